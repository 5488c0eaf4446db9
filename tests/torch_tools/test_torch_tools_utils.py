"""torch.nn.utils, its parametrizations, pruning and functional calls around the modules."""

import copy
import warnings

import torch
from support.torch_tools import CELLS, LAYERS, Model, Rows, assert_plant_is_caught, sample, train, weight
from support.torch_tools import weight_name as name_of
from support.twins import (
    cells_take_the_kernels,  # noqa: F401
    gradients,
    total,
)
from torch import nn
from torch.nn.utils import _per_sample_grad, parametrizations, parametrize, prune, stateless

ROWS = Rows()


def quietly(function, *args, **kwargs):
    """A call of a function that is deprecated."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(*args, **kwargs)


# ------------------------------------------------ gradients and vectors


def after_backward(function):
    def program(module):
        train(module)
        return function(module)

    return program


ROWS["clip_grad_norm_"] = after_backward(lambda m: nn.utils.clip_grad_norm_(m.parameters(), 0.1))
ROWS["clip_grad_norm_inf"] = after_backward(lambda m: nn.utils.clip_grad_norm_(m.parameters(), 0.1, torch.inf))
ROWS["clip_grad_norm_foreach"] = after_backward(lambda m: nn.utils.clip_grad_norm_(m.parameters(), 0.1, foreach=True))
ROWS["clip_grad_norm"] = after_backward(lambda m: quietly(nn.utils.clip_grad_norm, m.parameters(), 0.1))
ROWS["clip_grad_value_"] = after_backward(lambda m: nn.utils.clip_grad_value_(m.parameters(), 0.1))
ROWS["clip_grads_with_norm_"] = after_backward(
    lambda m: nn.utils.clip_grads_with_norm_(m.parameters(), 0.1, torch.tensor(2.0))
)
ROWS["get_total_norm"] = after_backward(lambda m: nn.utils.get_total_norm([p.grad for p in m.parameters()]))
ROWS["parameters_to_vector"] = lambda m: nn.utils.parameters_to_vector(m.parameters())


@ROWS.add()
def vector_to_parameters(module):
    vector = nn.utils.parameters_to_vector(module.parameters()).detach()
    nn.utils.vector_to_parameters(vector * 0.5, module.parameters())
    return train(module)


@ROWS.add()
def gradient_vector(module):
    """Through the vector itself: the parameters are views of a leaf."""
    vector = (nn.utils.parameters_to_vector(module.parameters()).detach() * 0.5).requires_grad_()
    views, start = {}, 0
    for name, parameter in module.named_parameters():
        views[name] = vector[start : start + parameter.numel()].view(parameter.shape)
        start += parameter.numel()
    total(torch.func.functional_call(module, views, (sample(module),))).backward()
    return vector.grad


# ------------------------------------------------ weight_norm, spectral_norm, orthogonal


def normalized(normalize, remove=None, dtype=None):
    def program(module):
        normalize(module, name_of(module))
        before = train(module), sorted(name for name, _ in module.named_parameters()), gradients(module)
        if remove is None:
            return before
        remove(module, name_of(module))
        module.zero_grad()
        return before, train(module)

    return program


def legacy(function):
    return lambda module, name, **kwargs: quietly(function, module, name, **kwargs)


REMOVE = parametrize.remove_parametrizations
ROWS["weight_norm"] = normalized(legacy(nn.utils.weight_norm))
ROWS["remove_weight_norm"] = normalized(legacy(nn.utils.weight_norm), legacy(nn.utils.remove_weight_norm))
ROWS["spectral_norm"] = normalized(legacy(nn.utils.spectral_norm))
ROWS["remove_spectral_norm"] = normalized(legacy(nn.utils.spectral_norm), legacy(nn.utils.remove_spectral_norm))
ROWS["parametrizations_weight_norm"] = normalized(parametrizations.weight_norm, REMOVE)
ROWS["parametrizations_weight_norm_dim_none"] = normalized(lambda m, n: parametrizations.weight_norm(m, n, dim=None))
# In eval: in training every read of the weight iterates, and torch.nn's layers read it several times a call.
ROWS["parametrizations_spectral_norm"] = normalized(lambda m, n: parametrizations.spectral_norm(m.eval(), n), REMOVE)
for kind in ("matrix_exp", "cayley", "householder"):
    ROWS.put(
        f"parametrizations_orthogonal_{kind}",
        normalized(lambda m, n, kind=kind: parametrizations.orthogonal(m, n, kind), REMOVE),
        dtype=torch.float64,
    )


class Scaled(nn.Module):
    def forward(self, value):
        return 0.5 * value

    def right_inverse(self, value):
        return 2 * value


class Sum(nn.Module):
    """A parametrization by two tensors."""

    def forward(self, a, b):
        return a + b

    def right_inverse(self, value):
        return value * 0.25, value * 0.75


ROWS["register_parametrization"] = normalized(
    lambda m, n: parametrize.register_parametrization(m, n, Scaled()), parametrize.remove_parametrizations
)
ROWS["register_parametrization_twice"] = normalized(
    lambda m, n: [parametrize.register_parametrization(m, n, Scaled()) for _ in range(2)]
)
ROWS["register_parametrization_of_two"] = normalized(lambda m, n: parametrize.register_parametrization(m, n, Sum()))
ROWS["register_parametrization_unsafe"] = normalized(
    lambda m, n: parametrize.register_parametrization(m, n, Scaled(), unsafe=True)
)


@ROWS.add()
def every_weight_parametrized(module):
    for name in [name for name, _ in module.named_parameters()]:
        parametrize.register_parametrization(module, name, Scaled())
    return train(module), parametrize.is_parametrized(module)


@ROWS.add()
def remove_leaving_the_original(module):
    parametrize.register_parametrization(module, name_of(module), Scaled())
    parametrize.remove_parametrizations(module, name_of(module), leave_parametrized=False)
    return train(module)


@ROWS.add()
def cached(module):
    """Inside, the weight is computed once for all calls."""
    parametrize.register_parametrization(module, name_of(module), Scaled())
    with parametrize.cached():
        result = module(sample(module)), module(sample(module))
    total(result).backward()
    return result


@ROWS.add()
def type_before_parametrizations(module):
    parametrize.register_parametrization(module, name_of(module), Scaled())
    return parametrize.type_before_parametrizations(module).__name__, type(module).__name__, sample(module)


@ROWS.add()
def transfer_parametrizations_and_params(module):
    parametrize.register_parametrization(module, name_of(module), Scaled())
    target = (
        parametrize.type_before_parametrizations(module)(3, 4, proj_size=module.proj_size)
        if getattr(module, "proj_size", 0)
        else parametrize.type_before_parametrizations(module)(3, 4)
    )
    target = parametrize.transfer_parametrizations_and_params(module, target)
    return train(target)


@ROWS.add()
def assigned_while_parametrized(module):
    parametrize.register_parametrization(module, name_of(module), Scaled())
    with torch.no_grad():
        setattr(module, name_of(module), torch.full_like(weight(module), 0.1))
    return train(module)


@ROWS.add()
def parametrized_deepcopy(module):
    parametrize.register_parametrization(module, name_of(module), Scaled())
    return train(copy.deepcopy(module)), list(module.state_dict())


# ------------------------------------------------ prune


def pruned(how):
    def program(module):
        how(module)
        result = train(module), prune.is_pruned(module), dict(module.named_buffers())
        prune.remove(module, name_of(module))
        return result, train(module)

    return program


ROWS["prune_identity"] = pruned(lambda m: prune.identity(m, name_of(m)))
ROWS["prune_random_unstructured"] = pruned(lambda m: prune.random_unstructured(m, name_of(m), 0.5))
ROWS["prune_l1_unstructured"] = pruned(lambda m: prune.l1_unstructured(m, name_of(m), 0.5))
ROWS["prune_random_structured"] = pruned(lambda m: prune.random_structured(m, name_of(m), 2, dim=0))
ROWS["prune_ln_structured"] = pruned(lambda m: prune.ln_structured(m, name_of(m), 2, n=2, dim=0))
ROWS["prune_custom_from_mask"] = pruned(lambda m: prune.custom_from_mask(m, name_of(m), weight(m) > 0))
ROWS["prune_global_unstructured"] = pruned(
    lambda m: prune.global_unstructured([(m, name_of(m))], prune.L1Unstructured, amount=3)
)
ROWS["prune_twice"] = pruned(
    lambda m: [prune.l1_unstructured(m, name_of(m), 2), prune.random_unstructured(m, name_of(m), 2)]
)


@ROWS.add()
def prune_every_weight_and_train(module):
    for name in [name for name, _ in module.named_parameters()]:
        prune.l1_unstructured(module, name, 0.5)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        result = train(module)
        optimizer.step()
    return result


# ------------------------------------------------ functional calls and per-sample gradients


def weights_of(module, scale=0.5):
    return {name: parameter.detach() * scale for name, parameter in module.named_parameters()}


ROWS["stateless_functional_call"] = lambda m: quietly(stateless.functional_call, m, weights_of(m), (sample(m),))
ROWS["stateless_functional_call_tied"] = lambda m: quietly(
    stateless.functional_call, m, weights_of(m), (sample(m),), tie_weights=False
)
ROWS["stateless_functional_call_strict"] = lambda m: quietly(
    stateless.functional_call, m, {name_of(m): weight(m) * 2}, (sample(m),), strict=True
)


def per_sample(module, x, **kwargs):
    call = _per_sample_grad.call_for_per_sample_grads(module, **kwargs)
    total(call(x)).backward()
    return {name: parameter.grad_sample for name, parameter in module.named_parameters()}


ROWS.put("per_sample_grads", lambda m: per_sample(m, sample(m).transpose(0, 1)), kinds=LAYERS, batch_first=True)
ROWS.put("per_sample_grads_time_first", lambda m: per_sample(m, sample(m), batch_first=False), kinds=LAYERS)
ROWS.put("per_sample_grads_batch_size", lambda m: per_sample(m, sample(m), batch_size=5), kinds=LAYERS)
ROWS.put(
    "per_sample_grads_mean",
    lambda m: per_sample(m, sample(m).transpose(0, 1), loss_reduction="mean"),
    kinds=LAYERS,
    batch_first=True,
    num_layers=2,
)
ROWS.put("per_sample_grads_cell", lambda m: per_sample(m, sample(m)), kinds=CELLS)


@ROWS.add()
def skip_init(module):
    """Uninitialized, then given weights: the module works, on both."""
    options = {"proj_size": module.proj_size} if getattr(module, "proj_size", 0) else {}
    fresh = nn.utils.skip_init(type(module), 3, 4, **options)
    fresh.load_state_dict(module.state_dict())
    return train(fresh)


@ROWS.add()
def convert_memory_format(module):
    nn.utils.convert_conv2d_weight_memory_format(module, torch.channels_last)
    nn.utils.convert_conv3d_weight_memory_format(module, torch.channels_last_3d)
    return train(module)


@ROWS.add()
def fuse_linear_bn(module):
    """Fusion next to the module leaves it alone."""
    model = Model(module).eval()
    norm = nn.BatchNorm1d(2).eval()
    model.after = nn.utils.fuse_linear_bn_eval(model.after, norm)
    return model(sample(module))


@ROWS.parametrize()
def test_utils(name, kind):
    ROWS.check(name, kind)


def test_a_difference_is_caught():
    assert_plant_is_caught(ROWS)
