"""Layers with fixed weights, packed once: what `rnnfast.freeze` puts in the place of RNN, GRU, LSTM and their cells.

A frozen layer has no parameters. Its forward is that of the layer it came from, in float32, for inference on CPUs.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from . import frozen_ops, packing
from .ops import Refused, is_refusal, words_of
from .packing import Sizes, Weights

_STOCK = {"rnn_tanh": torch.nn.RNN, "rnn_relu": torch.nn.RNN, "gru": torch.nn.GRU, "lstm": torch.nn.LSTM}
_STOCK_CELLS = {
    "rnn_tanh": torch.nn.RNNCell,
    "rnn_relu": torch.nn.RNNCell,
    "gru": torch.nn.GRUCell,
    "lstm": torch.nn.LSTMCell,
}
STATE_VERSION = 1
"""Of the form that a state_dict has; `load_state_dict` takes no other."""


class Frozen(torch.nn.Module):
    """What all frozen modules share.

    `state_dict` has the plain weights under torch.nn's names: float32, bfloat16, or int8 with a float32 `..._scale` of
    each row. The sum of both biases stands in bias_ih; bias_hh is zero but for GRU's b_hn.
    """

    packed: Tensor
    _states: int

    def __init__(self, sizes: Sizes, weights: Iterable[Weights], bias: bool, exact: bool):
        super().__init__()
        self.sizes, self.bias, self.exact = sizes, bias, exact
        self.weights, self._cell = sizes.weights, sizes.cell
        self.input_size, self.hidden_size = sizes.input_size, sizes.hidden_size
        self.register_buffer("packed", packing.pack(sizes, weights), persistent=False)
        self.training = False

    def train(self, mode: bool = True) -> "Frozen":
        """Raises RuntimeError for `mode=True`: a frozen layer has nothing to train."""
        if mode:
            raise RuntimeError(
                "a frozen layer cannot be trained; keep the model that rnnfast.freeze took, and freeze it again"
            )
        return self

    def extra_repr(self) -> str:
        return f"{self._stock().extra_repr()}, weights={self.weights!r}" + ", exact=True" * self.exact

    @property
    def kernel(self) -> str:
        """The format of the weights, and the instruction set that multiplies them on this machine."""
        isa = torch.ops.rnnfast._frozen_isa(packing.FORMATS.index(self.weights))
        return f"{self.weights} weights, packed once; kernel {isa}"

    def _no_gradients(self, input: Tensor, states: Sequence[Tensor | None]) -> None:
        """Raises RuntimeError where a gradient would be lost."""
        if input.requires_grad or any(state is not None and state.requires_grad for state in states):
            raise RuntimeError("a frozen layer has no gradients; its input and states must not require grad")

    def _names(self) -> list[str]:
        """torch.nn's suffixes of the weights, of every layer's directions in turn."""
        raise NotImplementedError

    def _stock(self) -> torch.nn.Module:
        """torch.nn's module of the same sizes, with weights of no meaning."""
        raise NotImplementedError

    def _refused(self, error: RuntimeError, *arguments: Any) -> RuntimeError:
        """The error for arguments that the operator has refused: torch's own, if torch.nn refuses them too."""
        if not is_refusal(error):
            return error

        with torch.no_grad():
            self._stock()(*arguments)
        return RuntimeError(f"a frozen layer: {words_of(error)}")

    def _states_of(self, input: Any, hx: Any, dims: tuple[int, ...], given: Any = None) -> Sequence[Any]:
        """hx as (h,) or (h, c). Where kinds or ranks are wrong, torch.nn's own forward raises.

        `given`: what the caller got in the place of `input`, a PackedSequence.
        """
        states = (None,) * self._states if hx is None else (hx,) if self._states == 1 else hx
        ranks = isinstance(input, Tensor) and input.dim() in dims and isinstance(states, (tuple, list))
        if ranks and len(states) == self._states:
            kinds = [state is None if hx is None else isinstance(state, Tensor) for state in states]
            if all(kinds) and all(state is None or state.dim() == input.dim() for state in states):
                if torch.is_grad_enabled():
                    self._no_gradients(input, states)
                return states
        refusal = Refused("rnnfast refuses: input and hx: expected tensors as torch.nn takes them")
        raise self._refused(refusal, input if given is None else given, hx)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        for name, tensor in self._plain().items():
            destination[prefix + name] = tensor
        destination[prefix + "format_version"] = torch.tensor(STATE_VERSION)

    def _plain(self) -> dict[str, Tensor]:
        """The plain weights by name."""
        found: dict[str, Tensor | None] = {}
        unpacked = packing.unpack(self.sizes, self.packed, self.bias)
        for suffix, own in zip(self._names(), unpacked, strict=True):
            found |= {f"{name}{suffix}": getattr(own, name) for name in packing.MATRICES}
            found |= {f"{name}{suffix}_scale": scale for name, scale in zip(packing.MATRICES, own.scales, strict=False)}
            found |= {f"bias_ih{suffix}": own.bias_ih, f"bias_hh{suffix}": own.bias_hh}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing_keys, unexpected_keys, error_msgs):
        """Takes all weights, or none of them and says why."""
        expected = self._plain()
        version = state_dict.get(prefix + "format_version")
        if version is not None and (getattr(version, "shape", None) != () or int(version) != STATE_VERSION):
            error_msgs.append(f"{prefix}format_version: expected {STATE_VERSION}, got {version}")
            return
        missing = [prefix + name for name in (*expected, "format_version") if prefix + name not in state_dict]
        unexpected = [
            key
            for key in state_dict
            if key.startswith(prefix) and key[len(prefix) :] not in {*expected, "format_version"}
        ]
        given = {name: state_dict[prefix + name] for name in expected if prefix + name in state_dict}
        wrong = [
            f"{prefix}{name}: expected {_kind(expected[name])}, got {_kind(tensor)}"
            for name, tensor in given.items()
            if _kind(tensor) != _kind(expected[name])
        ]
        missing_keys.extend(missing)
        unexpected_keys.extend(unexpected)
        error_msgs.extend(wrong)
        if not missing and not wrong:
            weights = [self._weights_of(given, suffix) for suffix in self._names()]
            self.packed = packing.pack(self.sizes, weights).to(self.packed.device)

    def _weights_of(self, named: dict[str, Tensor], suffix: str) -> Weights:
        matrices = [f"{name}{suffix}" for name in packing.MATRICES]
        scales = tuple(named[f"{name}_scale"] for name in matrices if f"{name}_scale" in named)
        weight_hr, bias_ih, bias_hh = (named.get(name + suffix) for name in ("weight_hr", "bias_ih", "bias_hh"))
        return Weights(named[matrices[0]], named[matrices[1]], weight_hr, scales, bias_ih, bias_hh)

    def __setstate__(self, state):
        super().__setstate__(state)
        packing.check_header(self.sizes, self.packed)


