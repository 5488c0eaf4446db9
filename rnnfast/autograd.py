"""Gradients around the operators: a torch.autograd.Function for layers and one for steps, outside the operators.

Whether anything must be saved is decided before the Function, so inference never pays for it. Backward of backward is
a re-expression: with create_graph=True the gradients are those of reference.py's loop over the same saved inputs.

Both have forward(ctx, ...), for the split into forward and setup_context costs an inspect.signature().bind at every
call, 20 of the 50 us of a small one, and would make results of what is merely saved.

Users may change in place, before backward, what torch.nn's backward does not need: a layer's output, although ours
needs it; biases; a weight whose product needs no gradient. Autograd finds such a change when backward asks for what was
saved. Then the check is taken off those tensors, and a changed output is computed again. A changed input, state or
other weight still raises autograd's own error. Where saved-tensor hooks are active (those of checkpointing, say)
autograd checks nothing: there the version counter of the output is kept, and backward looks at it.
"""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from . import reference
from .cells import arrangement_of, step_weights
from .ops import OPERATORS, Cell, Refused, is_refusal, require_later_layers
from .precision import follow_switch_in_backward

_EMPTY = torch.empty(0)
_CHANGED = (
    "one of the variables needed for gradient computation has been modified by an inplace operation"  # autograd's
)
_top_hooks = torch._C._autograd._top_saved_tensors_default_hooks


def _counter_of(tensor: Tensor) -> Tensor:
    """A tensor that shares the version counter of `tensor`, so its views' and aliases' too, but none of its memory."""
    counter = tensor.detach()
    counter.data = _EMPTY
    return counter


def _same(tensor):
    return tensor


def _saved(ctx, stages):
    """(What forward saved, through how many `stages` it was got).

    Where autograd finds a change in place it is asked again, without its check of some places: `stages` are functions
    that give them, one more of them each time. Raises autograd's error for a change elsewhere.
    """
    stage = getattr(ctx, "stage", 0)  # an earlier backward through the same node may have gone through some
    if stage > len(stages):
        raise RuntimeError(f"{_CHANGED}: a weight or bias that backward of backward needs")
    while True:
        try:
            return ctx.saved_tensors, stage  # checkpointing forbids to read it twice
        except RuntimeError as error:
            if stage == len(stages) or _CHANGED not in str(error):
                raise
        for place in stages[stage]():
            ctx._raw_saved_tensors[place].register_hooks(_same, _same)  # autograd checks no tensor that has hooks
        ctx.stage = stage = stage + 1


def _output_changed(ctx, stage, output):
    """Whether a layer's output has been changed in place; `stage` of _saved: 1 the output alone, 2 also weights."""
    counter, version = getattr(ctx, "version", (None, None))
    if counter is None:
        changed, weights_too = stage == 1 or (stage == 2 and output._version != 0), stage == 2
    else:
        changed = counter._version != version
        weights_too = any(weight._version != version for weight, version in ctx.weights)
    if changed and weights_too:
        raise RuntimeError(f"{_CHANGED}: the output of a layer, and a bias or weight that its output depends on")
    return changed


def _unread(weights, of_input, of_states):
    """The places, among the roles `weights`, of those that backward does not read for the gradients that it computes.

    `of_input`, `of_states`: whether it computes the gradient of the input, and that of any earlier h.
    """
    reads = {"input": of_input, "states": of_states, "all": True, None: False}
    return [i for i, weight in enumerate(weights) if not reads[weight.read_for]]


