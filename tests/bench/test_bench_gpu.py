"""What the benchmark does on a GPU, as far as it can be tested without one: the run, its clock and its floors."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import rnnfast
from bench import __main__ as program
from bench import (
    device,
    floors,
    measure,
    parity,
    peak,
    peers,
    plots,
    providers,
    report,
    suites,
    timing,
    warm,
    workloads,
)
from bench.cases import Case, float32_products
from bench.suites import Experiment
from rnnfast import _backends

WITHOUT_TRITON = os.environ | {"TRITON_INTERPRET": "0", "CUDA_VISIBLE_DEVICES": ""}
SMALL = Case("GRU", "training", 8, 3, seq_len=5)


@pytest.fixture
def fake_gpu(monkeypatch):
    """The CPU in a GPU's place."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr(peak, "SAMPLES", 1)
    monkeypatch.setattr(peak, "SAMPLE_BYTES", 1e6)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(measure, "machine", lambda device: "a GPU")
    monkeypatch.setattr(measure, "versions", lambda: {"torch": "2"})
    monkeypatch.setattr(device, "facts", lambda: {"name": "a GPU"})
    monkeypatch.setattr(providers, "GPU_BACKENDS", ("cpu", "reference"))
    monkeypatch.setattr(warm, "compile_kernels", lambda cases, backend: 0.0)
    monkeypatch.setattr(workloads, "workloads", lambda *arguments: [])
    parity.reference.cache_clear()
    yield
    parity.reference.cache_clear()
    torch.set_num_threads(threads)


def run(monkeypatch, folder, cases, *options):
    monkeypatch.setitem(suites.WHOLES, "gpu-quick", lambda: [Experiment("grid", case) for case in cases])
    arguments = ["bench", "gpu-quick", "--out", str(folder), "--seconds", "0.01", *options]
    monkeypatch.setattr(sys, "argv", arguments)
    status = program.main()
    records = json.loads((folder / "results.json").read_text())
    return status, {record["name"]: record for record in records}


@pytest.mark.quick(0)
def test_a_bad_case_is_kept_and_measured_again_last(monkeypatch, tmp_path, fake_gpu):
    cases = [replace(SMALL, hidden_size=size, input_size=8) for size in (8, 9, 10)]
    measured, bad = [], {9}

    def measure_case(experiment, seconds, others):
        measured.append(experiment.case.hidden_size)
        if experiment.case.hidden_size in bad:
            raise RuntimeError("out of resource")
        return real(experiment, seconds, others)

    real = measure.measure_case
    monkeypatch.setattr(measure, "measure_case", measure_case)
    status, records = run(monkeypatch, tmp_path, cases)
    assert status == 1 and measured == [8, 9, 10] and len(records) == 3
    assert [bool(record["failure"]) for record in records.values()] == [False, True, False]
    assert "out of resource" in records[cases[1].name]["failure"]
    assert json.loads((tmp_path / "device.json").read_text())["name"] == "a GPU"

    measured.clear()
    bad.clear()
    more = [replace(SMALL, hidden_size=11, input_size=8)]
    status, records = run(monkeypatch, tmp_path, cases + more, "--resume")
    assert status == 0 and measured == [11, 9] and len(records) == 4


def test_a_run_that_was_killed_names_the_case_that_it_died_in(monkeypatch, tmp_path, fake_gpu):
    def killed(experiment, seconds, others):
        raise KeyboardInterrupt

    monkeypatch.setattr(measure, "measure_case", killed)
    with pytest.raises(KeyboardInterrupt):
        run(monkeypatch, tmp_path, [SMALL])
    (record,) = json.loads((tmp_path / "results.json").read_text())
    assert record["name"] == SMALL.name and "did not end" in record["failure"]


def test_all_backends_take_turns(monkeypatch, tmp_path, fake_gpu):
    status, records = run(monkeypatch, tmp_path, [SMALL])
    record = records[SMALL.name]
    assert status == 0 and record["isa"] == "cpu, reference" and record["backend"] == "cpu"
    assert set(record["beside_ms"]) == {"reference"} and record["beside_failures"] == {}


def test_one_backend_on_request(monkeypatch, tmp_path, fake_gpu):
    with rnnfast.backend("reference"):
        _, records = run(monkeypatch, tmp_path, [SMALL])
    record = records[SMALL.name]
    assert record["isa"] == record["backend"] == "reference" and record["beside_ms"] == {}


