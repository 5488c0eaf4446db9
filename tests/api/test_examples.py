"""Every program of examples/ runs in its small form, in a process of its own, and prints what it promises."""

import ast
import os
import re
import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from torch import distributed

import rnnfast

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


def run(name: str, *launcher: str, seconds: float = 180) -> str:
    """What an example prints. A launcher's processes end with it, after `seconds` too."""
    command = [sys.executable, *launcher, str(ROOT / "examples" / name), "--small"]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}  # other tests keep the other cores busy
    environment.pop("RNNFAST_BACKEND", None)
    child = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        printed, errors = child.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)
        raise
    assert child.returncode == 0, errors[-3000:]
    return printed


def numbers(pattern: str, printed: str) -> list[float]:
    """The numbers that the group of a pattern finds, at least one."""
    found = [float(number) for number in re.findall(pattern, printed)]
    assert found, printed
    return found


DIFFERENCE = r"largest difference[^:\n]*?:? (\d\.\de[+-]\d+)"


@pytest.mark.quick(0)
def test_convert_pretrained():
    printed = run("convert_pretrained.py")
    assert "convert made it rnnfast's GRU: True" in printed
    assert "revert gave torch.nn's GRU back: True" in printed
    assert max(numbers(DIFFERENCE, printed)) < 1e-4
    assert numbers(r"accuracy of the converted model: (\S+)", printed)[0] > 0.75, "the pretrained model had learned"


@pytest.mark.quick(0)
def test_character_language_model():
    printed = run("character_language_model.py")
    losses = numbers(r"loss (\S+)", printed)
    assert losses[0] > 4 and losses[-1] < 2.8, "from about the logarithm of 100 characters downwards"
    sample = printed.split("sample: ")[1].rstrip("\n")
    assert sample.startswith("The statement ") and len(sample) > 100 and len(set(sample)) > 10


@pytest.mark.quick(0)
def test_packed_sentences():
    printed = run("packed_sentences.py")
    assert numbers(r"accuracy on new sentences: (\S+)", printed)[0] > 0.95
    shortest, longest = map(int, re.search(r"(\d+) to (\d+) words", printed).groups())
    assert shortest < longest
    assert re.search(r"^(the|a)/DET ", printed, re.MULTILINE)
    assert max(numbers(DIFFERENCE, printed)) < 1e-5


def test_streaming():
    printed = run("streaming.py")
    for way in ("layers", "cells", "chunks"):
        assert numbers(rf"{way} +(\d+) us per frame", printed)[0] > 0
    differences = numbers(DIFFERENCE, printed)
    assert len(differences) == 3 and max(differences) < 1e-5


@pytest.mark.skipif(rnnfast.backends()["cpu"] != "available", reason="the CPU kernels are not there")
def test_freeze():
    printed = run("freeze.py")
    accuracies = numbers(r"accuracy (\S+),", printed)
    assert len(accuracies) == 4 and accuracies[0] > 0.9, "torch.nn and three formats of a model that had learned"
    assert min(accuracies) >= accuracies[0] - 0.005
    sizes = numbers(r"weights +(\S+) MiB", printed)
    assert sizes == sorted(sizes, reverse=True) and min(numbers(r"(\S+) times as fast", printed)) > 0


@pytest.mark.quick(0)
def test_recurrent_policy():
    rewards = numbers(r"mean reward +(\S+)", run("recurrent_policy.py"))
    assert rewards[0] < 0.2
    assert rewards[-1] > 0.7, "more than the half of the treasures that an agent without memory finds"


@pytest.mark.quick(0)
@pytest.mark.skipif(not distributed.is_available(), reason="this torch is built without torch.distributed")
@pytest.mark.parametrize("launcher, processes", [((), 1), (TORCHRUN, 2)], ids=["alone", "torchrun"])
def test_data_parallel(launcher, processes):
    printed = run("data_parallel.py", *launcher)
    assert f"DDP, processes: {processes}; the weights equal those of one process" in printed
    part, whole = map(int, re.search(r"weight_hh_l0 here: (\d+) of (\d+); the weights equal", printed).groups())
    assert part * processes == whole


@pytest.mark.quick(0)
@pytest.mark.skipif(not (find_spec("onnx") and find_spec("onnxruntime")), reason="onnx, onnxruntime: not installed")
def test_export_onnx():
    printed = run("export_onnx.py")
    assert "has 2 LSTM nodes" in printed
    lengths = re.findall(r"ONNX Runtime, shape \(\d+, (\d+), 3\)", printed)
    batches = re.findall(r"torch.export, shape \((\d+), 5, 3\)", printed)
    assert len(set(lengths)) == 3 and len(set(batches)) == 2
    differences = numbers(DIFFERENCE, printed)
    assert len(differences) == 5 and max(differences) < 1e-4


@pytest.mark.quick(0)
@pytest.mark.skipif(rnnfast.backends()["cpu"] != "available", reason="the CPU kernels are not there")
def test_explain_aten():
    printed = run("explain_aten.py")
    answers = re.findall(r"explain says '(\w+)'", printed)
    assert answers == ["aten", "cpu"] * 5 + ["cpu"]
    assert "explain raises TypeError: LSTM is not a module of rnnfast" in printed
    assert "With strict=True the call raises: " in printed


@pytest.mark.parametrize("path", EXAMPLES, ids=[path.stem for path in EXAMPLES])
def test_every_example_is_short_described_and_tested(path):
    text = path.read_text()
    assert len(text.splitlines()) < 80
    assert path.name in ast.get_docstring(ast.parse(text)), "how to run it"
    assert f"examples/{path.name}" in (path.parent / "README.md").read_text()
    assert f'run("{path.name}"' in Path(__file__).read_text()
