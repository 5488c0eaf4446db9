"""The benchmark's own tests: it must refuse wrong results, time fairly and read its real input correctly."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from bench import (
    cases,
    data,
    goals,
    measure,
    memory,
    onnx_runtime,
    parity,
    peak,
    plots,
    providers,
    report,
    suites,
    training,
    workloads,
)
from bench.busy import busy_cores
from bench.cases import Case
from bench.timing import CpuClock, Sample, interleave, summarise

SMALL = Case("GRU", "training", 8, 3, seq_len=5)


def measure_case(case, section="grid", **beside):
    return measure.measure_case(suites.Experiment(section, case, beside), seconds=0.01)


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    parity.reference.cache_clear()
    monkeypatch.setattr(peak, "SAMPLES", 1)
    monkeypatch.setattr(peak, "SAMPLE_BYTES", 1e6)
    yield
    torch.set_num_threads(threads)


class SloppyGRU(nn.GRU):
    """A GRU that is wrong in the fourth digit."""

    def forward(self, input, hx=None, **rest):
        output, hx = super().forward(input, hx)
        return output * 1.0001, hx


def with_provider(monkeypatch, **classes):
    """Puts other classes in rnnfast's place."""
    namespace = SimpleNamespace(**{name: getattr(nn, name) for name in ("LSTM", "GRU", "RNN", "GRUCell")} | classes)
    monkeypatch.setattr(measure, "rnnfast", namespace)
    monkeypatch.setattr(training, "rnnfast", namespace)
    monkeypatch.setattr(training, "backend_of", lambda *arguments: "sloppy")


@pytest.mark.parametrize("mode", cases.MODES)
def test_wrong_result_gets_no_speedup(monkeypatch, mode):
    with_provider(monkeypatch, GRU=SloppyGRU)
    record = measure_case(replace(SMALL, mode=mode))
    assert record["speedup"] is None and record["torch_ms"] is None
    assert "output" in record["failure"]


def test_right_result_gets_a_full_record():
    record = measure_case(SMALL) | {"machine": "", "versions": {}, "commit": ""}
    wanted = "cell mode dtype seq_len batch input_size hidden_size num_layers bidirectional proj_size threads backend"
    wanted += " torch_ms rnnfast_ms speedup err torch_err machine versions commit"
    assert record.keys() >= set(wanted.split())
    assert record["failure"] is None
    assert record["speedup"] == pytest.approx(record["torch_ms"] / record["rnnfast_ms"])


@pytest.mark.quick(0)
def test_sloppy_training_breaks_the_curve_rule(monkeypatch):
    """The rule for loss curves sees an error of 1e-4 of every output."""

    class SloppyRNN(nn.RNN):
        def forward(self, input, hx=None):
            output, hx = super().forward(input, hx)
            return output * 1.0001, hx

    with_provider(monkeypatch, RNN=SloppyRNN)
    digits = next(w for w in workloads.workloads(full=False, threads=1, device="cpu") if "digits" in w.name)
    digits = replace(digits, epochs=2)
    assert training.train(digits)[0].parity.failure is not None
    with_provider(monkeypatch)
    assert training.train(digits)[0].parity.failure is None


@pytest.mark.parametrize("form", ["padded", "packed", "lengths", "cell"])
@pytest.mark.parametrize("cell", cases.CELLS)
def test_every_form_passes_and_counts_its_rows(cell, form):
    case = Case(cell, "training", 8, 3, 5, seq_len=7, form=form)
    record = measure_case(case)
    assert record["failure"] is None
    assert sum(case.lengths()) == (1 + 4 + 7 if form in ("packed", "lengths") else 21)
    assert case.flops() == 3 * 2 * cases.GATES[cell] * 8 * (5 + 8) * sum(case.lengths())


