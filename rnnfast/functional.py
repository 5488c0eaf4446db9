"""lstm, gru, rnn_tanh and rnn_relu on plain tensors: layers, directions, packing, dropout and autocast.

The arguments are those of torch's own operators (torch._VF.lstm and so on), named; the results are theirs too. The
backend is chosen once per call (select.py).
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import _VF, Tensor

from . import select
from ._backends import ATEN, Backend
from .call import AUTOCAST_DTYPES, Call, autocast_dtype, zeros
from .cells import SPECS
from .check import LENGTHS_NEED, check_lengths, check_states, check_what_torch_trusts, descending


def _stack_of(cell: str, doc: str) -> Callable[..., tuple[Tensor, ...]]:
    def function(
        input: Tensor,
        hx: Tensor | Sequence[Tensor] | None,
        weights: Sequence[Tensor],
        *,
        has_biases: bool = True,
        num_layers: int = 1,
        dropout: float = 0.0,
        training: bool = False,
        bidirectional: bool = False,
        batch_first: bool = False,
        batch_sizes: Tensor | None = None,
        lengths: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        if not all(isinstance(tensor, Tensor) for tensor in (input, *weights)):
            raise TypeError(f"{cell}: input and weights must be tensors")
        states = (hx,) if isinstance(hx, Tensor) else hx
        call = Call(
            cell,
            input,
            states,
            weights,
            has_biases,
            num_layers,
            dropout,
            training,
            bidirectional,
            batch_first,
            batch_sizes,
            lengths,
        )
        check_lengths(call)
        chosen = select.choose(call)
        return _aten(call) if chosen is ATEN else run(call, chosen)

    function.__name__ = function.__qualname__ = cell
    function.__doc__ = doc
    return function


lstm = _stack_of(
    "lstm",
    """A stack of LSTM layers, with projections if `weights` hold weight_hr.

    Args:
        input: [T, B, I], with batch_first [B, T, I], with batch_sizes [sum(batch_sizes), I]; float32, float64,
            bfloat16 or float16.
        hx: (h_0 [L*D, B, Hout], c_0 [L*D, B, H]) of any strides, or None for zeros; L layers, D directions.
        weights: in torch's flat order: for each layer, for each direction weight_ih, weight_hh, then bias_ih and
            bias_hh if has_biases, then weight_hr if projected.
        num_layers, dropout, training, bidirectional, batch_first: as in torch.nn.LSTM.
        batch_sizes: of a PackedSequence: int64 [T] on the CPU, descending.
        lengths: int32 or int64 [B] on the device of `input`, each in 0..T, unsorted; excludes batch_sizes. Output is
            zero at and after a row's length; the final states are those after its last step.

    Returns:
        output [T, B, D*Hout] (or in the form of `input`), h_n [L*D, B, Hout], c_n [L*D, B, H].

    Raises torch's own errors for tensors that do not fit together, RuntimeError or ValueError for lengths.
    """,
)
gru = _stack_of("gru", "A stack of GRU layers: `lstm` with the one state hx [L*D, B, H]. Returns (output, h_n).")
rnn_tanh = _stack_of("rnn_tanh", "A stack of tanh RNN layers: `gru` with another cell. Returns (output, h_n).")
rnn_relu = _stack_of("rnn_relu", "A stack of relu RNN layers: `gru` with another cell. Returns (output, h_n).")


def run(call: Call, backend: Backend) -> tuple[Tensor, ...]:
    """(output, *final states) of a call that fits, each layer by `backend`; of a step the final states alone."""
    states = zeros(call) if call.states is None else call.states
    low = autocast_dtype(call.input.device)
    if low is None or call.input.dtype not in AUTOCAST_DTYPES:
        return _run(call, backend, call.input, states, call.weights)
    weights = [weight.to(low) for weight in call.weights]
    results = _run(call, backend, call.input.to(low), [state.to(low) for state in states], weights)
    dtypes = _autocast_results(call, states, low)[-len(results) :]
    return tuple(result.to(dtype) for result, dtype in zip(results, dtypes, strict=True))


def _run(call, backend, input, states, weights):
    if call.step:
        return backend.step(call.cell, input, states, weights)
    transposed = call.batch_first and call.batch_sizes is None
    output = input.transpose(0, 1) if transposed else input
    results = backend.stack(
        call.cell,
        output,
        states,
        weights,
        call.num_layers,
        call.dropout if call.training else 0.0,
        call.batch_sizes,
        call.lengths,
    )
    return (results[0].transpose(0, 1), *results[1:]) if transposed else results


def _autocast_results(call: Call, states: Sequence[Tensor], low: torch.dtype) -> tuple[torch.dtype, ...]:
    """The dtypes of (output, *final states) that torch's own operators give under autocast to `low`.

    Matrix products come out in `low`, and what is pointwise promotes with the states: an RNN ends in a product's dtype
    and so does a projected h; a GRU's h and an LSTM's c meet the old state. oneDNN's LSTM is all `low`.
    """
    promoted = torch.promote_types(low, states[0].dtype)
    projected = states[0].size(-1) != states[-1].size(-1)
    if len(SPECS[call.cell].gates) == 1 or (not projected and _onednn_lstm(call)):
        return (low,) * (1 + len(states))
    return (low, low, promoted) if projected else (promoted,) * (1 + len(states))


def _onednn_dtypes() -> Iterator[torch.dtype]:
    """The dtypes of input for which torch runs oneDNN's LSTM on this CPU."""
    if torch.backends.mkldnn.is_available():
        yield torch.float32
        if torch.ops.mkldnn._is_mkldnn_bf16_supported():
            yield torch.bfloat16
        if torch.ops.mkldnn._is_mkldnn_fp16_supported():
            yield torch.float16


