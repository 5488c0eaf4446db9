"""Autograd through the modules: torch.nn's gradients wherever torch.nn gives one, and never a silently wrong one."""

import functools
import gc
import re
import weakref

import pytest
import torch
from support.twins import (
    CELLS,
    LAYERS,
    assert_same,
    cells_take_the_kernels,  # noqa: F401
    gradients,
    state_of,
    tensors,
    total,
    twins,
)
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence
from torch.utils.checkpoint import checkpoint

import rnnfast

KINDS = [*LAYERS, *CELLS]
DEEP = {"num_layers": 2, "bidirectional": True}


def sample(kind, **factory):
    return torch.randn(2, 3, **factory) if kind in CELLS else torch.randn(5, 2, 3, **factory)


def leaf_inputs(kind, module, **factory):
    """Input and states, all leaves that ask for gradients, as a flat list."""
    torch.manual_seed(5)
    values = [sample(kind, **factory), *tensors(state_of(module, 2, **factory))]
    return [value.requires_grad_() for value in values]


def call(module, x, *states):
    return module(x, tuple(states) if len(states) == 2 else states[0] if states else None)


def backward_of(kind, module, losses=total, **factory):
    """All gradients after one backward: inputs first, then parameters by name."""
    leaves = leaf_inputs(kind, module, **factory)
    losses(call(module, *leaves)).backward()
    return [leaf.grad for leaf in leaves], gradients(module)


# ------------------------------------------------ which gradients


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients(kind, training):
    ours, theirs = twins(kind, **({} if kind in CELLS else DEEP))
    assert_same(*(backward_of(kind, module.train(training)) for module in (ours, theirs)))


LOSSES = {
    "output": lambda result: total(result[0]),
    "last_state": lambda result: total(tensors(result)[-1]),
    "h_n": lambda result: total(tensors(result)[1]),
    "expanded": lambda result: sum(t.sum() for t in tensors(result)),
    "last_step": lambda result: tensors(result)[0][-1].square().sum(),
}


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("kind", LAYERS)
def test_gradients_of_parts_of_the_result(kind, loss):
    ours, theirs = twins(kind, **DEEP)
    assert_same(*(backward_of(kind, module, LOSSES[loss]) for module in (ours, theirs)))


@pytest.mark.parametrize("frozen", ["weight_ih", "weight_hh", "bias", "weight", "l0", "reverse", ""])
@pytest.mark.parametrize("kind", LAYERS)
def test_partial_freezing(kind, frozen):
    ours, theirs = twins(kind, **DEEP)
    for module in (ours, theirs):
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(frozen not in name)
    assert_same(*(backward_of(kind, module) for module in (ours, theirs)))
    for name, parameter in ours.named_parameters():
        assert (parameter.grad is None) == (frozen in name)
    x = sample(kind)
    assert ours(x)[0].requires_grad == (frozen != "")


@pytest.mark.parametrize("kind", KINDS)
def test_each_input_alone(kind):
    ours, theirs = twins(kind)
    for module in (ours, theirs):
        module.requires_grad_(False)
    for i in range(len(leaf_inputs(kind, ours))):
        grads = []
        for module in (ours, theirs):
            leaves = [leaf.requires_grad_(j == i) for j, leaf in enumerate(leaf_inputs(kind, module))]
            total(call(module, *leaves)).backward()
            grads.append([leaf.grad for leaf in leaves])
        assert_same(*grads)
        assert grads[0][i] is not None


@pytest.mark.parametrize("kind", LAYERS)
def test_packed_gradients(kind):
    ours, theirs = twins(kind, **DEEP)
    grads = []
    for module in (ours, theirs):
        x, *states = leaf_inputs(kind, module)
        packed = pack_padded_sequence(x, torch.tensor([2, 5]), enforce_sorted=False)
        (output, *_), state = call(module, packed, *states)
        (total(output) + total(state)).backward()
        grads.append(([x.grad, *(s.grad for s in states)], gradients(module)))
    assert_same(*grads)
    assert (grads[0][0][0][2:, 0] == 0).all(), "padding gets no gradient"


