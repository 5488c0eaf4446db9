"""Default dtypes and devices, containers, averages and optimizers around the modules."""

import copy

import torch
from support.torch_tools import (
    LAYERS,
    Model,
    Rows,
    assert_plant_is_caught,
    first,
    is_cell,
    leaf,
    sample,
    train,
    weight,
    weight_name,
)
from support.twins import (
    cells_take_the_kernels,  # noqa: F401
    gradients,
    tensors,
    total,
)
from torch import nn
from torch.nn.utils import parametrize
from torch.optim import swa_utils

# ------------------------------------------------ defaults and surroundings

AROUND = Rows()


def same_kind(module, **kwargs):
    """A module as this one is, built now."""
    options = {"proj_size": module.proj_size} if getattr(module, "proj_size", 0) else {}
    return type(module)(3, 4, **options, **kwargs)


@AROUND.add()
def default_dtype(module):
    torch.set_default_dtype(torch.float64)
    try:
        fresh = same_kind(module)
        return train(fresh)
    finally:
        torch.set_default_dtype(torch.float32)


@AROUND.add()
def default_dtype_around_a_call(module):
    torch.set_default_dtype(torch.float64)
    try:
        return train(module)
    finally:
        torch.set_default_dtype(torch.float32)


@AROUND.add()
def default_device_meta(module):
    torch.set_default_device("meta")
    try:
        fresh = same_kind(module)
        x = torch.empty(sample(module).shape)
        result = fresh(x)
    finally:
        torch.set_default_device(None)
    return [(tuple(t.shape), t.device.type) for t in tensors(result)], sample(module)


@AROUND.add()
def default_device_meta_around_a_call(module):
    with torch.device("meta"):
        return module(sample(module))


@AROUND.add()
def default_device_cpu_around_a_call(module):
    with torch.device("cpu"):
        return train(module)


@AROUND.add()
def fork_rng(module):
    with torch.random.fork_rng():
        torch.manual_seed(3)
        fresh = same_kind(module)
    return train(fresh), torch.rand(2)


@AROUND.add()
def generator_state_is_kept(module):
    before = torch.get_rng_state()
    train(module)
    return torch.equal(before, torch.get_rng_state()), sample(module)


@AROUND.add(kinds=LAYERS, num_layers=2, dropout=0.5)
def dropout_draws(module):
    return train(module), torch.rand(2)


@AROUND.add()
def deterministic(module):
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        return train(module)
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@AROUND.add()
def autocast(module):
    with torch.autocast("cpu", torch.bfloat16):
        return [torch.zeros(t.shape, dtype=t.dtype) for t in tensors(module(sample(module)))]


@AROUND.add()
def mkldnn_off(module):
    with torch.backends.mkldnn.flags(enabled=False):
        return train(module)


@AROUND.add()
def default_tensor_type(module):
    return train(module), same_kind(module, dtype=torch.float64)(sample(module).double())


# ------------------------------------------------ containers, other modules, averages

CONTAINERS = Rows()


def last(x):
    while not isinstance(x, torch.Tensor):
        x = x[0]
    return x


def through(build):
    """Training of a model around the module."""

    def program(module):
        model = build(module)
        x = leaf(module)
        result = last(model(x))
        total(result).backward()
        return result, x.grad, list(model.state_dict())

    return program


CONTAINERS["model"] = through(Model)
CONTAINERS["sequential"] = through(lambda m: nn.Sequential(nn.Linear(3, 3, bias=False).requires_grad_(False), m))
CONTAINERS["module_list"] = through(lambda m: nn.ModuleList([m])[0])
CONTAINERS["module_dict"] = through(lambda m: nn.ModuleDict({"layer": m})["layer"])
CONTAINERS["lazy"] = lambda m: lazy(m)
CONTAINERS["data_parallel"] = lambda m: nn.DataParallel(m)(sample(m))
CONTAINERS["averaged_model"] = lambda m: averaged(m, swa_utils.AveragedModel(Model(m)))
CONTAINERS["ema_model"] = lambda m: averaged(
    m, swa_utils.AveragedModel(Model(m), multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.9))
)
CONTAINERS["ema_model_avg_fn"] = lambda m: averaged(
    m, swa_utils.AveragedModel(Model(m), avg_fn=swa_utils.get_ema_avg_fn(0.9))
)
CONTAINERS["swa_model_avg_fn"] = lambda m: averaged(
    m, swa_utils.AveragedModel(Model(m), multi_avg_fn=swa_utils.get_swa_multi_avg_fn(), use_buffers=True)
)


