"""Gradients around the operators: one torch.autograd.Function for layers and one for steps.

Whether a call needs gradients is decided before the Function, so inference never pays for it. With create_graph=True
the gradients are those of reference.py's loop over the same saved inputs, which can be differentiated again.

Both Functions have forward(ctx, ...). The split into forward and setup_context costs an inspect.signature().bind at
every call, 20 of the 50 us of a small one, and would turn saved tensors into results.

Users may change some tensors in place before backward, as they may with torch.nn: a layer's output, biases, and a
weight whose product needs no gradient. Our backward needs the output all the same. Autograd finds such a change when
backward asks for the saved tensors. Then its check is taken off those tensors, and a changed output is computed
again. A changed input, state or other weight still raises autograd's own error. Where saved-tensor hooks are active,
as in checkpointing, autograd checks nothing. There the version counter of the output is kept, and backward looks at
it.
"""

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import reference
from ._torch_internals import (
    eager_apply,
    is_batched,
    is_transforming,
    saved_places,
    saved_tensors_hooks,
    stop_checking,
    version_of,
)
from .cells import arrangement_of, step_weights
from .ops import OPERATORS, Cell, Refused, reraise
from .precision import follow_switch_in_backward
from .rows import PADDED, Rows
from .stack import layer_by_layer, require_later_layers

_EMPTY = torch.empty(0)
_ROWS = len(Rows._fields)
_CHANGED = (
    "one of the variables needed for gradient computation has been modified by an inplace operation"  # autograd's
)


def _counter_of(tensor: Tensor) -> Tensor:
    """A tensor that shares the version counter of `tensor`, of its views and aliases, but none of its memory."""
    counter = tensor.detach()
    counter.data = _EMPTY
    return counter


def _saved(ctx, stages):
    """(The saved tensors, the number of `stages` that were needed to get them).

    Where autograd finds a change in place, it is asked again without its check of some places. Each of `stages` is a
    function that returns such places; each new attempt uses one stage more. Raises autograd's error for other changes.
    """
    stage = getattr(ctx, "stage", 0)  # an earlier backward through this node may have used some
    if stage > len(stages):
        raise RuntimeError(f"{_CHANGED}: a weight or bias that backward of backward needs")
    while True:
        try:
            return ctx.saved_tensors, stage  # checkpointing forbids to read it twice
        except RuntimeError as error:
            if stage == len(stages) or _CHANGED not in str(error):
                raise
        stop_checking(ctx, stages[stage]())
        ctx.stage = stage = stage + 1


def _output_changed(ctx, stage, output):
    """Whether a layer's output has been changed in place. `stage` of _saved: 1 the output alone, 2 also weights."""
    counter, version = getattr(ctx, "version", (None, None))
    if counter is None:
        changed, weights_too = stage == 1 or (stage == 2 and version_of(output) != 0), stage == 2
    else:
        changed = version_of(counter) != version
        weights_too = any(version_of(weight) != version for weight, version in ctx.weights)
    if changed and weights_too:
        raise RuntimeError(f"{_CHANGED}: the output of a layer, and a bias or weight that its output depends on")
    return changed


def _unread(weights, of_input, of_states):
    """The places in `weights` of the roles that backward does not read.

    `of_input`, `of_states`: whether backward computes the gradient of the input, and of any earlier h.
    """
    reads = {"input": of_input, "states": of_states, "all": True, None: False}
    return [i for i, weight in enumerate(weights) if not reads[weight.read_for]]


