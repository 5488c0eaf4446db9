"""The benchmark's own tests: it must refuse wrong results, time fairly and read its real input correctly."""

from __future__ import annotations

import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from bench import cases, data, measure, parity, providers, report, training
from bench.cases import Case
from bench.timing import CpuClock, Sample, interleave, summarise
from bench.workloads import workloads

SMALL = Case("GRU", "training", 8, 3, seq_len=5)


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    parity.reference.cache_clear()
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
    record = measure.measure_case(replace(SMALL, mode=mode), seconds=0.01)
    assert record["speedup"] is None and record["torch_ms"] is None
    assert "output" in record["failure"]


def test_right_result_gets_a_full_record():
    record = measure.measure_case(SMALL, seconds=0.01) | {"machine": "", "versions": {}, "commit": ""}
    wanted = "cell mode dtype seq_len batch input_size hidden_size num_layers bidirectional proj_size threads backend"
    wanted += " torch_ms rnnfast_ms speedup err torch_err machine versions commit"
    assert record.keys() >= set(wanted.split())
    assert record["failure"] is None
    assert record["speedup"] == pytest.approx(record["torch_ms"] / record["rnnfast_ms"])


def test_sloppy_training_breaks_the_curve_rule(monkeypatch):
    """The rule for loss curves sees an error of 1e-4 of every output."""

    class SloppyRNN(nn.RNN):
        def forward(self, input, hx=None):
            output, hx = super().forward(input, hx)
            return output * 1.0001, hx

    with_provider(monkeypatch, RNN=SloppyRNN)
    digits = next(w for w in workloads(full=False, threads=1, device="cpu") if "digits" in w.name)
    digits = replace(digits, epochs=2)
    assert training.train(digits)[0].parity.failure is not None
    with_provider(monkeypatch)
    assert training.train(digits)[0].parity.failure is None


@pytest.mark.parametrize("form", ["padded", "packed", "lengths", "cell"])
@pytest.mark.parametrize("cell", cases.CELLS)
def test_every_form_passes_and_counts_its_rows(cell, form):
    case = Case(cell, "training", 8, 3, 5, seq_len=7, form=form)
    record = measure.measure_case(case, seconds=0.01)
    assert record["failure"] is None
    assert sum(case.lengths()) == (1 + 4 + 7 if form in ("packed", "lengths") else 21)
    assert case.flops() == 3 * 2 * cases.GATES[cell] * 8 * (5 + 8) * sum(case.lengths())


def test_case_names_are_unique():
    for suite in (cases.quick(), cases.goal(), cases.full(), cases.gpu(quick=True), cases.gpu(quick=False)):
        names = [case.name for case in suite]
        assert len(set(names)) == len(names)
    assert len(cases.goal()) == 3 * 2 * 5 * 4
    assert len([case for case in cases.full() if case.on_grid]) == 3 * 2 * 9 * 4 * 2 * 2


def test_interleaving_finds_a_known_ratio():
    def work(milliseconds):
        end = time.process_time() + milliseconds / 1e3
        while time.process_time() < end:
            pass

    timing = interleave(lambda: work(2), lambda: work(1), CpuClock(threads=1), seconds=0.1)
    assert timing.speedup == pytest.approx(2, rel=0.3)
    assert timing.pairs >= 3


def test_pairs_that_waited_for_a_core_are_left_out():
    quiet = [(Sample(2e6, 2e6), Sample(1e6, 1e6))] * 6
    busy = [(Sample(9e8, 9e8, 0.5), Sample(1e6, 1e6))] * 9
    timing = summarise(quiet + busy, "wall")
    assert timing.speedup == 2 and timing.pairs == 6 and not timing.contended
    assert summarise(busy, "wall").contended


def test_last_line():
    def record(name, speedup, contended=False):
        return {"name": name, "speedup": speedup, "contended": contended}

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
    record = measure.measure_case(replace(SMALL, form="cell"), seconds=0.01)
    assert record["backend"] in providers.rnnfast.backends()