@pytest.mark.parametrize("mode", ["forward", "step"])
@pytest.mark.parametrize("seq_len", [1, 4])
@pytest.mark.parametrize("form", ["padded", "cell"])
def test_calls_and_steps(form, seq_len, mode):
    case = Case("LSTM", mode, 8, 3, seq_len=seq_len, form=form)
    assert measure_case(case, "calls")["failure"] is None
    runner = providers.Runner(nn, providers.Problem(case))
    before = [parameter.detach().clone() for parameter in runner.parameters]
    results = runner.run()
    changed = [not torch.equal(*pair) for pair in zip(before, runner.parameters, strict=True)]
    assert any(changed) == (mode == "step")
    assert results["output"].requires_grad and ("grad_weight_ih" in results) == (mode == "step" and form == "cell")


def test_case_names_are_unique():
    for suite in (suites.quick(), suites.cpu(), suites.full(), suites.gpu_quick(), suites.gpu()):
        names = [(experiment.section, experiment.case.name) for experiment in suite]
        assert len(set(names)) == len(names)
    assert len(list(suites.cpu_grid())) == len(goals.GRID) * 3 * 6 * 4
    assert {e.section for e in suites.cpu()} == set(suites.SECTIONS)


def test_selected_by_words():
    name = "lstm_h64_b1_t100_fp32_infer_2thr"
    assert suites.selected(name, "") and suites.selected(name, "lstm fp32") and suites.selected(name, "not bf16 h64")
    assert not suites.selected(name, "lstm not 2thr") and not suites.selected(name, "lstm bf16")


def test_interpolation():
    """A power law over H and a straight line over B are met exactly, whatever lies between."""
    assert goals.interpolate(200, (128, 256), (3 * 128**1.7, 3 * 256**1.7), power=True) == pytest.approx(3 * 200**1.7)
    assert goals.interpolate(7, (4, 16), (5 + 2 * 4, 5 + 2 * 16), power=False) == pytest.approx(5 + 2 * 7)
    assert suites.round_neighbours(33, 16) == ("hidden_size", 32, 64)
    assert suites.round_neighbours(64, 48) == ("batch", 16, 64)
    shapes = {(e.case.hidden_size, e.case.batch): e.beside for e in suites.neighbours()}
    assert [case.hidden_size for _, case in shapes[640, 1].values()] == [512, 1024]
    assert [(case.hidden_size, case.batch) for _, case in shapes[64, 3].values()] == [(64, 1), (64, 4)]


def goal_record(section, speedup=1.0, **rest):
    case = rest.pop("case", None) or Case("LSTM", "inference", 64, 16)
    record = {"name": case.name, "section": section, "isa": "avx512", "machine": "m", "speedup": speedup}
    return record | {field: getattr(case, field) for field in Case.__dataclass_fields__} | {"failure": None} | rest


def met(*records):
    return {outcome.goal.what: outcome.met for outcome in goals.outcomes(records)}


def test_grid_goals():
    def records(least, rest, **fields):
        cases_of_goal = list(cases.grid(suites.HIDDEN, suites.BATCHES, cells=("LSTM",), modes=("inference",)))
        return [goal_record("grid", rest if i else least, case=case, **fields) for i, case in enumerate(cases_of_goal)]

    (met_both,) = goals.outcomes(records(1.01, 1.75))
    assert "| yes |" in report.goal_table([met_both]) and "24 of 24" in report.goal_table([met_both])
    (part,) = goals.outcomes(records(1.01, 1.75)[:20])
    assert "yes so far" in report.goal_table([part]) and "20 of 24" in report.goal_table([part])
    assert met_both.met and len(met_both.cases) == 24 and met_both.cases[met_both.worst]["hidden_size"] == 32
    assert not any(met(*records(0.99, 1.75)).values()), "one case is below the minimum"
    assert not any(met(*records(1.01, 1.55)).values()), "the mean is below its goal"
    assert all(met(*records(0.86, 1.45, isa="avx2")).values()), "AVX2 must reach 0.85 of the goals"
    beside = {"torch_ms": 3.0, "rnnfast_ms": 2.0}
    for onnx_ms, judged in ((1.9, [False]), (2.1, [True]), (3.1, [])):  # beyond torch's time it is not the best
        record = goal_record("grid", beside_ms={"onnxruntime": onnx_ms}, **beside)
        assert [outcome.met for outcome in goals.outcomes([record]) if "ONNX" in outcome.goal.what] == judged
    other_sizes = goal_record("grid", 0.1, case=Case("LSTM", "inference", 320, 16))
    assert goals.outcomes([other_sizes]) == []