def _kind(value: Any) -> str:
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


class FrozenLayer(Frozen):
    """A frozen RNN, GRU or LSTM: all its layers and directions as one operator."""

    def __init__(self, layer: torch.nn.RNNBase, sizes: Sizes, weights: Iterable[Weights], exact: bool):
        super().__init__(sizes, weights, layer.bias, exact)
        self.mode, self.num_layers, self.batch_first = layer.mode, layer.num_layers, layer.batch_first
        self.bidirectional, self.proj_size, self.dropout = layer.bidirectional, layer.proj_size, 0.0
        self._states = 2 if sizes.cell == "lstm" else 1
        widths = (self.hidden_size, self.proj_size)[: self._states]
        self._options = (*widths, self.num_layers, self.bidirectional, exact)

    def _names(self) -> list[str]:
        ways = ("", "_reverse") if self.bidirectional else ("",)
        return [f"_l{layer}{way}" for layer in range(self.num_layers) for way in ways]

    def _stock(self) -> torch.nn.Module:
        options: dict[str, Any] = {"nonlinearity": "relu"} if self.sizes.cell == "rnn_relu" else {}
        options |= {"proj_size": self.proj_size} if self.sizes.cell == "lstm" else {}
        options |= {"bias": self.bias, "batch_first": self.batch_first, "bidirectional": self.bidirectional}
        sizes = self.input_size, self.hidden_size, self.num_layers
        return _STOCK[self.sizes.cell](*sizes, device="meta", **options).to_empty(device="cpu")

    def forward(self, input, hx=None, *, lengths=None):
        """As torch.nn's: (output, h_n) or (output, (h_n, c_n)).

        Args:
            input: float32 [T, B, I], or [B, T, I] with `batch_first`, or [T, I], or a PackedSequence.
            hx: h [num_layers * D, B, Hout], for an LSTM (h, c); None: zeros.
            lengths: int32 or int64 [B], the rows' lengths in padded input; see rnnfast.LSTM.

        Raises RuntimeError for tensors that require grad, else what torch.nn raises.
        """
        if type(input) is Tensor and input.dim() == 3 and not torch.compiler.is_compiling():
            states = self._usual_states(input, hx)
            if states is not None:
                x = input.transpose(0, 1) if self.batch_first else input
                try:
                    results = frozen_ops.EAGER[self.sizes.cell](
                        x, *states, self._buffers["packed"], None, lengths, *self._options
                    )
                except RuntimeError as error:
                    raise self._refused(error, input, hx) from None
                output = results[0].transpose(0, 1) if self.batch_first else results[0]
                return output, results[1] if self._states == 1 else results[1:]
        if isinstance(input, PackedSequence):
            return self._packed_sequence(input, hx, lengths)
        states = self._states_of(input, hx, (2, 3))
        batched, x = input.dim() != 2, input
        if not batched:
            x = x.unsqueeze(0 if self.batch_first else 1)
            states = tuple(state if state is None else state.unsqueeze(1) for state in states)
        if self.batch_first:
            x = x.transpose(0, 1)
        try:
            output, *finals = self._run(x, states, None, lengths)
        except RuntimeError as error:
            raise self._refused(error, input, hx) from None
        if self.batch_first:
            output = output.transpose(0, 1)
        if not batched:
            output, finals = output.squeeze(0 if self.batch_first else 1), [final.squeeze(1) for final in finals]
        return output, tuple(finals) if self._states == 2 else finals[0]

    def flatten_parameters(self) -> None:
        """Does nothing. Models call it before they call a layer."""

    def _usual_states(self, input: Tensor, hx: Any) -> Sequence[Tensor | None] | None:
        """The states of a usual call, None where they need another look. A microsecond shorter than `_states_of`."""
        states: Sequence[Tensor | None] | None
        if hx is None:
            states = (None,) if self._states == 1 else (None, None)
        elif self._states == 1:
            states = (hx,) if type(hx) is Tensor else None
        else:
            pair = type(hx) is tuple and len(hx) == 2 and type(hx[0]) is Tensor and type(hx[1]) is Tensor
            states = hx if pair else None
        if states is not None and torch.is_grad_enabled():
            self._no_gradients(input, states)
        return states

    def _run(self, x: Tensor, states: Sequence[Tensor | None], batch_sizes: Tensor | None, lengths: Tensor | None):
        operator = frozen_ops.operator(self.sizes.cell)
        return operator(x, *states, self.packed, batch_sizes, lengths, *self._options)

    def _packed_sequence(self, input: PackedSequence, hx: Any, lengths: Any):
        if lengths is not None:
            raise ValueError("lengths is for padded input; a packed sequence has its own batch_sizes")
        data, batch_sizes, order, back = input
        if hx is None:
            places, batch = self.num_layers * (1 + self.bidirectional), int(batch_sizes[0])
            sizes = (self.sizes.output_size, self.hidden_size)[: self._states]
            states: Sequence[Tensor] = tuple(data.new_zeros(places, batch, size) for size in sizes)
        else:
            states = self._states_of(data[None] if data.dim() == 2 else data, hx, (3,), input)
            if order is not None and all(state.size(1) == order.numel() for state in states):
                states = tuple(state.index_select(1, order) for state in states)
        if torch.is_grad_enabled():
            self._no_gradients(data, states)
        try:
            output, *finals = self._run(data, states, batch_sizes, None)
        except RuntimeError as error:
            raise self._refused(error, input, hx) from None
        if back is not None:
            finals = [final.index_select(1, back) for final in finals]
        return PackedSequence(output, batch_sizes, order, back), tuple(finals) if self._states == 2 else finals[0]