class _Layer(torch.autograd.Function):
    """apply(namespace, cell, rows, input, *states, *weights) -> (output, *final states)."""

    @staticmethod
    def forward(ctx, namespace, cell, rows, input, *tensors):
        op = OPERATORS[namespace][cell]
        states = op.states
        ctx.namespace, ctx.cell = namespace, cell
        if torch.compiler.is_compiling():  # a graph carries zeros for missing gradients
            outputs = op.layer.fwd(input, *tensors[:states], tensors[states:], *rows, *op.flags)
            ctx.batch_sizes = None
            ctx.save_for_backward(*rows, input, *tensors, outputs[0], *outputs[1 + states :])
            # A graph does not see that a saved output is changed in place. Inductor makes no copy where it is not.
            return outputs[0].clone(), *outputs[1 : 1 + states]
        ctx.set_materialize_grads(False)
        batch_sizes, lengths = rows.batch_sizes, rows.lengths  # *rows takes 0.1 us, because it is a NamedTuple
        try:
            outputs = op.eager_layer.fwd(input, *tensors[:states], tensors[states:], batch_sizes, lengths, *op.flags)
        except RuntimeError as error:
            reraise(error)
        if saved_tensors_hooks(True) is not None:
            ctx.version = _counter_of(outputs[0]), version_of(outputs[0])
            ctx.weights = [(w, version_of(w)) for w in tensors[states:] if not w.is_inference()]
        # Hooks may round what they pack, and autograd saves nothing that was made in inference mode.
        ctx.batch_sizes = batch_sizes if batch_sizes is None else batch_sizes.clone()
        ctx.save_for_backward(None, lengths, input, *tensors, outputs[0], *outputs[1 + states :])
        return outputs[: 1 + states]

    @staticmethod
    def backward(ctx, *grads):
        op, needs = OPERATORS[ctx.namespace][ctx.cell], ctx.needs_input_grad[3:]
        compiling, differentiable = torch.compiler.is_compiling(), _differentiable(grads)
        first, count = _ROWS + 1 + op.states, len(needs) - 1 - op.states  # of the weights, among what is saved

        def unneeded():
            arrangement = arrangement_of(op.spec, saved_places(ctx, slice(first, first + count)))
            assert arrangement is not None  # forward has run with these weights
            roles = arrangement.layout.weights * arrangement.directions
            return [first + i for i in _unread(roles, needs[0], True)]

        def output():
            return [first + count]

        if compiling:
            saved, stage = ctx.saved_tensors, 0
        else:
            saved, stage = _saved(ctx, [output] if differentiable else [output, unneeded])
        batch_sizes, lengths, input = saved[: _ROWS + 1]
        rows = Rows(batch_sizes if ctx.batch_sizes is None else ctx.batch_sizes, lengths)
        states, weights, results = saved[_ROWS + 1 : first], saved[first : first + count], saved[first + count :]
        if differentiable:

            def again(input, states, weights):
                return reference.layer(ctx.cell, input, states, weights, rows)

            gradients = _reexpressed_backward(again, input, states, weights, needs, grads)
        else:
            arguments = input, *states, weights, *rows, *op.flags
            if not compiling:
                follow_switch_in_backward(ctx.namespace, input)
                if _output_changed(ctx, stage, results[0]):
                    results = op.layer.fwd(*arguments)[0], *results[1:]
            gradients = _wanted(op.layer.bwd(*grads, *arguments, *results, *_needed(needs, op.states)), needs)
        return (None, None, None, *gradients)


class _Step(torch.autograd.Function):
    """apply(namespace, cell, input, *states, *weights) -> final states. None stands for a missing state or bias."""

    @staticmethod
    def forward(ctx, namespace, cell, input, *tensors):
        op = OPERATORS[namespace][cell]
        ctx.namespace, ctx.cell = namespace, cell
        if torch.compiler.is_compiling():
            outputs = op.step.fwd(input, *tensors, *op.flags)
        else:
            ctx.set_materialize_grads(False)
            if tensors[op.states].is_inference():  # autograd cannot save it, and torch's cells need not
                raise Refused("weight_ih was made in inference mode")
            try:
                outputs = op.eager_step.fwd(input, *tensors, *op.flags)
            except RuntimeError as error:
                reraise(error)
        if isinstance(outputs, Tensor):
            outputs = (outputs,)
        ctx.save_for_backward(input, *tensors, *(outputs[op.states :] or outputs))
        if torch.compiler.is_compiling() and len(outputs) == op.states:  # a saved result, as in _Layer
            return tuple(output.clone() for output in outputs)
        return outputs[: op.states]

    @staticmethod
    def backward(ctx, *grads):
        op, needs = OPERATORS[ctx.namespace][ctx.cell], ctx.needs_input_grad[2:]
        compiling, differentiable = torch.compiler.is_compiling(), _differentiable(grads)
        needed = _needed(needs, op.states)

        def unneeded():
            return [1 + op.states + i for i in _unread(step_weights(op.spec), *needed[:2])]

        saved = ctx.saved_tensors if compiling else _saved(ctx, [] if differentiable else [unneeded])[0]
        given, results = saved[: len(needs)], saved[len(needs) :]
        if differentiable:
            input, *tensors = given
            states = tensors[: op.states]
            weights = [weight for weight in tensors[op.states :] if weight is not None]

            def again(input, states, weights):
                return reference.step(ctx.cell, input, states, weights)

            gradients = _reexpressed_backward(again, input, states, weights, needs, grads)
            gradients += [None] * (len(needs) - len(gradients))
        else:
            if not compiling:
                follow_switch_in_backward(ctx.namespace, given[0])
            gradients = _wanted(op.step.bwd(*grads, *given, *op.flags, *results, *needed), needs)
        return (None, None, *gradients)


def _needed(needs, states):
    """The operators' need_grad_input, need_grad_states and need_grad_weights."""
    return needs[0], True in needs[1 : 1 + states], True in needs[1 + states :]


def _wanted(results, needs):
    """An operator's gradients, with None for a gradient that is not wanted and for a missing tensor."""
    gradients = [*results[:-1], *results[-1]]
    for i, need in enumerate(needs):
        if not need:
            gradients[i : i + 1] = (None,)  # a step without biases has fewer gradients
    return gradients


def _differentiable(grads):
    """Whether backward will be differentiated itself, or runs on many gradients at once.

    torch.func.vmap and is_grads_batched=True do the latter.
    """
    if torch.compiler.is_compiling():
        return False
    if torch.is_grad_enabled() or is_transforming():
        return True
    for grad in grads:
        if grad is not None and is_batched(grad):
            return True
    return False