def test_goals_of_the_other_sections():
    call = goal_record("calls", case=Case("GRU", "inference", 64, 1, seq_len=1))
    assert met(call | {"rnnfast_ms": 0.0079}) == {"module, T=1, B=1, H=64: us": True}
    assert met(call | {"rnnfast_ms": 0.0081}) == {"module, T=1, B=1, H=64: us": False}

    layer = goal_record("layers", case=Case("GRU", "inference", 64, 1, bidirectional=True))
    beside = {"beside_ms": {"torch plain": 3.0, "plain": 1.0}}
    assert all(met(layer | beside | {"speedup": 3.1}).values())
    assert not any(met(layer | beside | {"speedup": 2.9}).values())

    packed = goal_record("packed", case=Case("GRU", "inference", 64, 16, form="packed"), speedup=3.1)
    assert list(met(packed | {"rnnfast_ms": 1.1, "beside_ms": {"padded": 1.0}}).values()) == [True, True]
    assert list(met(packed | {"rnnfast_ms": 1.2, "beside_ms": {"padded": 1.0}}).values()) == [False, True]

    odd = goal_record("neighbours", case=Case("GRU", "inference", 64, 7), beside_ms={"below": 1.0, "above": 2.0})
    assert list(met(odd | {"rnnfast_ms": 1.25 * 1.14}).values()) == [True]
    assert list(met(odd | {"rnnfast_ms": 1.25 * 1.16}).values()) == [False]

    assert not any(met(goal_record("oversubscribed", 0.99)).values())
    assert not any(met(goal_record("memory", torch_mib=100.0, rnnfast_mib=101.0)).values())


def test_partial_runs_are_merged(tmp_path):
    def write(name, records):
        (tmp_path / name).write_text(json.dumps(records))
        return tmp_path / name

    first = write("a.json", [goal_record("grid", 1.0), goal_record("oversubscribed", 2.0)])
    again = write("b.json", [goal_record("grid", 1.5), goal_record("memory")])
    records = report.merged([first, again])
    assert [(r["section"], r["speedup"]) for r in records] == [("grid", 1.5), ("oversubscribed", 2.0), ("memory", 1.0)]
    with pytest.raises(ValueError, match="avx2"):
        report.merged([first, write("c.json", [goal_record("layers", isa="avx2")])])


def test_report_of_every_section(tmp_path, monkeypatch):
    """Records go through JSON into the report, with the columns that their section needs, and into the plots."""
    lstm = Case("LSTM", "inference", 64, 3, seq_len=3)
    monkeypatch.setattr(memory, "_peak_of", lambda namespace, case: {"torch.nn": 100.0, "rnnfast": 90.0}[namespace])
    near = {"below": ("rnnfast", replace(lstm, batch=1)), "above": ("rnnfast", replace(lstm, batch=4))}
    plain = {"torch plain": ("torch", lstm), "plain": ("rnnfast", lstm)}
    records = [
        measure_case(lstm),
        measure_case(replace(lstm, bidirectional=True), "layers", **plain),
        measure_case(replace(lstm, form="packed"), "packed", padded=("rnnfast", lstm)),
        measure_case(lstm, "neighbours", **near),
        measure.measure_memory(lstm),
    ]
    common = {"machine": "m", "isa": "avx2", "versions": {"torch": "2"}, "commit": "c"}
    report.write_json(tmp_path, [record | common for record in records])
    records = report.merged([tmp_path / "results.json"])
    assert "grid" not in {outcome.goal.section for outcome in report.judged(records, grid=False)}
    outcomes = report.judged(records, grid=True)
    parts = dict(report.sections("title", records, outcomes))
    for section, (column, _) in report.RELATIVE.items():
        assert column in parts[report.HEADINGS[section]] and column not in parts[report.HEADINGS["grid"]]
    assert "0.90" in parts["Peak memory of training, each in a process of its own"]
    rows = [line for line in parts["Goals"].splitlines()[2:] if "ONNX" not in line]
    assert len(rows) == 5  # bidirectional, packed twice, batch, memory; 3 steps are not the grid's
    written = {path.stem for path in plots.draw(records, outcomes, tmp_path)}
    assert {"goals", "roofline_fp32_1", "speedup_fp32_1"} <= written


