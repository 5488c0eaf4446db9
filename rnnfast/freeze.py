"""`freeze`: a copy of a model whose recurrent layers have fixed, packed weights, for fast inference on CPUs."""

import copy
import ctypes
import logging
import sys
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from . import modules
from ._torch_internals import has_hooks
from .frozen import Frozen, FrozenCell, FrozenLayer
from .packing import FORMATS, Sizes, Weights, quantised

_log = logging.getLogger("rnnfast")
_LAYERS = {torch.nn.RNN, torch.nn.GRU, torch.nn.LSTM, modules.RNN, modules.GRU, modules.LSTM}
_CELLS = {
    torch.nn.RNNCell: "rnn",
    torch.nn.GRUCell: "gru",
    torch.nn.LSTMCell: "lstm",
    modules.RNNCell: "rnn",
    modules.GRUCell: "gru",
    modules.LSTMCell: "lstm",
}
_MOST_COLUMNS = 32_767  # csrc/cpu/host/frozen.cpp: an int32 sum of int8 products must not overflow


def freeze(model: Module, weights: str = "int8", inplace: bool = False, exact: bool = False) -> Module:
    """A copy of `model` in eval mode whose RNN, GRU, LSTM and cells are frozen: packed once, without parameters.

    Args:
        model: any module, or one of these layers.
        weights: "float32": the same numbers as before. "bfloat16": half the memory. "int8": a quarter of it, and the
            fastest; each row of a weight has a scale, and activations are quantised per row at run time.
        inplace: change `model` and return it. A model that is itself a layer cannot be changed into another one.
        exact: int8 only. Activations have 16 bits in place of 8: half the error, up to 1.5 times the time.

    Frozen layers take and return float32 tensors on CPUs. A layer that cannot be frozen stays as it is; the logger
    "rnnfast" warns with its name and the reason.

    Raises ValueError for another `weights`, TypeError for what is no module.
    """
    if weights not in FORMATS:
        raise ValueError(f"weights: expected one of {', '.join(map(repr, FORMATS))}, got {weights!r}")
    if not isinstance(model, Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    found: dict[Module, Module] = {}
    for name, module in model.named_modules():
        if not isinstance(module, (torch.nn.RNNBase, torch.nn.RNNCellBase)) or isinstance(module, Frozen):
            continue
        reason = _refuses(module)
        if reason is None:
            found[module] = _frozen(module, weights, exact)
        else:
            _log.warning("%s (%s) is not frozen: %s", name or "the model", type(module).__name__, reason)
    _give_back()
    if model in found:
        if inplace:
            raise ValueError("inplace=True: a layer cannot become a frozen one in place; take what freeze returns")
        return found[model]
    if not inplace:
        # Copies everything but the layers that are replaced.
        model = copy.deepcopy(model, {id(module): frozen for module, frozen in found.items()})
    else:
        for parent in list(model.modules()):
            for name, child in list(parent.named_children()):
                if child in found:
                    setattr(parent, name, found[child])
    return model.eval()


def _give_back() -> None:
    """Returns freed memory to the system. glibc keeps up to 64 MiB of what packing has freed."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def _refuses(module: Any) -> str | None:
    """Why a layer cannot be frozen, or None."""
    if (
        type(module) not in _LAYERS
        and type(module) not in _CELLS
        and not torch.nn.utils.parametrize.is_parametrized(module)
    ):
        return "its class has code of its own"
    if has_hooks(module):
        return "it has hooks"
    named = [(name, weight) for name, weight in _named_weights(module).items() if weight is not None]
    for name, weight in named:
        if not isinstance(weight, Tensor) or weight.layout is not torch.strided or weight.is_meta:
            return f"{name} is no dense tensor"
        if weight.device.type != "cpu":
            return f"{name} is on {weight.device}; frozen layers run on CPUs"
        if weight.dtype is not torch.float32:
            return f"{name} is {weight.dtype}; frozen layers come from float32 ones"
    if max(module.input_size, module.hidden_size) > _MOST_COLUMNS:
        return f"it has more than {_MOST_COLUMNS} features"
    return None


def _suffixes(module: Any) -> list[str]:
    if isinstance(module, torch.nn.RNNCellBase):
        return [""]
    ways = ("", "_reverse") if module.bidirectional else ("",)
    return [f"_l{layer}{way}" for layer in range(module.num_layers) for way in ways]


def _named_weights(module: Any) -> dict[str, Tensor | None]:
    names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")
    return {name + suffix: getattr(module, name + suffix, None) for suffix in _suffixes(module) for name in names}


def _frozen(module: Any, weights: str, exact: bool) -> Frozen:
    """A frozen layer with the weights that `module` has now."""
    named = {name: weight if weight is None else weight.detach() for name, weight in _named_weights(module).items()}
    plain = (_weights_of(named, suffix, weights) for suffix in _suffixes(module))  # one at a time in memory
    sizes = Sizes(_cell_of(module), weights, module.input_size, module.hidden_size, 0, 1, 1)
    if isinstance(module, torch.nn.RNNCellBase):
        return FrozenCell(module, sizes, plain, exact)
    directions = 2 if module.bidirectional else 1
    sizes = sizes._replace(proj_size=module.proj_size, num_layers=module.num_layers, directions=directions)
    return FrozenLayer(module, sizes, plain, exact)


def _cell_of(module: Any) -> str:
    if isinstance(module, torch.nn.RNNBase):
        return module.mode.lower()
    cell = next(name for cls, name in _CELLS.items() if isinstance(module, cls))
    return f"rnn_{module.nonlinearity}" if cell == "rnn" else cell


def _weights_of(named: dict[str, Tensor | None], suffix: str, weights: str) -> Weights:
    ih, hh, hr, bias_ih, bias_hh = (
        named[name + suffix] for name in ("weight_ih", "weight_hh", "weight_hr", "bias_ih", "bias_hh")
    )
    matrices = [matrix for matrix in (ih, hh, hr) if matrix is not None]
    scales: tuple[Tensor, ...] = ()
    if weights == "int8":
        pairs = [quantised(matrix) for matrix in matrices]
        converted, scales = [pair[0] for pair in pairs], tuple(pair[1] for pair in pairs)
    else:
        converted = [matrix.to(getattr(torch, weights)) for matrix in matrices]
    return Weights(converted[0], converted[1], converted[2] if hr is not None else None, scales, bias_ih, bias_hh)
