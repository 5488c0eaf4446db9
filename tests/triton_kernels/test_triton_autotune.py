"""RNNFAST_AUTOTUNE: what is measured, what is kept, who may be measured. No GPU: the clock is ours."""

import pytest
import torch

from rnnfast.triton import autotune, plan

H200 = plan.Device("H200", (9, 0), 232_448, 132)
SIZE = ("lstm", False, 256, 256, "16-bit")


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("RNNFAST_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(autotune, "_rankings", {})


def plans(batch: int) -> list[plan.Plan]:
    return list(plan.candidates(*SIZE[:4], batch, 1, SIZE[4], H200, interpreted=False, reasons=[]))


class Clock:
    """Runs what it is given and takes as long as `seconds` says for its plan."""

    def __init__(self, seconds):
        self.seconds, self.runs, self.current = seconds, [], None

    def run(self, chosen: plan.Plan) -> None:
        self.current = chosen
        self.runs.append(chosen)

    def time(self, run) -> float:
        run()
        return self.seconds(self.current)


def test_the_fastest_is_taken_and_kept():
    found = plans(batch=16)
    assert {one.kind for one in found} == {"group", "step"}
    clock = Clock(lambda one: 1.0 if one.kind == "step" else 2.0)
    assert autotune.best(SIZE, found, clock.run, clock.time).kind == "step"
    assert len(clock.runs) == len(found) * (autotune.REPEATS + 1)
    autotune._rankings.clear()  # another process
    again = Clock(lambda one: 1.0)
    assert autotune.best(SIZE, found, again.run, again.time).kind == "step" and not again.runs


def test_a_plan_that_the_first_batch_could_not_have_is_measured_when_it_can():
    few, many = plans(batch=16), plans(batch=4096)
    assert set(many) != set(few)
    clock = Clock(lambda one: float(one.config.block_b))
    autotune.best(SIZE, few, clock.run, clock.time)
    autotune.best(SIZE, many, clock.run, clock.time)
    assert set(clock.runs) == {*few, *many}


def test_a_broken_file_is_measured_anew():
    autotune.cache_file().parent.mkdir()
    autotune.cache_file().write_text("{")
    clock = Clock(lambda one: 1.0)
    autotune.best(SIZE, plans(batch=16), clock.run, clock.time)
    assert clock.runs and autotune.cache_file().read_text().startswith("{")


def test_only_where_it_is_asked_for_and_on_a_gpu(monkeypatch):
    assert not autotune.wanted(torch.zeros(1))
    monkeypatch.setenv("RNNFAST_AUTOTUNE", "1")
    assert not autotune.wanted(torch.zeros(1))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert autotune.wanted(torch.empty(1, device="meta").as_subclass(_OnGpu))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert not autotune.wanted(torch.empty(1, device="meta").as_subclass(_OnGpu))


class _OnGpu(torch.Tensor):
    is_cuda = True


def test_a_folder_that_cannot_be_written_is_said(monkeypatch):
    monkeypatch.setenv("RNNFAST_CACHE_DIR", "/proc/nowhere")
    clock = Clock(lambda one: 1.0)
    with pytest.warns(RuntimeWarning, match="not kept"):
        autotune.best(SIZE, plans(batch=16), clock.run, clock.time)
    again = Clock(lambda one: 1.0)
    autotune.best(SIZE, plans(batch=16), again.run, again.time)
    assert not again.runs
