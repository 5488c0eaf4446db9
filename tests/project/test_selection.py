"""What `make test` and `make test-full` run: quick and rest are everything, once; every file has a quick test."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from support import selection

ROOT = Path(__file__).parents[2]

# Files without a quick test.
COMPILES = "compiles all kernels of its tier for the emulator; test_cuda_ops.py has quick tests of the same kernels"
WITHOUT = {f"tests/cuda/test_cuda_{tier}.py": COMPILES for tier in ("cta", "group", "cluster")}

# Collects everything in a process of its own, and has the selections of it.
COLLECT = """
import json, sys
import pytest
from support import selection

class Recorder:
    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_modifyitems(self, items):
        found = {name: [i.nodeid for i in selection.select(items, name)] for name in selection.SELECTIONS}
        json.dump(found, open(sys.argv[1], "w"))

sys.exit(pytest.main(["--collect-only", "-qq", *sys.argv[2:]], plugins=[Recorder()]))
"""


def parameter_sets(*sizes: int) -> list:
    """Items of a test with so many parameters, each of this many values, as pytest has them."""
    items = [SimpleNamespace(callspec=SimpleNamespace(indices={}))]
    for place, size in enumerate(sizes):
        items = [
            SimpleNamespace(callspec=SimpleNamespace(indices={**item.callspec.indices, f"p{place}": value}))
            for value in range(size)
            for item in items
        ]
    return items


def places(items: list) -> list[tuple[int, ...]]:
    return [tuple(item.callspec.indices.values()) for item in items]


def test_a_list_is_sampled_over_its_length():
    assert places(selection.spread(parameter_sets(9), 5)) == [(0,), (8,), (4,), (2,), (6,)]
    assert sorted(selection.halving(100)) == list(range(100))


def test_every_value_of_every_parameter_comes_before_any_twice():
    chosen = places(selection.spread(parameter_sets(4, 2, 3), 4))
    assert [len({place[p] for place in chosen}) for p in range(3)] == [4, 2, 3]
    assert len({place[:2] for place in chosen}) == 4


def test_no_more_than_there_is_and_none_where_none_is_wanted():
    items = parameter_sets(3)
    assert len(selection.spread(items, 5)) == 3 and selection.spread(items, 0) == []
    assert len(selection.spread([SimpleNamespace()], 1)) == 1


@pytest.mark.quick(0)
def test_quick_and_rest_are_everything_once(tmp_path):
    parts = [collected(tmp_path, "tests"), collected(tmp_path, "tests/bench", "bench")]  # as in the Makefile
    full, quick, rest = ([*parts[0][name], *parts[1][name]] for name in selection.SELECTIONS)
    assert len(full) == len(set(full)) > 10_000
    assert len(quick) + len(rest) == len(full) and {*quick, *rest} == {*full}
    files, with_quick = ({name.split("::")[0] for name in names} for names in (full, quick))
    assert files - with_quick == set(WITHOUT)
    there = [file for folder in ("tests", "bench") for file in (ROOT / folder).rglob("test_*.py")]
    assert files == {str(file.relative_to(ROOT)) for file in there}


def collected(tmp_path: Path, *folders: str) -> dict[str, list[str]]:
    path = os.pathsep.join([str(ROOT / "tests"), str(ROOT), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-c", COLLECT, str(tmp_path / "found"), *folders]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return json.loads((tmp_path / "found").read_text())


@pytest.mark.quick(0)
def test_the_option_selects():
    """One small file, by the command line."""
    counts = {}
    for name in selection.SELECTIONS:
        command = [sys.executable, "-m", "pytest", "--collect-only", "--select", name, "tests/ops/test_parity.py"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        counts[name] = sum("::" in line for line in done.stdout.splitlines())
    assert 0 < counts["quick"] < counts["rest"] and counts["quick"] + counts["rest"] == counts["full"]
