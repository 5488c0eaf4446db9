"""An ESTIMATE of the cycles that a step of the time loop takes, from the machine code; no GPU has confirmed it.

A simulation of one of an SM's four schedulers: its warps issue their instructions in order, at most one per cycle and
not before ptxas' control codes (sass.py), the pipes and the barriers let them. Everything that ASSUMED does not name is
left out: bandwidth of L2 and memory, bank conflicts, instruction cache, other blocks. Loads of gates are in time.
`make cuda-estimate` prints the table of CASES.
"""

from __future__ import annotations

import collections
import math
import re
import subprocess
from dataclasses import dataclass
from fractions import Fraction

from support import cuda_resources

from kernel_build.sources import instance

from . import sass

ARCH, CLOCK = "sm_90", 1.98  # GHz: the H200's highest

PUBLISHED = "published microbenchmarks of Hopper, from memory"
DOCUMENTED = "throughput that the CUDA programming guide gives for 9.0, from memory"
GUESS = "a guess"
# Name -> (cycles, of what, where from).
ASSUMED = {
    "tensor": (6.5, "between products m16n8k16 (tf32: m16n8k8) of a scheduler", PUBLISHED),
    "tensor_latency": (33, "until a product's sums can be read", PUBLISHED),
    "special": (8, "between MUFU of a scheduler", DOCUMENTED),
    "special_latency": (22, "of MUFU", PUBLISHED),
    "integer": (2, "between integer, logical, compare and conversion instructions of a scheduler", DOCUMENTED),
    "multiply": (2, "between IMAD of a scheduler (moves and shifts are often written as such)", DOCUMENTED),
    "shared": (1, "per 4 bytes a lane to or from shared or global memory; the four schedulers take turns", DOCUMENTED),
    "shared_latency": (30, "of LDS", PUBLISHED),
    "shuffle": (1, "between SHFL or MOVM; the four schedulers take turns", DOCUMENTED),
    "shuffle_latency": (25, "of SHFL, MOVM", PUBLISHED),
    "constant_latency": (20, "of LDC, S2R and other instructions with a scoreboard", GUESS),
    "operands_read": (12, "until a load or store has read its registers", GUESS),
    "barrier": (25, "from the last warp's arrival at BAR until all go on", PUBLISHED),
    "cluster_exchange": (350, "from the last store into another SM's memory until its wait ends (250-500)", GUESS),
    "group_exchange": (500, "from the last store for other CTAs until a poll can see it (300-700)", GUESS),
    "global_latency": (300, "of a load that polls L2", PUBLISHED),
}
INTEGER = re.compile(r"LOP3|IADD3|VIADD|SEL|FSEL|ISETP|FSETP|VIMNMX|FMNMX|LEA|SHF|PRMT|F2FP|PLOP3|IABS|MOV|I2F|F2F")
STEPS = 8  # that are simulated; the first two fill the pipes


@dataclass(frozen=True)
class Exchange:
    """How CTAs give each other h within a step."""

    sends: str  # opcodes
    receives: str
    delay: str  # in ASSUMED


EXCHANGES = {
    "cluster": Exchange(r"STAS|ST\.ASYNC", r"SYNCS\.PHASECHK\.TRANS64\.TRYWAIT", "cluster_exchange"),
    "group": Exchange(r"STG\.E\.?.*STRONG", r"LDG\.E\.?.*STRONG", "group_exchange"),
}


@dataclass(frozen=True)
class Estimate:
    cycles: float
    instructions: int
    counts: collections.Counter


