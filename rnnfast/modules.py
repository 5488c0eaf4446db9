"""RNN, LSTM, GRU and their cells: torch.nn's classes with another forward.

Everything else is torch.nn's own: constructor, parameters, state_dict, repr, checks and error messages. A call that
goes to torch's own operator runs torch.nn's forward. The modules keep no state: they read the weights at every call.
"""

import functools
import inspect
from collections.abc import Callable, Sequence
from operator import is_
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor, is_grad_enabled
from torch.nn.utils.rnn import PackedSequence

from . import autograd
from ._torch_internals import flat_weight_refs, reset_flat_weights
from ._tracing import OfTorchClass, path_of, proxy_in, record
from .call import Call, zeros
from .cells import SPECS, step_weights
from .check import LENGTHS_NEED, ORDINARY_TYPES, check_what_torch_trusts, states_of, usual_states
from .counterparts import counterpart
from .fast_path import STEP_DTYPES, is_open_to
from .ops import CELLS, Refused, is_refusal
from .rows import PADDED, Rows
from .run import run

_ALL_STEPS = tuple(PADDED)  # unpacks faster than a NamedTuple
_RNNS: Any = {"RNN_TANH": "rnn_tanh", "RNN_RELU": "rnn_relu"}  # torch.nn's `mode`
_RNN_OPERATORS: Any = {mode: CELLS[cell] for mode, cell in _RNNS.items()}

_NOTE = """
    .. note::
        This is :class:`torch.nn.{0}` with faster kernels: same constructor, parameters, results and errors.
        ``rnnfast.explain(module, input)`` says which kernel a call takes.
"""
_LENGTHS_NOTE = """
    .. note::
        ``forward(input, hx=None, *, lengths=None)`` also takes the lengths of the sequences in padded input: an int32
        or int64 tensor `(N)` on the input's device, unsorted, zeros allowed. The output is zero at and after a
        sequence's length. The final states are those after its last step, as if the input were packed.
"""


_Hidden: TypeAlias = Tensor | tuple[Tensor, Tensor] | None
if TYPE_CHECKING:  # each class below has one of these as its second base
    from torch.nn import Module as _Module
    from torch.nn import RNNBase as _Layer
    from torch.nn import RNNCellBase as _CellModule
else:
    _Module, _Layer, _CellModule = object, object, object


class _DropIn(_Module):
    """What all classes of this file share."""

    _torch_class: type[torch.nn.Module]
    _methods, __overloads__ = OfTorchClass(0), OfTorchClass(1)

    def __prepare_scriptable__(self) -> torch.nn.Module:
        """torch.nn's module over the same parameters, for torch.jit.script to compile.

        It also takes this module's place in the model that is scripted; `rnnfast.convert(model)` undoes that.
        """
        cls: Any = counterpart(self, ORIGINALS)
        if cls is None:
            return self  # a subclass with methods of its own
        stock = cls.__new__(cls)
        stock.__dict__.update(self.__dict__)
        return stock


# Methods that torch.nn's forward calls, and that subclasses override.
_ASKED = (
    "check_forward_args",
    "check_hidden_size",
    "check_input",
    "get_expected_cell_size",
    "get_expected_hidden_size",
    "permute_hidden",
)


