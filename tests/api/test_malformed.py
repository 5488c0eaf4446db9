"""No malformed argument ends the process, or makes a result of what is not the tensor's own.

Everything runs in child processes, because what these calls test for is that the process lives on. Of a random call
it is asked that it raises one of torch.nn's exceptions, or that its arguments are documented and its results those of
torch.nn; RNNFAST_MALFORMED=<count>[:<first seed>] makes more of them.
"""

from __future__ import annotations

import functools
import os
import re
import textwrap

import pytest
import torch
from support import malformed_cases
from support.malformed_cases import CASES, GROUPS, group_of
from support.malformed_child import attempt, difference, judge, survey
from support.malformed_modules import Attempt

pytestmark = pytest.mark.skipif(
    os.environ.get("RNNFAST_SKIP_EXT", "0") != "0",
    reason="RNNFAST_SKIP_EXT is set: the operators have no implementation",
)
COUNT, _, FIRST = os.environ.get("RNNFAST_MALFORMED", "1200").partition(":")
PER_PROCESS = 400
SEEDS = range(int(FIRST or 0), int(FIRST or 0) + int(COUNT))


@pytest.mark.quick(1)
@pytest.mark.parametrize("first", SEEDS[::PER_PROCESS])
def test_random_calls(first):
    found = survey(first, min(PER_PROCESS, SEEDS.stop - first))
    assert not found.faults, "\n".join(
        f"seed {f.seed}: {f.what}; {' '.join(f.outcome.split())[:300]}; {f.call[:600]}" for f in found.faults
    )
    assert len(found.outcomes) == min(PER_PROCESS, SEEDS.stop - first)


@functools.cache
def outcomes_of(group: str) -> dict[str, str]:
    """What comes of the cases of a group, by name."""
    places = [place for place, case in enumerate(CASES) if group_of(case) == group]
    outcomes = survey(places[0], len(places), script=malformed_cases.__file__).outcomes
    return {CASES[place].name: outcomes.get(place, "not run, too many died") for place in places}


def wrong(outcome: str, message: str) -> bool:
    """Whether this is neither a RuntimeError nor a ValueError that says what it must."""
    kinds, _, said = outcome.partition(": ")
    return not {"RuntimeError", "ValueError"} & set(kinds.split(" or ")) or not re.search(message, said)


@pytest.mark.parametrize("case", [case for case in CASES if not group_of(case)], ids=str)
def test_error_names_what_is_wrong(case):
    outcome = outcomes_of("")[case.name]
    if case.message == ".":  # whatever torch's own checks raise
        assert not outcome.startswith(("returned", "died", "not run")) and "INTERNAL ASSERT" not in outcome, outcome
    else:
        assert not wrong(outcome, case.message), outcome


@pytest.mark.parametrize("group", GROUPS)
def test_every_tensor_is_looked_at(group):
    """One tensor is on another device, or has lost its memory or half of it: what follows is not its own."""
    messages, outcomes = {case.name: case.message for case in CASES}, outcomes_of(group)
    bad = [f"{name}: {outcome}" for name, outcome in outcomes.items() if wrong(outcome, messages[name])]
    assert outcomes and not bad, f"{len(bad)} of {len(outcomes)}\n" + "\n".join(bad)


# ------------------------------------------------ the tests themselves


def test_calls_are_allowed_before_they_are_spoiled(monkeypatch):
    """Otherwise nothing that is computed could be judged."""
    monkeypatch.setattr(Attempt, "spoil_some", lambda self, r: None)
    for seed in range(60):
        call = attempt(seed)
        result = call.run()
        assert call.allowed() and call.exact, f"seed {seed}: {call}"
        assert difference(result, call.expected(), call) is None, f"seed {seed}: {call}"
        assert judge(call, result, None) is None
        assert judge(call, None, RuntimeError("no")) == "a documented call is refused"


def test_judge():
    class Undocumented(Attempt):
        def allowed(self):
            return False

    call = Undocumented()
    assert judge(call, torch.zeros(1), None) == "computed, though not documented"
    assert judge(call, None, ValueError("expected 1, got 2")) is None
    assert judge(call, None, ZeroDivisionError()) == "error of a wrong kind"
    assert judge(call, None, RuntimeError("INTERNAL ASSERT FAILED")) == "error of a wrong kind"


def test_a_process_that_dies_or_hangs_is_seen(tmp_path):
    """Seed 2 dies in its call, 4 before it, 6 after it, 8 hangs, 9 has a verdict; after each comes the next."""
    script = tmp_path / "child.py"
    script.write_text(
        textwrap.dedent("""\
            import os, signal, sys, time
            for seed in range(int(sys.argv[1]), int(sys.argv[1]) + int(sys.argv[2])):
                if seed == 4:
                    os.abort()
                print(seed, "makes", "a call", flush=True)
                if seed == 2:
                    os.kill(os.getpid(), signal.SIGSEGV)
                if seed == 8:
                    time.sleep(60)
                print(seed, "made", flush=True)
                if seed == 6:
                    sys.exit(1)
                print(seed, "judged", '["returned", ' + ('"bad"]' if seed == 9 else "null]"), flush=True)
            """)
    )
    found = survey(0, 12, timeout=4, script=str(script))
    assert {fault.seed: fault.what for fault in found.faults} == {
        2: "the process dies in the call",
        4: "the process dies before the call",
        6: "the process dies after the call",
        8: "the process dies in the call",
        9: "bad",
    }
    assert "-11" in found.outcomes[2] and "does not end" in found.outcomes[8]
    assert set(found.outcomes) == set(range(12)) and found.outcomes[11] == "returned"
