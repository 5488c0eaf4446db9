"""tools/gpu_check.py, as far as it can be tested without a GPU: what it keeps and what it calls a failure."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

TOOLS = Path(__file__).parents[2] / "tools"


def outside_of_workers() -> dict[str, str]:
    """The environment without what pytest-xdist tells its workers: this test may run in one."""
    return {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}


@pytest.fixture
def gpu_check(monkeypatch):
    monkeypatch.syspath_prepend(str(TOOLS))
    import gpu_check

    monkeypatch.setattr(gpu_check, "LIMITS", {name: 60 for name in gpu_check.LIMITS})
    return gpu_check


def test_every_test_is_kept_as_it_ends(gpu_check, tmp_path):
    program = tmp_path / "test_program.py"
    program.write_text(
        "import pytest\n"
        "def test_good(record_property): record_property('kinds', 'whole')\n"
        "def test_bad(): assert 1 == 2\n"
        "@pytest.mark.skip(reason='no CUDA device')\n"
        "def test_absent(): pass\n"
    )
    cases = tmp_path / "cases.jsonl"
    command = [sys.executable, "-m", "pytest", "-p", "gpu_check", str(program), "-c", os.devnull]
    environment = outside_of_workers() | {gpu_check.CASES: str(cases), "PYTHONPATH": str(TOOLS)}
    subprocess.run(command, env=environment, cwd=tmp_path, stdout=subprocess.DEVNULL, timeout=60)
    good, bad, absent = map(json.loads, cases.read_text().splitlines())
    assert (good["case"], good["outcome"], good["kinds"]) == ("test_good", "passed", "whole")
    assert bad["outcome"] == "failed" and "assert 1 == 2" in bad["failure"]
    assert absent["outcome"] == "skipped" and "no CUDA device" in absent["failure"]


@pytest.mark.quick(0)
def test_a_worker_with_a_broken_context_is_replaced(gpu_check, tmp_path):
    """After a trap or a wrong access every call of the process fails; the tests that are left want another."""
    pytest.importorskip("xdist")
    (tmp_path / "test_program.py").write_text(
        "import pytest, torch\n"
        "broken = []\n"
        "def synchronize():\n"
        "    if broken: raise RuntimeError('CUDA error: unspecified launch failure')\n"
        "torch.cuda.is_available, torch.cuda.synchronize = lambda: True, synchronize\n"
        "def test_trap(): broken.append(1); torch.cuda.synchronize()\n"
        "@pytest.mark.parametrize('i', range(3))\n"
        "def test_others(i): torch.cuda.synchronize()\n"
    )
    cases = tmp_path / "cases.jsonl"
    command = [sys.executable, "-m", "pytest", "-p", "gpu_check", "-n1", "test_program.py", "-c", os.devnull]
    environment = outside_of_workers() | {gpu_check.CASES: str(cases), "PYTHONPATH": str(TOOLS)}
    subprocess.run(command, env=environment, cwd=tmp_path, stdout=subprocess.DEVNULL, timeout=60)
    outcomes = [(case["case"], case["outcome"]) for case in map(json.loads, cases.read_text().splitlines())]
    assert ("test_trap", "failed") in outcomes
    assert {case for case, outcome in outcomes if outcome == "passed"} == {f"test_others[{i}]" for i in range(3)}


def test_a_command_that_hangs_is_stopped_with_all_its_children(gpu_check, tmp_path, monkeypatch):
    monkeypatch.setitem(gpu_check.LIMITS, "build", 0.5)
    begin = time.monotonic()
    stage = gpu_check.simple("build", ["sh", "-c", "echo here; sleep 30 & sleep 30"], tmp_path)
    assert time.monotonic() - begin < 20 and stage.status == "failed" and "stopped" in stage.what
    assert "here" in (tmp_path / "setup.log").read_text()
    assert gpu_check.simple("environment", ["true"], tmp_path).status == "passed"
    assert gpu_check.simple("environment", ["false"], tmp_path).what == "exit status 1"


def test_the_build_is_for_the_gpu_that_is_here(gpu_check, tmp_path, monkeypatch):
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\nprintf '9.0\\n9.0\\n8.0\\n'\n")
    smi.chmod(0o755)
    monkeypatch.setattr(gpu_check.shutil, "which", lambda name: str(smi))
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    assert gpu_check.architecture() == {"TORCH_CUDA_ARCH_LIST": "8.0;9.0"}
    smi.write_text("#!/bin/sh\necho 'No devices were found'; exit 6\n")
    assert gpu_check.architecture() == {}
    monkeypatch.setattr(gpu_check.shutil, "which", lambda name: None)
    assert gpu_check.architecture() == {}
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0a")
    assert gpu_check.architecture() == {}


def test_kernels_that_do_not_compile_are_a_failure_where_there_is_nvcc(gpu_check, monkeypatch):
    for there, expected in (
        (None, {"RNNFAST_CUDA": "1"}),
        ("/usr/local/cuda/bin", {"RNNFAST_CUDA": "1", "CUDA_HOME": "/usr/local/cuda"}),
        ("/elsewhere", {}),
    ):
        monkeypatch.setattr(
            gpu_check.shutil, "which", lambda name, path=None, there=there: name if path == there else None
        )
        assert gpu_check.cuda_wanted() == expected


def test_what_the_sanitizer_says(gpu_check):
    head = "whole LSTM torch.float32 done\nwhole GRU torch.float32 done\n"
    ours = "========= Invalid __global__ write of size 4 bytes\n=========     at lstm_forward+0x120 in lstm.py:40\n"
    theirs = "========= Race reported in sm90_gemm_bf16\n"
    theirs += "=========     Host Frame: rnnfast::cuda::launch_group_forward in _C_cuda.so\n"
    cuda = "========= Race reported in void rnnfast::cuda::group_forward<(rnnfast::cuda::Arithmetic)0, 256, 8>(T1)\n"
    assert gpu_check.verdict("memcheck", 0, head + "========= ERROR SUMMARY: 0 errors\n") == (
        "passed",
        "2 layers, exit status 0",
    )
    assert gpu_check.verdict("memcheck", gpu_check.FOUND, head + ours)[0] == "failed"
    assert gpu_check.verdict("racecheck", gpu_check.FOUND, head + cuda)[0] == "failed"
    assert gpu_check.verdict("racecheck", gpu_check.FOUND, head + theirs)[0] == "passed"
    assert gpu_check.verdict("racecheck", 1, head)[0] == "failed"
    assert gpu_check.verdict("synccheck", None, head)[0] == "failed"


def test_without_a_gpu_it_fails_and_says_so(gpu_check, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu_check, "simple", lambda name, *rest, **more: gpu_check.Stage(name, "passed", 0.0, ""))
    monkeypatch.setattr(gpu_check.shutil, "which", lambda *names, **more: None)
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--out", str(tmp_path)])
    assert gpu_check.main() == 1
    summary = json.loads((tmp_path / "summary.json").read_text())
    states = {stage["name"]: stage["status"] for stage in summary["stages"]}
    assert states == {"build": "passed", "environment": "passed", "tests": "failed", "sanitizer": "absent"}
    assert "torch" in summary["versions"] and summary["cases"] == []


def test_every_tool_of_the_sanitizer_runs_the_program(gpu_check, tmp_path, monkeypatch):
    tool = tmp_path / "compute-sanitizer"
    error = "echo '========= Race reported in lstm_forward'; exit 99"
    tool.write_text(f'#!/bin/sh\ncase "$*" in *racecheck*) {error};; esac\necho "whole LSTM done $*"\n')
    tool.chmod(0o755)
    monkeypatch.setattr(gpu_check.shutil, "which", lambda *names, **more: str(tool))
    states = {stage.name: stage.status for stage in gpu_check.sanitizers(tmp_path)}
    assert states == {"memcheck": "passed", "racecheck": "failed", "synccheck": "passed"}
    assert "--error-exitcode 99" in (tmp_path / "memcheck.log").read_text()