def test_another_backend_that_fails_is_named_and_not_timed(monkeypatch, tmp_path, fake_gpu):
    def check(case, of_torch, of_rnnfast):
        checked.append(case)
        if len(checked) == 2:
            raise RuntimeError("no kernel image is available")
        return real(case, of_torch, of_rnnfast)

    checked, real = [], parity.check
    monkeypatch.setattr(parity, "check", check)
    status, records = run(monkeypatch, tmp_path, [SMALL])
    record = records[SMALL.name]
    assert status == 0 and record["speedup"] > 0 and record["beside_ms"] == {}
    assert record["beside_failures"] == {"reference": "RuntimeError: no kernel image is available"}
    assert "no kernel image" in (tmp_path / "report.md").read_text()


class Torch(peers.Peer):
    """torch's GRU as a peer that takes every case; `shift` is its error."""

    def missing(self):
        return None

    def takes(self, case):
        return peers.Range("gru.py", ("GRU",), ())


def torch_as_peer(name, shift):
    def load(case, device, backend):
        zeros = torch.zeros(1, case.batch, case.hidden_size)
        return lambda x, *weights: (
            torch.gru(x, zeros.to(x), weights, True, 1, 0.0, False, False, False)[0] + shift(case)
        )

    return Torch(name, (), peers.as_torch, load)


def test_peers_take_turns_and_their_failures_are_named(monkeypatch, tmp_path, fake_gpu):
    def raises(case):
        raise ImportError("no such kernel")

    found = [
        torch_as_peer(*peer) for peer in (("haste", lambda c: 0), ("torchrl", lambda c: 0.1), ("flaggems", raises))
    ]
    monkeypatch.setattr(peers, "PEERS", found)
    monkeypatch.setattr(measure.peers.Peer, "version", lambda peer: "abc")
    cases = [SMALL, replace(SMALL, mode="inference", dtype="bf16")]
    status, records = run(monkeypatch, tmp_path, cases)
    assert status == 0
    for record in records.values():
        assert set(record["beside_ms"]) == {"reference", "haste"} and record["speedup"] > 0
        assert set(record["beside_failures"]) == {"torchrl", "flaggems"}
        assert "output: error 1" in record["beside_failures"]["torchrl"]
        assert record["beside_failures"]["flaggems"] == "ImportError: no such kernel"
    text = (tmp_path / "report.md").read_text()
    assert "haste / rnnfast" in text and "torchrl ms" not in text and "no such kernel" in text


def test_the_table_of_peers():
    def record(name, **peers_ms):
        return record_on_gpu(name, beside_ms={"cuda": 9.0, **peers_ms}) | {"rnnfast_ms": 2.0}

    records = [record("a", haste=4.0), record("b", haste=1.0, torchrl=6.0), record("c")]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in report.peer_table(records).splitlines()[2:]]
    assert rows == [["haste", "2", "1", "1.00", "0.50", "b"], ["torchrl", "1", "1", "3.00", "3.00", "b"]]
    assert report.peer_table([record("c")]) == ""
    assert "Peers (ratio of their time to rnnfast's)" in dict(report.sections("title", records, []))


@pytest.mark.parametrize(
    "dtype, failure", [("fp32-tf32", None), ("fp32-ieee", "grad_x: error 2.0e-03 > 1e-05"), ("bf16", None)]
)
def test_a_peer_is_held_to_the_ceiling_of_its_products(monkeypatch, dtype, failure):
    truth = {"output": torch.ones(4), "grad_x": torch.ones(4)}
    monkeypatch.setattr(parity, "reference", lambda case: truth)
    case = replace(SMALL, dtype=dtype, device="cuda")
    with float32_products(case):
        found = parity.check_ceiling(case, {"output": truth["output"], "grad_x": truth["grad_x"] + 2e-3})
        assert (found is None) if failure is None else found.startswith(failure)
        assert "shape" in parity.check_ceiling(case, {"output": torch.ones(3)})


def test_a_gpu_without_our_kernels_is_said_so(monkeypatch, fake_gpu):
    monkeypatch.setattr(providers.rnnfast, "backends", lambda: {"cpu": "not built", "reference": "not here"})
    with pytest.raises(RuntimeError, match="cpu: not built, reference: not here"):
        providers.gpu_backends()


def test_nothing_is_measured_on_a_gpu_that_died(monkeypatch, tmp_path, fake_gpu):
    def dead():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", dead)
    status, records = run(monkeypatch, tmp_path, [SMALL, replace(SMALL, batch=4)])
    assert list(records) == [SMALL.name]


def test_time_is_up(monkeypatch, tmp_path, fake_gpu):
    (tmp_path / "results.json").write_text(json.dumps([record_on_gpu("earlier")]))
    status, records = run(monkeypatch, tmp_path, [SMALL], "--minutes", "0.0000001", "--resume")
    assert status == 0 and list(records) == ["earlier"]


def test_results_of_another_machine_are_not_resumed(monkeypatch, tmp_path, fake_gpu):
    (tmp_path / "results.json").write_text(json.dumps([record_on_gpu("earlier", machine="another GPU")]))
    with pytest.raises(ValueError, match="another GPU"):
        run(monkeypatch, tmp_path, [SMALL], "--resume")


