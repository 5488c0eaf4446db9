"""The section "frozen": right sides only, on the same weights and states, with the goals and tables that follow."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch
from test_bench_harness import one_thread  # noqa: F401

from bench import frozen, goals, measure, onnx_runtime, peak, providers, report, suites
from bench.cases import Case
from bench.suites import Experiment

SIDES = set(frozen.SIDES) - ({"openvino"} if not find_spec("openvino") else set())
SMALL = Case("LSTM", "inference", 16, 3, seq_len=5, hx=True)


def measured(case: Case) -> dict:
    record = measure.measure_case(Experiment("frozen", case), seconds=0.01)
    return record | {"machine": "", "isa": "", "versions": {}, "commit": ""}


@pytest.mark.parametrize("case", [SMALL, replace(SMALL, num_layers=3), replace(SMALL, hx=False, seq_len=1)], ids=str)
def test_every_side_computes_the_layer(case):
    pytest.importorskip("onnxruntime")
    record = measured(case)
    assert record["failure"] is None and record["beside_failures"] == {}
    assert record["backend"] == "frozen"
    assert set(record["beside_ms"]) == SIDES == set(record["rms_errors"])
    assert record["rms_errors"]["onnxruntime"] < 1e-6 < record["rms_errors"]["int8"]
    assert set(record["bounds_ms"]) == set(peak.FORMATS)


def test_sides_that_there_are():
    """ONNX Runtime has no GRU in int8, and torch no RNN."""
    pytest.importorskip("onnxruntime")
    assert set(measured(replace(SMALL, cell="GRU"))["beside_ms"]) == SIDES - {"onnxruntime int8"}
    record = measured(replace(SMALL, cell="RNN"))
    assert set(record["beside_ms"]) == SIDES - set(frozen.INT8_RIVALS)
    assert "other int8" in report.frozen_table([record])


def test_a_wrong_side_is_not_timed(monkeypatch):
    right = frozen.torch_int8
    monkeypatch.setattr(frozen, "torch_int8", lambda module: right(torch.nn.LSTM(16, 16)))
    record = measured(SMALL)
    assert "torch int8" not in record["beside_ms"] and "rms error" in record["beside_failures"]["torch int8"]


def test_the_quantised_model_has_the_quantised_node():
    pytest.importorskip("onnxruntime")
    onnx = pytest.importorskip("onnx")
    module = providers.Runner(torch.nn, providers.Problem(SMALL)).module
    proto = onnx.load_from_string(onnx_runtime.quantised(onnx_runtime.model(module, SMALL)))
    assert "DynamicQuantizeLSTM" in [node.op_type for node in proto.graph.node]


def test_two_threads_take_turns_with_one():
    record = measured(replace(SMALL, threads=2))
    assert set(record["beside_ms"]) == {*frozen.OWN, *(f"{name}, 1 thread" for name in peak.FORMATS)}
    record["contended"] = False
    assert goals.of_one_thread(record) > 0
    assert report.frozen_threads_table([record]).count("|") > 8


def test_goals():
    beside = {"int8": 1.0, "bfloat16": 2.0, "onnxruntime": 5.0, "onnxruntime int8": 1.6, "torch int8": 3.0}
    record = {"section": "frozen", "name": "a", "cell": "LSTM", "threads": 1, "hidden_size": 256, "isa": ""}
    record |= {"rnnfast_ms": 4.0, "beside_ms": beside, "device": "cpu"}
    found = {outcome.goal.what: outcome for outcome in goals.outcomes([record])}
    assert {what: (o.values, o.met) for what, o in found.items()} == {
        "frozen float32: ONNX Runtime / rnnfast": ([1.25], True),
        "frozen int8, LSTM: the fastest other int8 / rnnfast": ([1.6], True),
        "frozen, H >= 256: float32 / int8": ([4.0], True),
    }
    slow = record | {"cell": "GRU", "beside_ms": {"int8": 2.0, "torch int8": 2.0}, "hidden_size": 64}
    assert [(o.goal.what[:16], o.met) for o in goals.outcomes([slow])] == [("frozen int8, GRU", False)]


def test_the_suite_has_every_size():
    cases = [experiment.case for experiment in suites.frozen()]
    assert all(case.hx and case.mode == "inference" for case in cases)
    plain = [case for case in cases if case.threads == 1 and case.num_layers == 1]
    assert len(plain) == 2 * 8 * 3 * 4
    assert {case.num_layers for case in cases} == {1, 2, 3, 5}
