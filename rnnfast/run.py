"""The one way of a call to its backend, from modules and from `functional`: check, choose, run."""

from collections.abc import Callable, Sequence

from torch import Tensor

from . import select
from ._backends import ATEN, Backend
from ._torch_internals import is_any_autocast_enabled
from .autocast import AUTOCAST_DTYPES, autocast_dtype, result_dtypes
from .call import Call, zeros
from .check import check_rows


def run(call: Call, prepare: Callable[[Call], Call] | None = None) -> tuple[Tensor, ...] | None:
    """(output, *final states), of a step the final states alone; None where torch's own operator is to run.

    `prepare` changes a call that does not go to torch's operator before it runs. Raises RuntimeError or ValueError for
    lengths of a wrong kind, and RuntimeError for a strict request that cannot be met.
    """
    if call.rows.lengths is not None:
        check_rows(call)
    backend = select.choose(call)
    if backend is ATEN:
        return None
    if prepare is not None:
        call = prepare(call)
    states = zeros(call) if call.states is None else call.states
    low = autocast_dtype(call.input.device) if is_any_autocast_enabled() else None
    if low is None or call.input.dtype not in AUTOCAST_DTYPES:
        return _on(backend, call, call.input, states, call.weights)
    weights = [weight.to(low) for weight in call.weights]
    results = _on(backend, call, call.input.to(low), [state.to(low) for state in states], weights)
    dtypes = result_dtypes(call, states, low)[-len(results) :]
    return tuple(result.to(dtype) for result, dtype in zip(results, dtypes, strict=True))


def _on(
    backend: Backend, call: Call, input: Tensor, states: Sequence[Tensor], weights: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """The results of `call` on `backend`, computed from these tensors in the place of its own."""
    if call.step:
        return backend.step(call.cell, input, states, weights)
    transposed = call.batch_first and call.rows.batch_sizes is None
    if transposed:
        input = input.transpose(0, 1)
    dropout = call.dropout if call.training else 0.0
    results = backend.stack(call.cell, input, states, weights, call.num_layers, dropout, call.rows)
    return (results[0].transpose(0, 1), *results[1:]) if transposed else results
