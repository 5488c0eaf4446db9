"""A small program for compute-sanitizer: every kind of Triton kernel and every tier of the CUDA kernels once, forward
and backward; see gpu_check.py."""

from __future__ import annotations

import os

import torch

import rnnfast
from rnnfast import _ext
from rnnfast.triton import plan

TIERS = ("cta", "cluster", "group", "step")
SIZES = {"whole": 20, "step": 20, "group": 256}  # hidden sizes
STEPS, BATCH, INPUTS = 3, 17, 5
# Each with one dtype: compiling takes a second per kernel.
CELLS = {
    "LSTM": {"dtype": torch.bfloat16},
    "GRU": {"dtype": torch.float32},
    "RNN": {"dtype": torch.float16},
    "projected LSTM": {"dtype": torch.float32, "proj_size": 7},
}


def run(cell: str, hidden_size: int) -> None:
    """One layer with unequal rows in both directions, forward and backward."""
    new = getattr(rnnfast, cell.split()[-1])
    module = new(INPUTS, hidden_size, bidirectional=True, device="cuda", **CELLS[cell])
    x = torch.randn(STEPS, BATCH, INPUTS, dtype=CELLS[cell]["dtype"], device="cuda", requires_grad=True)
    lengths = (torch.arange(BATCH) % (STEPS + 1)).cuda()
    output, _ = module(x, lengths=lengths)
    grads = torch.autograd.grad(output.sum(), [x, *module.parameters()])
    assert all(tensor.isfinite().all() for tensor in (output, *grads))


def tiers() -> None:
    """What a tier cannot do here, or was not built, is said and left out."""
    if _ext.cuda_failure is not None:
        print("no CUDA kernels:", _ext.cuda_failure, flush=True)
        return
    with rnnfast.backend("cuda", strict=True):
        for tier in TIERS:
            os.environ["RNNFAST_TIER"] = tier
            for cell in CELLS:
                size = cell.split()[-1].lower(), CELLS[cell]["dtype"], SIZES["step"], CELLS[cell].get("proj_size", 0)
                reason = _ext.cuda_refuses(*size, BATCH, 2)
                if reason:
                    print(tier, cell, reason, flush=True)
                    continue
                run(cell, SIZES["step"])
                print(tier, cell, "done", flush=True)


def main() -> None:
    whole, group = plan.WHOLE_TILES, plan.GROUP_TILES
    torch.manual_seed(0)
    with rnnfast.backend("triton", strict=True):
        for kind, hidden_size in SIZES.items():
            plan.WHOLE_TILES = whole if kind == "whole" else {}
            plan.GROUP_TILES = group if kind == "group" else {}
            for cell in CELLS:
                if kind == "group" and "proj_size" in CELLS[cell]:
                    continue
                run(cell, hidden_size)
                print(kind, cell, "done", flush=True)
    tiers()


if __name__ == "__main__":
    main()
