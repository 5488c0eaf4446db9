"""RNN, LSTM, GRU and their cells: torch.nn's classes with another forward.

Everything but forward is torch.nn's own: constructor, parameters, state_dict, repr, checks and error messages. Where
torch's own operator is to run, forward *is* torch.nn's forward. The modules keep no state of their own, hence nothing
that could be stale: weights are read by name at every call.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from operator import is_
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import parametrize
from torch.nn.utils.rnn import PackedSequence

from . import autograd, functional, select
from ._backends import ATEN
from ._tracing import OfTorchClass, proxy_in, record
from .call import Call, zeros
from .cells import SPECS, step_weights
from .check import LENGTHS_NEED, PLAIN_TYPES, check_lengths, check_what_torch_trusts
from .ops import CELLS, Refused, is_refusal

_RNNS = {"RNN_TANH": "rnn_tanh", "RNN_RELU": "rnn_relu"}  # torch.nn's `mode`

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

    _methods, __overloads__ = OfTorchClass(0), OfTorchClass(1)

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
    """hx as (hx,) or (hx, cx); None where it is not the tensor or the pair of tensors it should be."""
    count = len(SPECS[cell].states)
    if count == 1:
        return (hx,) if isinstance(hx, Tensor) else None
    if isinstance(hx, (tuple, list)) and len(hx) == count and all(isinstance(state, Tensor) for state in hx):
        return hx
    return None


def _usual_states(cell: str, hx: Any) -> Sequence[Tensor] | None:
    """`_states` of plain tensors; None where hx needs another look."""
    states = _states(cell, hx)
    return states if states is not None and PLAIN_TYPES.issuperset(map(type, states)) else None


# Methods that torch.nn's forward calls, and that subclasses override.
_ASKED = (
    "check_forward_args",
    "check_hidden_size",
    "check_input",
    "get_expected_cell_size",
    "get_expected_hidden_size",
    "permute_hidden",
)


class _Recurrent(_Drop):
    """forward of RNN, LSTM and GRU."""

    _cell: str | None = None
    """The kind of cell; None: an RNN's `mode` says."""
    _class_asks = False
    """Whether the class has overridden a method of _ASKED."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        stock = cls._torch_class
        cls._class_asks = any(getattr(cls, name, None) is not getattr(stock, name, None) for name in _ASKED)

    def _asks(self) -> bool:
        """Whether the class, or the module itself, has a method of its own that torch.nn's forward would call."""
        own = self.__dict__
        return self._class_asks or any(name in own for name in _ASKED)  # words that Dynamo knows

    def _weights(self) -> list[Tensor] | None:
        """The weights that torch.nn's forward would use, in its flat order; None if one is no tensor.

        Those are what the names of the parameters give, if one of them is another tensor than torch.nn last saw there.
        Else they are what `_flat_weights` holds, even where a user has put other tensors into that list.
        """
        flat, names, parameters = self._flat_weights, self._flat_weights_names, self._parameters
        named = [parameters.get(name) for name in names]
        for i, weight in enumerate(named):
            if weight is None:  # a plain attribute, or a parametrization
                named[i] = getattr(self, names[i], None)
        weights = named
        if len(flat) != len(named) or not all(map(is_, named, flat)):
            seen = [ref and ref() for ref in self._flat_weight_refs]
            if len(seen) == len(named) and (len(flat) != len(seen) or not all(map(is_, seen, flat))):
                # The user has put tensors into the list. Torch.nn computes with them until a name changes.
                pairs = zip(self._flat_weight_refs, named, strict=True)
                if all(ref is None or weight is None or ref() is weight for ref, weight in pairs):
                    weights = flat
                else:
                    self._init_flat_weights()
        return weights if all(isinstance(weight, Tensor) for weight in weights) else None

    def _call(self, input: Any, hx: Any, lengths: Tensor | None = None) -> Call | None:
        """The arguments of forward in the terms of select.py, or None where their kinds or ranks are already wrong."""
        batch_sizes = None
        if isinstance(input, PackedSequence):
            input, batch_sizes, _, _ = input
        cell = self._cell or _RNNS.get(self.mode)
        weights = self._weights()
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
            sizes=(self.input_size, self.hidden_size, self.proj_size),
        )

    def forward(self, input, hx=None, *, lengths=None):
        """Runs the forward pass; see the class. `lengths`: int tensor `(N)`, the rows' lengths in padded input."""
        cell, weights, num_layers = self._cell or _RNNS.get(self.mode), self._flat_weights, self.num_layers
        op = CELLS.get(cell)
        usual = (
            lengths is None
            and select.fast_path_open(input)
            and input.dim() == 3
            and not (num_layers != 1 and self.training and self.dropout)
            and op is not None
            and len(weights)
            == num_layers * (2 if self.bidirectional else 1) * op.spec.counts[not not self.bias][not not self.proj_size]
            and all(map(is_, map(self._parameters.get, self._flat_weights_names), weights))
            and PLAIN_TYPES.issuperset(map(type, weights))
            and not self._class_asks
            and self.__dict__.keys().isdisjoint(_ASKED)
        )
        states = None
        if usual:
            states = op.spec.no_states if hx is None else _usual_states(cell, hx)
        if states is None:
            return self._decided(input, hx, lengths)
        batch_first, trains = self.batch_first, torch.is_grad_enabled()
        x = input.transpose(0, 1) if batch_first else input
        try:
            if trains:
                output, *hidden = autograd.stack(cell, x, states, weights, num_layers)
            else:  # autograd.infer, in place: its call takes half a microsecond
                output, *hidden = op.eager_layer.infer(x, *states, weights, None, None, *op.flags, num_layers)
        except RuntimeError as error:
            if not (isinstance(error, Refused) if trains else is_refusal(error)):
                raise
            return self._decided(input, hx, lengths)
        if batch_first:
            output = output.transpose(0, 1)
        return output, hidden[0] if op.states == 1 else tuple(hidden)

    # torch.nn's signature: ONNX's TorchScript exporter passes all that it finds there by position.
    forward.__signature__ = inspect.signature(torch.nn.LSTM.forward)

    def _decided(self, input: Any, hx: Any, lengths: Tensor | None) -> Any:
        """`forward` by the backend that select.py decides on."""
        call = self._call(input, hx, lengths)
        if call is None:
            proxy = proxy_in(input, hx)
            if proxy is not None:
                return record(self, proxy, input, hx=hx, lengths=lengths)
            call = self._call(input, None)
            if call is not None:
                check_what_torch_trusts(call, self._flat_weights_names)
            return self._by_torch(input, hx, lengths)
        if lengths is not None:
            check_lengths(call)
        chosen = select.choose(call)
        if chosen is ATEN:
            check_what_torch_trusts(call, self._flat_weights_names)
            return self._by_torch(input, hx, lengths)

        packed = isinstance(input, PackedSequence)
        if packed and hx is not None and (input.sorted_indices is not None or self._asks()):
            call = call._replace(states=self._permuted(call, call.states, input.sorted_indices))
        if self._asks():
            call = self._asked(call)
        output, *states = functional.run(call, chosen)
        if not packed and input.dim() == 2:
            output = output.squeeze(0 if self.batch_first else 1)
            states = [state.squeeze(1) for state in states]
        hidden = states[0] if len(states) == 1 else tuple(states)
        if packed:
            return PackedSequence(output, *input[1:]), self.permute_hidden(hidden, input.unsorted_indices)
        return output, self.permute_hidden(hidden, None) if self._asks() else hidden

    def _permuted(self, call: Call, states: Sequence[Tensor], order: Tensor | None) -> Sequence[Tensor]:
        hidden = self.permute_hidden(states[0] if len(states) == 1 else tuple(states), order)
        return (hidden,) if len(states) == 1 else hidden

    def _asked(self, call: Call) -> Call:
        """`call` after the subclass's own checks, in torch.nn's order."""
        states = zeros(call) if call.states is None else call.states
        if call.batch_sizes is None or len(states) == 1:  # torch.nn.LSTM has its packed states checked elsewhere
            self.check_forward_args(call.input, states[0] if len(states) == 1 else states, call.batch_sizes)
        if call.states is not None and call.batch_sizes is None:
            states = self._permuted(call, states, None)
        return call._replace(states=states)

    def _by_torch(self, input, hx, lengths):
        """torch.nn's own forward, which also raises its own errors."""
        result = super().forward(input, hx)
        if lengths is not None:
            raise RuntimeError(LENGTHS_NEED)
        return result


