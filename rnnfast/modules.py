"""RNN, LSTM, GRU and their cells: torch.nn's classes with another forward.

Everything but forward is torch.nn's own: constructor, parameters, state_dict, repr, checks and error messages. Where
torch's own operator is to run, forward *is* torch.nn's forward. The modules keep no state of their own, hence nothing
that could be stale: weights are read by name at every call.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Proxy
from torch.nn.utils import parametrize
from torch.nn.utils.rnn import PackedSequence

from . import autograd, functional, select
from ._call import LENGTHS_NEED, Call, check_lengths, fits
from .select import ATEN

_CELLS = {"RNN_TANH": "rnn_tanh", "RNN_RELU": "rnn_relu", "LSTM": "lstm", "GRU": "gru"}  # torch.nn's `mode`
_NONE = None, None  # an LSTM's states that are not given

_NOTE = """
    .. note::
        This is :class:`torch.nn.{0}` with faster kernels: same constructor, parameters, results and errors.
        ``rnnfast.explain(module, input)`` says which kernel a call takes.
"""
_LENGTHS_NOTE = """
    .. note::
        ``forward(input, hx=None, *, lengths=None)`` also takes the rows' lengths, an int32 or int64 tensor `(N)` on
        the input's device, unsorted, zeros allowed, for padded input. The output is zero at and after a row's length,
        and the final states are those after its last step, as if the input were packed.
