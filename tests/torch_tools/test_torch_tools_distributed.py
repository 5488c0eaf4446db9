"""torch.distributed around the modules, over gloo: in this process alone, and in two children."""

import contextlib
import copy
import datetime
import os
import tempfile
import warnings

import pytest
import torch
from support.torch_tools import Model, Rows, assert_plant_is_caught, compare, leaf, sample, train
from support.twins import (
    cells_take_the_kernels,  # noqa: F401
    tensors,
    total,
    twins,
)
from torch import distributed, multiprocessing
from torch.nn.parallel import DistributedDataParallel

import rnnfast

pytestmark = pytest.mark.skipif(not distributed.is_available(), reason="this torch is built without torch.distributed")

# ------------------------------------------------ torch.distributed, alone

ALONE = Rows(kinds=("gru", "lstm", "lstmcell"))


@pytest.fixture(scope="module")
def group():
    """A process group of one."""
    with tempfile.NamedTemporaryFile() as file:
        distributed.init_process_group("gloo", init_method=f"file://{file.name}", rank=0, world_size=1)
        yield
        distributed.destroy_process_group()
        with contextlib.suppress(FileNotFoundError):
            os.unlink(file.name)
        open(file.name, "w").close()  # for the context to delete


def mesh():
    return distributed.device_mesh.init_device_mesh("cpu", (1,))


def step(model, module):
    x = leaf(module)
    result = model(x)
    total(result).backward()
    return result, x.grad