def test_packed_input_built_by_hand_gets_a_gradient():
    ours, theirs = twins("gru")
    grads = []
    for module in (ours, theirs):
        data = torch.linspace(-1, 1, 18).view(6, 3).requires_grad_()
        total(module(PackedSequence(data, torch.tensor([3, 2, 1])))[0].data).backward()
        grads.append(data.grad)
    assert_same(*grads)


# ------------------------------------------------ the graph


@pytest.mark.parametrize("kind", KINDS)
def test_retain_graph_twice_then_not(kind):
    ours, theirs = twins(kind)
    results = []
    for module in (ours, theirs):
        leaves = leaf_inputs(kind, module)
        loss = total(call(module, *leaves))
        loss.backward(retain_graph=True)
        once = [leaf.grad.clone() for leaf in leaves]
        loss.backward()
        torch.testing.assert_close([leaf.grad for leaf in leaves], [2 * grad for grad in once])
        results.append(([leaf.grad for leaf in leaves], gradients(module)))
        with pytest.raises(RuntimeError, match="backward through the graph a second time"):
            loss.backward()
    assert_same(*results)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("kind", KINDS)
def test_no_graph_without_grad_mode(kind, mode):
    ours, theirs = twins(kind)
    with mode():
        result, expected = ours(sample(kind)), theirs(sample(kind))
    for tensor, other in zip(tensors(result), tensors(expected), strict=True):
        assert not tensor.requires_grad and tensor.grad_fn is None
        assert tensor.is_inference() == other.is_inference()
    assert all(t.requires_grad for t in tensors(ours(sample(kind))))


