"""Gradients around the operators: a torch.autograd.Function for layers and one for steps, outside the operators.

Whether anything must be saved is decided before the Function, so inference never pays for it. Backward of backward is
a re-expression: with create_graph=True the gradients are those of reference.py's loop over the same saved inputs.

Both have forward(ctx, ...), for the split into forward and setup_context costs an inspect.signature().bind at every
call, 20 of the 50 us of a small one, and would make results of what is merely saved.
"""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from . import reference
from .ops import OPERATORS
from .precision import follow_switch_in_backward


class _Layer(torch.autograd.Function):
    """apply(namespace, cell, batch_sizes, lengths, input, *states, *weights) -> (output, *final states)."""

    @staticmethod
    def forward(ctx, namespace, cell, batch_sizes, lengths, input, *tensors):
        op = OPERATORS[namespace][cell]
        outputs = op.layer.fwd(input, *tensors[: op.states], tensors[op.states :], batch_sizes, lengths, *op.flags)
        ctx.namespace, ctx.cell = namespace, cell
        saved = outputs[1 + op.states :]
        ctx.save_for_backward(batch_sizes, lengths, input, *tensors, outputs[0], *saved)
        if not torch.compiler.is_compiling():  # Dynamo knows no such method; its graphs carry zeros instead
            ctx.set_materialize_grads(False)
        return outputs[: 1 + op.states]

    @staticmethod
    def backward(ctx, *grads):
        op, needs = OPERATORS[ctx.namespace][ctx.cell], ctx.needs_input_grad[4:]
        batch_sizes, lengths, input, *tensors = ctx.saved_tensors
        states, tensors = tensors[: op.states], tensors[op.states :]
        weights, results = tensors[: len(needs) - 1 - op.states], tensors[len(needs) - 1 - op.states :]
        if _differentiable(grads):

            def again(input, states, weights):
                return reference.layer(ctx.cell, input, states, weights, batch_sizes, lengths)

            gradients = _reexpressed_backward(again, input, states, weights, needs, grads)
        else:
            if not torch.compiler.is_compiling():
                follow_switch_in_backward(ctx.namespace, input)
            arguments = input, *states, weights, batch_sizes, lengths, *op.flags, *results
            gradients = _wanted(op.layer.bwd(*grads, *arguments, *_needed(needs, op.states)), needs)
        return (None, None, None, None, *gradients)


class _Step(torch.autograd.Function):
    """apply(namespace, cell, input, *states, *weights) -> final states; all that a step lacks is None."""

    @staticmethod
    def forward(ctx, namespace, cell, input, *tensors):
        op = OPERATORS[namespace][cell]
        outputs = op.step.fwd(input, *tensors, *op.flags)
        if isinstance(outputs, Tensor):
            outputs = (outputs,)
        ctx.namespace, ctx.cell = namespace, cell
        ctx.save_for_backward(input, *tensors, *(outputs[op.states :] or outputs))
        if not torch.compiler.is_compiling():
            ctx.set_materialize_grads(False)
        return outputs[: op.states]

    @staticmethod
    def backward(ctx, *grads):
        op, needs = OPERATORS[ctx.namespace][ctx.cell], ctx.needs_input_grad[2:]
        given, saved = ctx.saved_tensors[: len(needs)], ctx.saved_tensors[len(needs) :]
        if _differentiable(grads):
            input, *tensors = given
            states = tensors[: op.states]
            weights = [weight for weight in tensors[op.states :] if weight is not None]

            def again(input, states, weights):
                return reference.step(ctx.cell, input, states, weights)

            gradients = _reexpressed_backward(again, input, states, weights, needs, grads)
            gradients += [None] * (len(needs) - len(gradients))
        else:
            if not torch.compiler.is_compiling():
                follow_switch_in_backward(ctx.namespace, given[0])
            arguments = *given, *op.flags, *saved
            gradients = _wanted(op.step.bwd(*grads, *arguments, *_needed(needs, op.states)), needs)
        return (None, None, *gradients)


def _needed(needs, states):
    """The operators' need_grad_input, need_grad_states and need_grad_weights."""
    return needs[0], True in needs[1 : 1 + states], True in needs[1 + states :]


def _wanted(results, needs):
    """An operator's gradients, None in the place of what is not wanted or was not there."""
    gradients = [*results[:-1], *results[-1]]
    for i, need in enumerate(needs):
        if not need:
            gradients[i : i + 1] = (None,)  # a step without biases has fewer gradients
    return gradients


