"""Machine code of NVIDIA GPUs (SASS) as cuobjdump prints it: instructions, their control codes, and the time loop.

An instruction is 16 bytes. From bit 105 on the compiler tells the hardware how to schedule it (the same from Volta to
Blackwell): 4 bits of cycles to stall the warp afterwards, 1 bit for yielding, twice 3 bits with the number of the
scoreboard (7: none) that it raises until its result is written, and until its operands are read; and 6 bits with the
scoreboards that must be down before it is issued.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

NO_SCOREBOARD = 7
FUNCTION = re.compile(r"Function : (\S+)")
CODE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)\s*([^;]*?)\s*;\s+/\* 0x[0-9a-f]{16} \*/")
SECOND_WORD = re.compile(r"^\s*/\* 0x([0-9a-f]{16}) \*/")


@dataclass(frozen=True)
class Instruction:
    address: int
    guard: str  # "@!P0", or "" where nothing guards it
    opcode: str  # with its suffixes: "LDS.128"
    operands: str
    stall: int
    written: int  # the scoreboard that is raised until the result is there
    read: int  # that is raised until the operands are read
    waits: int  # bits of the scoreboards that it waits for

    @property
    def name(self) -> str:
        return self.opcode.split(".")[0]

    @property
    def bytes(self) -> int:
        """That each lane moves, of a load or store."""
        widths = (("128", 16), ("64", 8), ("U16", 2), ("S16", 2), ("U8", 1), ("S8", 1))
        return next((size for word, size in widths if word in self.opcode.split(".")), 4)

    @property
    def never(self) -> bool:
        return self.guard == "@!PT"

    @property
    def target(self) -> int | None:
        """Of a branch."""
        found = re.search(r"0x([0-9a-f]+)\s*$", self.operands) if self.name in ("BRA", "BSSY") else None
        return int(found[1], 16) if found else None


def cuobjdump() -> str | None:
    """The toolkit's, or the one that Triton brings."""
    triton = importlib.util.find_spec("triton")
    brought = [f"{folder}/backends/nvidia/bin" for folder in (triton.submodule_search_locations if triton else ())]
    return shutil.which("cuobjdump", path=os.pathsep.join([os.environ.get("PATH", ""), *brought]))


def disassemble(cubin: Path, kernel: str) -> list[Instruction]:
    """The instructions of the kernel with this mangled name."""
    command = [cuobjdump(), "-sass", "-fun", kernel, str(cubin)]
    return parse(subprocess.run(command, capture_output=True, text=True, check=True).stdout)[kernel]


def parse(text: str) -> dict[str, list[Instruction]]:
    kernels: dict[str, list[Instruction]] = {}
    instructions, waiting = [], None
    for line in text.splitlines():
        if found := FUNCTION.search(line):
            instructions = kernels.setdefault(found[1], [])
        elif found := CODE.search(line):
            waiting = found
        elif waiting and (found := SECOND_WORD.match(line)):
            address, guard, opcode, operands = waiting.groups()
            control = int(found[1], 16) >> 41
            instructions.append(
                Instruction(
                    int(address, 16), (guard or "").strip(), opcode, operands, stall=control & 15,
                    written=control >> 5 & 7, read=control >> 8 & 7, waits=control >> 11 & 63,
                )
            )  # fmt: skip
            waiting = None
    return kernels


class NoLoop(ValueError):
    """The time loop, or a step's way through it, was not found."""


def successors(code: list[Instruction]) -> list[list[int]]:
    """For each instruction, where the warp may be next (all lanes together)."""
    index = {instruction.address: i for i, instruction in enumerate(code)}
    following, joins = [], {}
    for i, instruction in enumerate(code):
        after = [i + 1] if i + 1 < len(code) else []
        conditional = instruction.guard or re.match(r"!?U?P\d", instruction.operands)
        if instruction.name == "BSSY":
            joins[instruction.operands.split(",")[0]] = instruction.target
        elif instruction.name == "BSYNC" and joins.get(instruction.operands) in index:
            after = [index[joins[instruction.operands]]]
        elif instruction.name == "BRA" and "DIV" not in instruction.opcode and instruction.target in index:
            after = [index[instruction.target]] + (after if conditional else [])
        elif instruction.name in ("EXIT", "RET", "BRX") and not instruction.guard:
            after = []
        following.append(after)
    return following


def time_loop(code: list[Instruction]) -> tuple[list[int], list[list[int]]]:
    """The instructions of the outermost loop with tensor core products, and where a warp goes from each in a step.

    The former in an order in which the latter, without the ways back to what was before, only goes forward.
    """
    following = successors(code)
    products = [i for i, instruction in enumerate(code) if instruction.name == "HMMA"]
    if not products:
        raise NoLoop("no tensor core products")
    loops = []
    for head in sorted({to for i, after in enumerate(following) for to in after if to <= i}):
        body = natural_loop(following, head)
        if body and all(i in body for i in products):
            loops.append((len(body), head, body))
    if not loops:
        raise NoLoop("no loop holds all tensor core products")
    _, head, body = max(loops)
    order, open_nodes, seen = [], [(head, iter(following[head]))], {head}
    ways: list[list[int]] = [[] for _ in code]
    on_path = {head}
    while open_nodes:  # depth first: an edge to what is on the path leads back
        node, rest = open_nodes[-1]
        to = next(rest, None)
        if to is None:
            open_nodes.pop()
            on_path.discard(node)
            order.append(node)
        elif to in body and to not in on_path:
            ways[node].append(to)
            if to not in seen:
                seen.add(to)
                on_path.add(to)
                open_nodes.append((to, iter(following[to])))
        elif to == head:
            ways[node].append(to)
    return order[::-1], ways


