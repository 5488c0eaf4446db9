"""csrc/cuda/plan/plan.h as a pure function: tier, tile or the reason, for a table of GPUs that need not be here.

The kernels' sizes are told by their own headers, which g++ compiles as for the emulator; no kernel is.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
from itertools import product
from pathlib import Path
from typing import NamedTuple

import pytest
from emulator.build import CSRC, KERNEL_FLAGS

from kernel_build.architectures import ARCHITECTURES

ROOT = Path(__file__).parents[2]
TIERS = ("cta", "cluster", "group", "step")
CELLS = {"rnn": 0, "gru": 1, "lstm": 2}
PRODUCTS = {"bf16": 0, "f16": 1, "tf32": 2, "f32": 3}

PLAN = """
#include "cuda/plan/plan.h"
#include <cstring>
using namespace rnnfast;
using namespace rnnfast::cuda;
Resources resources_of(const Problem& problem, Tier tier);
struct Kernels {
  const Problem& problem;
  int unfit_tiers, multiprocessors;
  Resources resources(Tier tier) const { return resources_of(problem, tier); }
  const char* unfit(Tier tier) const {  // as if an SM held one CTA
    const bool fits = resources(tier).ctas <= multiprocessors && !(unfit_tiers >> int(tier) & 1);
    return fits ? nullptr : "it does not fit";
  }
};
extern "C" bool choose_plan(const int* p, const int* d, const char* forced, int* out, char* why) {
  Shape shape{};
  shape.cell = Cell(p[0]), shape.hidden_size = p[3], shape.output_size = p[4] ? p[4] : p[3];
  shape.batch = p[5], shape.directions = p[6], shape.steps = 1;
  const Problem problem{Arithmetic(p[1]), p[2] != 0, p[4] != 0, shape};
  const DeviceLimits device{d[0], d[1], d[2], d[3], d[4] != 0};
  const Choice choice = choose(problem, device, forced, Kernels{problem, p[7], d[1]});
  std::strncpy(why, choice.why().c_str(), 511);
  const Plan& plan = choice.plan;
  const int threads = plan.tier == Tier::kStep ? 32 * kStepWarps : resources_of(problem, plan.tier).threads;
  const int values[6] = {int(plan.tier), plan.ctas, plan.tile_units, plan.tile_batch, plan.shared_bytes, threads};
  std::memcpy(out, values, sizeof(values));
  return choice.found;
}
"""
RESOURCES = """
#include "cuda/plan/resident.cuh"
#include "cuda/tiers/cluster/launch.cuh"
#include "cuda/tiers/cta/launch.cuh"
#include "cuda/tiers/group/launch.cuh"
using namespace rnnfast::cuda;
Resources resources_of(const Problem& problem, Tier tier) {
  switch (problem.arithmetic) {
    case Arithmetic::kBfloat16: return resident_resources<Arithmetic::kBfloat16>(tier, problem.shape, problem.backward);
    case Arithmetic::kHalf: return resident_resources<Arithmetic::kHalf>(tier, problem.shape, problem.backward);
    case Arithmetic::kTf32: return resident_resources<Arithmetic::kTf32>(tier, problem.shape, problem.backward);
    default: return resident_resources<Arithmetic::kExact>(tier, problem.shape, problem.backward);
  }
}
"""


class Gpu(NamedTuple):
    """A device's limits; from NVIDIA's published tables."""

    capability: int
    multiprocessors: int
    shared_per_block: int
    largest_cluster: int
    cooperative: int


GPUS = {  # by architecture and multiprocessors
    name: Gpu(sm, processors, ARCHITECTURES[sm].shared_bytes, ARCHITECTURES[sm].largest_cluster, 1)
    for name, sm, processors in (
        ("T4", 75, 40),
        ("A100", 80, 108),
        ("L40S", 89, 142),
        ("RTX 4090", 89, 128),
        ("H100", 90, 132),
        ("H200", 90, 132),
        ("B200", 100, 148),
        ("RTX 5090", 120, 170),
    )
}


class Plan(NamedTuple):
    tier: str
    ctas: int
    units: int
    batch: int
    shared_bytes: int
    threads: int
    why: str  # the tiers before it were not taken


@pytest.fixture(scope="session")
def library(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plan")
    compiler = [os.environ.get("CXX", "c++"), "-std=c++20", "-fPIC", "-Wall", "-Werror", f"-I{CSRC}"]
    for name, source, flags in (
        ("plan", PLAN, []),
        ("resources", RESOURCES, [*KERNEL_FLAGS, "-Wno-unknown-pragmas"]),
    ):
        (folder / f"{name}.cpp").write_text(source)
        subprocess.run([*compiler, *flags, "-c", folder / f"{name}.cpp", "-o", folder / f"{name}.o"], check=True)
    objects = [folder / "plan.o", folder / "resources.o"]
    subprocess.run([*compiler, "-shared", *objects, "-o", folder / "plan.so"], check=True)
    found = ctypes.CDLL(str(folder / "plan.so"))
    found.choose_plan.restype = ctypes.c_bool
    return found


@pytest.fixture
def plan(library):
    def choose(gpu, cell, number, H, B=1, D=1, proj=0, backward=False, forced=None, unfit=()):
        unfit_tiers = sum(1 << TIERS.index(tier) for tier in unfit)
        numbers = (ctypes.c_int * 8)(CELLS[cell], PRODUCTS[number], backward, H, proj, B, D, unfit_tiers)
        out, why = (ctypes.c_int * 6)(), ctypes.create_string_buffer(512)
        forced = forced.encode() if forced else None
        if library.choose_plan(numbers, (ctypes.c_int * 5)(*GPUS[gpu]), forced, out, why):
            return Plan(TIERS[out[0]], *out[1:], why.value.decode())
        return why.value.decode()

    return choose


@pytest.mark.parametrize(
    "gpu, cell, number, H, B, tier, ctas",
    [
        # weight_hh in one CTA
        ("A100", "lstm", "bf16", 128, 16, "cta", 1),
        ("L40S", "gru", "f16", 128, 64, "cta", 1),
        ("RTX 4090", "lstm", "tf32", 64, 16, "cta", 1),
        ("H200", "lstm", "bf16", 100, 1, "cta", 1),
        ("H200", "rnn", "bf16", 256, 1, "cta", 1),
        ("B200", "lstm", "f32", 64, 16, "cta", 1),
        ("H200", "lstm", "bf16", 128, 65536, "cta", 1),
        # a cluster, from compute capability 9.0 on; of 16 CTAs not everywhere
        ("H100", "lstm", "bf16", 129, 16, "cluster", 4),
        ("H100", "lstm", "bf16", 256, 16, "cluster", 4),
        ("H100", "lstm", "bf16", 512, 64, "cluster", 16),
        ("H100", "gru", "bf16", 512, 64, "cluster", 16),
        ("H100", "lstm", "tf32", 256, 16, "cluster", 8),
        ("B200", "rnn", "f16", 512, 1, "cluster", 4),
        ("RTX 5090", "lstm", "bf16", 256, 16, "cluster", 4),
        ("RTX 5090", "lstm", "bf16", 512, 16, "group", 32),
        # all multiprocessors; small batches only
        ("H200", "lstm", "bf16", 1024, 16, "group", 64),
        ("H200", "lstm", "tf32", 512, 8, "group", 32),
        ("H200", "rnn", "bf16", 2048, 16, "group", 64),
        ("H200", "lstm", "bf16", 2048, 16, "group", 128),
        ("B200", "gru", "f16", 1536, 8, "group", 96),
        ("A100", "lstm", "bf16", 256, 16, "group", 16),
        ("A100", "lstm", "bf16", 512, 16, "group", 32),
        ("RTX 4090", "lstm", "bf16", 512, 16, "group", 32),
        # the rest
        ("H200", "lstm", "bf16", 512, 1024, "step", 1),
        ("H200", "lstm", "bf16", 1024, 256, "step", 1),
        ("H200", "lstm", "bf16", 2049, 1, "step", 1),
        ("A100", "lstm", "bf16", 1024, 256, "step", 1),
        ("A100", "gru", "bf16", 2048, 1, "step", 1),  # 128 CTAs, 108 multiprocessors
        ("T4", "lstm", "f16", 64, 8, "step", 1),
        ("T4", "gru", "f32", 5, 1, "step", 1),
    ],
)
def test_tier(plan, gpu, cell, number, H, B, tier, ctas):
    chosen = plan(gpu, cell, number, H, B)
    assert isinstance(chosen, Plan), chosen
    assert (chosen.tier, chosen.ctas) == (tier, ctas), chosen


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("backward", [False, True])
def test_every_plan_fits_its_device(plan, gpu, cell, backward):
    limits = GPUS[gpu]
    numbers = [number for number in PRODUCTS if limits.capability >= 80 or number in ("f16", "f32")]
    hidden = (1, 5, 32, 63, 64, 100, 128, 129, 256, 512, 640, 1024, 1536, 2048, 5000)
    for number, H, (B, D) in product(numbers, hidden, ((1, 1), (8, 2), (64, 1), (256, 2), (1024, 1))):
        for forced in (None, *TIERS):
            chosen = plan(gpu, cell, number, H, B, D, backward=backward, forced=forced)
            if isinstance(chosen, str):
                assert chosen.startswith(f"tier {forced}: "), (number, H, B, chosen)
                continue
            assert chosen.shared_bytes <= limits.shared_per_block, (number, H, B, chosen)
            # A thread of the resident tiers may have 255 registers, and an SM has 65536.
            assert 32 <= chosen.threads <= (128 if chosen.tier == "step" else 256), (number, H, B, chosen)
            if chosen.tier == "cluster":
                assert 2 <= chosen.ctas <= limits.largest_cluster
            if chosen.tier == "group":
                assert chosen.ctas <= limits.multiprocessors
            if chosen.tier != "step":
                assert chosen.ctas * chosen.units >= H


def test_a_projection(plan):
    assert plan("H200", "lstm", "bf16", 64, proj=32).tier == "cta"
    assert plan("H200", "lstm", "bf16", 256, proj=32)[:2] == ("cluster", 4)
    assert plan("H200", "lstm", "f32", 256, proj=32)[:2] == ("cluster", 16)
    assert plan("H200", "lstm", "bf16", 1024, proj=512).tier == "group"
    assert "weight_hr exceeds" in plan("H200", "lstm", "tf32", 1024, proj=640, forced="group")
    assert plan("H200", "lstm", "tf32", 1024, proj=640).tier == "step"
    assert plan("A100", "lstm", "bf16", 1536, proj=320).tier == "group"
    assert "more shared memory" in plan("A100", "lstm", "bf16", 1536, proj=320, backward=True, forced="group")
    assert "smaller than hidden_size" in plan("H200", "lstm", "bf16", 64, proj=64, forced="cta")


def test_a_kernel_needs_its_shared_memory(plan):
    reason = "it needs more shared memory than a CTA has"
    assert plan("H200", "lstm", "bf16", 2048, forced="group").shared_bytes > 99 << 10
    assert plan("RTX 4090", "lstm", "bf16", 2048, forced="group") == f"tier group: {reason}"
    assert f"tier group: {reason}" in plan("RTX 4090", "lstm", "bf16", 2048).why


def test_what_cannot_all_run_at_once_is_passed_over(plan):
    assert plan("H200", "lstm", "bf16", 512).tier == "cluster"
    chosen = plan("H200", "lstm", "bf16", 512, unfit=["cluster"])
    assert chosen.tier == "group" and "tier cluster: it does not fit" in chosen.why
    chosen = plan("H200", "lstm", "bf16", 512, unfit=["cluster", "group"])
    assert chosen.tier == "step" and "tier cluster: it does not fit; tier group: it does not fit" in chosen.why
    for tier in ("cluster", "group"):
        assert plan("H200", "lstm", "bf16", 512, forced=tier, unfit=[tier]) == f"tier {tier}: it does not fit"


def test_many_turns_are_worse_than_tier_step(plan):
    """Tiles of the batch that a device cannot run at once wait for each other."""
    for gpu, tier, number, H, rows in (
        ("H200", "cluster", "bf16", 512, 8 * 8 * 8),  # 8 waves of 8 clusters of 16 CTAs, with 8 rows each
        ("B200", "cluster", "bf16", 512, 8 * 9 * 8),
        ("RTX 5090", "cluster", "bf16", 256, 8 * 42 * 8),
        ("H200", "group", "bf16", 1024, 2 * 2 * 8),  # 2 groups of 64 CTAs at once
        ("H200", "group", "f32", 512, 8 * 4 * 8),  # exact products: 4 groups of 32
        ("A100", "group", "bf16", 256, 2 * 6 * 8),
        ("RTX 4090", "group", "bf16", 512, 2 * 4 * 8),
    ):
        assert plan(gpu, "lstm", number, H, rows).tier == tier
        chosen = plan(gpu, "lstm", number, H, rows + 1)
        assert chosen.tier == "step" and f"tier {tier}: so many rows take too many turns" in chosen.why
        assert plan(gpu, "lstm", number, H, rows // 2, D=2).tier == tier
        assert plan(gpu, "lstm", number, H, rows // 2 + 1, D=2).tier == "step"
        assert plan(gpu, "lstm", number, H, 4 * rows, forced=tier).tier == tier


def test_large_tiles_where_they_fill_half_of_the_device(plan):
    # bf16 LSTM: 32 units x 64 rows, so 32 x 4 CTAs against 132 multiprocessors.
    assert plan("H200", "lstm", "bf16", 1024, 256, forced="step")[2:4] == (32, 64)
    assert plan("H200", "lstm", "bf16", 256, 64, forced="step")[2:4] == (16, 16)
    assert plan("H200", "lstm", "bf16", 4096, 16, forced="step")[2:4] == (16, 16)
    # ... and have the shared memory
    assert plan("T4", "lstm", "f16", 1024, 256, forced="step")[2:4] == (16, 16)


def test_a_forced_tier_is_taken_or_refused_with_the_reason(plan):
    for tier in TIERS:  # whatever would be faster
        for cell, number, H in product(CELLS, PRODUCTS, (1, 13, 64)):
            chosen = plan("H200", cell, number, H, forced=tier)
            assert chosen.tier == tier and chosen.why == ""
    for gpu, H, tier, reason in (
        ("H200", 256, "cta", "tier cta: weight_hh exceeds the registers of one CTA"),
        ("A100", 256, "cluster", "tier cluster: clusters need compute capability 9.0 or newer"),
        ("RTX 5090", 512, "cluster", "tier cluster: the device has no clusters of that size"),
        ("H200", 1024, "cluster", "tier cluster: weight_hh exceeds the registers of a cluster"),
        ("H200", 2049, "group", "tier group: weight_hh exceeds what a group can hold"),
        ("T4", 64, "group", "tier group: asynchronous copies need compute capability 8.0 or newer"),
        ("H200", 64, "block", "RNNFAST_TIER: expected cta, cluster, group or step, got block"),
    ):
        assert plan(gpu, "lstm", "f16", H, forced=tier) == reason


def test_the_tiers_before_say_why_they_were_not_taken(plan):
    assert plan("H200", "lstm", "bf16", 64).why == ""
    assert plan("A100", "lstm", "bf16", 256).why == (
        "tier cta: weight_hh exceeds the registers of one CTA; "
        "tier cluster: clusters need compute capability 9.0 or newer"
    )


def test_an_old_device_is_refused_what_it_lacks(plan):
    for number, name in (("bf16", "bfloat16"), ("tf32", "TF32")):
        reason = plan("T4", "lstm", number, 64)
        assert f"tier step: {name} products need compute capability 8.0 or newer" in reason
    assert "8.0" in plan("T4", "lstm", "f16", 64, forced="cta")