def record_on_gpu(name: str, **rest) -> dict:
    """A record as a GPU gives it."""
    case = Case("LSTM", "training", 128, 16, dtype="fp32-tf32", seq_len=512, device="cuda")
    verdict = parity.Parity("output", 1e-4, 1e-4, 1e-3, None)
    times = timing.Timing(2.0, 1.0, 2.2, 1.1, 9, 0.01, "cuda", False)
    record = measure._record("grid", name, case, "triton", verdict, times)
    record |= {
        "machine": "a GPU",
        "isa": "cpu, reference",
        "versions": {"torch": "2"},
        "commit": "c",
        "kernels": ["persist (90%, 1x)"],
    }
    record |= {"torch_us_per_step": 3.9, "us_per_step": 1.95, "bound_ms": 0.3, "bound_by": "steps", "fraction": 0.3}
    record |= {"torch_gflops": 1.0, "gflops": 2.0, "peak_gflops": 9.0, "bandwidth_gbs": None, "flops_per_byte": 2.0}
    return record | rest


def test_report_of_a_gpu(tmp_path):
    records = [record_on_gpu("lstm_a"), record_on_gpu("lstm_b", speedup=None, failure="did not end")]
    parts = dict(report.sections("title", records, report.judged(records, grid=True)))
    table = parts["Cases"]
    for text in ("us/step", "1.95", "persist (90%", "wall ratio", "steps", "30%"):
        assert text in table
    assert "lstm_b: did not end" in parts["WRONG RESULTS (no speed-up is reported for these)"]
    assert {path.stem for path in plots.draw(records, [], tmp_path)} == {"speedup_fp32-tf32_1", "roofline_fp32-tf32_1"}


def test_the_suites():
    quick, whole = suites.gpu_quick(), suites.gpu()
    assert {e.case.device for e in quick + whole} == {"cuda"}
    names = {e.case.name for e in whole if e.section == "grid"}
    assert len(names) == 3 * 10 * 5 * 2 * len(suites.GPU_DTYPES) and {e.case.name for e in quick} <= names
    for suite in (quick, whole):
        sections = {e.section for e in suite if e.section.startswith(providers.TIER_SECTION)}
        assert sections == {f"tier {tier}" for tier in ("cta", "cluster", "group", "step")} <= set(report.HEADINGS)
    assert "lstm_h64_b1_t512_fp32-tf32_train" in names


def test_a_section_of_a_tier_runs_that_tier(monkeypatch, tmp_path, fake_gpu, capsys):
    """Where the kernels are there and take the case; else it is left out, with the reason."""
    monkeypatch.setattr(providers._ext, "cuda_failure", None)
    asked = []

    def cuda_refuses(cell, dtype, hidden_size, *rest, backward):
        asked.append(os.environ["RNNFAST_TIER"])
        return "too large" if hidden_size > 8 else None

    def measure_case(experiment, seconds, others):
        measured.append((os.environ.get("RNNFAST_TIER"), _backends.requested(), experiment.case.hidden_size))
        return record_on_gpu(experiment.case.name, section=experiment.section)

    measured = []
    monkeypatch.setattr(providers._ext, "cuda_refuses", cuda_refuses)
    monkeypatch.setattr(measure, "measure_case", measure_case)
    cases = [replace(SMALL, hidden_size=size) for size in (8, 9)]
    experiments = [Experiment(section, case) for section in ("grid", "tier group") for case in cases]
    monkeypatch.setitem(suites.WHOLES, "gpu-quick", lambda: experiments)
    monkeypatch.setattr(sys, "argv", ["bench", "gpu-quick", "--out", str(tmp_path)])
    assert program.main() == 0
    assert measured == [(None, "cpu", 8), (None, "cpu", 9), ("group", "cuda", 8)] and set(asked) == {"group"}
    told = capsys.readouterr().out
    assert "tier group: 1 cases are left out; too large" in told and "CUDA kernels, tier group alone" in told
    monkeypatch.setattr(providers._ext, "cuda_failure", "it is not built")
    assert providers.tier_refuses("tier cta", SMALL) == "it is not built"