def natural_loop(following: list[list[int]], head: int) -> set[int]:
    """What lies between `head` and a way back to it, if nothing but `head` leads in; else nothing."""
    before: list[list[int]] = [[] for _ in following]
    for i, after in enumerate(following):
        for to in after:
            before[to].append(i)
    reached = reachable(following, 0, head)
    body, todo = {head}, [i for i in before[head] if i >= head and i not in reached]
    while todo:
        i = todo.pop()
        if i in reached:
            return set()
        if i not in body:
            body.add(i)
            todo += before[i]
    return body if len(body) > 1 else set()


def reachable(following: list[list[int]], start: int, without: int) -> set[int]:
    """What the beginning leads to without passing `without`."""
    reached, todo = set(), [start]
    while todo:
        i = todo.pop()
        if i != without and i not in reached:
            reached.add(i)
            todo += following[i]
    return reached


# What a step on aligned, dense rows does as often as it can, and what it avoids: narrow pieces and the table of rows.
WANTED = {r"HMMA": 10_000, r"BAR|SYNCS|STAS|\S*STRONG": 1_000, r"LDGSTS": 100}
NARROW = re.compile(r"LDGSTS\.E(\.64)?$|(STG|STS)\S*\.[US](8|16)$|CALL")
NARROW_LOAD = re.compile(r"LDG\S*\.([US](8|16)|64)$")  # where rows come by LDGSTS


def stored(code: list[Instruction]) -> tuple[list[int], dict[int, int]]:
    """Bytes that each instruction stores to global memory per lane, and those that a branch adds where it is taken.

    For a guarded store and the narrower ones that the branch after it skips are one or the other. What other CTAs wait
    for (STRONG) does not count.
    """
    index = {instruction.address: i for i, instruction in enumerate(code)}
    own, with_branch = [0] * len(code), {}
    for i, instruction in enumerate(code):
        if instruction.name != "STG" or "STRONG" in instruction.opcode:
            continue
        own[i] = instruction.bytes
        at = next((j for j in range(i + 1, len(code)) if code[j].name in ("BRA", "BSYNC")), i)
        skipped = [other for other in code[at + 1 : index.get(code[at].target, 0)] if other.name == "STG"]
        if instruction.guard and skipped and all(other.bytes < instruction.bytes for other in skipped):
            with_branch[at], own[i] = with_branch.get(at, 0) + own[i], 0
    return own, with_branch


def steps(code: list[Instruction]) -> dict[int, list[Instruction]]:
    """What a full-speed warp issues in a step: for each number of bytes that a lane may store, the best way.

    Branches are not followed but chosen, none backwards: the way with all products, wide copies and few instructions.
    """
    order, following = time_loop(code)
    own, with_branch = stored(code)
    copies = any(code[i].name == "LDGSTS" for i in order)

    def worth(i: int) -> int:
        opcode = code[i].opcode
        if NARROW.search(opcode) or (copies and NARROW_LOAD.search(opcode)):
            return -50 if code[i].guard else -500
        return next((value for what, value in WANTED.items() if re.match(what, opcode)), -1)

    head = order[0]
    # Of every instruction, for each number of bytes stored on the way to it: its worth, and where it came from.
    best: list[dict[int, tuple[int, int, int]]] = [{} for _ in code]
    best[head][own[head]] = (worth(head), -1, 0)
    ends: dict[int, tuple[int, int, int]] = {}
    for i in order:
        for to in following[i]:
            more, gain = (own[to], worth(to)) if to != head else (0, 0)
            if i in with_branch and code[to].address == code[i].target:
                more += with_branch[i]
            elif i in with_branch:
                gain -= 500  # narrower stores will follow
            reached = best[to] if to != head else ends
            for count, (value, *_) in best[i].items():
                if count + more not in reached or value + gain > reached[count + more][0]:
                    reached[count + more] = (value + gain, i, count)
    if not ends:
        raise NoLoop("no way through the time loop")
    ways = {}
    for total, (_, i, count) in ends.items():
        way = []
        while i >= 0:
            way.append(code[i])
            _, i, count = best[i][count]
        ways[total] = way[::-1]
    return ways


def step(code: list[Instruction], share: Fraction = Fraction(1)) -> list[Instruction]:
    """The step that stores most, or this share of it: inference stores the output alone."""
    ways = steps(code)
    count = max(ways) * share
    if count not in ways:
        raise NoLoop(f"no way through the time loop stores {count} bytes per lane, only {sorted(ways)}")
    return ways[count]