class FrozenCell(Frozen):
    """A frozen RNNCell, GRUCell or LSTMCell."""

    def __init__(self, cell: torch.nn.RNNCellBase, sizes: Sizes, weights: Iterable[Weights], exact: bool):
        super().__init__(sizes, weights, cell.bias, exact)
        self._states = 2 if sizes.cell == "lstm" else 1

    def _names(self) -> list[str]:
        return [""]

    def _stock(self) -> torch.nn.Module:
        options = {"nonlinearity": "relu"} if self.sizes.cell == "rnn_relu" else {}
        sizes = self.input_size, self.hidden_size, self.bias
        return _STOCK_CELLS[self.sizes.cell](*sizes, device="meta", **options).to_empty(device="cpu")

    def forward(self, input, hx=None):
        """As torch.nn's: h [B, H], or (h, c). `input`: float32 [B, I] or [I]."""
        states = self._states_of(input, hx, (1, 2))
        batched, x = input.dim() != 1, input
        if not batched:
            x, states = x[None], tuple(state if state is None else state[None] for state in states)
        operator = frozen_ops.step_operator(self.sizes.cell)
        try:
            finals = operator(x, *states, self.packed, self.hidden_size, self.exact)
        except RuntimeError as error:
            raise self._refused(error, input, hx) from None
        if self._states == 1:
            return finals if batched else finals[0]
        return tuple(finals) if batched else tuple(final[0] for final in finals)
