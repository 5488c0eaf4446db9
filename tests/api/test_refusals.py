"""One way out of the fast path: operators refuse before they compute, and nothing runs twice. On every backend."""

from __future__ import annotations

import pytest
import torch
from support.twins import LAYERS, assert_same, gradients, total, twins
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import rnnfast
from rnnfast import autograd
from rnnfast.call import Call
from rnnfast.check import fits
from rnnfast.ops import OPERATORS, Refused, is_refusal

BACKENDS = ("cpu", "emulator", "triton")


@pytest.fixture(params=BACKENDS)
def kernels(request):
    reason = rnnfast.backends()[request.param]
    if reason != "available":
        pytest.skip(f"backend {request.param}: {reason}")
    with rnnfast.backend(request.param, strict=True):
        yield request.param


class Log(TorchDispatchMode):
    """The operators of rnnfast that began, and those that returned."""

    def __init__(self):
        super().__init__()
        self.begun: list[str] = []
        self.done: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        ours = func.namespace.startswith("rnnfast") and "_cuda_" not in func.name()  # no questions about plans
        self.begun += [func.name()] * ours
        result = func(*args, **(kwargs or {}))
        self.done += [func.name()] * ours
        return result


def trained(module, forward, x):
    """Loss and gradients, as tensors apart from the module."""
    x = x.clone().requires_grad_()
    module.zero_grad()
    loss = total(forward(x))
    loss.backward()
    return loss.detach(), x.grad, {name: grad.clone() for name, grad in gradients(module).items()}


@pytest.mark.parametrize("num_layers", [1, 2])
@pytest.mark.parametrize("kind", LAYERS)
def test_checkpointing(kernels, kind, num_layers):
    ours, theirs = twins(kind, num_layers=num_layers)
    x = torch.randn(3, 2, 3)
    plain = trained(ours, lambda v: ours(v)[0], x)
    with Log() as log:
        again = trained(ours, lambda v: checkpoint(lambda u: ours(u)[0].relu_(), v, use_reentrant=False), x)
    expected = trained(theirs, lambda v: theirs(v)[0].relu(), x)
    assert_same(again, expected)
    assert_same(plain, trained(theirs, lambda v: theirs(v)[0], x))
    assert log.begun == log.done
    assert sum("fwd" in name for name in log.done) <= 3 * num_layers  # forward, recomputed, and for the changed output


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("kind", LAYERS)
def test_results_changed_in_place(kernels, kind, bidirectional):
    ours, theirs = twins(kind, bidirectional=bidirectional)
    x = torch.randn(3, 2, 3)

    def changed(v):
        output, hidden = ours(v)
        output.masked_fill_(output < 0, 0)
        output[-1].mul_(2)
        return output**2, hidden

    def copied(v):
        output, hidden = theirs(v)
        output = output.relu()
        return torch.cat([output[:-1], output[-1:] * 2]) ** 2, hidden

    assert_same(trained(ours, changed, x), trained(theirs, copied, x))


@pytest.mark.parametrize("dynamo", ["eager", "aot_eager"])
@pytest.mark.parametrize("kind", LAYERS)
def test_results_changed_in_place_in_a_graph(kind, dynamo):
    torch._dynamo.reset()
    ours, theirs = twins(kind)
    x = torch.randn(3, 2, 3)

    def changed(v):
        return ours(v)[0].relu_() ** 2

    compiled = trained(ours, torch.compile(changed, backend=dynamo), x)
    assert_same(compiled, trained(theirs, lambda v: theirs(v)[0].relu() ** 2, x))


@pytest.mark.parametrize("kind", ["rnn_tanh", "gru", "lstm"])
def test_batch_sizes_are_no_matter_of_autograd(kind):
    """Hooks that round what they pack, and batch_sizes made in inference mode or changed later, harm no gradient."""
    ours, theirs = twins(kind)
    results = []
    for module in (ours, theirs):
        with torch.inference_mode():
            sizes = torch.tensor([2, 1])
        rows = torch.arange(9.0).view(3, 3).requires_grad_()
        packed = torch.nn.utils.rnn.PackedSequence(rows, sizes.clone() if module is theirs else sizes)
        halved = torch.autograd.graph.saved_tensors_hooks(lambda t: t.bfloat16(), lambda t: t.float())
        with halved if module is ours else torch.enable_grad():
            output, _ = module(packed)
        output.data.sum().backward()
        results.append(rows.grad)
    torch.testing.assert_close(*results, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("hooks", [False, True], ids=["no hooks", "hooks"])
@pytest.mark.parametrize("kind", LAYERS)
def test_output_and_bias_changed_in_place(kind, hooks):
    """Each is computed as in torch.nn; after both the output cannot be computed again, which is said."""
    ours, theirs = twins(kind)
    x = torch.randn(3, 2, 3)

    def written(module, output_too):
        same = torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t)
        module.zero_grad()
        with same if hooks else torch.enable_grad():
            output, _ = module(x)
        with torch.no_grad():
            module.bias_ih_l0.add_(1)
        if output_too:
            output.relu_()
        total(output).backward()
        return gradients(module)

    expected = trained(theirs, lambda v: theirs(v)[0], x)[2]
    assert_same(written(ours, False), expected)
    with pytest.raises(RuntimeError, match="modified by an inplace operation: the output of a layer, and a bias"):
        written(ours, True)