def _reexpressed_backward(again, input, states, weights, needs, grads):
    """The gradients of one layer by torch's own operators, which can be differentiated again and batched."""
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad(), torch.autocast(input.device.type, enabled=False):
        # Aliases, because one tensor may stand in two places (hx = cx) and each place has its own gradient.
        tensors = [t if t is None else t.view_as(t) for t in (input, *states, *weights)]
        outputs = again(tensors[0], tensors[1 : 1 + len(states)], tensors[1 + len(states) :])
    given = [(output, grad) for output, grad in zip(outputs, grads, strict=True) if grad is not None]
    if not given:
        return [None] * len(tensors)
    needs = needs[: len(tensors)]
    wanted: list[Any] = [tensor for tensor, need in zip(tensors, needs, strict=True) if need]
    outputs, grads = zip(*given, strict=True)
    found = iter(torch.autograd.grad(outputs, wanted, grads, create_graph=create_graph, allow_unused=True))
    return [next(found) if need else None for need in needs]


# The transforms of torch.func, which Function.apply prepares for, reach no call of the kernels (select.py).
apply_layer = eager_apply(_Layer)
_apply_step = eager_apply(_Step)


def layer(
    cell: str,
    input: Tensor,
    states: Sequence[Tensor | None],
    weights: Sequence[Tensor],
    rows: Rows = PADDED,
    namespace: str = "rnnfast",
) -> tuple[Tensor, ...]:
    """One layer through the operators of `ops.py`, differentiable. Arguments and results are `reference.layer`'s.

    This function, `stack` and `step` raise Refused, before anything is computed, for what the operators do not take.
    """
    if torch.is_grad_enabled() and _any_requires_grad(weights, input, states):
        return _train(cell, input, states, weights, rows, namespace)
    return infer(OPERATORS[namespace][cell], input, states, weights, rows, 1)


def _train(cell, input, states, weights, rows, namespace):
    if torch.compiler.is_compiling():  # Dynamo refuses one tensor in two places (hx = cx, tied weights)
        states, weights = [s.view_as(s) for s in states], [w.view_as(w) for w in weights]
        return _Layer.apply(namespace, cell, rows, input, *states, *weights)
    return apply_layer(namespace, cell, rows, input, *states, *weights)


def infer(
    op: Cell,
    input: Tensor,
    states: Sequence[Tensor | None],
    weights: Sequence[Tensor],
    rows: Rows,
    num_layers: int,
) -> tuple[Tensor, ...]:
    """A stack of layers without gradients, by the operators `op`."""
    if torch.compiler.is_compiling():
        return op.layer.infer(input, *states, weights, *rows, *op.flags, num_layers)
    try:
        return op.eager_layer.infer(input, *states, weights, *rows, *op.flags, num_layers)
    except RuntimeError as error:
        reraise(error)


def stack(
    cell: str,
    input: Tensor,
    states: Sequence[Tensor | None],
    weights: Sequence[Tensor],
    num_layers: int,
    dropout: float = 0.0,
    rows: Rows = PADDED,
    namespace: str = "rnnfast",
) -> tuple[Tensor, ...]:
    """A stack of layers through the operators, differentiable. Arguments and results are `layer_by_layer`'s."""
    trains = torch.is_grad_enabled() and _any_requires_grad(weights, input, states)
    if not trains and (dropout == 0 or num_layers == 1):
        return infer(OPERATORS[namespace][cell], input, states, weights, rows, num_layers)
    if num_layers == 1:
        return _train(cell, input, states, weights, rows, namespace)
    require_later_layers(cell, states, weights, num_layers)
    each = functools.partial(layer, namespace=namespace)
    return layer_by_layer(each, cell, input, states, weights, num_layers, dropout, rows)


def step(
    cell: str,
    input: Tensor,
    states: Sequence[Tensor | None],
    weights: Sequence[Tensor],
    namespace: str = "rnnfast",
) -> tuple[Tensor, ...]:
    """One step of a cell through the operators, differentiable. Arguments and results are `reference.step`'s."""
    op = OPERATORS[namespace][cell]
    missing = () if len(weights) == op.step_count else (None,) * (op.step_count - len(weights))
    compiling = torch.compiler.is_compiling()
    if torch.is_grad_enabled() and _any_requires_grad(weights, input, states):
        if compiling:
            states, weights = [s if s is None else s.view_as(s) for s in states], [w.view_as(w) for w in weights]
            return _Step.apply(namespace, cell, input, *states, *weights, *missing)
        return _apply_step(namespace, cell, input, *states, *weights, *missing)
    operators = op.step if compiling else op.eager_step
    try:
        results = operators.infer(input, *states, *weights, *missing, *op.flags)
    except RuntimeError as error:
        reraise(error)
    return (results,) if op.states == 1 else results


def _any_requires_grad(weights, input, states):
    for weight in weights:
        if weight.requires_grad:
            return True
    return input.requires_grad or any(state is not None and state.requires_grad for state in states)
