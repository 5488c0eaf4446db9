"""Data-parallel training: DistributedDataParallel over gloo in two processes, and nn.DataParallel without a GPU."""

import copy
import datetime

import pytest
import torch
from support.twins import LAYERS, assert_same, gradients, total, twins
from torch import distributed, multiprocessing, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.rnn import pack_padded_sequence

import rnnfast

STEPS, BATCH, WORLD = 3, 4, 2


class Model(nn.Module):
    """Padded and packed layers, a projection and a cell."""

    def __init__(self, library):
        super().__init__()
        self.gru = library.GRU(3, 4, num_layers=2, bidirectional=True)
        self.lstm = library.LSTM(8, 5, proj_size=3)
        self.cell = library.RNNCell(3, 4)

    def forward(self, x, lengths):
        output, _ = self.gru(x)
        packed, (h, _) = self.lstm(pack_padded_sequence(output, lengths, enforce_sorted=False))
        return self.cell(h[0], self.cell(h[0])), packed.data


def data(step):
    generator = torch.Generator().manual_seed(step)
    return torch.randn(6, BATCH, 3, generator=generator), torch.tensor([2, 6, 3, 5])


def loss_of(model, x, lengths):
    cell, packed = model(x, lengths)
    return cell.square().sum() + packed.square().sum()


def train(model, rows):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for step in range(STEPS):
        optimizer.zero_grad()
        x, lengths = data(step)
        loss_of(model, x[:, rows], lengths[rows]).backward()
        optimizer.step()


def worker(rank, model, address, results, static_graph):
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=address, rank=rank, world_size=WORLD, timeout=datetime.timedelta(seconds=60)
    )
    try:
        model = copy.deepcopy(model)  # what spawn hands over lies in memory that both processes share
        parallel = DistributedDataParallel(model, static_graph=static_graph)
        train(parallel, slice(rank * BATCH // WORLD, (rank + 1) * BATCH // WORLD))
        torch.save(model.state_dict(), f"{results}/{rank}.pt")
        # It holds the process group too. Were it the last to let go, gloo's threads would be joined under the GIL,
        # which one of them may be waiting for.
        del parallel
    finally:
        distributed.destroy_process_group()


@pytest.mark.quick(1)
@pytest.mark.skipif(not distributed.is_available(), reason="this torch is built without torch.distributed")
@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_two_processes_train_like_one(start, tmp_path):
    """Gradients are averaged over the processes: the same as one process of torch.nn on all rows with half the loss."""
    torch.manual_seed(0)
    stock, ours = Model(nn), Model(rnnfast)
    ours.load_state_dict(stock.state_dict())
    address = f"file://{tmp_path}/rendezvous"
    multiprocessing.start_processes(
        worker, (ours, address, str(tmp_path), start == "fork"), nprocs=WORLD, start_method=start
    )
    before = copy.deepcopy(stock.state_dict())
    optimizer = torch.optim.SGD(stock.parameters(), lr=0.05)
    for step in range(STEPS):
        optimizer.zero_grad()
        (loss_of(stock, *data(step)) / WORLD).backward()
        optimizer.step()
    states = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(WORLD)]
    for name, expected in stock.state_dict().items():
        assert torch.equal(states[0][name], states[1][name]), name
        torch.testing.assert_close(states[0][name], expected, rtol=1e-4, atol=1e-6, msg=lambda m, name=name: name + m)
        assert not torch.equal(expected, before[name]), name


@pytest.mark.parametrize("kind", LAYERS)
def test_data_parallel_without_gpu(kind):
    ours, theirs = twins(kind, num_layers=2)
    x = torch.randn(5, 4, 3)
    wrapped = nn.DataParallel(ours, dim=1)
    if torch.cuda.is_available():
        wrapped.device_ids = []  # as on a machine without
    assert_same(wrapped(x), theirs(x))
    total(wrapped(x)).backward()
    total(theirs(x)).backward()
    assert_same(gradients(ours), gradients(theirs))
    assert [name.removeprefix("module.") for name in wrapped.state_dict()] == list(theirs.state_dict())


def test_processes_share_weights_in_shared_memory():
    """Hogwild: share_memory() moves the weights; a child's in-place update is seen here."""
    ours, theirs = twins("gru")
    ours.share_memory()
    x = torch.randn(5, 2, 3)
    assert_same(ours(x), theirs(x))
    process = multiprocessing.get_context("fork").Process(target=_negate, args=(ours,))
    process.start()
    process.join(60)
    assert process.exitcode == 0
    _negate(theirs)
    assert_same(ours(x), theirs(x))


def _negate(module):
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.neg_()
