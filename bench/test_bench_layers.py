"""Absolute times with pytest-benchmark, per case and provider: `python -m pytest bench/test_bench_layers.py`.

pytest-benchmark measures one call after the other, so its times belong to one provider and one machine at one moment:
good for comparing commits (--benchmark-autosave, --benchmark-compare), not for ratios between providers. Those come
from `python -m bench`, which takes both sides in turn.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

import rnnfast
from bench import cases, parity, suites
from bench.providers import Problem, Runner

pytest.importorskip("pytest_benchmark")

NAMESPACES = {"torch": nn, "rnnfast": rnnfast}
CASES = [*cases.grid((64, 256), (1, 16)), *suites.special(threads=1)]


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("provider", NAMESPACES)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_bench_layer(case, provider, benchmark, one_thread):
    problem = Problem(case)
    runner = Runner(NAMESPACES[provider], problem)
    with torch.set_grad_enabled(case.mode != "inference"):
        verdict = parity.check(case, Runner(nn, problem).run(), runner.run())
        assert verdict.failure is None, verdict.failure
        benchmark.group = case.name
        benchmark.extra_info |= {"backend": runner.backend(), "err": verdict.err, "torch_err": verdict.torch_err}
        benchmark(runner.timed)
