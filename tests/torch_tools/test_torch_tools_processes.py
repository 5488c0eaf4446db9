"""torch.multiprocessing around the modules: children, shared memory and queues."""

import pickle
from multiprocessing.reduction import ForkingPickler

import torch
from support.torch_tools import KINDS, Rows, assert_plant_is_caught, compare, sample, train
from support.twins import (
    cells_take_the_kernels,  # noqa: F401
    tensors,
    total,
    twins,
)
from torch import multiprocessing

PROCESSES = Rows()


def forward(module, x):
    return [t.detach() for t in tensors(module(x))]


def answer(queue, function, module, x):
    torch.set_num_threads(1)
    queue.put([t.clone().numpy() for t in function(module, x)])  # by value: the sender may end first


def in_child(function, module, x, start="fork"):
    """function(module, x) in a child process."""
    context = multiprocessing.get_context(start)
    queue = context.SimpleQueue()
    process = context.Process(target=answer, args=(queue, function, module, x))
    process.start()
    found = queue.get()
    process.join(60)
    assert process.exitcode == 0
    return [torch.from_numpy(value) for value in found]


def trained(module, x):
    total(module(x)).backward()
    return [p.grad for p in module.parameters()]


@PROCESSES.add()
def forked(module):
    return in_child(forward, module, sample(module))


@PROCESSES.add()
def forked_training(module):
    return in_child(trained, module, sample(module))


@PROCESSES.add()
def forked_after_a_forward(module):
    before = train(module)
    return before, in_child(forward, module, sample(module))


@PROCESSES.add()
def shared_memory(module):
    module.share_memory()
    return [p.is_shared() for p in module.parameters()], in_child(forward, module, sample(module)), train(module)


def halve(module, x):
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(0.5)
    return [x]


@PROCESSES.add()
def a_child_changes_shared_weights(module):
    module.share_memory()
    in_child(halve, module, sample(module))
    return module(sample(module))


def from_queue(queue, answers):
    torch.set_num_threads(1)
    module, x = queue.get()
    answers.put([t.numpy() for t in forward(module, x)])


@PROCESSES.add()
def module_through_a_queue(module):
    context = multiprocessing.get_context("fork")
    queue, answers = context.Queue(), context.SimpleQueue()
    process = context.Process(target=from_queue, args=(queue, answers))
    process.start()
    queue.put((module, sample(module)))
    found = answers.get()
    process.join(60)
    queue.close()
    return [torch.from_numpy(value) for value in found]


@PROCESSES.add()
def result_through_a_pipe(module):
    pickled = ForkingPickler.dumps([t.detach() for t in tensors(module(sample(module)))])
    return [t.clone() for t in pickle.loads(bytes(pickled))]


# One process for all kinds: it takes seconds to start.
def spawned_worker(index, modules, folder):
    torch.set_num_threads(1)
    torch.save([forward(module, sample(module)) for module in modules], f"{folder}/{index}.pt")


def test_spawned(tmp_path):
    pairs = [twins(kind) for kind in KINDS]
    multiprocessing.spawn(spawned_worker, ([ours for ours, _ in pairs], str(tmp_path)), nprocs=1)
    compare(torch.load(tmp_path / "0.pt", weights_only=True), [forward(theirs, sample(theirs)) for _, theirs in pairs])


@PROCESSES.parametrize()
def test_processes(name, kind):
    PROCESSES.check(name, kind)


def test_a_difference_is_caught():
    assert_plant_is_caught(PROCESSES)