_ONEDNN_DTYPES = tuple(_onednn_dtypes())


def _onednn_lstm(call: Call) -> bool:
    """Whether torch's own operator would take oneDNN's LSTM for this call (ATen/native/RNN.cpp, use_mkldnn)."""
    lstm = SPECS[call.cell].torch_operator == "lstm"
    if not lstm or call.batch_sizes is not None or call.step or call.input.device.type != "cpu":
        return False
    if not torch.backends.mkldnn.enabled or (call.input.dtype is torch.float16 and torch.is_grad_enabled()):
        return False
    return call.input.dtype in _ONEDNN_DTYPES


def _aten(call: Call) -> tuple[Tensor, ...]:
    """The stack by torch's own operator, which also raises the errors of a call that does not fit."""
    torch_operator = SPECS[call.cell].torch_operator
    if torch_operator is None:
        raise RuntimeError(f"{call.cell}: expected tensors that fit together as documented")
    _check_direct_call(call)
    states = zeros(call) if call.states is None else call.states
    hx = states[0] if len(SPECS[call.cell].states) == 1 else states
    operator = getattr(_VF, torch_operator)
    options = call.has_biases, call.num_layers, call.dropout, call.training, call.bidirectional
    if call.batch_sizes is not None:
        return operator(call.input, call.batch_sizes, hx, call.weights, *options)
    results = operator(call.input, hx, call.weights, *options, call.batch_first)
    if call.lengths is not None:
        raise RuntimeError(LENGTHS_NEED)
    return results


def _check_direct_call(call: Call) -> None:
    """Raises RuntimeError for arguments that torch's operators, which their modules protect, would not survive."""
    dims = 3 if call.batch_sizes is None else 2
    if call.input.dim() != dims:
        raise RuntimeError(f"input must have {dims} dimensions, got {call.input.dim()}")
    if call.batch_sizes is not None and not descending(call.batch_sizes, call.input.size(0)):
        kind = f"{call.batch_sizes.dtype} {list(call.batch_sizes.shape)} on {call.batch_sizes.device}"
        rows = call.input.size(0)
        raise RuntimeError(f"batch_sizes: expected descending int64 [T] on the CPU with a sum of {rows}, got {kind}")
    weight_hh = call.weights[1] if len(call.weights) > 1 else None
    if weight_hh is None or weight_hh.dim() != 2:
        given = len(call.weights) if weight_hh is None else f"{list(weight_hh.shape)} as weight_hh"
        raise RuntimeError(f"Expected weight_ih, weight_hh and so on of every layer and direction, got {given}")
    hidden_size, output_size = weight_hh.size(0) // len(SPECS[call.cell].gates), weight_hh.size(1)
    check_states(call, hidden_size, output_size)
    sizes = call.input.size(-1), hidden_size, 0 if output_size == hidden_size else output_size
    check_what_torch_trusts(call._replace(sizes=sizes), [f"weights[{i}]" for i in range(len(call.weights))])