@pytest.mark.parametrize("what", ["input", "hx", "weight_hh_l0"])
@pytest.mark.parametrize("kind", ["rnn_tanh", "gru", "lstm"])
def test_a_changed_argument_raises(kernels, kind, what):
    ours, _ = twins(kind)
    x, h = torch.randn(3, 2, 3, requires_grad=True), torch.randn(1, 2, 4)
    given = {"input": x * 1, "hx": h}
    hx = (given["hx"], torch.zeros(1, 2, 4)) if kind == "lstm" else given["hx"]
    output, _ = ours(given["input"], hx)
    with torch.no_grad():
        given.get(what, getattr(ours, what, None)).mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


class Own(Exception):
    pass


@pytest.mark.parametrize("num_layers", [1, 2])
@pytest.mark.parametrize("error", [Own, RuntimeError, MemoryError, torch.OutOfMemoryError])
def test_what_a_hook_raises_reaches_the_user_at_once(kernels, error, num_layers):
    ours, _ = twins("gru", num_layers=num_layers)
    asked = []

    def pack(tensor):
        asked.append(tensor)
        raise error("from the hook")

    with Log() as log, torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        with pytest.raises(error, match="from the hook"):
            ours(torch.randn(3, 2, 3))
    assert len(asked) == 1 and len(log.done) == 1


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
@pytest.mark.parametrize("wrong", ["weight_ih_l1", "weight_hh_l1", "bias_hh_l1", "bias_ih_l2"])
def test_a_refused_stack_has_computed_nothing(kernels, wrong, grad):
    ours, theirs = twins("gru", num_layers=3)
    for module in (ours, theirs):
        setattr(module, wrong, nn.Parameter(getattr(module, wrong)[:-1].detach().clone()))
    with torch.set_grad_enabled(grad), Log() as log:
        with pytest.raises(RuntimeError, match=f"{wrong}: expected shape .*, got "):
            ours(torch.randn(3, 2, 3))
        with pytest.raises(RuntimeError):
            theirs(torch.randn(3, 2, 3))
    assert log.done == []


def cut(tensor):
    return tensor[:-1].clone()


CALLS = {
    "as documented": {},
    "input of another size": {"input": torch.randn(3, 2, 5)},
    "input of another rank": {"input": torch.randn(3, 3)},
    "input of no steps": {"input": torch.randn(0, 2, 3)},
    "input of no rows": {"input": torch.randn(3, 0, 3), "states": (torch.randn(2, 0, 4),)},
    "input in float64": {"input": torch.randn(3, 2, 3).double()},
    "hx of other layers": {"states": (torch.randn(3, 2, 4),)},
    "hx of another batch": {"states": (torch.randn(2, 3, 4),)},
    "hx in float64": {"states": (torch.randn(2, 2, 4).double(),)},
    "no hx": {"states": (None,)},
}


@pytest.mark.parametrize("namespace", ["rnnfast", "rnnfast_emulator", "rnnfast_triton"])
@pytest.mark.parametrize("what", [*CALLS, *range(8)])
def test_the_operators_refuse_what_does_not_fit(namespace, what):
    """Shorter by a row are the weights of each place; `fits` says the same as the operators, before them."""
    if namespace not in OPERATORS:
        pytest.skip("the emulator is not built")
    weights = [weight.detach().requires_grad_() for weight in rnnfast.GRU(3, 4, 2).parameters()]
    given = {"input": torch.randn(3, 2, 3), "states": (torch.randn(2, 2, 4),)}
    if isinstance(what, int):
        weights[what] = cut(weights[what])
    else:
        given |= CALLS[what]
    states = None if given["states"] == (None,) else given["states"]
    fit = fits(Call("gru", given["input"], states, weights, num_layers=2))
    for grad in (True, False):
        with torch.set_grad_enabled(grad), Log() as log:
            try:
                autograd.stack("gru", given["input"], given["states"], weights, 2, namespace=namespace)
                taken = True
            except Refused as error:
                assert is_refusal(error) and "expected" in str(error)
                taken = False
        assert taken == fit and bool(log.done) == fit


@pytest.mark.parametrize("kind", ["RNNCell", "GRUCell", "LSTMCell"])
@pytest.mark.parametrize("sizes", [(3, 0), (0, 4), (0, 0)], ids=str)
def test_cells_of_size_0(kind, sizes):
    ours, theirs = twins(kind, *sizes)
    for x in (torch.randn(2, sizes[0]), torch.randn(sizes[0])):
        assert_same(ours(x), theirs(x))


@pytest.mark.parametrize("training", [True, False])
def test_flops_and_profiler_see_every_layer(kernels, training):
    """torch's own count of the GRU and RNN; the LSTM, for which torch knows none, by the same rule."""
    T, B, I, H = 3, 2, 5, 4  # noqa: E741
    for kind, gates in (("rnn_tanh", 1), ("gru", 3), ("lstm", 4)):
        module = getattr(rnnfast, LAYERS[kind][0])(I, H, 2)
        x = torch.randn(T, B, I, requires_grad=training)
        forward = 2 * T * B * gates * H * (I + H) + 2 * T * B * gates * H * (H + H)
        with torch.set_grad_enabled(training), FlopCounterMode(display=False) as counter:
            output, _ = module(x)
            assert counter.get_total_flops() == forward
            if training:
                output.sum().backward()
                # No gradient of hx is wanted, so the first step of both layers needs no product for it.
                assert counter.get_total_flops() == 3 * forward - 2 * (2 * B * gates * H * H)
        with torch.set_grad_enabled(training), torch.profiler.profile() as profile:
            module(x)
        names = [event.name for event in profile.events() if event.name.startswith("rnnfast")]
        names = [name for name in names if "_cuda_" not in name]
        assert len(names) == (2 if training else 1) and all("fwd" in n if training else "infer" in n for n in names)