def test_limits():
    """Few rows are limited by reading the weights, many by arithmetic; each is the larger of the two times."""
    few, many = (peak.limits(Case("LSTM", "inference", 256, batch)) for batch in (1, 64))
    assert (few["bound_by"], many["bound_by"]) == ("weights", "arithmetic")
    assert many["bound_ms"] == pytest.approx(2 * 4 * 256 * 512 * 6400 / many["peak_gflops"] / 1e6)
    weights = 4 * 256 * 256 * 101  # the recurrent ones 100 times, those of the input once
    assert few["bound_ms"] == pytest.approx(weights * 4 / few["bandwidth_gbs"] / 1e6)
    assert Case("LSTM", "training", 256, 1, form="cell").weights_read() == 2 * 100 * 4 * 256 * 512


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("num_layers", [1, 2])
@pytest.mark.parametrize("cell", cases.CELLS)
def test_onnx_runtime_computes_the_same(cell, num_layers, bidirectional):
    pytest.importorskip("onnxruntime")
    case = Case(cell, "inference", 8, 3, 5, seq_len=7, num_layers=num_layers, bidirectional=bidirectional)
    record = measure_case(case)
    assert record["beside_failures"] == {} and record["beside_ms"]["onnxruntime"] > 0
    assert not onnx_runtime.takes(replace(case, mode="training"))


def test_wrong_onnx_result_is_not_timed(monkeypatch):
    pytest.importorskip("onnxruntime")
    monkeypatch.setitem(onnx_runtime.GATE_ORDER, "GRU", (0, 1, 2))
    record = measure_case(replace(SMALL, mode="inference"))
    assert "onnxruntime" not in record["beside_ms"] and "error" in record["beside_failures"]["onnxruntime"]
    assert record["speedup"] is not None


def test_without_onnx_runtime_its_columns_vanish(monkeypatch):
    monkeypatch.setattr(onnx_runtime, "missing", lambda: "not installed")
    assert "onnxruntime" not in report.case_table([measure_case(replace(SMALL, mode="inference"))])


def test_busy_processes_are_stopped():
    with pytest.raises(KeyboardInterrupt), busy_cores() as processes:
        assert all(process.poll() is None for process in processes) and processes
        raise KeyboardInterrupt
    assert all(process.poll() is not None for process in processes)


def test_busy_processes_end_with_their_parent():
    """A parent that is killed can stop nobody."""
    program = "import os\nfrom bench.busy import busy_cores\nwith busy_cores() as processes:\n"
    program += "    print(*[p.pid for p in processes], flush=True)\n    os.kill(os.getpid(), 9)\n"
    done = subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    children = [int(pid) for pid in done.stdout.split()]
    assert done.returncode == -9 and children
    deadline = time.monotonic() + 20
    while any(is_running(pid) for pid in children):
        assert time.monotonic() < deadline, "a busy process outlived its parent"
        time.sleep(0.05)