def local(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def grads(model):
    return [None if p.grad is None else local(p.grad) for p in model.parameters()]


@ALONE.add()
def ddp(module):
    return step(DistributedDataParallel(module), module)


@ALONE.add()
def ddp_of_a_model(module):
    return step(DistributedDataParallel(Model(module), find_unused_parameters=True), module)


@ALONE.add()
def ddp_static_graph(module):
    return step(DistributedDataParallel(module, static_graph=True), module)


@ALONE.add()
def ddp_gradient_as_bucket_view(module):
    return step(DistributedDataParallel(module, gradient_as_bucket_view=True), module)


@ALONE.add()
def ddp_no_sync(module):
    model = DistributedDataParallel(module)
    with model.no_sync():
        step(model, module)
    return step(model, module)


@ALONE.add()
def ddp_communication_hook(module):
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

    model = DistributedDataParallel(module)
    model.register_comm_hook(None, allreduce_hook)
    return step(model, module)


@ALONE.add()
def ddp_with_a_checkpoint(module):
    from torch.utils.checkpoint import checkpoint

    model = DistributedDataParallel(module, static_graph=True)
    return step(lambda x: checkpoint(model, x, use_reentrant=False), module)


@ALONE.add()
def fsdp(module):
    """FSDP of the first kind."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = FullyShardedDataParallel(module, device_id=torch.device("cpu"), use_orig_params=True)
        return step(model, module)


@ALONE.add()
def fully_shard(module):
    from torch.distributed.fsdp import fully_shard

    fully_shard(module, mesh=mesh())
    result = step(module, module)
    found = grads(module)
    module.zero_grad()
    return result, found


@ALONE.add()
def fully_shard_of_a_model(module):
    from torch.distributed.fsdp import fully_shard

    model = Model(module)
    fully_shard(model.module, mesh=mesh())
    fully_shard(model, mesh=mesh())
    result = step(model, module)
    found = grads(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.step()
    optimizer.zero_grad()
    again = step(model, module)
    model.zero_grad()
    return result, found, again


@ALONE.add()
def fully_shard_mixed_precision(module):
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    fully_shard(module, mesh=mesh(), mp_policy=MixedPrecisionPolicy(param_dtype=torch.float64))
    result = step(module, module)
    found = grads(module)
    module.zero_grad()
    return result, found


@ALONE.add()
def parallelize_a_neighbour(module):
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    model = Model(module)
    plan = {name: ColwiseParallel(output_layouts=Replicate()) for name in ("before", "after")}
    return step(parallelize_module(model, mesh(), plan), module)


@ALONE.add()
def distribute_module(module):
    """Every parameter a DTensor."""
    from torch.distributed.tensor import distribute_module

    model = distribute_module(module, mesh())
    return [local(t) for t in tensors(model(sample(module)))]


@ALONE.add()
def distributed_input(module):
    from torch.distributed.tensor import distribute_tensor

    return [local(t) for t in tensors(module(distribute_tensor(sample(module), mesh())))]


@ALONE.add()
def broadcast(module):
    for parameter in module.parameters():
        distributed.broadcast(parameter.data, 0)
    return train(module)


@ALONE.add()
def all_reduced_gradients(module):
    result = train(module)
    for parameter in module.parameters():
        distributed.all_reduce(parameter.grad)
    return result


@ALONE.add()
def broadcast_object(module):
    objects = [copy.deepcopy(module)]
    distributed.broadcast_object_list(objects, 0)
    return train(objects[0])


@ALONE.add()
def checkpoint_state_dict(module):
    """torch.distributed.checkpoint: save, load, and the state dict helpers."""
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint import state_dict as helpers

    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        state = helpers.get_model_state_dict(module)
        checkpoint.save(state, checkpoint_id=folder)
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.zero_()
        loaded = helpers.get_model_state_dict(module)
        checkpoint.load(loaded, checkpoint_id=folder)
        helpers.set_model_state_dict(module, loaded)
    return train(module)


@ALONE.add()
def checkpoint_of_an_optimizer(module):
    from torch.distributed.checkpoint import state_dict as helpers

    optimizer = torch.optim.Adam(module.parameters(), lr=0.1)
    train(module)
    optimizer.step()
    model_state, optimizer_state = helpers.get_state_dict(module, optimizer)
    helpers.set_state_dict(module, optimizer, model_state_dict=model_state, optim_state_dict=optimizer_state)
    return model_state, sorted(optimizer_state["state"]), train(module)


@ALONE.add()
def checkpoint_wrapper(module):
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    return step(checkpoint_wrapper(module), module)


@ALONE.add()
def zero_optimizer(module):
    from torch.distributed.optim import ZeroRedundancyOptimizer

    optimizer = ZeroRedundancyOptimizer(module.parameters(), torch.optim.SGD, lr=0.1)
    train(module)
    optimizer.step()
    return train(module)


@ALONE.add()
def pipeline_stage(module):
    from torch.distributed.pipelining import PipelineStage, ScheduleGPipe

    stage = PipelineStage(Model(module), 0, 1, torch.device("cpu"))
    return ScheduleGPipe(stage, 1).step(sample(module))


# ------------------------------------------------ two processes

KINDS_OF_TWO = ("gru", "lstm", "lstm_proj", "lstmcell")


def data_of(rank, module):
    return sample(module) * (rank + 1)


def two_ddp(rank, module):
    model = DistributedDataParallel(module)
    total(model(data_of(rank, module))).backward()
    return [p.grad for p in module.parameters()]


def two_fully_sharded(rank, module):
    from torch.distributed.fsdp import fully_shard

    model = Model(module)
    shards = distributed.device_mesh.init_device_mesh("cpu", (2,))
    fully_shard(model.module, mesh=shards)
    fully_shard(model, mesh=shards)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    found = []
    for _ in range(2):
        result = model(data_of(rank, module))
        total(result).backward()
        found.append([result.detach(), *grads(model)])
        optimizer.step()
        optimizer.zero_grad()
    return found


def two_fsdp(rank, module):
    from torch.distributed.fsdp import FullyShardedDataParallel

    x = data_of(rank, module)
    model = FullyShardedDataParallel(Model(module), device_id=torch.device("cpu"))
    result = model(x)
    total(result).backward()
    return [result.detach(), *grads(model)]


def two_parallelized(rank, module):
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    model = Model(module)
    plan = {"after": ColwiseParallel(output_layouts=Replicate())}
    parallelize_module(model, distributed.device_mesh.init_device_mesh("cpu", (2,)), plan)
    result = model(sample(module))
    total(result).backward()
    return [result.detach(), *(p.grad for p in module.parameters())]


def two_broadcast(rank, module):
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(1 - rank)
            distributed.broadcast(parameter, 0)
    return [t.detach() for t in tensors(module(sample(module)))]


TWO = {
    "ddp": two_ddp,
    "fully_shard": two_fully_sharded,
    "fsdp": two_fsdp,
    "parallelize_module": two_parallelized,
    "broadcast": two_broadcast,
}


def outcome_of(function, rank, module):
    """What can be sent: values, or the class and text of the exception."""
    torch.manual_seed(1)
    try:
        return function(rank, module)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def two_worker(rank, pairs, address, folder):
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=address, rank=rank, world_size=2, timeout=datetime.timedelta(seconds=60)
    )
    warnings.simplefilter("ignore")
    found = {}
    for name, function in TWO.items():
        for kind, pair in pairs.items():
            with rnnfast.backend("cpu"):  # for the cell, whose step may be torch's own else
                found[name, kind] = [outcome_of(function, rank, copy.deepcopy(module)) for module in pair]
    torch.save(found, f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def of_two(tmp_path_factory):
    """rank -> (name, kind) -> (our outcome, torch.nn's), all from one pair of processes."""
    folder = tmp_path_factory.mktemp("two")
    torch.manual_seed(0)
    pairs = {kind: twins(kind) for kind in KINDS_OF_TWO}
    multiprocessing.start_processes(
        two_worker, (pairs, f"file://{folder}/rendezvous", str(folder)), nprocs=2, start_method="fork"
    )
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("kind", KINDS_OF_TWO)
@pytest.mark.parametrize("name", TWO)
def test_two(name, kind, of_two):
    for found in of_two:
        actual, expected = found[name, kind]
        assert not isinstance(expected, str), expected
        assert not isinstance(actual, str), actual
        compare(actual, expected)


@ALONE.parametrize()
def test_alone(name, kind, group):
    ALONE.check(name, kind)


def test_a_difference_is_caught():
    assert_plant_is_caught(ALONE)
