"""torch.autograd and its modes around the modules."""

import copy
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor

import torch
from support.torch_tools import CELLS, Rows, assert_plant_is_caught, call, first, leaf, leaves, sample, train, weight
from support.twins import (
    cells_take_the_kernels,  # noqa: F401
    tensors,
    total,
)

# ------------------------------------------------ torch.autograd

GRADS = Rows(dtype=torch.float64)


@GRADS.add()
def grad_batched(module):
    x = leaf(module)
    result = first(module(x))
    rows = torch.stack([torch.ones_like(result), result.detach()])
    return torch.autograd.grad(result, [x, *module.parameters()], rows, is_grads_batched=True)


@GRADS.add()
def grad_batched_create_graph(module):
    x = leaf(module)
    result = first(module(x))
    rows = torch.stack([torch.ones_like(result), result.detach()])
    (found,) = torch.autograd.grad(result, x, rows, is_grads_batched=True, create_graph=True)
    total(found.square()).backward()
    return found, x.grad


@GRADS.add()
def grad_allow_unused(module):
    other = torch.zeros(2, requires_grad=True)
    return torch.autograd.grad(total(module(leaf(module))), [other, weight(module)], allow_unused=True)


@GRADS.add()
def grad_of_unused(module):
    torch.autograd.grad(total(module(leaf(module))), [torch.zeros(2, requires_grad=True)])


@GRADS.add()
def grad_materialized(module):
    other = torch.zeros(2, requires_grad=True)
    return torch.autograd.grad(total(module(leaf(module))), [other, weight(module)], materialize_grads=True)


@GRADS.add()
def third_derivative(module):
    x = leaf(module)
    value = total(module(x))
    for _ in range(3):
        (grad,) = torch.autograd.grad(value, x, create_graph=True)
        value = total(grad.square())
    value.backward()
    return value, x.grad


@GRADS.add()
def backward_of_several(module):
    inputs = leaves(module)
    results = tensors(call(module, *inputs))
    torch.autograd.backward(results, [torch.ones_like(result) for result in results])
    return [value.grad for value in inputs]


@GRADS.add()
def gradcheck(module):
    inputs = leaves(module, batch=1)
    checks = [
        torch.autograd.gradcheck(lambda *args: tuple(tensors(call(module, *args))), inputs, **options)
        for options in ({"fast_mode": True}, {"fast_mode": True, "check_batched_grad": True})
    ]
    return checks, inputs[0]


@GRADS.add()
def gradcheck_of_every_mode(module):
    x = leaf(module, batch=1, steps=2)
    options = {"check_forward_ad": True, "check_batched_forward_grad": False, "check_undefined_grad": True}
    return torch.autograd.gradcheck(lambda x: first(module(x)), x, **options), x


@GRADS.add()
def gradgradcheck(module):
    x = leaf(module, batch=1, steps=2)
    return torch.autograd.gradgradcheck(lambda x: first(module(x)), x, check_batched_grad=True), x


@GRADS.add()
def no_gradient_for_what_is_left_out(module):
    """Gradients that are None, and of zeros."""
    inputs = leaves(module)
    result = tensors(call(module, *inputs))
    (result[-1] * 0).sum().backward()
    return [value.grad for value in inputs]


# ------------------------------------------------ modes

MODES = Rows()


def within(context, run=train):
    def program(module):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with context():
                return run(module)

    return program


def forward(module):
    return first(module(sample(module)))


MODES["detect_anomaly"] = within(torch.autograd.detect_anomaly)
MODES["set_detect_anomaly"] = within(lambda: torch.autograd.set_detect_anomaly(True, check_nan=False))
MODES["set_multithreading_enabled"] = within(lambda: torch.autograd.set_multithreading_enabled(False))
MODES["no_grad"] = within(torch.no_grad, forward)
MODES["enable_grad"] = within(torch.enable_grad)
MODES["set_grad_enabled"] = within(lambda: torch.set_grad_enabled(False), forward)
MODES["inference_mode"] = within(torch.inference_mode, forward)
MODES["inference_mode_off"] = within(lambda: torch.inference_mode(False))
MODES["no_grad_backward"] = within(torch.no_grad)
MODES["inference_mode_backward"] = within(torch.inference_mode)
MODES["unsafe_preserve_version_counter"] = lambda m: version_kept(m)
MODES["no_grad_decorator"] = lambda m: torch.no_grad()(forward)(m)
MODES["set_view_replay_enabled"] = within(lambda: torch.autograd._force_original_view_tracking(True))
MODES["profiler_record"] = within(lambda: torch.autograd.profiler.record_function("layer"))
MODES["emit_nothing"] = within(lambda: torch.autograd.profiler.profile(enabled=False))


def version_kept(module):
    x = leaf(module) * 1
    result = module(x)
    with torch.autograd._unsafe_preserve_version_counter(x):
        x.data.mul_(1)
    total(result).backward()
    return result


@MODES.add()
def anomaly_names_the_nan(module):
    with warnings.catch_warnings(), torch.autograd.detect_anomaly():
        warnings.simplefilter("ignore")
        (first(module(leaf(module))) * 0).sqrt().sum().backward()


@MODES.add()
def inference_input(module):
    with torch.inference_mode():
        x = sample(module)
    with torch.no_grad():
        return module(x)


@MODES.add()
def inference_input_with_grad(module):
    with torch.inference_mode():
        x = sample(module)
    return total(module(x)).backward()


@MODES.add(kinds=CELLS)
def inference_weights(module):
    """Without a gradient for input and states nothing of a cell's backward needs its weights."""
    with torch.inference_mode():
        other = copy.deepcopy(module)
    return first(other(sample(module))).detach()


@MODES.add()
def other_thread_backward(module):
    """Backward in a thread of its own."""
    x = leaf(module)
    loss = total(module(x))
    thread = threading.Thread(target=loss.backward)
    thread.start()
    thread.join()
    return x.grad


@MODES.add()
def threads_share_a_module(module):
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda scale: first(module(sample(module) * scale)), [1.0, 2.0, 3.0, 4.0]))
    total(found).backward()
    return found


@MODES.add()
def a_function_around_the_call(module):
    """A user's autograd.Function that calls the module, and runs backward itself."""

    class Around(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            with torch.enable_grad():
                inner = x.detach().requires_grad_()
                result = first(module(inner))
            ctx.inner, ctx.result = inner, result
            return result.detach()

        @staticmethod
        def backward(ctx, grad):
            ctx.result.backward(grad)
            return ctx.inner.grad

    x = leaf(module)
    total(Around.apply(x)).backward()
    return x.grad


@GRADS.parametrize()
def test_grads(name, kind):
    GRADS.check(name, kind)


@MODES.parametrize()
def test_modes(name, kind):
    MODES.check(name, kind)


def test_a_difference_is_caught():
    assert_plant_is_caught(MODES)