class Scheduler:
    """One scheduler with `warps` warps, `schedulers` of them at work in the SM, all walking through `way`."""

    def __init__(self, way: list[sass.Instruction], warps: int, schedulers: int = 4, exchange: Exchange | None = None):
        self.way, self.exchange = way, exchange
        self.cost = {name: cycles for name, (cycles, *_) in ASSUMED.items()}
        self.schedulers = schedulers
        self.pipes: dict[str, float] = collections.defaultdict(float)  # from when on they are free
        self.warps = [Warp() for _ in range(warps)]
        self.sends = [i for i, at in enumerate(way) if exchange and re.match(exchange.sends, at.opcode)]
        self.receives = [i for i, at in enumerate(way) if exchange and re.match(exchange.receives, at.opcode)]
        self.sent: dict[int, list[float]] = collections.defaultdict(list)  # per step, of each warp
        self.accumulators = [sum_registers(at) for at in way]
        self.registers = [tuple(int(n) for n in re.findall(r"\bR(\d+)\b", at.operands)) for at in way]

    def run(self) -> float:
        """Cycles per step."""
        ends, now = [], 0.0
        while any(warp.step < STEPS for warp in self.warps):
            times = [(self.earliest(warp, now), i) for i, warp in enumerate(self.warps) if warp.step < STEPS]
            now, i = min(times)
            if math.isinf(now):
                raise RuntimeError("the warps wait for each other: something in the loop is not modelled")
            warp = self.warps[i]
            self.issue(warp, now)
            now += 1
            if warp.at == len(self.way):
                warp.at, warp.step = 0, warp.step + 1
                ends.append((warp.step, warp.free))
        end = {step: max(at for s, at in ends if s == step) for step in (2, STEPS)}
        return (end[STEPS] - end[2]) / (STEPS - 2)

    def earliest(self, warp: Warp, now: float) -> float:
        """When the warp's next instruction may be issued; infinity: another warp has to do something first."""
        instruction = self.way[warp.at]
        if warp.waiting:
            return math.inf
        time = max(now, warp.free)
        for board in range(6):
            if instruction.waits >> board & 1:
                time = max(time, warp.boards[board])
        # Nothing but the hardware itself makes an instruction wait for a product's sums.
        names = self.accumulators[warp.at] if instruction.name == "HMMA" else self.registers[warp.at]
        for register in names:
            time = max(time, warp.sums.get(register, 0.0))
        if instruction.never:
            return time
        if warp.at in self.receives:
            time = max(time, self.arrival(warp))
        return max(time, self.pipes[self.pipe(instruction)])

    def arrival(self, warp: Warp) -> float:
        """When what this step's wait is for has come: sent in the step before, or earlier in this one."""
        step = warp.step - (0 if self.sends and self.sends[-1] < self.receives[0] else 1)
        if step < 0 or not self.sends:
            return 0.0
        if len(self.sent[step]) < len(self.warps):
            return math.inf
        return max(self.sent[step]) + self.cost[self.exchange.delay]

    def pipe(self, instruction: sass.Instruction) -> str:
        name = instruction.name
        if name == "HMMA":
            return "tensor"
        if name == "MUFU":
            return "special"
        if name in MEMORY or name in SHUFFLES:
            return "memory"
        if name == "IMAD":
            return "multiply"
        return "integer" if INTEGER.match(name) else "none"

    def issue(self, warp: Warp, now: float) -> None:
        instruction, cost = self.way[warp.at], self.cost
        name, pipe, latency = instruction.name, self.pipe(instruction), cost["constant_latency"]
        if instruction.never:
            pipe, latency = "none", 0
        elif pipe == "tensor":
            self.pipes[pipe] = now + cost["tensor"]
            for register in range(4):
                warp.sums[self.registers[warp.at][0] + register] = now + cost["tensor_latency"]
        elif pipe == "special":
            self.pipes[pipe], latency = now + cost["special"], cost["special_latency"]
        elif name in SHUFFLES:
            self.pipes[pipe], latency = now + cost["shuffle"] * self.schedulers, cost["shuffle_latency"]
        elif pipe == "memory":
            # Copies to shared memory occupy it when they arrive; only their addresses pass here.
            pieces = 1 if name == "LDGSTS" else max(1, instruction.bytes // 4)
            self.pipes[pipe] = now + cost["shared"] * pieces * self.schedulers
            latency = cost["shared_latency"] + pieces * self.schedulers / 2
            if name == "LDG":  # a guarded one reads the table of ragged rows; these are dense
                latency = cost["global_latency"] if not instruction.guard else 0
        elif pipe in ("integer", "multiply"):
            self.pipes[pipe] = now + cost[pipe]
        if instruction.written != sass.NO_SCOREBOARD:
            board = instruction.written
            warp.boards[board] = max(warp.boards[board], now + latency)
        if instruction.read != sass.NO_SCOREBOARD:
            board = instruction.read
            warp.boards[board] = max(warp.boards[board], now + cost["operands_read"])
        warp.free = now + max(1, instruction.stall)
        if self.sends and warp.at == self.sends[-1]:
            self.sent[warp.step].append(now)
        if instruction.opcode.startswith("BAR.SYNC"):
            warp.waiting = True
            if all(other.waiting for other in self.warps):
                for other in self.warps:
                    other.free, other.waiting = max(other.free, now + cost["barrier"]), False
        warp.at += 1


MEMORY = {"LDS", "STS", "LDSM", "LDG", "STG", "LDGSTS", "LDL", "STL", "STAS", "ST", "LD"}
SHUFFLES = {"SHFL", "MOVM"}


class Warp:
    def __init__(self):
        self.at = self.step = 0
        self.free = 0.0  # from when on it may issue
        self.boards = [0.0] * 6  # until when the scoreboards are up
        self.sums: dict[int, float] = {}  # registers that a product will write, and when
        self.waiting = False  # in a barrier


def sum_registers(instruction: sass.Instruction) -> tuple[int, ...]:
    """The first register that a product adds to; chains of products wait for it."""
    last = instruction.operands.split(",")[-1]
    found = re.search(r"\bR(\d+)\b", last) if instruction.name == "HMMA" else None
    return (int(found[1]),) if found else ()


def estimate(
    code: list[sass.Instruction], threads: int, share: Fraction = Fraction(1), exchange: Exchange | None = None
) -> Estimate:
    """`share`: see sass.step."""
    way = sass.step(code, share)
    warps = threads // 32
    cycles = Scheduler(way, -(-warps // 4), min(warps, 4), exchange).run()
    return Estimate(cycles, len(way), collections.Counter(i.name for i in way if not i.never))


@dataclass(frozen=True)
class Case:
    tier: str
    cell: str
    product: str
    H: int  # of the kernel: what it pads to

    def kernel(self, backward: bool) -> str:
        """A pattern of its mangled name: product, cell, H and then no projection."""
        product, cell = PRODUCTS.index(self.product), CELLS.index(self.cell)
        name = f"{self.tier}_{'backward' if backward else 'forward'}"
        return rf"{name}ILNS0_10ArithmeticE{product}ELNS_4CellE{cell}ELi{self.H}E(Lb0E)?(Li0E)?(Li8E)?E"

    @property
    def output_share(self) -> Fraction:
        """Of the bytes that training stores: beside h there are four gates, and c in float32."""
        size = 2 if self.product in ("bf16", "f16") else 4
        return {"rnn": Fraction(1), "gru": Fraction(1, 5), "lstm": Fraction(size, 5 * size + 4)}[self.cell]


PRODUCTS, CELLS = ("bf16", "f16", "tf32", "exact"), ("rnn", "gru", "lstm")  # in the order of layer.h and cell.h
CASES = (
    Case("cta", "lstm", "bf16", 64),
    Case("cta", "lstm", "bf16", 128),
    Case("cta", "gru", "bf16", 128),
    Case("cta", "rnn", "bf16", 256),
    Case("cta", "lstm", "tf32", 64),
    Case("cta", "lstm", "exact", 64),
    Case("cluster", "lstm", "bf16", 256),
    Case("cluster", "lstm", "bf16", 512),
    Case("cluster", "gru", "bf16", 512),
    Case("group", "lstm", "bf16", 1024),
)
COLUMNS = ("HMMA", "LDS", "STS", "MUFU", "BAR", "LDGSTS", "LDG", "STG", "STAS")


def rows(case: Case, backward: bool) -> list[list[str]]:
    """Of the table: forward for inference and for training, or backward."""
    source = instance(case.tier, case.product, "backward" if backward else "forward")
    cubin = cuda_resources.machine_code(source, ARCH)
    text = cubin.with_name(cubin.name.replace(f"-{ARCH}.cubin", ".ptx")).read_text()
    entries = re.findall(r"\.entry (\w+)\([^)]*\)\s*\.maxntid (\d+)", text)
    entries = [entry for entry in entries if re.search(case.kernel(backward), entry[0])]
    assert len(entries) == 1, f"{source.name} has no kernel {case.kernel(backward)}, or several: {entries}"
    ((name, threads),) = entries
    code = sass.disassemble(cubin, name)
    plain = subprocess.run(["c++filt", name], capture_output=True, text=True, check=True).stdout.strip()
    (registers,) = (k.registers for k in cuda_resources.compile_kernels(source, ARCH) if k.kernel == plain)
    passes = [("inference", case.output_share), ("training", Fraction(1))]
    if backward or case.cell == "rnn":  # an RNN saves nothing but its output
        passes = [("backward" if backward else "forward", Fraction(1))]
    found = []
    for what, share in passes:
        try:
            result = estimate(code, int(threads), share, EXCHANGES.get(case.tier))
        except sass.NoLoop as error:
            raise sass.NoLoop(f"{case.tier} {case.cell} {case.product} H {case.H}, {what}: {error}") from error
        counts = [str(result.counts[column]) for column in COLUMNS]
        cycles = [f"{result.cycles:.0f}", f"{result.cycles / CLOCK / 1000:.2f}"]
        head = [f"{case.tier} {case.cell} {case.product} H {case.H} {what}", str(registers), str(result.instructions)]
        found.append([*head, *counts, *cycles])
    return found


def table() -> str:
    lines = [["kernel", "registers", "instructions", *COLUMNS, "cycles", "us"]]
    for case in CASES:
        for backward in (False, True):
            lines += rows(case, backward)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)
    assumed = "\n".join(f"  {cycles:>5}  {what}: {source}" for cycles, what, source in ASSUMED.values())
    return (
        f"AN ESTIMATE, no measurement: cycles of one step of one batch tile on {ARCH}, and us at {CLOCK} GHz.\n"
        f"Instructions are those of a warp in a step on dense, aligned rows.\n\n{text}\n\n"
        f"Assumed, in cycles:\n{assumed}\nAnd nothing else takes time: see tools/cuda_estimate/sass_cycles.py.\n"
    )


if __name__ == "__main__":
    print(table())