@pytest.mark.parametrize("changed", ["input", "weight", "output", "hx"])
@pytest.mark.parametrize("kind", ["rnn_tanh", "gru", "lstm", "lstm_proj", "grucell", "lstmcell"])
def test_writing_what_backward_needs_is_never_silent(kind, changed):
    """Either torch's error about an in-place write, or the gradient of what was computed."""
    ours, _ = twins(kind)
    expected = backward_of(kind, ours, lambda result: sum(t.sum() for t in tensors(result)))
    ours.zero_grad()
    leaves = leaf_inputs(kind, ours)
    inner = [leaf * 1 for leaf in leaves]
    result = call(ours, *inner)
    loss = sum(t.sum() for t in tensors(result))
    with torch.no_grad():
        if changed == "weight":
            getattr(ours, "weight_hh" if kind in CELLS else "weight_hh_l0").mul_(-1.5)
        else:
            {"input": inner[0], "hx": inner[1], "output": tensors(result)[0]}[changed].mul_(-1.5)
    try:
        loss.backward()
    except RuntimeError as error:
        assert re.search("modified by an inplace operation|has been modified inplace", str(error))
    else:
        assert_same(([leaf.grad for leaf in leaves], gradients(ours)), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_graph_dies_with_its_result(kind):
    """No reference cycle: memory of a step is free as soon as its result is, without the garbage collector."""
    boxes = []

    class Box:
        def __init__(self, tensor):
            self.tensor = tensor.detach()  # with its grad_fn it would be a cycle of its own
            boxes.append(weakref.ref(self))

    ours, _ = twins(kind)
    gc.disable()
    try:
        with torch.autograd.graph.saved_tensors_hooks(Box, lambda box: box.tensor):
            result = ours(sample(kind))
        assert boxes and all(box() is not None for box in boxes)
        del result
        assert all(box() is None for box in boxes)
    finally:
        gc.enable()


@pytest.mark.parametrize("kind", LAYERS)
def test_hooks(kind):
    seen, grads = [], []
    for module in twins(kind):
        log = []
        module.register_forward_pre_hook(lambda m, args: (args[0] * 2, *args[1:]))
        module.register_forward_hook(lambda m, args, out: (out[0] * 0.5, out[1]))
        module.register_full_backward_hook(lambda m, gi, go, log=log: log.append((gi[0], go[0])))
        module.weight_hh_l0.register_hook(lambda grad: grad * 3)
        module.weight_ih_l0.register_post_accumulate_grad_hook(lambda p, log=log: log.append(p.grad.clone()))
        x = torch.linspace(-1, 1, 30).view(5, 2, 3).requires_grad_()
        total(module(x)[0]).backward()
        seen.append(log)
        grads.append((x.grad, gradients(module)))
    assert len(seen[0]) == len(seen[1]) == 2
    assert_same(sorted(tensors(seen[0]), key=lambda t: t.numel()), sorted(tensors(seen[1]), key=lambda t: t.numel()))
    assert_same(*grads)


@pytest.mark.parametrize("kind", KINDS)
def test_saved_tensor_hooks(kind):
    """What is saved goes through torch's hooks (offloading, quantized activations), and comes back from them."""
    ours, theirs = twins(kind)
    expected, packed = backward_of(kind, theirs), []

    def pack(tensor):
        packed.append(tensor)
        return tensor.clone()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
        actual = backward_of(kind, ours)
    assert packed
    assert_same(actual, expected)


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non_reentrant"])
@pytest.mark.parametrize("kind", LAYERS)
def test_checkpoint(kind, reentrant):
    ours, theirs = twins(kind, num_layers=2, dropout=0.5)
    results = []
    for module in (ours, theirs):
        torch.manual_seed(2)
        x, *states = leaf_inputs(kind, module)
        output = checkpoint(functools.partial(call, module), x, *states, use_reentrant=reentrant)
        total(output).backward()
        results.append((output, [x.grad, *(s.grad for s in states)], gradients(module)))
    assert_same(*results)


def test_anomaly_mode_names_a_nan():
    ours, _ = twins("gru")
    with pytest.warns(UserWarning, match="Anomaly Detection"), torch.autograd.detect_anomaly():
        loss = (ours(torch.randn(5, 2, 3))[0] * 0).sqrt().sum()
        with pytest.raises(RuntimeError, match="returned nan values"):
            loss.backward()


# ------------------------------------------------ higher derivatives and torch.func, in float64


@pytest.mark.parametrize("kind", ["rnn_tanh", "gru", "lstm", "lstm_proj", "rnncell_tanh", "grucell", "lstmcell"])
def test_gradcheck_and_gradgradcheck(kind):
    name, options = (LAYERS | CELLS)[kind]
    ours = getattr(rnnfast, name)(2, 3, dtype=torch.float64, **options)
    names = [name for name, _ in ours.named_parameters()]
    x = torch.randn(2, 2, dtype=torch.float64) if kind in CELLS else torch.randn(3, 2, 2, dtype=torch.float64)
    leaves = [x, *tensors(state_of(ours, 2, dtype=torch.float64)), *(p.detach().clone() for p in ours.parameters())]
    leaves = [leaf.requires_grad_() for leaf in leaves]

    def function(*args):
        states, weights = args[1 : -len(names)], dict(zip(names, args[-len(names) :], strict=True))
        hx = tuple(states) if len(states) == 2 else states[0]
        return tuple(tensors(torch.func.functional_call(ours, weights, (args[0], hx))))

    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True)


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_penalty(kind):
    """WGAN-GP: the norm of the input's gradient is itself trained on."""
    ours, theirs = twins(kind, dtype=torch.float64)
    results = []
    for module in (ours, theirs):
        leaves = leaf_inputs(kind, module, dtype=torch.float64)
        grads = torch.autograd.grad(total(call(module, *leaves)), leaves, create_graph=True)
        sum(grad.square().sum() for grad in grads).backward()
        results.append((grads, [leaf.grad for leaf in leaves], gradients(module)))
    assert_same(*results)


@pytest.mark.parametrize("kind", LAYERS)
def test_packed_double_backward(kind):
    results = []
    for module in twins(kind, dtype=torch.float64, **DEEP):
        x, *states = leaf_inputs(kind, module, dtype=torch.float64)
        output, _ = call(module, pack_padded_sequence(x, torch.tensor([2, 5]), enforce_sorted=False), *states)
        (grad,) = torch.autograd.grad(total(output.data), x, create_graph=True)
        grad.square().sum().backward()
        results.append((grad, x.grad, gradients(module)))
    assert_same(*results)


