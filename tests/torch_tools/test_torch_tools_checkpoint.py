"""torch.utils.checkpoint and torch.autograd.graph around the modules: recomputation, hooks on what is saved, nodes."""

import contextlib
import functools

import pytest
import torch
from support.torch_tools import (
    KINDS,
    LAYERS,
    Model,
    Own,
    Rows,
    assert_plant_is_caught,
    call,
    first,
    leaf,
    leaves,
    sample,
    trained,
    weight,
)
from support.twins import cells_take_the_kernels, total, twins  # noqa: F401
from torch.autograd import graph
from torch.utils import checkpoint as ckpt
from torch.utils.checkpoint import CheckpointPolicy, checkpoint

ROWS = Rows()


# ------------------------------------------------ torch.utils.checkpoint


def checkpointed(module, *, run=None, **kwargs):
    """Gradients of input and states after a checkpointed forward."""
    options = {"use_reentrant": False, **kwargs}
    return trained(module, lambda *inputs: checkpoint(run or functools.partial(call, module), *inputs, **options))


def selective(policy):
    """Options of `checkpoint` by which `policy` says for every operator whether its results are kept."""
    contexts = functools.partial(ckpt.create_selective_checkpoint_contexts, lambda ctx, op, *args, **kwargs: policy)
    return {"context_fn": contexts}


def nested(module, *inputs):
    return checkpoint(lambda *args: call(module, *args), *inputs, use_reentrant=False)


DROPOUT = {"kinds": LAYERS, "num_layers": 2, "dropout": 0.5}

ROWS["reentrant"] = lambda m: checkpointed(m, use_reentrant=True)
ROWS["non_reentrant"] = checkpointed
ROWS["output_only"] = lambda m: checkpointed(m, run=lambda *args: first(call(m, *args)))
ROWS["nested"] = lambda m: checkpointed(m, run=functools.partial(nested, m))
ROWS["nested_in_reentrant"] = lambda m: checkpointed(m, run=functools.partial(nested, m), use_reentrant=True)
ROWS["twice_in_one"] = lambda m: checkpointed(m, run=lambda *args: (call(m, *args), call(m, *args)))
ROWS["determinism_check_none"] = lambda m: checkpointed(m, determinism_check="none")
ROWS["debug"] = lambda m: checkpointed(m, debug=True)
ROWS["no_early_stop"] = lambda m: checkpointed(m, early_stop=False)
ROWS.put("two_layers", checkpointed, kinds=LAYERS, num_layers=2, bidirectional=True)
ROWS.put("dropout", checkpointed, **DROPOUT)
ROWS.put("dropout_reentrant", lambda m: checkpointed(m, use_reentrant=True), **DROPOUT)
ROWS.put("dropout_drawn_anew", lambda m: checkpointed(m, preserve_rng_state=False), **DROPOUT)
ROWS["selective_recompute"] = lambda m: checkpointed(m, **selective(CheckpointPolicy.MUST_RECOMPUTE))
ROWS["selective_list"] = lambda m: checkpointed(
    m, context_fn=functools.partial(ckpt.create_selective_checkpoint_contexts, [torch.ops.aten.mm.default])
)


SAVED = Rows(
    better="torch's own operators write to what such a policy saved, and raise",
    prepare=lambda module: setattr(module, "plain", True),
)


def keep(policy):
    def program(module):
        if not hasattr(module, "plain"):
            return checkpointed(module, **selective(policy))
        return trained(module)

    return program


SAVED["must_save"] = keep(CheckpointPolicy.MUST_SAVE)
SAVED["prefer_save"] = keep(CheckpointPolicy.PREFER_SAVE)


@ROWS.add()
def set_early_stop_false(module):
    with ckpt.set_checkpoint_early_stop(False):
        return checkpointed(module)


@ROWS.add()
def debug_enabled(module):
    with ckpt.set_checkpoint_debug_enabled(True):
        return checkpointed(module)


@ROWS.add()
def in_a_model(module):
    """The layer in the middle of what is recomputed."""
    model, x = Model(module), leaf(module)
    result = checkpoint(model, x, use_reentrant=False)
    total(result).backward()
    return result, x.grad


