"""Makes malformed calls, one per seed, and says what came of them.

`python malformed_child.py FIRST COUNT` writes a line before each call, one after it, and one with the verdict, so that
a process that dies or hangs names the call that did it. `survey` runs such processes and reads their lines.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import resource
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from support.malformed_functions import FunctionCall, OperatorCall
from support.malformed_modules import ALLOWED, Attempt, ModuleCall, tensors

# Refusals that have nothing to do with shapes: torch.nn's of kinds of tensors, and ours of lengths beside such tensors.
ITS_OWN = (
    "lengths needs ",
    "Inference tensors",
    "ZeroTensors are immutable",
    "tolist() shouldn't be called on a tensor with unallocated storage",
    "could not create a primitive",
    "Unexpected floating",
)
MEMORY = 8 << 30  # of one process: what asks for more gets an error
TESTS = Path(__file__).parents[1]  # where a process finds this package
DEATHS = 20  # after so many a survey ends


def attempt(seed: int) -> Attempt:
    return (ModuleCall, ModuleCall, OperatorCall, FunctionCall)[seed % 4](seed)


def difference(found: Any, wanted: Any, call: Attempt) -> str | None:
    found, wanted = tensors(found), tensors(wanted)
    shapes = [[tuple(t.shape) for t in each] for each in (found, wanted)]
    if shapes[0] != shapes[1]:
        return f"has shapes {shapes[0]}, a correct call gives {shapes[1]}"
    for a, b in zip(found, wanted, strict=True) if call.values else ():
        if not a.is_meta and a.is_floating_point():
            a, b = a.detach().double(), b.detach().double()
            if not torch.allclose(a, b, call.tolerance, call.tolerance, equal_nan=True):
                return f"differs from a correct call by {(a - b).abs().max():.2g}"
    return None


def judge(call: Attempt, result: Any, error: Exception | None) -> str | None:
    """What is wrong with what came of a call; None where all is well."""
    allowed = False
    with contextlib.suppress(Exception):  # of tensors that answer no question
        allowed = call.allowed()
    if error is not None:
        kind_is_right = isinstance(error, ALLOWED) or (
            isinstance(error, AssertionError) and str(error).startswith("mode must be")  # torch.nn's
        )
        if not kind_is_right or "INTERNAL ASSERT" in str(error):
            return "error of a wrong kind"
        if not allowed or not call.exact or str(error).startswith(ITS_OWN):
            return None
        with contextlib.suppress(Exception):
            call.expected()
            return "a documented call is refused"
        return None
    if not allowed:
        torchs = call.odd or all(t.is_meta for t in tensors(result))
        return None if torchs else "computed, though not documented"
    try:
        wanted = call.expected()
    except Exception as error:
        own = str(error).startswith(ITS_OWN) or not call.exact
        return None if own else f"computed, but a correct call raises {type(error).__name__}: {str(error)[:200]}"
    return difference(result, wanted, call)


def make(seed: int, attempt: Callable[[int], Any] = attempt, judge: Callable[..., str | None] = judge):
    call, result, caught = attempt(seed), None, None
    print(seed, "makes", " ".join(str(call).split()), flush=True)
    try:
        result = call.run()
    except Exception as error:
        caught = error
    print(seed, "made", flush=True)
    verdict = judge(call, result, caught)
    kind = "" if caught is None else " or ".join(cls.__name__ for cls in type(caught).__mro__[:-3])
    outcome = "returned" if caught is None else f"{kind}: {str(caught)[:300]}"
    print(seed, "judged", json.dumps([outcome, verdict]), flush=True)


class Fault(NamedTuple):
    seed: int
    what: str
    outcome: str
    call: str


class Survey(NamedTuple):
    outcomes: dict[int, str]
    faults: list[Fault]


def survey(first: int, count: int, timeout: float = 120, script: str = __file__) -> Survey:
    """The outcomes of so many seeds, in as few processes as survive; one that dies is followed by another.

    After DEATHS of them the other seeds have no outcome.
    """
    outcomes: dict[int, str] = {}
    faults: list[Fault] = []
    path = os.pathsep.join(filter(None, [str(TESTS), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path}
    seed, end = first, first + count
    while seed < end and sum(outcome.startswith("died") for outcome in outcomes.values()) < DEATHS:
        command = [sys.executable, script, str(seed), str(end - seed)]
        options = {"env": environment, "capture_output": True, "text": True, "errors": "replace"}
        try:
            process = subprocess.run(command, timeout=timeout, **options)
            output, errors, how = process.stdout, process.stderr, f"exit status {process.returncode}"
        except subprocess.TimeoutExpired as expired:
            output, errors, how = (expired.stdout or b"").decode(errors="replace"), "", "it does not end"
        calls: dict[int, str] = {}
        stage: dict[int, str] = {}
        for line in output.splitlines():
            number, _, rest = line.partition(" ")
            word, _, text = rest.partition(" ")
            if word not in ("makes", "made", "judged"):
                continue
            last = int(number)
            stage[last] = word
            if word == "makes":
                calls[last] = text
            elif word == "judged":
                outcomes[last], verdict = json.loads(text)
                if verdict is not None:
                    faults.append(Fault(last, verdict, outcomes[last], calls[last]))
        judged = [seed for seed, word in stage.items() if word == "judged"]
        if how == "exit status 0" and len(judged) == end - seed:
            break
        killer = max(stage, default=seed)
        if stage.get(killer) == "judged":
            killer += 1  # it died while it prepared the next
        when = {"makes": "in the call", "made": "after the call"}.get(stage.get(killer, ""), "before the call")
        outcomes[killer] = f"died {when}, {how}"
        faults.append(Fault(killer, f"the process dies {when}", f"{how} {errors[-500:]}", calls.get(killer, "")))
        seed = killer + 1
    return Survey(outcomes, faults)


def main(first: int, count: int, make: Callable[[int], None] = make):
    """What a process does with its seeds."""
    faulthandler.enable()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if "asan" not in os.environ.get("LD_PRELOAD", ""):
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for seed in range(first, first + count):
        make(seed)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
