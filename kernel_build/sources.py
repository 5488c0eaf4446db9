"""The source files of every library, with the flags of each."""

from typing import NamedTuple

AVX2 = ("-mavx2", "-mfma", "-mf16c")
AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c")


class Source(NamedTuple):
    """One object file: a source file, compiled with flags of its own."""

    path: str
    """From the root of the repository."""
    flags: tuple[str, ...] = ()
    suffix: str = ""
    """Tells the object files of one source file apart."""
    machine: str | None = None
    """The machine that it is for, as `c++ -dumpmachine` begins. None: every machine."""
    ptx: tuple[int, ...] = ()
    """Kernels only: the versions of PTX that are made of it. Machine code comes from the newest one that it can run."""

    @property
    def name(self) -> str:
        """The object file without its ending, from the folder of all objects."""
        return self.path.rpartition(".")[0] + self.suffix


# Files without flags come first. The linker keeps the first of several equal inline functions: it must run everywhere.
CPU_SOURCES = (
    Source("csrc/cpu/host/ops_cpu.cpp"),
    Source("csrc/cpu/host/layers.cpp"),
    Source("csrc/cpu/host/frozen.cpp"),
    Source("csrc/cpu/host/isa.cpp"),
    Source("csrc/cpu/kernels/isa_base.cpp"),
    Source("csrc/cpu/kernels/isa_neon.cpp", machine="aarch64"),
    Source("csrc/cpu/kernels/isa_avx2.cpp", AVX2, machine="x86_64"),
    Source("csrc/cpu/kernels/isa_avx2_vnni.cpp", (*AVX2, "-mavxvnni"), machine="x86_64"),
    Source("csrc/cpu/kernels/isa_avx512.cpp", AVX512, machine="x86_64"),
    Source("csrc/cpu/kernels/isa_avx512_vnni.cpp", (*AVX512, "-mavx512vnni"), machine="x86_64"),
    Source("csrc/cpu/kernels/isa_avx512_bf16.cpp", (*AVX512, "-mavx512bf16"), machine="x86_64"),
)

CUDA_HOST_SOURCES = tuple(Source(f"csrc/cuda/host/{name}.cpp") for name in ("ops_cuda", "host", "forward", "backward"))

ARITHMETICS = {"exact": "kExact", "f16": "kHalf", "bf16": "kBfloat16", "tf32": "kTf32"}
"""Short names of csrc/cuda/layer.h's `enum class Arithmetic`."""
PASSES = ("forward", "backward")
_RESIDENT = {"cta": 80, "cluster": 90, "group": 80}
# Machine code of sm_100 spills where it is made from the step kernels' TF32 PTX of version 80.
_STEP = {"exact": (75, 80), "f16": (75, 80), "bf16": (80,), "tf32": (80, 100)}


def instance(tier: str, arithmetic: str, direction: str = "") -> Source:
    """The kernels of one tier with one arithmetic; of one pass where the tier is not "step"."""
    flags = [f"-DRNNFAST_ARITHMETIC={ARITHMETICS[arithmetic]}"]
    if direction:
        flags.append(f"-DRNNFAST_BACKWARD={PASSES.index(direction)}")
    suffix = "".join(f"-{word}" for word in (arithmetic, direction) if word)
    ptx = _STEP[arithmetic] if tier == "step" else (_RESIDENT[tier],)
    return Source(f"csrc/cuda/tiers/{tier}/instance.cu", tuple(flags), suffix, ptx=ptx)


# PTX is made once for each version, which takes two thirds of the time for one architecture. Machine code for every
# architecture comes from it, with as many registers as from PTX of its own (all kernels of tier CTA in bf16, sm_90).
CUDA_KERNEL_SOURCES = (
    Source("csrc/cuda/device/around.cu", ptx=(75,)),
    Source("csrc/cuda/plan/resident.cu", ptx=(80,)),
    *(
        instance(tier, arithmetic, direction)
        for tier in _RESIDENT
        for arithmetic in ARITHMETICS
        for direction in PASSES
    ),
    *(instance("step", arithmetic) for arithmetic in ARITHMETICS),
)

EMULATOR_SOURCES = tuple(
    Source(f"csrc/emulator/{name}.cpp") for name in ("fiber", "schedule", "runtime", "memory", "warp")
)
