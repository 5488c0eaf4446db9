"""Threads: torch.set_num_threads is followed, Python threads do not disturb each other, a forked child works."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from support import harness
from support.harness import CELLS, Case, num_threads

import rnnfast
from rnnfast import _ext

pytestmark = pytest.mark.skipif(_ext.failure is not None, reason=f"the compiled kernels are absent: {_ext.failure}")

# One for each way to share the work: over the batch, over the units.
SPLITS = {"many-rows": {"T": 12, "B": 48, "I": 40, "H": 130}, "few-rows": {"T": 12, "B": 1, "I": 64, "H": 512}}


def step(module, data, cell: str) -> list[torch.Tensor]:
    """A training step's results: outputs, states, and the gradients of input, states and weights."""
    x = data.input.detach().requires_grad_()
    states = [s.clone().requires_grad_() for s in (data.hx, data.cx)[: 2 if cell == "lstm" else 1]]
    with rnnfast.backend("cpu", strict=True):
        output, final = module(x, tuple(states) if cell == "lstm" else states[0], lengths=data.lengths)
    results = [output, *(final if cell == "lstm" else (final,))]
    grads = [data.grads[name] for name in ("output", "h_n", "c_n")[: len(results)]]
    found = torch.autograd.grad(results, [x, *states, *module.parameters()], grads)
    return [*(r.detach() for r in results), *found]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("threads", [1, 2, 4])
@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("cell", CELLS)
def test_repeat_runs_are_bit_equal(cell, split, threads):
    case = Case(cell, **SPLITS[split], bidirectional=split == "many-rows")
    module, data = harness.make_module(rnnfast, case), harness.Data(case)
    with num_threads(threads):
        first = step(module, data, cell)
        assert all(same(first, step(module, data, cell)) for _ in range(3))
    with num_threads(1):  # that every count obeys the parity rule is test_parity's matter; here: no count goes astray
        for a, b in zip(first, step(module, data, cell), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * float(b.abs().max()))


@pytest.mark.parametrize(("cell", "proj"), [("lstm", 0), ("lstm", 40), ("gru", 0), ("rnn_tanh", 0)])
def test_busy_cores_change_no_result(cell, proj):
    """With more threads than cores a team leaves its unit split at some step: nobody can see at which."""
    case = Case(cell, T=150, B=4, I=64, H=320, proj=proj)  # rows for two stretches of backward
    module, data = harness.make_module(rnnfast, case), harness.Data(case)
    with num_threads(1):
        expected = step(module, data, cell)
    with num_threads(4 * (os.cpu_count() or 1)):
        assert all(same(expected, step(module, data, cell)) for _ in range(4))


STACKS = [Case(cell, T=150, B=1, I=40, H=70, layers=3) for cell in CELLS]
STACKS += [Case("lstm", T=150, B=5, I=40, H=70, proj=33, layers=10), Case("gru", T=151, B=2, I=9, H=70, layers=9)]
STACKS += [Case(cell, T=150, B=3, I=40, H=71, layers=4, dtype=torch.bfloat16) for cell in CELLS]


@pytest.mark.parametrize("case", STACKS, ids=str)
def test_a_wavefront_gives_what_one_thread_does(case):
    """Layers at different steps on different threads, as many as cores and (never in step) many more."""
    module, data = harness.make_module(rnnfast, case), harness.Data(case)
    x, hx, cx = (tensor.to(case.dtype) for tensor in (data.input, data.hx, data.cx))

    def results() -> list[torch.Tensor]:
        output, final = module(x, (hx, cx) if case.cell == "lstm" else hx)
        return [output, *(final if case.cell == "lstm" else (final,))]

    with torch.no_grad(), rnnfast.backend("cpu", strict=True):
        with num_threads(1):
            expected = results()
        for threads in (2, 3, 4 * (os.cpu_count() or 1)):
            with num_threads(threads):
                first = results()
                assert all(same(first, results()) for _ in range(8))
            for a, b in zip(first, expected, strict=True):
                torch.testing.assert_close(a, b, rtol=0, atol=8 * torch.finfo(case.dtype).eps)


