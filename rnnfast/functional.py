"""lstm, gru, rnn_tanh and rnn_relu on tensors: layers, directions, packing, dropout and autocast.

The arguments are those of torch's own operators, as keywords, and the results are the same. select.py chooses the
backend once per call.
"""

from collections.abc import Callable, Sequence

from torch import Tensor

from ._torch_internals import recurrent_operator
from .call import Call, zeros
from .cells import SPECS
from .check import LENGTHS_NEED, check_states, check_what_torch_trusts, descending
from .rows import PADDED, Rows
from .run import run


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
            PADDED if batch_sizes is None and lengths is None else Rows(batch_sizes, lengths),
        )
        results = run(call)
        return _by_torch(call) if results is None else results

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

    Raises torch's own errors for tensors that do not fit together, and RuntimeError or ValueError for wrong lengths.
    """,
)
gru = _stack_of("gru", "A stack of GRU layers: `lstm` with the one state hx [L*D, B, H]. Returns (output, h_n).")
rnn_tanh = _stack_of("rnn_tanh", "A stack of tanh RNN layers: `gru` with another cell. Returns (output, h_n).")
rnn_relu = _stack_of("rnn_relu", "A stack of relu RNN layers: `gru` with another cell. Returns (output, h_n).")


def _by_torch(call: Call) -> tuple[Tensor, ...]:
    """The stack by torch's own operator, which raises the errors of a call that does not fit."""
    torch_operator = SPECS[call.cell].torch_operator
    if torch_operator is None:
        raise RuntimeError(f"{call.cell}: expected tensors that fit together as documented")
    _check_direct_call(call)
    states = zeros(call) if call.states is None else call.states
    hx = states[0] if len(SPECS[call.cell].states) == 1 else states
    operator = recurrent_operator(torch_operator)
    options = call.has_biases, call.num_layers, call.dropout, call.training, call.bidirectional
    batch_sizes, lengths = call.rows
    if batch_sizes is not None:
        return operator(call.input, batch_sizes, hx, call.weights, *options)
    results = operator(call.input, hx, call.weights, *options, call.batch_first)
    if lengths is not None:
        raise RuntimeError(LENGTHS_NEED)
    return results


def _check_direct_call(call: Call) -> None:
    """Raises RuntimeError for arguments that would end the process in torch's operators; torch.nn checks them."""
    batch_sizes = call.rows.batch_sizes
    dims = 3 if batch_sizes is None else 2
    if call.input.dim() != dims:
        raise RuntimeError(f"input must have {dims} dimensions, got {call.input.dim()}")
    if batch_sizes is not None and not descending(batch_sizes, call.input.size(0)):
        kind = f"{batch_sizes.dtype} {list(batch_sizes.shape)} on {batch_sizes.device}"
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