def sequential(module, **kwargs):
    x = leaf(module)
    model = torch.nn.Sequential(torch.nn.Identity(), Model(module), torch.nn.Tanh())
    result = ckpt.checkpoint_sequential(model, 3, x, **kwargs)
    total(result).backward()
    return result, x.grad


ROWS["sequential"] = lambda m: sequential(m, use_reentrant=False)
ROWS["sequential_reentrant"] = lambda m: sequential(m, use_reentrant=True)


@ROWS.add()
def frozen_input(module):
    result = checkpoint(module, sample(module), use_reentrant=False)
    total(result).backward()
    return result


@ROWS.add()
def two_backwards(module):
    x = leaf(module)
    loss = total(checkpoint(module, x, use_reentrant=False))
    loss.backward(retain_graph=True)
    loss.backward()
    return x.grad


@ROWS.add(dtype=torch.float64)
def double_backward(module):
    x = leaf(module)
    (grad,) = torch.autograd.grad(total(checkpoint(module, x, use_reentrant=False)), x, create_graph=True)
    grad.square().sum().backward()
    return grad, x.grad


@ROWS.add()
def changed_between(module):
    """Recomputation sees another weight; what it saves has the same shapes, and torch.nn is content with that."""
    x = leaf(module)
    result = checkpoint(module, x, use_reentrant=False)
    with torch.no_grad():
        weight(module).mul_(0.5)
    total(result).backward()
    return result, x.grad


@ROWS.add()
def recomputation_raises(module):
    calls = []

    def run(x):
        calls.append(x)
        if len(calls) > 1:
            raise ZeroDivisionError
        return module(x)

    total(checkpoint(run, leaf(module), use_reentrant=False)).backward()


@ROWS.add()
def another_shape_when_recomputed(module):
    calls = []

    def run(x):
        calls.append(x)
        return first(module(x[..., :1, :] if len(calls) > 1 else x)).sum()

    checkpoint(run, leaf(module), use_reentrant=False).backward()


# ------------------------------------------------ hooks on what is saved


def hooked(module, pack, unpack=lambda saved: saved):
    with graph.saved_tensors_hooks(pack, unpack):
        return trained(module)


def raising(error):
    def hook(tensor):
        raise error("a hook's own")

    return hook


ROWS["hooks_identity"] = lambda m: hooked(m, lambda t: t)
ROWS["hooks_clone"] = lambda m: hooked(m, lambda t: t.clone(), lambda t: t.clone())
ROWS["hooks_numpy"] = lambda m: hooked(m, lambda t: t.detach().numpy().copy(), torch.from_numpy)
ROWS["hooks_to_double"] = lambda m: hooked(
    m, lambda t: (t.dtype, t.double() if t.is_floating_point() else t), lambda p: p[1].to(p[0])
)
ROWS["hooks_detach"] = lambda m: hooked(m, lambda t: t.detach())
for error in (
    RuntimeError,
    ValueError,
    TypeError,
    AssertionError,
    NotImplementedError,
    StopIteration,
    MemoryError,
    Own,
):
    ROWS[f"pack_raises_{error.__name__}"] = lambda m, error=error: hooked(m, raising(error))
    ROWS[f"unpack_raises_{error.__name__}"] = lambda m, error=error: hooked(m, lambda t: t, raising(error))
ROWS["pack_raises_out_of_memory"] = lambda m: hooked(m, raising(torch.OutOfMemoryError))
ROWS["pack_gives_no_tensor"] = lambda m: hooked(m, lambda t: None)


@ROWS.add()
def pack_raises_once_then_the_call_works(module):
    """A failed call leaves nothing behind."""
    with contextlib.suppress(Own):
        hooked(module, raising(Own))
    return hooked(module, lambda t: t)


@pytest.mark.parametrize("kind", KINDS)
def test_a_raising_hook_is_asked_once(kind):
    """An exception of a hook ends the call: nothing is run a second time on another path."""
    ours, _ = twins(kind)
    asked = []

    def pack(tensor):
        asked.append(tensor)
        raise Own

    with pytest.raises(Own), graph.saved_tensors_hooks(pack, lambda saved: saved):
        ours(leaf(ours))
    assert len(asked) == 1


