"""Gradients around the operators: one torch.autograd.Function for all cells, outside the operators.

Whether anything must be saved is decided before the Function, so inference never pays for it. Backward of backward is
a re-expression: with create_graph=True the gradients are those of reference.py's loop over the same saved inputs.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from . import reference
from .ops import CELLS


class _Layer(torch.autograd.Function):
    """apply(cell, batch_sizes, lengths, input, *states, *weights) -> (output, *final states).

    forward takes ctx, for the split into forward and setup_context costs an inspect.signature().bind at every call, 20
    of the 50 us of a small one, and would make results of what is merely saved.
    """

    @staticmethod
    def forward(ctx, cell, batch_sizes, lengths, input, *tensors):
        op = CELLS[cell]
        states, weights = tensors[: op.states], tensors[op.states :]
        *outputs, saved = op.fwd(input, *states, weights, batch_sizes, lengths, *op.flags)
        ctx.cell, ctx.inputs = cell, 1 + len(tensors)
        ctx.save_for_backward(batch_sizes, lengths, input, *tensors, outputs[0], *saved)
        if not torch.compiler.is_compiling():  # Dynamo knows no such method; its graphs carry zeros instead
            ctx.set_materialize_grads(False)
        return tuple(outputs)

    @staticmethod
    def backward(ctx, *grads):
        op = CELLS[ctx.cell]
        batch_sizes, lengths, *tensors = ctx.saved_tensors
        (input, *tensors), output, saved = tensors[: ctx.inputs], tensors[ctx.inputs], tensors[ctx.inputs + 1 :]
        needs = ctx.needs_input_grad[3:]
        if not torch.compiler.is_compiling() and (torch.is_grad_enabled() or _batched(grads)):
            gradients = _reexpressed_backward(ctx.cell, batch_sizes, lengths, [input, *tensors], needs, grads)
        else:
            states, weights = tensors[: op.states], tensors[op.states :]
            needed = needs[0], any(needs[1 + op.states :])
            arguments = input, *states, weights, batch_sizes, lengths, *op.flags, output, saved
            *gradients, grad_weights = op.bwd(*grads, *arguments, *needed)
            gradients = [*gradients, *grad_weights]
        kept = (gradient if need else None for gradient, need in zip(gradients, needs, strict=True))
        return (None, None, None, *kept)


def _batched(grads):
    """Whether the gradients stand for many at once: torch.func.vmap, or is_grads_batched=True."""
    legacy = torch._C._functorch.is_legacy_batchedtensor
    return torch._C._are_functorch_transforms_active() or any(grad is not None and legacy(grad) for grad in grads)


def _reexpressed_backward(cell, batch_sizes, lengths, tensors, needs, grads):
    """The gradients of one layer by torch's own operators, which can be differentiated again and batched."""
    create_graph = torch.is_grad_enabled()
    split = 1 + CELLS[cell].states
    with torch.enable_grad(), torch.autocast(tensors[0].device.type, enabled=False):
        # Aliases, because one tensor may stand in two places (hx = cx) and each place has its own gradient.
        tensors = [tensor.view_as(tensor) for tensor in tensors]
        outputs = reference.layer(cell, tensors[0], tensors[1:split], tensors[split:], batch_sizes, lengths)
    given = [(output, grad) for output, grad in zip(outputs, grads, strict=True) if grad is not None]
    if not given:
        return [None] * len(tensors)
    wanted = [tensor for tensor, need in zip(tensors, needs, strict=True) if need]
    outputs, grads = zip(*given, strict=True)
    found = iter(torch.autograd.grad(outputs, wanted, grads, create_graph=create_graph, allow_unused=True))
    return [next(found) if need else None for need in needs]


def layer(
    cell: str,
    input: Tensor,
    states: Sequence[Tensor],
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None = None,
    lengths: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """One layer through the operators of `ops.py`, differentiable; the arguments and results of `reference.layer`."""
    op = CELLS[cell]
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (input, *states, *weights)):
        if torch.compiler.is_compiling():  # Dynamo refuses one tensor in two places (hx = cx, tied weights)
            states, weights = [s.view_as(s) for s in states], [w.view_as(w) for w in weights]
        return _Layer.apply(cell, batch_sizes, lengths, input, *states, *weights)
    return op.infer(input, *states, weights, batch_sizes, lengths, *op.flags)