class _Recurrent(_DropIn, _Layer):
    """forward of RNN, LSTM and GRU."""

    _cell: Any = None
    """The kind of cell; None: an RNN's `mode` says."""
    _operators: Any = None  # of `_cell`
    _class_asks = False
    """Whether the class has a method of its own in the place of one in _ASKED."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        stock = cls._torch_class
        cls._class_asks = any(getattr(cls, name, None) is not getattr(stock, name, None) for name in _ASKED)

    def _asks(self) -> bool:
        """Whether the class, or the module itself, has its own form of a method that torch.nn's forward calls."""
        own = self.__dict__
        return self._class_asks or any(name in own for name in _ASKED)  # in a form that Dynamo can trace

    def _weights(self) -> list[Tensor] | None:
        """The weights that torch.nn's forward would use, in its flat order; None if one is no tensor.

        If a name has another tensor than torch.nn last saw there: the tensors by name. Else those in `_flat_weights`,
        even where a user has put other tensors into that list.
        """
        flat, names, parameters = self._flat_weights, self._flat_weights_names, self._parameters
        named: list[Any] = [parameters.get(name) for name in names]
        for i, weight in enumerate(named):
            if weight is None:  # a plain attribute, or a parametrization
                named[i] = getattr(self, names[i], None)
        weights = named
        if len(flat) != len(named) or not all(map(is_, named, flat)):
            refs = flat_weight_refs(self)
            seen = [ref and ref() for ref in refs]
            if len(seen) == len(named) and (len(flat) != len(seen) or not all(map(is_, seen, flat))):
                # The user has put tensors into the list. Torch.nn computes with them until a name changes.
                pairs = zip(refs, named, strict=True)
                if all(ref is None or weight is None or ref() is weight for ref, weight in pairs):
                    weights = flat
                else:
                    reset_flat_weights(self)
        return weights if all(isinstance(weight, Tensor) for weight in weights) else None

    def _call(self, input: Any, hx: Any, lengths: Tensor | None = None) -> Call | None:
        """The arguments of forward as a call; None where a kind or a number of dimensions is wrong."""
        batch_sizes = None
        if isinstance(input, PackedSequence):
            input, batch_sizes, _, _ = input
        cell = self._cell or _RNNS.get(self.mode)
        weights = self._weights()
        if cell is None or weights is None or not isinstance(input, Tensor):
            return None
        states = None
        if hx is not None and (states := states_of(cell, hx)) is None:
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
            Rows(batch_sizes, lengths),
            sizes=(self.input_size, self.hidden_size, self.proj_size),
        )

    def forward(self, input: Tensor | PackedSequence, hx: _Hidden = None, *, lengths: Tensor | None = None) -> Any:
        """forward(input, hx=None, *, lengths=None) -> (output, h_n); for an LSTM (output, (h_n, c_n))

        Args:
            input, hx: as in torch.nn, with the same errors.
            lengths: int32 or int64 `(N)`, the lengths of the sequences in padded input; see the class. Raises
                RuntimeError for another shape, dtype or device, and ValueError beside a PackedSequence.
        """
        weights: Any = self._flat_weights
        num_layers, op = self.num_layers, self._operators or _RNN_OPERATORS.get(self.mode)
        bare, biased, projected, both = op.counts if op is not None else (0, 0, 0, 0)
        each = (both if self.proj_size else biased) if self.bias else projected if self.proj_size else bare
        usual = (
            lengths is None
            and is_open_to(input)
            and input.dim() == 3
            and not (num_layers != 1 and self.training and self.dropout)
            and op is not None
            and len(weights) == num_layers * (2 if self.bidirectional else 1) * each
            and all(map(is_, map(self._parameters.get, self._flat_weights_names), weights))
            and ORDINARY_TYPES.issuperset(map(type, weights))
            and not self._class_asks
            and self.__dict__.keys().isdisjoint(_ASKED)
        )
        states = None
        if usual:
            states = op.no_states if hx is None else usual_states(op.states, hx)
        if states is None:
            return self._decided(input, hx, lengths)
        batch_first, trains = self.batch_first, is_grad_enabled()
        x: Any = input
        if batch_first:
            x = x.transpose(0, 1)
        try:
            if trains:
                output, *hidden = autograd.stack(op.spec.name, x, states, weights, num_layers)
            else:  # what autograd.infer does; a call of it would take half a microsecond
                output, *hidden = op.eager_layer.infer(x, *states, weights, *_ALL_STEPS, *op.flags, num_layers)
        except RuntimeError as error:
            if not (isinstance(error, Refused) if trains else is_refusal(error)):
                raise
            return self._decided(input, hx, lengths)
        if batch_first:
            output = output.transpose(0, 1)
        return output, hidden[0] if op.states == 1 else tuple(hidden)

    # torch.nn's signature, because ONNX's TorchScript exporter passes every argument in it by position.
    forward.__signature__ = inspect.signature(torch.nn.LSTM.forward)  # type: ignore[attr-defined] # of a function

    def _decided(self, input: Any, hx: Any, lengths: Tensor | None) -> Any:
        """`forward` for what the fast path does not take."""
        call = self._call(input, hx, lengths)
        if call is None:
            if (proxy := proxy_in(input, hx)) is not None:
                return record(self, proxy, input, hx=hx, lengths=lengths)
            return self._by_torch(self._call(input, None), input, hx, lengths)
        packed, asks = isinstance(input, PackedSequence), self._asks()
        order = input.sorted_indices if packed else None
        prepare = functools.partial(self._prepared, order, packed) if asks or order is not None else None
        results = run(call, prepare)
        if results is None:
            return self._by_torch(call, input, hx, lengths)
        output, *states = results
        if not packed and input.dim() == 2:
            output = output.squeeze(0 if self.batch_first else 1)
            states = [state.squeeze(1) for state in states]
        hidden: Any = states[0] if len(states) == 1 else tuple(states)
        if packed:
            return PackedSequence(output, *input[1:]), self.permute_hidden(hidden, input.unsorted_indices)
        return output, self.permute_hidden(hidden, None) if asks else hidden

    def _prepared(self, order: Tensor | None, packed: bool, call: Call) -> Call:
        """`call` after the subclass's own checks, with the states in the order of packed rows."""
        if packed and call.states is not None:
            call = call._replace(states=self._permuted(call.states, order))
        return self._asked(call) if self._asks() else call

    def _permuted(self, states: Sequence[Tensor], order: Tensor | None) -> Sequence[Tensor]:
        """The states in another order of the batch, by the class's own method."""
        hidden: Any = states[0] if len(states) == 1 else tuple(states)
        hidden = self.permute_hidden(hidden, order)
        return (hidden,) if len(states) == 1 else hidden

    def _asked(self, call: Call) -> Call:
        """`call` after the subclass's own checks, in torch.nn's order."""
        states, batch_sizes = zeros(call) if call.states is None else call.states, call.rows.batch_sizes
        if batch_sizes is None or len(states) == 1:  # torch.nn.LSTM asks no such method about packed states
            given: Any = states[0] if len(states) == 1 else states
            self.check_forward_args(call.input, given, batch_sizes)
        if call.states is not None and batch_sizes is None:
            states = self._permuted(states, None)
        return call._replace(states=states)

    def _by_torch(self, call: Call | None, input: Any, hx: Any, lengths: Tensor | None) -> Any:
        """torch.nn's own forward, which also raises its own errors."""
        if call is not None:
            check_what_torch_trusts(call, self._flat_weights_names)
        result = super().forward(input, hx)
        if lengths is not None:
            raise RuntimeError(LENGTHS_NEED)
        return result


