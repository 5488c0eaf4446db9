"""csrc/cuda/plan.h as a pure function: tier, tile or the reason, for a table of GPUs that need not be here."""

from __future__ import annotations

import ctypes
import os
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
TIERS = ("cta", "cluster", "group", "step")
ALL = 0b1111
CELLS = {"rnn": 0, "gru": 1, "lstm": 2}
PRODUCTS = {"bf16": 0, "f16": 1, "tf32": 2, "f32": 3}

SHIM = """
#include "cuda/plan.h"
#include <cstring>
using namespace rnnfast;
using namespace rnnfast::cuda;
extern "C" int choose_plan(const int* p, const int* d, unsigned compiled, const char* forced, int* out, char* reason) {
  const Problem problem{Cell(p[0]), Product(p[1]), p[2] != 0, p[4] != 0, p[3], p[4] ? p[4] : p[3], p[5], p[6], p[7]};
  const DeviceLimits device{d[0], d[1], d[2], d[3], d[4] != 0};
  Plan plan{};
  std::string text;
  const bool found = choose(problem, device, compiled, forced, plan, text);
  std::strncpy(reason, text.c_str(), 255);
  const int values[5] = {int(plan.tier), plan.ctas, plan.tile_units, plan.tile_batch, plan.shared_bytes};
  std::memcpy(out, values, sizeof(values));
  return found;
}
"""


class Gpu(NamedTuple):
    """A device's limits; from NVIDIA's published tables."""

    capability: int
    multiprocessors: int
    shared_per_block: int
    largest_cluster: int
    cooperative: int


GPUS = {
    "T4": Gpu(75, 40, 64 << 10, 1, 1),
    "A100": Gpu(80, 108, 163 << 10, 1, 1),
    "L40S": Gpu(89, 142, 99 << 10, 1, 1),
    "RTX 4090": Gpu(89, 128, 99 << 10, 1, 1),
    "H100": Gpu(90, 132, 227 << 10, 16, 1),
    "H200": Gpu(90, 132, 227 << 10, 16, 1),
    "B200": Gpu(100, 148, 227 << 10, 16, 1),
}


class Plan(NamedTuple):
    tier: str
    ctas: int
    units: int
    batch: int
    shared_bytes: int