def is_running(pid):
    """Whether the process exists and has not ended: one that nobody waited for is a zombie."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.quick(0)
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_that_of_the_process_alone():
    ballast = torch.ones(300 << 18)  # 300 MiB of the parent's
    peaks = [memory._peak_of("torch.nn", Case("RNN", "training", 16, batch, seq_len=10)) for batch in (1, 40_000)]
    assert peaks[0] < memory.peak_mib() and len(ballast)
    assert peaks[1] > peaks[0] + 2 * 40_000 * 160 * 4 / 2**20  # input and output


def test_interleaving_finds_a_known_ratio():
    def work(milliseconds):
        end = time.process_time() + milliseconds / 1e3
        while time.process_time() < end:
            pass

    calls = {"torch": lambda: work(2), "rnnfast": lambda: work(1), "third": lambda: work(4)}
    timing = interleave(calls, CpuClock(threads=1), seconds=0.1)
    assert timing.speedup == pytest.approx(2, rel=0.3)
    assert timing.beside_ms["third"] == pytest.approx(4 * timing.rnnfast_ms, rel=0.3)
    assert timing.rounds >= 3


def test_no_sample_begins_with_cold_caches():
    called = []

    class Clock(CpuClock):
        def measure(self, call, repeats):
            before = len(called)
            sample = super().measure(call, repeats)
            assert called[before - 1 :] == called[-1:] * (repeats + 1)
            return sample

    calls = {name: lambda name=name: called.append(name) for name in ("torch", "rnnfast", "third")}
    interleave(calls, Clock(threads=1), seconds=0.01)


def test_rounds_that_waited_for_a_core_are_left_out():
    quiet = [(Sample(2e6, 2e6), Sample(1e6, 1e6))] * 6
    busy = [(Sample(9e8, 9e8, 0.5), Sample(1e6, 1e6))] * 9
    timing = summarise(quiet + busy, "wall")
    assert timing.speedup == 2 and timing.rounds == 6 and not timing.contended
    assert summarise(busy, "wall").contended


def test_last_line():
    def record(name, speedup, contended=False):
        return {"name": name, "section": "grid", "speedup": speedup, "contended": contended}

    records = [record("a", 4.0), record("b", 1.0), record("wrong", None), record("disturbed", 99.0, contended=True)]
    assert report.last_line(records) == "geomean speedup 2.00x over 2 cases, min 1.00x (b)"
    assert report.last_line([]).startswith("no speed-up to report")


def test_text_and_sentences():
    ids = data.characters(1000)
    assert ids.shape == (1000,) and 0 <= ids.min() and ids.max() < data.VOCABULARY
    (x, y), *rest = data.streams(ids, batch=3, seq_len=20)
    assert x.shape == y.shape == (20, 3) and len(rest) == 1000 // 60 - 1
    assert torch.equal(x[1:], y[:-1]) and torch.equal(rest[0][0][0], y[-1])

    sentences = data.tagged_sentences(400, longest=60)
    assert {tag for sentence in sentences for _, tag in sentence} == set(data.TAGS)
    assert all(3 <= len(sentence) <= 60 for sentence in sentences)
    words, tags = data.tagger_batches(64, 32, 100, longest=60)[1]
    assert len(words.data) == len(tags) and words.batch_sizes[0] == 32


def test_tags_follow_from_the_neighbours(monkeypatch):
    source = "def run(self, n):\n    return self.go(n, width=3.5) + 'x'\n"
    monkeypatch.setattr(data, "library_sources", lambda: (source,))
    first, second = data.tagged_sentences(2, longest=60)
    assert first[1] == ("run", "definition") and first[3] == ("self", "name")
    found = dict(second)
    assert [found[word] for word in ("return", "go", "width", "3.5", "'x'", "n", "+")] == [
        "keyword", "call", "argument", "number", "string", "name", "operator",
    ]  # fmt: skip


def test_digits_are_the_images_row_by_row():
    batches = data.digit_batches(64)
    assert len(batches) == 1797 // 64
    pixels, labels = batches[0]
    assert pixels.shape == (8, 64, 8) and labels[:10].tolist() == list(range(10))
    assert 0 <= pixels.min() and pixels.max() == 1


def test_backend_is_what_rnnfast_says():
    runner = providers.Runner(nn, providers.Problem(SMALL))
    assert runner.backend() == "torch"
    record = measure_case(replace(SMALL, form="cell"))
    assert record["backend"] in providers.rnnfast.backends()