# Rows that leave tiles of one or two of them, which round otherwise, behind some cuts and not behind others.
REMAINDERS = [Case(cell, T=65, B=1, I=40, H=256) for cell in CELLS]
REMAINDERS += [Case("lstm", T=4, B=1, I=64, H=1024), Case("lstm", T=65, B=1, I=17, H=259, proj=130, bidirectional=True)]


@pytest.mark.parametrize("case", REMAINDERS, ids=str)
def test_busy_cores_change_no_rounding(case):
    """At a given number of threads: a call that begins while others hold the cores cuts its products as all do."""
    module, data = harness.make_module(rnnfast, case), harness.Data(case)
    with num_threads(2 * (os.cpu_count() or 1)):
        expected = step(module, data, case.cell)
        assert all(same(expected, step(module, data, case.cell)) for _ in range(40))


def busy_threads(case: Case, threads: int, least: float = 0.08) -> int:
    """How many OS threads of this process burn at least so many seconds of CPU while the kernels run for 0.6."""
    module, data = harness.make_module(rnnfast, case), harness.Data(case)

    def used() -> dict[str, float]:
        # Linux numbers the CPU clock of a thread so: pthread_getcpuclockid(3), MAKE_THREAD_CPUCLOCK.
        return {task: time.clock_gettime((~int(task) << 3) | 6) for task in os.listdir("/proc/self/task")}

    with num_threads(threads), torch.no_grad(), rnnfast.backend("cpu", strict=True):
        module(data.input)
        before, end = used(), time.process_time() + 0.6  # of CPU, of all threads: on a busy machine too
        while time.process_time() < end:
            module(data.input)
        after = used()
    return sum(after[task] - before.get(task, 0) >= least for task in after)


needs_thread_clocks = pytest.mark.skipif(
    not os.path.isdir("/proc/self/task"), reason="/proc/self/task (the threads of a process, of Linux) is missing"
)


@needs_thread_clocks
def test_set_num_threads_is_followed():
    assert busy_threads(Case("gru", T=300, B=96, I=64, H=128), 1) == 1
    assert busy_threads(Case("gru", T=300, B=96, I=64, H=128), 2) == 2
    assert busy_threads(Case("lstm", T=300, B=96, I=64, H=128), 1) == 1


@needs_thread_clocks
def test_layers_share_threads_that_one_cannot_fill():
    case, least = Case("gru", T=300, B=1, I=32, H=32), 0.003  # for it is given up soon where the cores are busy
    assert busy_threads(case, 2, least) == 1
    assert busy_threads(replace(case, layers=4), 2, least) == 2


@pytest.mark.parametrize("shared", [True, False], ids=["one-module", "own-modules"])
def test_python_threads_at_once(shared):
    """Forward and backward from four Python threads, each of two OpenMP threads, equal the same work done alone."""
    work = []
    for i in range(4):
        cell = "lstm" if shared else CELLS[i]
        case = Case(cell, **SPLITS["few-rows" if i % 2 else "many-rows"], seed=i)
        if shared:
            case = Case(cell, T=9, B=20 + i, I=40, H=130, seed=i)
        module = work[0][0] if shared and i else harness.make_module(rnnfast, case)
        work.append((module, harness.Data(case), cell))
    with num_threads(2):
        expected = [step(*item) for item in work]
        start = threading.Barrier(len(work))

        def job(i: int) -> bool:
            torch.set_num_threads(2)  # of this thread
            start.wait()
            return all(same(step(*work[i]), expected[i]) for _ in range(6))

        with ThreadPoolExecutor(len(work)) as pool:
            assert list(pool.map(job, range(len(work)))) == [True] * len(work)


def test_backend_request_belongs_to_its_thread():
    module, x = rnnfast.GRU(2, 3), torch.zeros(4, 1, 2)
    with rnnfast.backend("aten", strict=True), ThreadPoolExecutor(1) as pool:
        assert rnnfast.explain(module, x).backend == "aten"
        assert pool.submit(lambda: rnnfast.explain(module, x).backend).result() == "cpu"