class _Layer(torch.autograd.Function):
    """apply(namespace, cell, batch_sizes, lengths, input, *states, *weights) -> (output, *final states)."""

    @staticmethod
    def forward(ctx, namespace, cell, batch_sizes, lengths, input, *tensors):
        op = OPERATORS[namespace][cell]
        states = op.states
        ctx.namespace, ctx.cell = namespace, cell
        if torch.compiler.is_compiling():  # its graphs carry zeros for gradients that are not there
            outputs = op.layer.fwd(input, *tensors[:states], tensors[states:], batch_sizes, lengths, *op.flags)
            ctx.batch_sizes = None
            ctx.save_for_backward(batch_sizes, lengths, input, *tensors, outputs[0], *outputs[1 + states :])
            # A graph does not see that a saved output is changed in place. Inductor makes no copy where it is not.
            return outputs[0].clone(), *outputs[1 : 1 + states]
        ctx.set_materialize_grads(False)
        try:
            outputs = op.eager_layer.fwd(input, *tensors[:states], tensors[states:], batch_sizes, lengths, *op.flags)
        except RuntimeError as error:
            if is_refusal(error):
                raise Refused(str(error)) from error
            raise
        if _top_hooks(True) is not None:
            ctx.version = _counter_of(outputs[0]), outputs[0]._version
            ctx.weights = [(w, w._version) for w in tensors[states:] if not w.is_inference()]
        # Hooks may round what they pack, and autograd saves nothing that was made in inference mode.
        ctx.batch_sizes = batch_sizes if batch_sizes is None else batch_sizes.clone()
        ctx.save_for_backward(None, lengths, input, *tensors, outputs[0], *outputs[1 + states :])
        return outputs[: 1 + states]

    @staticmethod
    def backward(ctx, *grads):
        op, needs = OPERATORS[ctx.namespace][ctx.cell], ctx.needs_input_grad[4:]
        compiling, differentiable = torch.compiler.is_compiling(), _differentiable(grads)
        first, count = 3 + op.states, len(needs) - 1 - op.states  # of the weights, among what is saved

        def unneeded():
            given = [saved.data for saved in ctx._raw_saved_tensors[first : first + count]]
            layout, directions, *_ = arrangement_of(op.spec, given)
            return [first + i for i in _unread(layout.weights * directions, needs[0], True)]

        def output():
            return [first + count]

        if compiling:
            saved, stage = ctx.saved_tensors, 0
        else:
            saved, stage = _saved(ctx, [output] if differentiable else [output, unneeded])
        batch_sizes, lengths, input = saved[:3]
        batch_sizes = batch_sizes if ctx.batch_sizes is None else ctx.batch_sizes
        states, weights, results = saved[3:first], saved[first : first + count], saved[first + count :]
        if differentiable:

            def again(input, states, weights):
                return reference.layer(ctx.cell, input, states, weights, batch_sizes, lengths)

            gradients = _reexpressed_backward(again, input, states, weights, needs, grads)
        else:
            arguments = input, *states, weights, batch_sizes, lengths, *op.flags
            if not compiling:
                follow_switch_in_backward(ctx.namespace, input)
                if _output_changed(ctx, stage, results[0]):
                    results = op.layer.fwd(*arguments)[0], *results[1:]
            gradients = _wanted(op.layer.bwd(*grads, *arguments, *results, *_needed(needs, op.states)), needs)
        return (None, None, None, None, *gradients)


class _Step(torch.autograd.Function):
    """apply(namespace, cell, input, *states, *weights) -> final states; all that a step lacks is None."""

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
                if is_refusal(error):
                    raise Refused(str(error)) from error
                raise
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
apply_layer = super(torch.autograd.Function, _Layer).apply
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
    """One layer through the operators of `ops.py`, differentiable; the arguments and results of `reference.layer`.

    Raises Refused, before anything is computed, for what the operators do not take; so do `stack` and `step`.
    """
    if torch.is_grad_enabled() and _any_requires_grad(weights, input, states):
        return _train(cell, input, states, weights, batch_sizes, lengths, namespace)
    return infer(OPERATORS[namespace][cell], input, states, weights, batch_sizes, lengths, 1)


def _train(cell, input, states, weights, batch_sizes, lengths, namespace):
    if torch.compiler.is_compiling():  # Dynamo refuses one tensor in two places (hx = cx, tied weights)
        states, weights = [s.view_as(s) for s in states], [w.view_as(w) for w in weights]
        return _Layer.apply(namespace, cell, batch_sizes, lengths, input, *states, *weights)
    return apply_layer(namespace, cell, batch_sizes, lengths, input, *states, *weights)


def infer(
    op: Cell,
    input: Tensor,
    states: Sequence[Tensor | None],
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
    num_layers: int,
) -> tuple[Tensor, ...]:
    """A stack of layers without gradients, by the operators `op`."""
    if torch.compiler.is_compiling():
        return op.layer.infer(input, *states, weights, batch_sizes, lengths, *op.flags, num_layers)
    try:
        return op.eager_layer.infer(input, *states, weights, batch_sizes, lengths, *op.flags, num_layers)
    except RuntimeError as error:
        if is_refusal(error):
            raise Refused(str(error)) from error
        raise


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
    trains = torch.is_grad_enabled() and _any_requires_grad(weights, input, states)
    if not trains and (dropout == 0 or num_layers == 1):
        return infer(OPERATORS[namespace][cell], input, states, weights, batch_sizes, lengths, num_layers)
    if num_layers == 1:
        return _train(cell, input, states, weights, batch_sizes, lengths, namespace)
    require_later_layers(cell, states, weights, num_layers)
    each = functools.partial(layer, namespace=namespace)
    return reference.stack(each, cell, input, states, weights, num_layers, dropout, batch_sizes, lengths)


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
    compiling = torch.compiler.is_compiling()
    if torch.is_grad_enabled() and _any_requires_grad(weights, input, states):
        if compiling:
            states, weights = [s.view_as(s) for s in states], [w.view_as(w) for w in weights]
            return _Step.apply(namespace, cell, input, *states, *weights, *biases)
        return _apply_step(namespace, cell, input, *states, *weights, *biases)
    operators = op.step if compiling else op.eager_step
    try:
        results = operators.infer(input, *states, *weights, *biases, *op.flags)
    except RuntimeError as error:
        if is_refusal(error):
            raise Refused(str(error)) from error
        raise
    return (results,) if op.states == 1 else results


def _any_requires_grad(weights, input, states):
    for weight in weights:
        if weight.requires_grad:
            return True
    return input.requires_grad or any(state is not None and state.requires_grad for state in states)
