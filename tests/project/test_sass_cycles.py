"""The estimate of cycles per step: its simulation on code whose cycles are known, and the time loops of the kernels."""

from __future__ import annotations

import shutil
from fractions import Fraction

import pytest
from cuda_estimate import sass, sass_cycles
from cuda_estimate.sass_cycles import ASSUMED, Scheduler
from support import cuda_resources

COST = {name: cycles for name, (cycles, *_) in ASSUMED.items()}
TABLE = cuda_resources.BUILD.parent / "cuda_cycles.txt"


def listing(*lines: str) -> str:
    """What cuobjdump prints for lines of "instruction | stall written read waits"; the last three may be left out."""
    text = "\t\tFunction : kernel\n"
    for i, line in enumerate(lines):
        instruction, _, numbers = line.partition("|")
        stall, written, read, waits = [*map(int, numbers.split()), *(1, 7, 7, 0)[len(numbers.split()) :]]
        control = (stall | written << 5 | read << 8 | waits << 11) << 41
        text += f"        /*{16 * i:04x}*/   {instruction.strip()} ;   /* 0x{0:016x} */\n"
        text += f"{'':60}/* 0x{control:016x} */\n"
    return text


def code(*lines: str) -> list[sass.Instruction]:
    return sass.parse(listing(*lines))["kernel"]


BARRIER = "BAR.SYNC.DEFER_BLOCKING 0x0"


def cycles(*lines: str, warps: int = 1, schedulers: int = 4) -> float:
    return Scheduler(code(*lines), warps, schedulers).run()


def test_instructions_are_read():
    (instruction,) = code("@!P4 LDS.128 R164, [R218+0x10] | 5 2 3 17")
    assert instruction == sass.Instruction(0, "@!P4", "LDS.128", "R164, [R218+0x10]", 5, 2, 3, 17)
    assert (instruction.name, instruction.bytes, instruction.never) == ("LDS", 16, False)
    (branch,) = code("@P0 BRA 0x4b00")
    assert branch.target == 0x4B00


def test_stall_counts_add_up():
    assert cycles("NOP | 4", "NOP | 6", "NOP | 15") == 25


def test_warps_take_turns():
    assert cycles("NOP | 4", "NOP | 6", warps=2) == 10
    assert cycles(*["NOP"] * 10, BARRIER, warps=3) == 3 * 11 - 1 + COST["barrier"]


def test_a_scoreboard_is_waited_for():
    latency = COST["shared_latency"] + 2  # half the time that a quarter of the bytes of four schedulers takes
    assert cycles("LDS R0, [R1] | 1 0", "NOP | 1 7 7 1") == latency + 1
    assert cycles("LDS R0, [R1] | 1 0", "NOP | 1") < latency
    assert cycles("MUFU.TANH R0, R1 | 1 3", "NOP | 1 7 7 8") == COST["special_latency"] + 1
    assert cycles("@!PT LDS RZ, [RZ] | 1 0", "NOP | 1 7 7 1") == 2


def test_products_follow_each_other():
    independent = [f"HMMA.16816.F32.BF16 R{4 * i}, R100, R104, RZ" for i in range(8)]
    assert cycles(*independent) == 8 * COST["tensor"]
    chain = ["HMMA.16816.F32.BF16 R0, R100, R104, R0"] * 4
    assert cycles(*chain) == 4 * COST["tensor_latency"]
    assert cycles(*chain, warps=2) == 4 * COST["tensor_latency"]
    one = "HMMA.16816.F32.BF16 R0, R100, R104, RZ"
    assert cycles(one, "FADD R8, R3, R4", "NOP | 9") == COST["tensor_latency"] + 10


def test_pipes_are_shared():
    assert cycles(*["MUFU.TANH R0, R1"] * 5, BARRIER, warps=2) == 9 * COST["special"] + 1 + COST["barrier"]
    assert cycles(*["LDS.128 R0, [R8]"] * 3) == 3 * 16
    assert cycles(*["LDS.128 R0, [R8]"] * 3, schedulers=1) == 3 * 4
    assert cycles("IMAD R0, R1, R2, R3", "LOP3.LUT R4, R5, R6, R7") == 2


def test_a_barrier_waits_for_the_last():
    assert cycles("NOP | 10", BARRIER) == 10 + COST["barrier"]
    assert cycles("NOP | 10", BARRIER, "NOP | 9", warps=2) == 11 + COST["barrier"] + 9


