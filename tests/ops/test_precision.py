"""Which products float32 layers get from the CUDA kernels, as the emulator runs them; Triton's: test_triton_ops.py."""

from __future__ import annotations

import itertools

import torch
from support.emulated import needs_emulator

import rnnfast

pytestmark = needs_emulator


def test_every_pass_follows_the_switch_of_its_own_time(monkeypatch):
    """The library keeps the switch for float32 products of a whole process; it must be told before each pass."""
    torch._dynamo.reset()
    model, x = rnnfast.GRU(24, 24), torch.randn(2, 3, 24, requires_grad=True)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")

    def results(run, forward, backward):
        monkeypatch.setenv("RNNFAST_FLOAT32_PRODUCTS", forward)
        output, _ = run(x)
        monkeypatch.setenv("RNNFAST_FLOAT32_PRODUCTS", backward)
        return output, *torch.autograd.grad(output.sum(), [x, *model.parameters()])

    def same(first, second):
        return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))

    with rnnfast.backend("emulator", strict=True):
        eager = {(f, b): results(model, f, b) for f in ("ieee", "tf32") for b in ("ieee", "tf32")}
        assert torch.equal(eager["tf32", "ieee"][0], eager["tf32", "tf32"][0])
        for one, other in itertools.combinations(eager.values(), 2):
            assert not same(one, other)
        for products, expected in eager.items():
            model(x)  # of the last backward's switch
            assert same(results(compiled, *products), expected), products