@pytest.mark.quick(0)
def test_concurrent_first_calls():
    """Nothing that is set up at the first call (instruction set, scratch memory) is set up twice or half."""
    program = """
import threading, torch, rnnfast
modules = [rnnfast.LSTM(5, 70), rnnfast.GRU(5, 70), rnnfast.RNN(5, 70)] * 3
x, results, start = torch.randn(6, 4, 5), {}, threading.Barrier(9)
def job(i):
    start.wait()
    results[i] = modules[i](x)[0].detach()
threads = [threading.Thread(target=job, args=(i,)) for i in range(9)]
[t.start() for t in threads]; [t.join() for t in threads]
assert all(torch.equal(results[i], modules[i](x)[0]) for i in range(9))
print("equal")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["equal"], done.stderr[-2000:]


def in_child(job, seconds: float = 30.0) -> int:
    """The exit status of a forked child that runs job(); a child that hangs is killed and reported as such."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            # The poison of conftest is torch's own fill, and that does hang in such a child.
            torch.use_deterministic_algorithms(False)
            status = 0 if job() else 2
        finally:
            os._exit(status)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    pytest.fail(f"the forked child hung for {seconds} s")


# Besides both splits: sizes at which converting, packing or gathering tensors is parallel work by itself.
WIDE = {"T": 20, "B": 32, "I": 80, "H": 256}
FORKED = {f"{cell}-{split}": Case(cell, **SPLITS[split]) for cell in CELLS for split in SPLITS}
FORKED |= {
    "bfloat16": Case("gru", **WIDE, dtype=torch.bfloat16),
    "float16": Case("lstm", **WIDE, dtype=torch.float16),
    "lengths": Case("lstm", **WIDE, ragged="lengths"),
    "strided": Case("rnn_tanh", **WIDE, layout="strided", grads="sum"),
}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="os.fork is missing on this platform")
@pytest.mark.filterwarnings(
    "ignore:This process:DeprecationWarning"
)  # fork in a process with threads is the very point
@pytest.mark.parametrize("name", FORKED)
def test_fork_after_use(name):
    """libgomp's pool does not survive fork: a child of a parent that ran two threads must neither hang nor differ."""
    case = FORKED[name]
    module, data = harness.make_module(rnnfast, case), harness.Data(case)
    if case.layout == "strided":
        data.input = harness.laid_out(data.input, case)
    with num_threads(2):
        expected = step(module, data, case.cell)
        closeness = 1e-4 if case.dtype == torch.float32 else 1e-1

        def close() -> bool:  # not bit-equal: the child uses one thread
            found = step(module, data, case.cell)
            torch.set_num_threads(1)  # torch's own operators do hang in such a child
            pairs = [(a.double(), b.double()) for a, b in zip(found, expected, strict=True)]
            return all(float((a - b).abs().max()) <= closeness * float(b.abs().max()) for a, b in pairs)

        def nested() -> bool:
            return close() and in_child(close) == 0

        assert in_child(nested) == 0
        assert same(step(module, data, case.cell), expected)  # the parent's pool is whole


@pytest.mark.quick(0)
def test_multiprocessing_fork_data_loader():
    """The common way to meet a fork: DataLoader workers that run a recurrent module, after the parent has."""
    program = """
import torch, rnnfast
torch.set_num_threads(2)
module = rnnfast.GRU(8, 256)
class Data(torch.utils.data.Dataset):
    def __len__(self): return 6
    def __getitem__(self, i):
        with torch.no_grad():
            return module(torch.full((40, 24, 8), float(i)))[0]
expected = [Data()[i] for i in range(6)]
loader = torch.utils.data.DataLoader(Data(), batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=60)
for a, b in zip(loader, expected, strict=True):
    torch.testing.assert_close(a, b)
print("equal")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["equal"], done.stderr[-2000:]


@pytest.mark.quick(1)
@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_oversubscription_does_not_hang(cell):
    """Many more threads than cores, in several Python threads at once: slow is allowed, a stuck barrier is not."""
    program = f"""
import threading, torch, rnnfast
modules = [rnnfast.{cell.upper()}(16, 512), rnnfast.{cell.upper()}(16, 64, bidirectional=True)]
inputs = [torch.randn(5, 1, 16), torch.randn(5, 64, 16)]
def job():
    torch.set_num_threads(16)
    for module, x in zip(modules, inputs):
        module(x)[0].sum().backward()
threads = [threading.Thread(target=job) for _ in range(4)]
[t.start() for t in threads]; [t.join() for t in threads]
print("done")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=180)
    assert done.stdout.split() == ["done"], done.stderr[-2000:]
