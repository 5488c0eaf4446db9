"""The table of measurements by which CUDA tensors get their kernels: tools/gpu_table.py, rnnfast/gpu_table.py. No GPU.

The results are made up, and so is the table, in a folder of the test.
"""

from __future__ import annotations

import importlib.util
import json
import time
from pathlib import Path

import pytest
import torch
from torch._subclasses import FakeTensorMode

import rnnfast
from rnnfast import _backends, gpu_table, select
from rnnfast.call import Call

SCRIPT = Path(__file__).parents[2] / "tools" / "gpu_table.py"


def record(cell="LSTM", dtype="bf16", mode="training", units=256, rows=16, torch_ms=2.0, cuda=1.0, triton=None, **rest):
    """A record as `python -m bench gpu` leaves it, of the fields that the table is made from."""
    times = {"backend": "cuda", "torch_ms": torch_ms, "rnnfast_ms": cuda, "beside_ms": {}, "failure": None}
    if triton:
        times["beside_ms"] = {"triton": triton}
    place = {"machine": "GPU A", "versions": {"torch": "2.13.0+cu130"}, "commit": "abc1234", "date": "2026-12-01"}
    shape = {"cell": cell, "dtype": dtype, "mode": mode, "hidden_size": units, "batch": rows, "device": "cuda"}
    return {"section": "grid", "noisy": False, "contended": False} | place | shape | times | rest


RESULTS = [
    record(units=64, cuda=1.0, triton=0.5),
    record(units=256, rows=16, cuda=1.25, triton=2.5),
    record(units=256, rows=256, cuda=2.02),
    record(units=1024, failure="output: wrong", torch_ms=None, cuda=None),
    record(cell="GRU", noisy=True),
    record(section="other", cell="RNN"),
    record(dtype="fp32-tf32", cuda=0.5),
    record(dtype="fp32-ieee", cuda=4.0),
]


@pytest.fixture
def table(tmp_path, monkeypatch):
    """The table of RESULTS in the place of the package's, for a GPU of their name; no kernel is really there."""
    tables = made(tmp_path, RESULTS)
    monkeypatch.setattr(gpu_table, "TABLES", tables)
    monkeypatch.setattr(gpu_table, "_known", {})
    monkeypatch.setattr(gpu_table, "_gpu", lambda device: ("GPU A", (9, 0)))
    monkeypatch.setattr(select, "_warned", set())
    for name in ("cuda", "triton"):
        here = _backends.BACKENDS[name]._replace(unavailable=lambda: None, refuses=lambda call: None)
        monkeypatch.setitem(_backends.BACKENDS, name, here)
    return tables