"""


class _Drop:
    """What all classes of this file share, beside the torch.nn class that each names as its second base."""

    _torch_class: type[torch.nn.Module]

    def _weights(self, names: Sequence[str]) -> list[Tensor] | None:
        """The weights by name as they are now, parameters or what took their place; None if one is no tensor."""
        parameters = self._parameters
        weights = [parameters.get(name) for name in names]
        for i, weight in enumerate(weights):
            if weight is None:
                weights[i] = weight = getattr(self, names[i], None)
                if not isinstance(weight, Tensor):
                    return None
        return weights

    def _record(self, proxy: Proxy, *args: Any, **kwargs: Any) -> Proxy:
        """Under torch.fx.symbolic_trace: one call_module node, as for the modules of torch.nn."""
        path = proxy.tracer.path_of_module(self)
        return proxy.tracer.create_proxy("call_module", path, args, kwargs)

    def __prepare_scriptable__(self) -> torch.nn.Module:
        """torch.jit.script compiles torch.nn's module over the very same parameters.

        It also leaves that module in the scripted model's place of this one; `rnnfast.convert(model)` undoes that.
        """
        cls = counterpart(self, ORIGINALS)
        if cls is None:
            return self  # a subclass with methods of its own
        stock = cls.__new__(cls)
        stock.__dict__.update(self.__dict__)
        return stock


def _states(cell: str, hx: Any) -> Sequence[Tensor] | None:
    """hx as (hx,) or (hx, cx); None for zeros, and where it is not the tensor or the pair of tensors it should be."""
    if cell != "lstm":
        return (hx,) if isinstance(hx, Tensor) else None
    if isinstance(hx, (tuple, list)) and len(hx) == 2 and isinstance(hx[0], Tensor) and isinstance(hx[1], Tensor):
        return hx
    return None


def _proxy_in(*values: Any) -> Proxy | None:
    for value in values:
        if isinstance(value, (tuple, list)):
            value = _proxy_in(*value)
        if isinstance(value, Proxy):
            return value
    return None


class _Recurrent(_Drop):
    """forward of RNN, LSTM and GRU."""

    def _call(self, input: Any, hx: Any, lengths: Tensor | None = None) -> Call | None:
        """The arguments of forward in the terms of select.py, or None where their kinds or ranks are already wrong."""
        batch_sizes = None
        if isinstance(input, PackedSequence):
            input, batch_sizes, _, _ = input
        cell = _CELLS.get(self.mode)
        weights = self._weights(self._flat_weights_names)
        if cell is None or weights is None or not isinstance(input, Tensor):
            return None
        states = _states(cell, hx)
        if states is None and hx is not None:
            return None
        if batch_sizes is None and input.dim() == 2:
            input = input.unsqueeze(0 if self.batch_first else 1)
            if states is not None:
                if any(state.dim() != 2 for state in states):
                    return None
                states = tuple(state.unsqueeze(1) for state in states)
        return Call(
            cell,
            input,
            states,
            weights,
            self.bias,
            self.num_layers,
            self.dropout,
            self.training,
            self.bidirectional,
            self.batch_first,
            batch_sizes,
            lengths,
        )

    def _plain(self, input: Tensor, hx: Any) -> tuple[Tensor, Any] | None:
        """The shortest way to the kernels; None where the arguments need another look."""
        try:
            cell, parameters = _CELLS[self.mode], self._parameters
            weights = [parameters[name] for name in self._flat_weights_names]
            if input.dim() != 3:
                return None
            if self.batch_first:
                input = input.transpose(0, 1)
            if cell == "lstm":
                states = _NONE if hx is None else _states(cell, hx)
                output, *hidden = autograd.stack(cell, input, states, weights, self.num_layers)
                hidden = tuple(hidden)
            else:
                output, hidden = autograd.stack(cell, input, (hx,), weights, self.num_layers)
            return output.transpose(0, 1) if self.batch_first else output, hidden
        except Exception:
            return None

    def forward(self, input, hx=None, *, lengths=None):
        """Runs the forward pass; see the class. `lengths`: int tensor `(N)`, the rows' lengths in padded input."""
        # Dropout draws random numbers, and what has been drawn cannot be drawn again on a second way.
        draws = self.num_layers != 1 and self.training and self.dropout != 0
        if lengths is None and not draws and select.is_plain(input):
            result = self._plain(input, hx)
            if result is not None:
                return result
        call = self._call(input, hx, lengths)
        if call is None:
            proxy = _proxy_in(input, hx)
            if proxy is not None:
                return self._record(proxy, input, hx, **({} if lengths is None else {"lengths": lengths}))
            return super().forward(input, hx)
        if lengths is not None:
            check_lengths(call)
        chosen = select.choose(call)
        if chosen is ATEN:
            return self._by_torch(input, hx, lengths)

        packed = isinstance(input, PackedSequence)
        if packed and hx is not None and input.sorted_indices is not None:
            hx = self.permute_hidden(hx, input.sorted_indices)
            call = call._replace(states=hx if call.cell == "lstm" else (hx,))
        try:
            output, *states = functional.run(call, chosen)
        except Exception:
            if fits(call):
                raise
            return self._by_torch(input, hx, lengths)
        if not packed and input.dim() == 2:
            output = output.squeeze(0 if self.batch_first else 1)
            states = [state.squeeze(1) for state in states]
        hidden = tuple(states) if call.cell == "lstm" else states[0]
        if packed:
            return PackedSequence(output, *input[1:]), self.permute_hidden(hidden, input.unsorted_indices)
        return output, hidden

    def _by_torch(self, input, hx, lengths):
        """torch.nn's own forward, which also raises its own errors."""
        result = super().forward(input, hx)
        if lengths is not None:
            raise RuntimeError(LENGTHS_NEED)
        return result

    # torch.nn's signature: ONNX's TorchScript exporter passes all that it finds there by position.
    forward.__signature__ = inspect.signature(torch.nn.LSTM.forward)


class RNN(_Recurrent, torch.nn.RNN):
    __doc__ = torch.nn.RNN.__doc__ + _NOTE.format("RNN") + _LENGTHS_NOTE
    _torch_class = torch.nn.RNN


class LSTM(_Recurrent, torch.nn.LSTM):
    __doc__ = torch.nn.LSTM.__doc__ + _NOTE.format("LSTM") + _LENGTHS_NOTE
    _torch_class = torch.nn.LSTM


class GRU(_Recurrent, torch.nn.GRU):
    __doc__ = torch.nn.GRU.__doc__ + _NOTE.format("GRU") + _LENGTHS_NOTE
    _torch_class = torch.nn.GRU


_WITHOUT = ("weight_ih", "weight_hh")
_WITH_BIASES = (*_WITHOUT, "bias_ih", "bias_hh")


