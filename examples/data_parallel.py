"""Data-parallel training of an LSTM: DistributedDataParallel and FSDP2, on CPUs with gloo.

Run it with two processes: torchrun --standalone --nproc-per-node 2 examples/data_parallel.py [--small]
It runs with one process too: python examples/data_parallel.py [--small]
"""

import copy
import sys

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import rnnfast

SMALL = "--small" in sys.argv
HIDDEN, STEPS, BATCH = (16, 5, 8) if SMALL else (64, 40, 32)


class Adder(nn.Module):
    """Predicts the sum of a sequence's numbers."""

    def __init__(self):
        super().__init__()
        self.lstm = rnnfast.LSTM(input_size=1, hidden_size=HIDDEN, num_layers=2)
        self.head = nn.Linear(HIDDEN, 1)

    def forward(self, x: Tensor) -> Tensor:
        output, _ = self.lstm(x)
        return self.head(output[-1])


def train(model: nn.Module, rank: int, world_size: int) -> float:
    """Trains on every `world_size`-th row of each batch, from row `rank` on. Returns the last loss."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(1)  # every process draws the same batches
    for _ in range(STEPS):
        x = torch.rand(10, BATCH, 1, generator=generator)[:, rank::world_size]
        loss = F.mse_loss(model(x), x.sum(0))
        optimizer.zero_grad()
        loss.backward()  # averages the gradients over the processes
        optimizer.step()
    return loss.item()


def train_everywhere(model: Adder) -> None:
    rank, world_size = distributed.get_rank(), distributed.get_world_size()
    alone, replicated, sharded = (copy.deepcopy(model) for _ in range(3))
    loss = train(alone, rank=0, world_size=1)

    train(DistributedDataParallel(replicated), rank, world_size)

    mesh = init_device_mesh("cpu", (world_size,))
    fully_shard(sharded.lstm, mesh=mesh)  # gathers the layers' weights for forward and backward only
    fully_shard(sharded, mesh=mesh)
    train(sharded, rank, world_size)
    part = sharded.lstm.weight_hh_l0.to_local()
    gathered = {name: tensor.full_tensor() for name, tensor in sharded.state_dict().items()}

    torch.testing.assert_close(replicated.state_dict(), alone.state_dict(), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(gathered, alone.state_dict(), rtol=1e-3, atol=1e-4)
    if rank == 0:
        print(f"loss after {STEPS} steps in one process: {loss:.4f}")
        print(f"DDP, processes: {world_size}; the weights equal those of one process")
        print(f"FSDP2, rows of weight_hh_l0 here: {len(part)} of {4 * HIDDEN}; the weights equal those of one process")


alone = {} if distributed.is_torchelastic_launched() else {"store": distributed.HashStore(), "rank": 0, "world_size": 1}
distributed.init_process_group("gloo", **alone)
torch.manual_seed(0)  # every process starts with the same weights
train_everywhere(Adder())
distributed.destroy_process_group()