class RNN(_Recurrent, torch.nn.RNN):
    __doc__ = f"{torch.nn.RNN.__doc__}{_NOTE.format('RNN')}{_LENGTHS_NOTE}"
    _torch_class = torch.nn.RNN


class LSTM(_Recurrent, torch.nn.LSTM):
    __doc__ = f"{torch.nn.LSTM.__doc__}{_NOTE.format('LSTM')}{_LENGTHS_NOTE}"
    _cell, _operators = "lstm", CELLS["lstm"]
    _torch_class = torch.nn.LSTM


class GRU(_Recurrent, torch.nn.GRU):
    __doc__ = f"{torch.nn.GRU.__doc__}{_NOTE.format('GRU')}{_LENGTHS_NOTE}"
    _cell, _operators = "gru", CELLS["gru"]
    _torch_class = torch.nn.GRU


_CELL_WEIGHTS = [weight.name for weight in step_weights(SPECS["lstm"])]  # those of all three


class _Cell(_DropIn, _CellModule):
    """forward of RNNCell, LSTMCell and GRUCell: one layer, one step."""

    _mode: Callable[[], Any]  # "rnn_tanh", "gru", ...; None for what torch.nn's own forward refuses

    def _registered(self) -> list[Any]:
        """The parameters by name, without biases if both are None. None stands for what is no parameter."""
        parameters = self._parameters
        weights = list(map(parameters.get, _CELL_WEIGHTS))
        if weights[2] is weights[3] is None and "bias_ih" in parameters and "bias_hh" in parameters:
            return weights[:2]
        return weights

    def _weights(self) -> list[Any]:
        """The weights by name: parameters, or what took their place; without biases if both are None."""
        weights = self._registered()
        for i, weight in enumerate(weights):
            if weight is None:
                weights[i] = getattr(self, _CELL_WEIGHTS[i])
        return weights[:2] if weights[-1] is weights[-2] is None else weights

    def _call(self, input: Any, hx: Any) -> Call | None:
        """The arguments of forward as a call of one step; None where a kind or a number of dimensions is wrong."""
        weights = self._weights()
        cell, states = self._mode(), None
        if cell is None or not all(isinstance(tensor, Tensor) for tensor in (input, *weights)):
            return None
        if hx is not None:
            states = states_of(cell, hx)
            if states is None or any(state.dim() != input.dim() for state in states):
                return None
        if input.dim() not in (1, 2):
            return None
        if input.dim() == 1:
            input = input[None]
            states = None if states is None else [state[None] for state in states]
        sizes = None  # if the matrices do not agree: torch's cells check them
        rows = weights[0].size(0) if weights[0].dim() == 2 else 0
        if rows and weights[1].shape == (rows, rows // len(SPECS[cell].gates)):
            sizes = weights[0].size(1), weights[1].size(1), 0
        return Call(cell, input, states, weights, len(weights) == len(_CELL_WEIGHTS), step=True, sizes=sizes)

    def _fast(self, input: Tensor, hx: Any) -> Sequence[Tensor] | None:
        """The results on the fast path; None where the arguments need another look."""
        cell, weights = self._mode(), self._registered()
        op: Any = CELLS.get(cell)
        if op is None or input.dim() != 2 or not ORDINARY_TYPES.issuperset(map(type, weights)):
            return None
        states = op.no_states if hx is None else usual_states(op.states, hx)
        if states is None:
            return None
        try:
            return autograd.step(cell, input, states, weights)
        except Refused:
            return None

    def forward(self, input: Tensor, hx: _Hidden = None) -> Any:
        """forward(input, hx=None) -> h_n; for an LSTMCell (h_n, c_n). Shapes and errors are those of torch.nn."""
        results = self._fast(input, hx) if is_open_to(input, STEP_DTYPES) else None
        if results is None:
            call = self._call(input, hx)
            if call is None:
                proxy = proxy_in(input, hx)
                if proxy is not None and path_of(self, proxy):  # empty for the traced module itself
                    return record(self, proxy, input, hx=hx)
                return self._by_torch(input, hx)
            results = run(call)
            if results is None:
                check_what_torch_trusts(call, _CELL_WEIGHTS)
                return self._by_torch(input, hx)
            if input.dim() == 1:
                results = [result[0] for result in results]
        return results[0] if len(results) == 1 else tuple(results)

    def _by_torch(self, input: Any, hx: Any) -> Any:
        """torch.nn's own forward, which also raises its own errors.

        With a 1D input it would take a 2D state of size hidden_size, and then broadcast it or end the process.
        """
        if isinstance(input, Tensor) and input.dim() == 1 and hx is not None:
            states = hx if isinstance(self, torch.nn.LSTMCell) else (hx,)
            for i, state in enumerate(states):
                if isinstance(state, Tensor) and state.dim() == 2 and state.size(0) == self.hidden_size:
                    what = f"{type(self).__name__}: Expected hx[{i}] to be 1D like the input"
                    raise RuntimeError(f"{what}, got 2D of shape {list(state.shape)}")
        return super().forward(input, hx)


class RNNCell(_Cell, torch.nn.RNNCell):
    __doc__ = f"{torch.nn.RNNCell.__doc__}{_NOTE.format('RNNCell')}"
    _torch_class = torch.nn.RNNCell

    def _mode(self) -> Any:
        return _RNNS.get(f"RNN_{self.nonlinearity}".upper())


class LSTMCell(_Cell, torch.nn.LSTMCell):
    __doc__ = f"{torch.nn.LSTMCell.__doc__}{_NOTE.format('LSTMCell')}"
    _torch_class = torch.nn.LSTMCell

    def _mode(self) -> str:
        return "lstm"


class GRUCell(_Cell, torch.nn.GRUCell):
    __doc__ = f"{torch.nn.GRUCell.__doc__}{_NOTE.format('GRUCell')}"
    _torch_class = torch.nn.GRUCell

    def _mode(self) -> str:
        return "gru"


COUNTERPARTS: dict[type, type] = {cls._torch_class: cls for cls in (RNN, LSTM, GRU, RNNCell, LSTMCell, GRUCell)}
"""torch.nn's class -> rnnfast's."""
ORIGINALS: dict[type, type] = {ours: stock for stock, ours in COUNTERPARTS.items()}
"""rnnfast's class -> torch.nn's."""