def test_an_exchange_comes_before_the_next_step():
    way = code("SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [R0]", "NOP | 7", "STAS.128 [R2], R4")
    found = Scheduler(way, 2, exchange=sass_cycles.EXCHANGES["cluster"]).run()
    assert COST["cluster_exchange"] + 8 <= found <= COST["cluster_exchange"] + 40
    way = code("STAS.128 [R2], R4", "SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [R0]", "NOP | 7")
    assert Scheduler(way, 2, exchange=sass_cycles.EXCHANGES["cluster"]).run() >= COST["cluster_exchange"] + 8


LOOP = (
    "NOP",
    "HMMA.16816.F32.BF16 R0, R100, R104, RZ",  # 0x10: the loop
    "@!P0 BRA 0x50",
    "LDG.E.U16 R8, [R10]",  # narrow copies
    "BRA 0x60",
    "LDGSTS.E.BYPASS.128 [R9], desc[UR6][R10.64]",
    BARRIER,  # 0x60
    "@P3 STG.E desc[UR6][R20.64], R4",  # output, as a word or by elements
    "@P3 BRA 0xb0",
    "STG.E.U16 desc[UR6][R20.64], R4",
    "STG.E.U16 desc[UR6][R20.64+0x2], R5",
    "@P1 BRA 0xe0",  # 0xb0
    "STG.E.64 desc[UR6][R22.64], R4",  # gates
    "STG.E.64 desc[UR6][R22.64+0x40], R4",
    "@P2 BRA 0x10",  # 0xe0
    "EXIT",
)


def test_the_way_through_a_step():
    training = [instruction.opcode for instruction in sass.step(code(*LOOP))]
    words = ["HMMA.16816.F32.BF16", "BRA", "LDGSTS.E.BYPASS.128", "BAR.SYNC.DEFER_BLOCKING", "STG.E", "BRA", "BRA"]
    assert training == [*words, "STG.E.64", "STG.E.64", "BRA"]
    inference = [instruction.opcode for instruction in sass.step(code(*LOOP), Fraction(1, 5))]
    assert inference == [*words, "BRA"]
    with pytest.raises(sass.NoLoop, match="stores 10 bytes per lane, only"):
        sass.step(code(*LOOP), Fraction(1, 2))


def test_a_loop_within_and_code_behind_the_loop():
    lines = [*LOOP[:7], "@P5 BRA 0x60", "@P6 BRA 0xb0", "@P2 BRA 0x10", "EXIT", "BRA 0x90"]
    assert [i.address for i in sass.step(code(*lines))] == [0x10, 0x20, 0x50, 0x60, 0x70, 0x80, 0x90]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["NOP", "BRA 0x0"], "no tensor core products"),
        (["HMMA.16816.F32.BF16 R0, R100, R104, RZ", "EXIT"], "no loop holds all"),
        (["HMMA.16816.F32.BF16 R0, R100, R104, RZ", *LOOP[1:]], "no loop holds all"),
    ],
)
def test_no_loop(lines, message):
    with pytest.raises(sass.NoLoop, match=message):
        sass.step(code(*lines))


@pytest.mark.quick(0)
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
@pytest.mark.skipif(sass.cuobjdump() is None, reason="needs cuobjdump, of CUDA or of Triton")
def test_table_of_the_kernels():
    """Every case's loop is found, with the products of a step: 16 x 8 x 16 (tf32: 8) of a warp each."""
    TABLE.write_text(sass_cycles.table())
    lines = [line.split("  ") for line in TABLE.read_text().splitlines()]
    found = {words[0]: words for words in lines if words[0].split(" ")[0] in ("cta", "cluster", "group")}
    assert len(found) == 3 * len(sass_cycles.CASES) - sum(case.cell == "rnn" for case in sass_cycles.CASES)
    for case in sass_cycles.CASES:
        gates = {"lstm": 4, "gru": 3, "rnn": 1}[case.cell]
        if case.tier == "cta":
            depth, parts = 16 if case.product == "bf16" else 8, 3 if case.product == "exact" else 1
            warps = case.H // 16 if case.H <= 128 else case.H // 32
            expected = gates * case.H * case.H // (16 * depth) // warps * parts
            for what in ("forward" if case.cell == "rnn" else "training", "backward"):
                words = [w for w in found[f"cta {case.cell} {case.product} H {case.H} {what}"] if w.strip()]
                assert int(words[3]) == expected, words