def test_suites_of_a_gpu_are_refused_without_one(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("BENCH", raising=False)
    assert program.parse_arguments([]).suite == "quick"
    with pytest.raises(SystemExit):
        program.parse_arguments(["gpu"])
    assert "needs a CUDA device" in capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert program.parse_arguments([]).suite == "gpu-quick"


def test_products_are_switched_by_the_name_of_the_dtype():
    switches = torch.backends.cudnn.rnn, torch.backends.cuda.matmul
    before = [switch.fp32_precision for switch in switches]
    for dtype in ("ieee", "tf32"):
        case = replace(SMALL, dtype=f"fp32-{dtype}", device="cuda")
        with float32_products(case):
            assert [switch.fp32_precision for switch in switches] == [dtype, dtype]
            assert parity.working_dtype(case) == (torch.float16 if dtype == "tf32" else torch.float32)
    with float32_products(SMALL):
        assert [switch.fp32_precision for switch in switches] == before


def test_floors():
    """They never fall with more units or rows, and a training takes longer than a forward pass."""
    assert floors.step_us(Case("LSTM", "inference", 130, 17, dtype="bf16")) == 0.43
    assert floors.step_us(Case("LSTM", "training", 512, 256, dtype="fp16")) == pytest.approx(2.0 + 2.2)
    for nothing in (Case("RNN", "inference", 64, 1, dtype="bf16"), Case("LSTM", "inference", 32, 1, dtype="bf16")):
        assert floors.step_us(nothing) is None
    assert floors.step_us(Case("LSTM", "inference", 64, 1, dtype="fp32-ieee")) is None
    assert floors.step_us(Case("LSTM", "inference", 64, 1, dtype="bf16", num_layers=2)) is None
    for (cell, *_), sizes in floors.FLOOR_US.items():
        assert cell in ("LSTM", "GRU") and all(1 in rows for rows in sizes.values())
        for rows in sizes.values():
            assert list(rows.values()) == sorted(rows.values())


def test_the_floor_is_the_limit_where_it_is_larger(monkeypatch):
    monkeypatch.setattr(peak, "peak_gflops", lambda *arguments: 700_000.0)
    monkeypatch.setattr(peak, "_is_hopper", lambda: True)
    limit = peak.limits(Case("LSTM", "inference", 128, 16, dtype="bf16", seq_len=512, device="cuda"))
    assert limit["bound_by"] == "steps" and limit["floor_us_per_step"] == 0.43
    of_input = 2 * 4 * 128 * 128 * 512 * 16 / 700_000.0 / 1e6
    assert limit["bound_ms"] == pytest.approx(0.43 * 0.512 + of_input)
    large = peak.limits(Case("RNN", "inference", 2048, 256, dtype="bf16", seq_len=512, device="cuda"))
    assert large["bound_by"] == "arithmetic"


def test_kernels_are_compiled_once():
    parts = warm.shares([e.case for e in suites.gpu_quick()], processes=7)
    flat = [case for part in parts for case in part]
    assert len(parts) == 7 and len(set(flat)) == len(flat) and {case.seq_len for case in flat} == {2}
    where = {}
    for index, part in enumerate(parts):
        for case in part:
            assert where.setdefault(replace(case, batch=0), index) == index


@pytest.mark.quick(0)
def test_compiling_runs_every_case_in_other_processes(monkeypatch):
    monkeypatch.setattr(warm, "PROCESSES", 1)
    assert 0 < warm.compile_kernels([SMALL, replace(SMALL, batch=4)], "cpu") < warm.SECONDS
    call = "warm.main('cpu', [Case('GRU', 'training', 8, 3)])"
    program = ["from bench import warm", "from bench.cases import Case", call]
    done = subprocess.run([sys.executable, "-c", "; ".join(program)], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0 and done.stderr == ""
    refused = "; ".join(program).replace("'cpu'", "'triton'")
    done = subprocess.run([sys.executable, "-c", refused], env=WITHOUT_TRITON, capture_output=True, text=True)
    assert done.returncode == 0 and "triton" in done.stderr


def test_the_kernels_of_a_call():
    lines = device.summary(
        [("copy", 10.0, 2), ("gemm", 60.0, 512), ("idle", 0.0, 1), ("x" * 200, 20.0, 1), ("y", 10.0, 1)]
    )
    assert lines[0] == "gemm (60%, 512x)" and len(lines) == device.KERNELS and len(lines[1]) < 110


@pytest.mark.parametrize("repeatable", [False, True])
def test_clock_of_the_gpu(monkeypatch, repeatable):
    """A call that changes something is made once per sample; else GPU time is taken while the GPU is still busy."""
    order = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: order.append("wait"))
    clock = timing.CudaClock.__new__(timing.CudaClock)
    clock.repeatable = repeatable
    clock.flush = SimpleNamespace(zero_=lambda: order.append("flush"))
    clock.start = SimpleNamespace(record=lambda: order.append("start"), elapsed_time=lambda end: 3.0)
    clock.end = SimpleNamespace(record=lambda: order.append("end"))
    sample = clock.measure(lambda: order.append("call"), 1)
    waiting = ["flush", "wait", "start", "call", "end", "wait"]
    assert order == (["flush", "start", "call", "end", "wait"] + waiting if repeatable else waiting)
    assert sample.clock == 3e6 and sample.wall > 0