class _Cell(_Drop):
    """forward of RNNCell, LSTMCell and GRUCell: one layer, one step."""

    _mode: Callable[[], str | None]  # "rnn_tanh", "gru", ...; None for what torch.nn's own forward refuses

    def _call(self, input: Any, hx: Any) -> Call | None:
        """The arguments of forward as a call of one step, or None where their kinds or ranks are already wrong."""
        cell = self._mode()
        weights = self._weights(_WITH_BIASES if self.bias else _WITHOUT)
        states = _states(cell, hx)
        if cell is None or weights is None or not isinstance(input, Tensor) or (states is None and hx is not None):
            return None
        if input.dim() not in (1, 2):
            return None
        if states is not None and any(state.dim() != input.dim() for state in states):
            return None
        if input.dim() == 1:
            input = input[None]
            states = None if states is None else [state[None] for state in states]
        return Call(cell, input, states, weights, bool(self.bias), step=True)

    def _plain(self, input: Tensor, hx: Any) -> Sequence[Tensor] | None:
        """The shortest way to the kernels; None where the arguments need another look."""
        if input.dim() != 2:
            return None
        try:
            cell, parameters = self._mode(), self._parameters
            weights = [parameters[name] for name in (_WITH_BIASES if self.bias else _WITHOUT)]
            states = (hx,) if cell != "lstm" else _NONE if hx is None else _states(cell, hx)
            return autograd.step(cell, input, states, weights)
        except Exception:
            return None

    def forward(self, input, hx=None):
        """Runs one step; see the class."""
        results = self._plain(input, hx) if select.is_plain(input, select.STEP_DTYPES) else None
        if results is None:
            call = self._call(input, hx)
            if call is None:
                proxy = _proxy_in(input, hx)
                return super().forward(input, hx) if proxy is None else self._record(proxy, input, hx)
            chosen = select.choose(call)
            if chosen is ATEN:
                return super().forward(input, hx)
            try:
                results = functional.run(call, chosen)
            except Exception:
                if fits(call):
                    raise
                return super().forward(input, hx)
            if input.dim() == 1:
                results = [result[0] for result in results]
        return results[0] if len(results) == 1 else tuple(results)


class RNNCell(_Cell, torch.nn.RNNCell):
    __doc__ = torch.nn.RNNCell.__doc__ + _NOTE.format("RNNCell")
    _torch_class = torch.nn.RNNCell

    def _mode(self) -> str | None:
        return _CELLS.get(f"RNN_{self.nonlinearity}".upper())


class LSTMCell(_Cell, torch.nn.LSTMCell):
    __doc__ = torch.nn.LSTMCell.__doc__ + _NOTE.format("LSTMCell")
    _torch_class = torch.nn.LSTMCell

    def _mode(self) -> str:
        return "lstm"


class GRUCell(_Cell, torch.nn.GRUCell):
    __doc__ = torch.nn.GRUCell.__doc__ + _NOTE.format("GRUCell")
    _torch_class = torch.nn.GRUCell

    def _mode(self) -> str:
        return "gru"


COUNTERPARTS = {cls._torch_class: cls for cls in (RNN, LSTM, GRU, RNNCell, LSTMCell, GRUCell)}
"""torch.nn's class -> rnnfast's."""
ORIGINALS = {ours: stock for stock, ours in COUNTERPARTS.items()}
"""rnnfast's class -> torch.nn's."""


def counterpart(module: torch.nn.Module, classes: Mapping[type, type]) -> type | None:
    """The class that `module` gets by `classes`; None if its own is neither there nor made from one of them.

    torch.nn.utils.parametrize makes a class per module, with a property per parametrized weight: so does this.
    """
    cls = type(module)
    if cls in classes or not parametrize.is_parametrized(module) or cls.__bases__[0] not in classes:
        return classes.get(cls)
    namespace = {key: value for key, value in vars(cls).items() if key not in ("__dict__", "__weakref__")}
    return type(cls.__name__, (classes[cls.__bases__[0]],), namespace)