def _differentiable(grads):
    """Whether backward is itself to be differentiated, or to be run on many gradients at once.

    The latter are torch.func.vmap and is_grads_batched=True.
    """
    if torch.compiler.is_compiling():
        return False
    if torch.is_grad_enabled() or torch._C._are_functorch_transforms_active():
        return True
    for grad in grads:
        if grad is not None and torch._C._functorch.is_legacy_batchedtensor(grad):
            return True
    return False


def _reexpressed_backward(again, input, states, weights, needs, grads):
    """The gradients of one layer by torch's own operators, which can be differentiated again and batched."""
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad(), torch.autocast(input.device.type, enabled=False):
        # Aliases, because one tensor may stand in two places (hx = cx) and each place has its own gradient.
        input, *tensors = (t if t is None else t.view_as(t) for t in (input, *states, *weights))
        outputs = again(input, tensors[: len(states)], tensors[len(states) :])
    tensors = [input, *tensors]
    given = [(output, grad) for output, grad in zip(outputs, grads, strict=True) if grad is not None]
    if not given:
        return [None] * len(tensors)
    needs = needs[: len(tensors)]
    wanted = [tensor for tensor, need in zip(tensors, needs, strict=True) if need]
    outputs, grads = zip(*given, strict=True)
    found = iter(torch.autograd.grad(outputs, wanted, grads, create_graph=create_graph, allow_unused=True))
    return [next(found) if need else None for need in needs]


# Function.apply without its preparations for torch.func, whose transforms reach no call of the kernels (select.py): it
# takes 5 us of 25 (Zen 4).
_apply_layer = super(torch.autograd.Function, _Layer).apply
_apply_step = super(torch.autograd.Function, _Step).apply


def layer(
    cell: str,
    input: Tensor,
    states: Sequence[Tensor | None],
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None = None,
    lengths: Tensor | None = None,
    namespace: str = "rnnfast",
) -> tuple[Tensor, ...]:
    """One layer through the operators of `ops.py`, differentiable; the arguments and results of `reference.layer`."""
    op = OPERATORS[namespace][cell]
    if torch.is_grad_enabled() and _any_requires_grad(weights, input, states):
        if torch.compiler.is_compiling():  # Dynamo refuses one tensor in two places (hx = cx, tied weights)
            states, weights = [s.view_as(s) for s in states], [w.view_as(w) for w in weights]
            return _Layer.apply(namespace, cell, batch_sizes, lengths, input, *states, *weights)
        return _apply_layer(namespace, cell, batch_sizes, lengths, input, *states, *weights)
    return op.layer.infer(input, *states, weights, batch_sizes, lengths, *op.flags)


def stack(
    cell: str,
    input: Tensor,
    states: Sequence[Tensor | None],
    weights: Sequence[Tensor],
    num_layers: int,
    dropout: float = 0.0,
    batch_sizes: Tensor | None = None,
    lengths: Tensor | None = None,
    namespace: str = "rnnfast",
) -> tuple[Tensor, ...]:
    """A stack of layers through the operators, differentiable; the arguments and results of `reference.stack`."""
    if num_layers == 1:
        return layer(cell, input, states, weights, batch_sizes, lengths, namespace)
    if dropout != 0 or (torch.is_grad_enabled() and _any_requires_grad(weights, input, states)):
        each = functools.partial(layer, namespace=namespace)
        return reference.stack(each, cell, input, states, weights, num_layers, dropout, batch_sizes, lengths)
    op = OPERATORS[namespace][cell]
    return op.layer.infer(input, *states, weights, batch_sizes, lengths, *op.flags, num_layers)


def step(
    cell: str,
    input: Tensor,
    states: Sequence[Tensor | None],
    weights: Sequence[Tensor],
    namespace: str = "rnnfast",
) -> tuple[Tensor, ...]:
    """One step of a cell through the operators, differentiable; the arguments and results of `reference.step`."""
    op = OPERATORS[namespace][cell]
    biases = () if len(weights) == 4 else (None, None)
    if torch.is_grad_enabled() and _any_requires_grad(weights, input, states):
        if torch.compiler.is_compiling():
            states, weights = [s.view_as(s) for s in states], [w.view_as(w) for w in weights]
            return _Step.apply(namespace, cell, input, *states, *weights, *biases)
        return _apply_step(namespace, cell, input, *states, *weights, *biases)
    results = op.step.infer(input, *states, *weights, *biases, *op.flags)
    return (results,) if op.states == 1 else results


def _any_requires_grad(weights, input, states):
    for weight in weights:
        if weight.requires_grad:
            return True
    return input.requires_grad or any(state is not None and state.requires_grad for state in states)