def made(folder: Path, records: list[dict], name: str = "GPU A") -> dict:
    spec = importlib.util.spec_from_file_location("gpu_table", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    (folder / "results.json").write_text(json.dumps(records))
    (folder / "device.json").write_text(json.dumps({"name": name, "capability": "9.0"}))
    file = folder / "table.json"
    script.main([str(folder / "results.json"), "--table", str(file)])
    return json.loads(file.read_text())


def explain(cell="LSTM", units=256, rows=16, dtype=torch.bfloat16, **options):
    with FakeTensorMode(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.RNNBase, "reset_parameters", lambda self: None)  # random numbers want a real GPU
        module = getattr(rnnfast, cell)(8, units, device="cuda", dtype=dtype, **options)
        return rnnfast.explain(module, torch.empty(5, rows, 8, device="cuda", dtype=dtype))


def test_the_package_has_no_table_that_nobody_measured():
    for name, found in gpu_table.TABLES.items():
        assert found.keys() == {"capability", "date", "torch", "commit", "speedups"}, name


def test_what_the_script_writes(tmp_path):
    made(tmp_path, RESULTS)
    both = made(tmp_path, [record(cell="GRU")], name="GPU B")
    assert both["GPU B"]["speedups"] == {"gru bf16 training": {"256": {"16": {"cuda": 2.0}}}}
    of_a = both["GPU A"]
    assert (of_a["capability"], of_a["date"], of_a["torch"]) == ([9, 0], "2026-12-01", "2.13.0+cu130")
    assert of_a["speedups"].keys() == {"lstm bf16 training", "lstm fp32-tf32 training", "lstm fp32-ieee training"}
    rows = of_a["speedups"]["lstm bf16 training"]
    assert list(rows) == ["64", "256", "1024"] and list(rows["256"]) == ["16", "256"]
    assert rows["64"]["16"] == {"cuda": 2.0, "triton": 4.0} and rows["1024"]["16"] == {}
    with pytest.raises(ValueError, match="several machines"):
        made(tmp_path, [record(), record(machine="GPU B")])
    with pytest.raises(ValueError, match="no undisturbed case"):
        made(tmp_path, [record(noisy=True)])


@pytest.mark.parametrize(
    ("units", "rows", "taken"),
    [
        (64, 16, "triton"),  # the faster of two
        (256, 16, "cuda"),
        (256, 64, "cuda"),  # 64 is as near to 16 as to 256
        (256, 65, "aten"),  # measured slower than torch's operator, if by little
        (1024, 16, "aten"),  # wrong there
        (127, 1, "triton"),  # nearest by ratio
        (129, 1, "cuda"),
        (9999, 9999, "aten"),
    ],
)
def test_the_nearest_measurement_decides(table, units, rows, taken):
    assert explain(units=units, rows=rows).backend == taken


def test_the_row_its_date_and_its_gpu_are_shown(table, monkeypatch):
    text = str(explain())
    origin = "measured on GPU A, 2026-12-01, torch 2.13.0+cu130"
    assert f"lstm bf16 training, H 256, B 16: cuda 1.60, triton 0.80 times the speed of torch.nn ({origin})" in text
    slower = explain(rows=256)
    assert "slower than torch's own operator: lstm bf16 training, H 256, B 256: cuda 0.99" in slower.passed_over["cuda"]
    table["GPU B"] = table["GPU A"] | {"capability": [12, 0]}
    gpu_table._known.clear()
    monkeypatch.setattr(gpu_table, "_gpu", lambda device: ("GPU C", (8, 6)))
    assert f"({origin}; GPU C has not been measured)" in str(explain())


def test_float32_has_a_row_for_each_kind_of_products(table, monkeypatch):
    monkeypatch.setenv("RNNFAST_FLOAT32_PRODUCTS", "tf32")
    assert explain(dtype=torch.float32).backend == "cuda"
    monkeypatch.setenv("RNNFAST_FLOAT32_PRODUCTS", "ieee")
    assert explain(dtype=torch.float32).backend == "aten"


def test_what_has_no_measurement_must_be_asked_for(table):
    for nothing in (
        explain("GRU"),
        explain(proj_size=9),
        explain(dtype=torch.float64),
        explain("RNN"),
    ):
        assert nothing.backend == "aten" and nothing.measured is None
        assert "must be asked for" in nothing.passed_over["cuda"]
    with torch.no_grad():
        assert explain().backend == "aten"  # inference is a row of its own
    with rnnfast.backend("triton"):
        assert explain("GRU").backend == "triton"


def test_what_is_not_there_leaves_the_next(table, monkeypatch):
    monkeypatch.setitem(
        _backends.BACKENDS, "triton", _backends.TRITON._replace(unavailable=lambda: "it is not installed")
    )
    assert explain(units=64).backend == "cuda"


def test_without_a_table_nothing_changes(table, monkeypatch):
    monkeypatch.setattr(gpu_table, "TABLES", {})
    found = explain()
    assert found.backend == "aten" and found.measured is None and "must be asked for" in found.passed_over["triton"]


@pytest.mark.parametrize(("dtype", "found"), [(torch.bfloat16, [1, 1, 1, 0]), (torch.float32, [1, 1, 1, 1])])
def test_a_compiled_graph_can_ask(table, dtype, found, monkeypatch):
    """One graph for all batches between two edges of the table."""
    monkeypatch.setenv("RNNFAST_FLOAT32_PRODUCTS", "tf32")
    torch._dynamo.reset()
    weights = list(rnnfast.LSTM(8, 256, dtype=dtype).parameters())

    def ask(x):
        return x.sum() * 0 + len(gpu_table.measured(Call("lstm", x, None, weights)).backends)

    graphs = []
    compiled = torch.compile(ask, fullgraph=True, dynamic=True, backend=lambda graph, inputs: graphs.append(0) or graph)
    assert [int(compiled(torch.zeros(3, rows, 8, dtype=dtype))) for rows in (16, 9, 64, 256)] == found
    assert len(graphs) == len(set(found))


def test_asking_the_table_is_cheap(table):
    """Less than a microsecond where nothing else runs; here a bound that a machine in use can keep."""
    module = rnnfast.LSTM(8, 256, device="meta", dtype=torch.bfloat16)
    call = module._call(torch.empty(5, 16, 8, device="meta", dtype=torch.bfloat16), None)
    assert gpu_table.measured(call).backends == ("cuda",)
    best = min(_seconds(call) for _ in range(5))
    assert best < 20e-6


def _seconds(call, count=1000):
    begin = time.thread_time()
    for _ in range(count):
        gpu_table.measured(call)
    return (time.thread_time() - begin) / count