@pytest.fixture(scope="session")
def library(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plan")
    (folder / "plan.cpp").write_text(SHIM)
    command = [os.environ.get("CXX", "c++"), "-std=c++20", "-Wall", "-Werror", "-shared", "-fPIC", f"-I{ROOT}/csrc"]
    subprocess.run([*command, folder / "plan.cpp", "-o", folder / "plan.so"], check=True)
    return ctypes.CDLL(str(folder / "plan.so"))


@pytest.fixture
def plan(library):
    def choose(gpu, cell, product, H, B=1, D=1, proj=0, backward=False, compiled=ALL, forced=None, cta_bytes=0):
        numbers = (ctypes.c_int * 8)(CELLS[cell], PRODUCTS[product], backward, H, proj, B, D, cta_bytes)
        out, reason = (ctypes.c_int * 5)(), ctypes.create_string_buffer(256)
        forced = forced.encode() if forced else None
        limits = (ctypes.c_int * 5)(*GPUS[gpu])
        if library.choose_plan(numbers, limits, compiled, forced, out, reason):
            return Plan(TIERS[out[0]], *out[1:])
        return reason.value.decode()

    return choose


@pytest.mark.parametrize(
    "gpu, cell, product, H, B, tier, ctas",
    [
        # weight_hh in the registers of one CTA: 128 KiB
        ("A100", "lstm", "bf16", 128, 16, "cta", 1),
        ("L40S", "gru", "f16", 128, 64, "cta", 1),
        ("RTX 4090", "lstm", "tf32", 64, 16, "cta", 1),
        ("H200", "lstm", "bf16", 100, 1, "cta", 1),
        ("H200", "rnn", "bf16", 256, 1, "cta", 1),
        ("B200", "lstm", "f32", 64, 16, "cta", 1),
        # a cluster, from compute capability 9.0 on
        ("H100", "lstm", "bf16", 129, 16, "cluster", 2),
        ("H100", "lstm", "bf16", 256, 16, "cluster", 4),
        ("H100", "lstm", "bf16", 512, 64, "cluster", 16),
        ("H100", "gru", "bf16", 512, 64, "cluster", 16),
        ("H100", "lstm", "tf32", 256, 16, "cluster", 8),
        ("B200", "rnn", "f16", 512, 1, "cluster", 4),
        # all multiprocessors; small batches only
        ("H200", "lstm", "bf16", 1024, 16, "group", 64),
        ("H200", "lstm", "tf32", 512, 8, "group", 32),
        ("A100", "lstm", "bf16", 256, 16, "group", 4),
        ("A100", "lstm", "bf16", 512, 16, "group", 16),
        # the rest
        ("H200", "lstm", "bf16", 1024, 256, "step", 1),
        ("H200", "lstm", "bf16", 2048, 1, "step", 1),
        ("A100", "lstm", "bf16", 1024, 256, "step", 1),
        ("T4", "lstm", "f16", 64, 8, "step", 1),
        ("T4", "gru", "f32", 5, 1, "step", 1),
    ],
)
def test_tier(plan, gpu, cell, product, H, B, tier, ctas):
    chosen = plan(gpu, cell, product, H, B)
    assert isinstance(chosen, Plan), chosen
    assert (chosen.tier, chosen.ctas) == (tier, ctas)


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("backward", [False, True])
def test_every_plan_fits_its_device(plan, gpu, cell, backward):
    limits = GPUS[gpu]
    for product, size in (("bf16", 2), ("f16", 2), ("tf32", 4), ("f32", 4)):
        if limits.capability < 80 and product in ("bf16", "tf32"):
            continue
        for H in (1, 5, 32, 63, 64, 100, 128, 129, 256, 512, 640, 1024, 2048, 5000):
            for B, D in ((1, 1), (8, 2), (64, 1), (256, 2), (1024, 1)):
                chosen = plan(gpu, cell, product, H, B, D, backward=backward)
                assert isinstance(chosen, Plan), chosen
                assert chosen.shared_bytes <= limits.shared_per_block, (product, H, B, chosen)
                if chosen.tier in ("cluster", "group"):
                    gates = {"rnn": 1, "gru": 3, "lstm": 4}[cell]
                    padded = -(-H // 32) * 32
                    assert gates * padded * padded * size <= chosen.ctas * (128 << 10)
                    assert chosen.ctas * chosen.units == padded
                if chosen.tier == "cluster":
                    assert 2 <= chosen.ctas <= limits.largest_cluster
                if chosen.tier == "group":
                    assert chosen.ctas * D <= limits.multiprocessors


def test_only_compiled_tiers_are_chosen(plan):
    assert plan("H200", "lstm", "bf16", 128, compiled=0b1000).tier == "step"
    assert plan("H200", "lstm", "bf16", 128, compiled=0b1001).tier == "cta"
    assert plan("H200", "lstm", "bf16", 256, compiled=0b1001).tier == "step"


def test_a_projection_stays_on_one_cta_or_takes_tier_step(plan):
    assert plan("H200", "lstm", "bf16", 64, proj=32).tier == "cta"
    assert plan("H200", "lstm", "bf16", 256, proj=32).tier == "step"
    assert "no second product" in plan("H200", "lstm", "bf16", 256, proj=32, forced="cluster")
    assert "smaller than hidden_size" in plan("H200", "lstm", "bf16", 64, proj=64, forced="cta")


def test_tier_cta_needs_the_shared_memory_of_its_kernel(plan):
    assert plan("RTX 4090", "lstm", "f32", 64, cta_bytes=100 << 10).tier != "cta"
    assert plan("H200", "lstm", "f32", 64, cta_bytes=100 << 10) == ("cta", 1, 64, 8, 100 << 10)
    assert plan("RTX 4090", "lstm", "f32", 64, forced="cta", cta_bytes=100 << 10) == (
        "tier cta: it needs more shared memory than a CTA has"
    )


def test_large_tiles_where_they_fill_half_of_the_device(plan):
    # bf16 LSTM: 32 units x 64 rows, so 32 x 4 CTAs against 132 multiprocessors.
    assert plan("H200", "lstm", "bf16", 1024, 256, forced="step")[2:4] == (32, 64)
    assert plan("H200", "lstm", "bf16", 256, 64, forced="step")[2:4] == (16, 16)
    assert plan("H200", "lstm", "bf16", 4096, 16, forced="step")[2:4] == (16, 16)
    # ... and have the shared memory
    assert plan("T4", "lstm", "f16", 1024, 256, forced="step")[2:4] == (16, 16)


def test_a_forced_tier_is_taken_or_refused_with_the_reason(plan):
    assert plan("H200", "lstm", "bf16", 64, forced="step").tier == "step"
    assert plan("H200", "lstm", "bf16", 64, forced="cta").tier == "cta"
    for gpu, H, B, tier, reason in (
        ("H200", 256, 1, "cta", "tier cta: weight_hh exceeds the registers of one CTA"),
        ("H200", 64, 1, "cluster", "tier cluster: weight_hh fits one CTA"),
        ("A100", 256, 1, "cluster", "tier cluster: clusters need compute capability 9.0 or newer"),
        ("H200", 1024, 1, "cluster", "tier cluster: weight_hh exceeds the registers of all CTAs"),
        ("H200", 1024, 256, "group", "tier group: the batch is too large for the groups that fit the device"),
        ("H200", 2048, 1, "group", "tier group: weight_hh exceeds the registers of all CTAs"),
        ("H200", 64, 1, "block", "RNNFAST_TIER: expected cta, cluster, group or step, got block"),
    ):
        assert plan(gpu, "lstm", "bf16", H, B, forced=tier) == reason
    assert plan("H200", "lstm", "bf16", 64, forced="cta", compiled=0b1000) == "tier cta: it is not compiled in"


def test_an_old_device_is_refused_what_it_lacks(plan):
    assert plan("T4", "lstm", "bf16", 64) == "tier step: bfloat16 products need compute capability 8.0 or newer"
    assert plan("T4", "lstm", "tf32", 64) == "tier step: TF32 products need compute capability 8.0 or newer"
    assert "8.0" in plan("T4", "lstm", "f16", 64, forced="cta")