class RNN(_Recurrent, torch.nn.RNN):
    __doc__ = torch.nn.RNN.__doc__ + _NOTE.format("RNN") + _LENGTHS_NOTE
    _torch_class = torch.nn.RNN


class LSTM(_Recurrent, torch.nn.LSTM):
    __doc__ = torch.nn.LSTM.__doc__ + _NOTE.format("LSTM") + _LENGTHS_NOTE
    _cell = "lstm"
    _torch_class = torch.nn.LSTM


class GRU(_Recurrent, torch.nn.GRU):
    __doc__ = torch.nn.GRU.__doc__ + _NOTE.format("GRU") + _LENGTHS_NOTE
    _cell = "gru"
    _torch_class = torch.nn.GRU


_CELL_WEIGHTS = [weight.name for weight in step_weights(SPECS["lstm"])]  # those of all three


class _Cell(_Drop):
    """forward of RNNCell, LSTMCell and GRUCell: one layer, one step."""

    _mode: Callable[[], str | None]  # "rnn_tanh", "gru", ...; None for what torch.nn's own forward refuses

    def _weights(self) -> list[Tensor | None]:
        """The weights by name as they are now, parameters or what took their place; without biases if both are None."""
        parameters = self._parameters
        weights = [parameters.get(name) for name in _CELL_WEIGHTS]
        for i, weight in enumerate(weights):
            if weight is None:
                weights[i] = getattr(self, _CELL_WEIGHTS[i])
        return weights[:2] if weights[2] is weights[3] is None else weights

    def _call(self, input: Any, hx: Any) -> Call | None:
        """The arguments of forward as a call of one step, or None where their kinds or ranks are already wrong."""
        cell, weights, states = self._mode(), self._weights(), None
        if cell is None or not all(isinstance(tensor, Tensor) for tensor in (input, *weights)):
            return None
        if hx is not None:
            states = _states(cell, hx)
            if states is None or any(state.dim() != input.dim() for state in states):
                return None
        if input.dim() not in (1, 2):
            return None
        if input.dim() == 1:
            input = input[None]
            states = None if states is None else [state[None] for state in states]
        sizes = None  # where the matrices do not agree, which torch's cells check themselves
        if weights[0].dim() == 2 and weights[1].shape == (
            weights[0].size(0),
            weights[0].size(0) // len(SPECS[cell].gates),
        ):
            sizes = weights[0].size(1), weights[1].size(1), 0
        return Call(cell, input, states, weights, len(weights) == 4, step=True, sizes=sizes)

    def _fast(self, input: Tensor, hx: Any) -> Sequence[Tensor] | None:
        """The result by the shortest way to the kernels; None where the arguments need another look."""
        cell, parameters = self._mode(), self._parameters
        weights = [parameters.get(name) for name in _CELL_WEIGHTS]
        if weights[2] is weights[3] is None and "bias_ih" in parameters and "bias_hh" in parameters:
            weights = weights[:2]
        if cell is None or input.dim() != 2 or not PLAIN_TYPES.issuperset(map(type, weights)):
            return None
        states = SPECS[cell].no_states if hx is None else _usual_states(cell, hx)
        if states is None:
            return None
        try:
            return autograd.step(cell, input, states, weights)
        except Refused:
            return None

    def forward(self, input, hx=None):
        """Runs one step; see the class."""
        results = self._fast(input, hx) if select.fast_path_open(input, select.STEP_DTYPES) else None
        if results is None:
            call = self._call(input, hx)
            if call is None:
                proxy = proxy_in(input, hx)
                if proxy is None or not proxy.tracer.path_of_module(self):  # the traced module itself
                    return self._by_torch(input, hx)
                return record(self, proxy, input, hx=hx)
            chosen = select.choose(call)
            if chosen is ATEN:
                check_what_torch_trusts(call, _CELL_WEIGHTS)
                return self._by_torch(input, hx)
            results = functional.run(call, chosen)
            if input.dim() == 1:
                results = [result[0] for result in results]
        return results[0] if len(results) == 1 else tuple(results)

    def _by_torch(self, input, hx):
        """torch.nn's own forward, which also raises its own errors.

        It takes a 2D state for a 1D input where both sizes are hidden_size, and then broadcasts or ends the process.
        """
        if isinstance(input, Tensor) and input.dim() == 1 and hx is not None:
            states = hx if isinstance(self, torch.nn.LSTMCell) else (hx,)
            for i, state in enumerate(states):
                if isinstance(state, Tensor) and state.dim() == 2 and state.size(0) == self.hidden_size:
                    what = f"{type(self).__name__}: Expected hx[{i}] to be 1D like the input"
                    raise RuntimeError(f"{what}, got 2D of shape {list(state.shape)}")
        return super().forward(input, hx)


class RNNCell(_Cell, torch.nn.RNNCell):
    __doc__ = torch.nn.RNNCell.__doc__ + _NOTE.format("RNNCell")
    _torch_class = torch.nn.RNNCell

    def _mode(self) -> str | None:
        return _RNNS.get(f"RNN_{self.nonlinearity}".upper())


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