def inner_sgd(f, parameters, x):
    """One MAML step: the loss after a differentiable step of gradient descent."""
    grads = torch.func.grad(lambda p: f(p, x).square().sum())(parameters)
    stepped = {name: p - 0.1 * grads[name] for name, p in parameters.items()}
    return f(stepped, x).square().sum()


TRANSFORMS = {
    "grad": lambda f, p, x: torch.func.grad(lambda p: f(p, x).square().sum())(p),
    "vjp": lambda f, p, x: torch.func.vjp(f, p, x)[1](torch.ones_like(f(p, x))),
    "jvp_input": lambda f, p, x: torch.func.jvp(lambda x: f(p, x), (x,), (x + 1,)),
    "jvp_weights": lambda f, p, x: torch.func.jvp(lambda p: f(p, x), (p,), (p,)),
    "jacrev": lambda f, p, x: torch.func.jacrev(lambda x: f(p, x))(x),
    "jacfwd": lambda f, p, x: torch.func.jacfwd(lambda x: f(p, x))(x),
    "hvp": lambda f, p, x: torch.func.jvp(torch.func.grad(lambda x: f(p, x).square().sum()), (x,), (x + 1,)),
    "maml": lambda f, p, x: torch.func.grad(lambda p: inner_sgd(f, p, x))(p),
    "functionalize": lambda f, p, x: torch.func.functionalize(lambda x: f(p, x))(x),
    "vmap_input": lambda f, p, x: torch.func.vmap(lambda x: f(p, x))(torch.stack([x, x + 1])),
    "vmap_weights": lambda f, p, x: torch.func.vmap(lambda p: f(p, x))({k: torch.stack([v, -v]) for k, v in p.items()}),
    "per_sample": lambda f, p, x: torch.func.vmap(
        torch.func.grad(lambda p, x: f(p, x).square().sum()), in_dims=(None, 0)
    )(p, torch.stack([x, x + 1])),
    "batched_grads": lambda f, p, x: torch.autograd.functional.jacobian(lambda x: f(p, x), x, vectorize=True),
    "hessian": lambda f, p, x: torch.autograd.functional.hessian(lambda x: f(p, x).square().sum(), x, vectorize=True),
    "functional_jvp": lambda f, p, x: torch.autograd.functional.jvp(lambda x: f(p, x), x, x + 1),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("kind", ["rnn_tanh", "gru", "lstm", "lstm_proj", "rnncell_tanh", "grucell", "lstmcell"])
def test_transforms(kind, transform):
    """Where torch.nn gives an answer, the same; where it has none (vmap over a layer), its error."""
    ours, theirs = twins(kind, dtype=torch.float64)
    x = sample(kind, dtype=torch.float64)

    def run(module):
        parameters = {name: p.detach() for name, p in module.named_parameters()}
        return TRANSFORMS[transform](
            lambda p, x: tensors(torch.func.functional_call(module, p, (x,)))[0], parameters, x
        )

    try:
        expected = run(theirs)
    except RuntimeError as error:
        with pytest.raises(RuntimeError) as caught:
            run(ours)
        assert str(caught.value) == str(error)
    else:
        assert_same(run(ours), expected)
        assert any(t.abs().max() > 0 for t in tensors(expected))


@pytest.mark.parametrize("kind", KINDS)
def test_forward_mode_level(kind):
    ours, theirs = twins(kind, dtype=torch.float64)
    x, tangents = sample(kind, dtype=torch.float64), []
    for module in (ours, theirs):
        with torch.autograd.forward_ad.dual_level():
            result = tensors(module(torch.autograd.forward_ad.make_dual(x, x + 1)))
            tangents.append([torch.autograd.forward_ad.unpack_dual(t).tangent for t in result])
    assert all(tangent is not None for tangent in tangents[0])
    assert_same(*tangents)
