"""torch.autograd.functional, torch.func and forward mode around the modules, in float64."""

import copy

import torch
from support.torch_tools import Rows, assert_plant_is_caught, call, first, leaf, leaves, sample, weight, weight_name
from support.twins import (
    cells_take_the_kernels,  # noqa: F401
    gradients,
    total,
)
from torch.autograd import forward_ad, functional

# ------------------------------------------------ torch.autograd.functional


FUNCTIONAL = Rows(dtype=torch.float64)


def output(module):
    return lambda x: first(module(x))


def scalar(module):
    return lambda x: total(first(module(x)).square())


def small(module):
    return sample(module, batch=1, steps=2)


STRATEGIES = {
    "reverse": {},
    "reverse_vectorized": {"vectorize": True},
    "forward_vectorized": {"vectorize": True, "strategy": "forward-mode"},
    "strict": {"strict": True},
    "create_graph": {"create_graph": True},
}
for name, options in STRATEGIES.items():
    FUNCTIONAL[f"jacobian_{name}"] = lambda m, options=options: functional.jacobian(output(m), small(m), **options)
HESSIANS = {
    "reverse": {},
    "vectorized": {"vectorize": True},
    "forward": {"vectorize": True, "outer_jacobian_strategy": "forward-mode"},
    "strict": {"strict": True},
}
for name, options in HESSIANS.items():
    FUNCTIONAL[f"hessian_{name}"] = lambda m, options=options: functional.hessian(scalar(m), small(m), **options)
FUNCTIONAL["jvp"] = lambda m: functional.jvp(output(m), sample(m), sample(m) + 1)
FUNCTIONAL["jvp_create_graph"] = lambda m: functional.jvp(output(m), sample(m), sample(m) + 1, create_graph=True)
FUNCTIONAL["vjp"] = lambda m: functional.vjp(output(m), sample(m), torch.ones_like(first(m(sample(m)))))
FUNCTIONAL["hvp"] = lambda m: functional.hvp(scalar(m), sample(m), sample(m) + 1)
FUNCTIONAL["vhp"] = lambda m: functional.vhp(scalar(m), sample(m), sample(m) + 1)


def of_weights(module, function, **options):
    """`function` of functional.py with respect to the recurrent weight and the input at once."""

    def run(value, x):
        return first(torch.func.functional_call(module, {weight_name(module): value}, (x,)))

    return function(run, (weight(module).detach(), small(module)), **options)


FUNCTIONAL["jacobian_of_weights"] = lambda m: of_weights(m, functional.jacobian)
FUNCTIONAL["jacobian_of_weights_vectorized"] = lambda m: of_weights(m, functional.jacobian, vectorize=True)


# ------------------------------------------------ torch.func and forward mode

FUNC = Rows(dtype=torch.float64)


def stateful(module):
    """(function of weights and input, weights)."""
    weights = {name: value.detach() for name, value in module.named_parameters()}
    return lambda p, x: first(torch.func.functional_call(module, p, (x,))), weights


def transform(make):
    """make(f, weights, x) in terms of torch.func."""
    return lambda m: make(*stateful(m), small(m))


def loss(f):
    return lambda p, x: total(f(p, x).square())


FUNC["grad_and_value"] = transform(lambda f, p, x: torch.func.grad_and_value(loss(f))(p, x))
FUNC["grad_has_aux"] = transform(lambda f, p, x: torch.func.grad(lambda p, x: (loss(f)(p, x), x), has_aux=True)(p, x))
FUNC["grad_of_both"] = transform(lambda f, p, x: torch.func.grad(loss(f), argnums=(0, 1))(p, x))
FUNC["vjp"] = transform(lambda f, p, x: torch.func.vjp(f, p, x)[1](torch.ones_like(f(p, x))))
FUNC["jvp"] = transform(lambda f, p, x: torch.func.jvp(f, (p, x), (p, x + 1)))
FUNC["linearize"] = transform(lambda f, p, x: torch.func.linearize(lambda x: f(p, x), x)[1](x + 1))
FUNC["jacrev"] = transform(lambda f, p, x: torch.func.jacrev(f, argnums=1)(p, x))
FUNC["jacrev_chunked"] = transform(lambda f, p, x: torch.func.jacrev(f, argnums=1, chunk_size=1)(p, x))
FUNC["jacfwd"] = transform(lambda f, p, x: torch.func.jacfwd(f, argnums=1)(p, x))
FUNC["hessian"] = transform(lambda f, p, x: torch.func.hessian(loss(f), argnums=1)(p, x))
FUNC["vmap"] = transform(lambda f, p, x: torch.func.vmap(f, (None, 0))(p, torch.stack([x, x + 1])))
FUNC["vmap_chunked"] = transform(
    lambda f, p, x: torch.func.vmap(f, (None, 0), chunk_size=1)(p, torch.stack([x, x + 1]))
)
FUNC["vmap_randomness"] = transform(
    lambda f, p, x: torch.func.vmap(f, (None, 0), randomness="different")(p, torch.stack([x, x + 1]))
)
FUNC["functionalize"] = transform(lambda f, p, x: torch.func.functionalize(f)(p, x))
FUNC["functionalize_grad"] = transform(lambda f, p, x: torch.func.functionalize(torch.func.grad(loss(f)))(p, x))


@FUNC.add()
def stack_module_state(module):
    """An ensemble: one call of many weights."""
    other = copy.deepcopy(module)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(0.5)
    weights, buffers = torch.func.stack_module_state([module, other])
    base = copy.deepcopy(module).to("meta")
    x = sample(module)
    return torch.func.vmap(lambda p, b: first(torch.func.functional_call(base, (p, b), (x,))))(weights, buffers)


@FUNC.add()
def functional_call_of_several(module):
    halves = {weight_name(module): weight(module).detach() * 0.5}
    return torch.func.functional_call(module, (halves, {}), (sample(module),), strict=False)


@FUNC.add()
def functional_call_on_meta(module):
    """The weights of a module without memory are all given."""
    weights = {name: value.detach() for name, value in module.named_parameters()}
    return torch.func.functional_call(copy.deepcopy(module).to("meta"), weights, (sample(module),))


@FUNC.add()
def dual_weights(module):
    """Forward mode with a tangent for a weight."""
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(weight(module).detach(), torch.ones_like(weight(module)))
        result = torch.func.functional_call(module, {weight_name(module): dual}, (sample(module),))
        return forward_ad.unpack_dual(first(result)).tangent


@FUNC.add()
def dual_states(module):
    inputs = [value.detach() for value in leaves(module)]
    with forward_ad.dual_level():
        inputs[1] = forward_ad.make_dual(inputs[1], torch.ones_like(inputs[1]))
        result = first(call(module, *inputs))
        return forward_ad.unpack_dual(result).tangent


@FUNC.add()
def dual_then_backward(module):
    x = leaf(module)
    with forward_ad.dual_level():
        result = first(module(forward_ad.make_dual(x, torch.ones_like(x))))
        forward_ad.unpack_dual(result).tangent.sum().backward()
    return x.grad, gradients(module)


@FUNCTIONAL.parametrize()
def test_functional(name, kind):
    FUNCTIONAL.check(name, kind)


@FUNC.parametrize()
def test_func(name, kind):
    FUNC.check(name, kind)


def test_a_difference_is_caught():
    assert_plant_is_caught(FUNC)
