"""Two ways to rnnfast without editing a model: `convert` an existing one, or `patch` torch.nn before one is built.

Conversion changes the class of a module in place, and nothing else. Parameters, buffers, hooks, the training flag,
names and all references to the module stay as they are.
"""

import copy
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch.nn import Module

from .counterparts import counterpart
from .modules import COUNTERPARTS, ORIGINALS

_NAMESPACES = ("torch.nn", "torch.nn.modules", "torch.nn.modules.rnn")


def convert(model: Module, inplace: bool = True) -> Module:
    """Turns every torch.nn.RNN, LSTM, GRU and cell in `model`, itself included, into rnnfast's.

    Args:
        model: any module.
        inplace: change `model`; otherwise change and return a deep copy.

    Parametrized modules (weight_norm and the like) are converted too. Subclasses of torch.nn's classes are left alone,
    because their code may rely on their base, and a RuntimeWarning names them. Derive them from rnnfast's classes, or
    build the model under `patched()`.
    """
    return _exchange(model, COUNTERPARTS, inplace)


def revert(model: Module, inplace: bool = True) -> Module:
    """Undoes `convert`: every rnnfast module in `model` becomes torch.nn's. For tools that map exact types.

    An example: torch.ao.quantization.quantize_dynamic(rnnfast.revert(model), {torch.nn.LSTM}).
    """
    return _exchange(model, ORIGINALS, inplace)


def _exchange(model: Module, classes: Mapping[type, type], inplace: bool) -> Module:
    model = model if inplace else copy.deepcopy(model)
    left_alone = []
    for name, module in model.named_modules():
        cls = counterpart(module, classes)
        if cls is not None:
            module.__class__ = cls
        elif isinstance(module, tuple(classes)) and not isinstance(module, tuple(classes.values())):
            left_alone.append(f"{name or 'the model itself'} ({type(module).__name__})")
    if left_alone:
        warnings.warn(f"left alone, being subclasses: {', '.join(left_alone)}", RuntimeWarning, stacklevel=3)
    return model


_depth = 0


def patch() -> None:
    """Makes torch.nn.RNN, LSTM, GRU and the cells rnnfast's, for all code that looks them up after this call.

    Existing modules stay as they are (see `convert`). While patched, those cannot be pickled whole, because pickle
    finds another class under their name. Every patch() needs its unpatch().
    """
    global _depth
    _depth += 1
    _bind(COUNTERPARTS.values())


def unpatch() -> None:
    """Undoes one patch(). After the last one torch.nn is as before. Raises RuntimeError without a patch()."""
    global _depth
    if _depth == 0:
        raise RuntimeError("rnnfast.unpatch() without rnnfast.patch()")
    _depth -= 1
    if _depth == 0:
        _bind(COUNTERPARTS)


@contextmanager
def patched() -> Iterator[None]:
    """`patch` for the length of a block; blocks may be nested."""
    patch()
    try:
        yield
    finally:
        unpatch()


def _bind(classes) -> None:
    for namespace in _NAMESPACES:
        for cls in classes:
            setattr(sys.modules[namespace], cls.__name__, cls)