def lazy(module):
    """A lazy module behind the layer."""
    torch.manual_seed(0)
    model = nn.Sequential(module, First(), nn.LazyLinear(2))
    return model(sample(module))


class First(nn.Module):
    def forward(self, result):
        return first(result)


def averaged(module, average):
    for _ in range(3):
        module.zero_grad()
        train(module)
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.sub_(0.1 * parameter.grad)
        average.update_parameters(Model(module))
    module.zero_grad()
    return average(sample(module)), average.state_dict()


@CONTAINERS.add()
def update_bn(module):
    torch.manual_seed(0)
    norm = nn.BatchNorm1d(3 if is_cell(module) else 2, momentum=None)
    model = nn.Sequential(norm, module)
    swa_utils.update_bn([sample(module), sample(module) * 2], model)
    return model(sample(module)), norm.running_mean


@CONTAINERS.add()
def swa_scheduler(module):
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    scheduler = swa_utils.SWALR(optimizer, swa_lr=0.05, anneal_epochs=2)
    for _ in range(3):
        optimizer.zero_grad()
        result = train(module)
        optimizer.step()
        scheduler.step()
    return result


@CONTAINERS.add()
def tied_weights(module):
    other = copy.deepcopy(module)
    setattr(other, weight_name(other), weight(module))
    result = module(sample(module)), other(sample(module) * 2)
    total(result).backward()
    return result, gradients(other)


@CONTAINERS.add()
def parametrized_in_a_container(module):
    model = Model(module)
    parametrize.register_parametrization(model.module, weight_name(module), nn.Tanh(), unsafe=True)
    result = model(sample(module))
    total(result).backward()
    return result


@CONTAINERS.add()
def optimizers(module):
    """Every optimizer's first steps."""
    state, found = copy.deepcopy(module.state_dict()), {}
    for name in ("SGD", "Adam", "AdamW", "Adagrad", "RMSprop", "NAdam", "Adamax", "Adadelta", "ASGD"):
        module.load_state_dict(state)
        optimizer = getattr(torch.optim, name)(module.parameters(), lr=1e-3)
        optimizer.zero_grad()
        train(module)
        optimizer.step()
        found[name] = first(module(sample(module)))
    return found


@CONTAINERS.add(dtype=torch.float64)
def lbfgs(module):
    optimizer = torch.optim.LBFGS(module.parameters(), lr=0.1, max_iter=3)

    def closure():
        optimizer.zero_grad()
        loss = total(module(sample(module))).square()
        loss.backward()
        return loss

    optimizer.step(closure)
    return module(sample(module))


@CONTAINERS.add()
def hooks_into_the_optimizer(module):
    """Optimizers that step inside backward, after each accumulated gradient."""
    for parameter in module.parameters():
        optimizer = torch.optim.SGD([parameter], lr=0.1)

        def step(p, optimizer=optimizer):
            optimizer.step()
            optimizer.zero_grad()

        parameter.register_post_accumulate_grad_hook(step)
    return train(module), module(sample(module))


@AROUND.parametrize()
def test_around(name, kind):
    AROUND.check(name, kind)


@CONTAINERS.parametrize()
def test_containers(name, kind):
    CONTAINERS.check(name, kind)


def test_a_difference_is_caught():
    assert_plant_is_caught(CONTAINERS)