@ROWS.add()
def nested_hooks(module):
    with graph.saved_tensors_hooks(lambda t: t * 1, lambda t: t):
        return hooked(module, lambda t: t.clone())


@ROWS.add()
def save_on_cpu(module):
    inputs = leaves(module)
    with graph.save_on_cpu():
        result = call(module, *inputs)
    total(result).backward()
    return result, [value.grad for value in inputs]


@ROWS.add()
def save_on_cpu_around_a_checkpoint(module):
    with graph.save_on_cpu():
        return checkpointed(module)


@ROWS.add()
def hooks_in_a_checkpoint(module):
    def run(*inputs):
        with graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t):
            return call(module, *inputs)

    return checkpointed(module, run=run)


@ROWS.add()
def disabled_hooks(module):
    with graph.disable_saved_tensors_hooks("not here"):
        x = leaf(module)
        result = module(x)
        total(result).backward()
    return result, x.grad


@ROWS.add()
def disabled_hooks_refuse_hooks(module):
    with graph.disable_saved_tensors_hooks("not here"):
        return hooked(module, lambda t: t)


@ROWS.add()
def mutation_allowed(module):
    """Inputs, states and weights written between forward and backward: the gradients are those of the old values."""
    inputs = leaves(module)
    with graph.allow_mutation_on_saved_tensors():
        inner = [value * 1 for value in inputs]
        result = call(module, *inner)
        with torch.no_grad():
            for value in (*inner, weight(module)):
                value.mul_(-2)
        total(result).backward()
    return result, [value.grad for value in inputs]


@ROWS.add()
def mutation_of_the_result_allowed(module):
    x = leaf(module)
    with graph.allow_mutation_on_saved_tensors():
        output = first(module(x))
        output.mul_(2)
        output.sum().backward()
    return output, x.grad


# ------------------------------------------------ nodes of the graph


@ROWS.add()
def node_hooks(module):
    """Hooks before and after the node that made the output may change gradients."""
    x = leaf(module)
    output = first(module(x))
    output.grad_fn.register_prehook(lambda grads: tuple(None if g is None else g * 2 for g in grads))
    output.sum().backward()
    return x.grad


@ROWS.add()
def tensor_hooks_on_results(module):
    x, seen = leaf(module), []
    result = first(module(x))
    result.retain_grad()
    result.register_hook(lambda grad: grad * 3)
    result.register_hook(lambda grad: seen.append(grad))
    result.square().sum().backward()
    return seen, result.grad, x.grad


@ROWS.add()
def multi_grad_hook(module):
    seen = []
    handle = graph.register_multi_grad_hook(tuple(module.parameters()), lambda grads: seen.append(list(grads)))
    total(module(leaf(module))).backward()
    handle.remove()
    return seen


@ROWS.add()
def multi_grad_hook_any(module):
    seen = []
    inputs = leaves(module)
    graph.register_multi_grad_hook(tuple(inputs), lambda grad: seen.append(1), mode="any")
    total(call(module, *inputs)).backward()
    return seen, [value.grad for value in inputs]


@ROWS.add()
def gradient_edge(module):
    x = leaf(module)
    output = first(module(x))
    edge = graph.get_gradient_edge(output)
    return torch.autograd.grad(edge, [x, weight(module)], grad_outputs=torch.ones_like(output))


@ROWS.add()
def backward_inputs(module):
    """Only what is asked for gets a gradient."""
    x = leaf(module)
    total(module(x)).backward(inputs=[x, weight(module)])
    return x.grad


@ROWS.add()
def increment_version(module):
    x = leaf(module) * 1
    result = module(x)
    graph.increment_version(x)
    total(result).backward()


@ROWS.add()
def increment_version_of_a_weight(module):
    result = module(leaf(module))
    graph.increment_version([weight(module)])
    total(result).backward()


@SAVED.parametrize()
def test_saved(name, kind):
    SAVED.check(name, kind)


@ROWS.parametrize()
def test_row(name, kind):
    ROWS.check(name, kind)


def test_a_difference_is_caught():
    assert_plant_is_caught(ROWS)
