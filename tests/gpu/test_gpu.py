"""The kernels on a GPU: the parity rule for every kind of kernel, equal bits, CUDA graphs, streams, autotune.

`make gpu-check` runs this file in several processes, for compiling takes most of its time: H, P and what else is
constexpr make a kernel of their own, T and B do not. Memory is poisoned as in all tests (conftest.py).
"""

from __future__ import annotations

import os

# Else cuBLAS may choose another algorithm per stream, and torch warns at every product of a deterministic run.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

from itertools import product

import pytest
import torch
from support.harness import CELLS, Case, Data, check, float32_products, make_module, run

import rnnfast
from rnnfast import _ext, triton
from rnnfast.triton import plan

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

DEVICE = "cuda"
BACKENDS = ("triton", "cuda")  # whose kernels run here
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
# Cells, and the LSTM with a projection; and the four ways of numbers.
KINDS_OF_LAYERS = (*CELLS, "lstm_projected")
NUMBERS = {"tf32": (F32, "tf32"), "ieee": (F32, "ieee"), "fp16": (F16, "ieee"), "bf16": (BF16, "ieee")}
PROJECTED_FROM = {5: 1, 63: 5, 100: 64, 128: 63, 130: 100, 200: 130, 256: 128, 512: 63, 640: 256, 1024: 256}  # H: P
# The oracle's threads: the processes that pytest-xdist runs side by side share the cores.
ORACLE_THREADS = max(1, (os.cpu_count() or 1) // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")))


def needs(backend: str) -> None:
    if backend == "triton" and triton.interpreted:
        pytest.skip("Triton's kernels run in its interpreter here, not on the GPU: set TRITON_INTERPRET=0")
    if backend == "cuda" and _ext.cuda_failure is not None:
        pytest.skip(_ext.cuda_failure)


@pytest.fixture(params=BACKENDS)
def name(request) -> str:
    """The backend under test."""
    needs(request.param)
    return request.param


only_triton = pytest.mark.parametrize("name", ["triton"], indirect=True)


@pytest.fixture(autouse=True)
def _threads_for_the_oracle(_fixed_state):
    torch.set_num_threads(ORACLE_THREADS)


def layer(kind: str, T: int, B: int, I: int, H: int, numbers: str, **rest) -> Case:  # noqa: E741
    """A case by the names above; an LSTM that is too small for a projection has none."""
    dtype, products = NUMBERS[numbers]
    if (kind, numbers) == ("rnn_relu", "ieee"):
        T = min(T, 9)  # of many steps each row comes to relu's kink
    projection = PROJECTED_FROM.get(H, 0) if kind == "lstm_projected" else 0
    cell = kind.removesuffix("_projected")
    return Case(cell, T, B, I, H, proj=projection, dtype=dtype, products=products, **rest)


def tiers_of(case: Case) -> list[str]:
    """What the CUDA kernels plan for forward and for backward, with the products of the last call."""
    size = case.cell.split("_")[0], case.dtype, case.H, case.proj, case.B, case.directions
    return [_ext.cuda_plan(*size, backward=backward) for backward in (False, True)]


def force(tier: str, case: Case, monkeypatch) -> None:
    """CUDA's calls take this tier; skips the test where this GPU cannot run the case on it."""
    needs("cuda")
    monkeypatch.setenv("RNNFAST_TIER", tier)
    if refused := [plan for plan in tiers_of(case) if plan.startswith("refused: ")]:
        pytest.skip(refused[0])


def kinds_of(case: Case, name: str) -> str:
    """Which kind of kernel forward and backward take, for the log."""
    from rnnfast.triton import layers

    if name == "cuda":
        return ", ".join(plan.split(":")[0] for plan in tiers_of(case))
    cell, size = case.cell.split("_")[0], (case.H, case.proj or case.H, case.B, case.directions)
    products = case.products if case.dtype is F32 else "16-bit"
    device = layers.device_of(torch.empty(0, device=DEVICE))
    plans = [plan.plan(cell, backward, *size, products, device) for backward in (False, True)]
    return ", ".join(one if isinstance(one, str) else one.kind for one in plans)


def check_here(case: Case, name: str, record_property) -> None:
    try:
        check(case, name, DEVICE)
    finally:
        record_property("kinds", kinds_of(case, name))


@pytest.fixture
def only(monkeypatch):
    """Takes kinds of kernels away, so that the one that is asked for must run."""

    def take(kind: str) -> None:
        if kind in ("group", "step"):
            monkeypatch.setattr(plan, "WHOLE_TILES", {})
        if kind == "step":
            monkeypatch.setattr(plan, "GROUP_TILES", {})
        if kind == "second tiles":
            for table in ("WHOLE_TILES", "GROUP_TILES"):
                rest = {
                    key: {size: tiles[1:] or tiles for size, tiles in sizes.items()}
                    for key, sizes in getattr(plan, table).items()
                }
                monkeypatch.setattr(plan, table, rest)

    return take


def test_memory_is_poisoned():
    assert torch.empty(1000, device=DEVICE).isnan().all()


# H -> (T, B, bidirectional, ragged); by size they take every kind of kernel, few rows and many.
SIZES = {
    1: (129, 17, False, None),
    5: (1000, 3, True, "lengths"),
    63: (1000, 17, False, None),
    100: (129, 3, True, "unsorted"),
    128: (2, 65, False, None),
    130: (129, 17, False, "lengths"),
    256: (129, 3, True, None),
    512: (2, 65, False, "sorted"),
    640: (1, 17, False, None),
    1024: (5, 1, True, None),
}
# 16-bit types take turns over the sizes, each cell beginning with another; exact products have one kind of kernel.
BY_SIZE = []
for turn, kind in enumerate(KINDS_OF_LAYERS):
    for place, (H, (T, B, both, ragged)) in enumerate(SIZES.items()):
        numbers = ["tf32", ("fp16", "bf16")[(place + turn) % 2]] + ["ieee"] * ((place + turn) % 2)
        for number in numbers:
            BY_SIZE.append(layer(kind, T, B, 7, H, number, bidirectional=both, ragged=ragged, seed=place))


@pytest.mark.parametrize("case", BY_SIZE, ids=str)
def test_parity_by_size(case, name, record_property):
    check_here(case, name, record_property)


RAGGED = [
    layer(kind, 33, 17, 5, H, number, bidirectional=True, ragged=ragged, seed=3)
    for kind, (H, number), ragged in product(
        KINDS_OF_LAYERS, ((63, "tf32"), (63, "bf16"), (256, "bf16")), ("lengths", "sorted", "unsorted")
    )
]


@pytest.mark.parametrize("case", RAGGED, ids=str)
def test_parity_of_unequal_rows_in_both_directions(case, name, record_property):
    check_here(case, name, record_property)


FORCED = [
    *(("step", layer(cell, 9, 3, 5, 100, numbers, seed=4)) for cell, numbers in product(CELLS, NUMBERS)),
    *(("step", layer("lstm_projected", 9, 65, 5, 100, n, bidirectional=True, seed=4)) for n in ("tf32", "bf16")),
    *(("group", layer(k, 9, 17, 5, 200, n, seed=5)) for k, n in product(("rnn_tanh", "rnn_relu"), ("tf32", "bf16"))),
    *(("group", layer(k, 3, 16, 5, 512, n, seed=5)) for k, n in product(("rnn_tanh", "gru", "lstm"), ("tf32", "fp16"))),
    *(("second tiles", layer(k, 129, 3, 5, 63, n, seed=6)) for k, n in product(CELLS, ("tf32", "fp16"))),
    *(("second tiles", layer(k, 5, 17, 5, H, "bf16", seed=6)) for k, H in (("rnn_tanh", 256), ("lstm", 128))),
]  # fmt: skip


@only_triton
@pytest.mark.parametrize(("kind", "case"), FORCED, ids=str)
def test_parity_of_kinds_that_another_hides(kind, case, name, only, record_property):
    only(kind)
    if kind in ("group", "step"):
        assert kinds_of(case, name) == f"{kind}, {kind}"
    check_here(case, name, record_property)


def test_parity_of_a_very_long_sequence(name, record_property):
    check_here(layer("lstm", 2000, 2, 3, 100, "tf32"), name, record_property)


EXACT = [layer(cell, 33, 17, 5, H, "ieee", seed=7) for cell, H in product(CELLS, (20, 63))]


@only_triton
@pytest.mark.parametrize("case", EXACT, ids=str)
def test_three_tf32_products_are_as_exact_as_ieee(case, name, monkeypatch):
    monkeypatch.setenv("RNNFAST_FLOAT32_PRODUCTS", "tf32x3")
    check(case, name, DEVICE)


@pytest.mark.parametrize("cell", ["RNNCell", "GRUCell", "LSTMCell"])
def test_cells(cell, name):
    ours, theirs = (getattr(package, cell)(7, 100).to(DEVICE) for package in (rnnfast, torch.nn))
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(5, 7, device=DEVICE)
    with float32_products("ieee"), rnnfast.backend(name, strict=True):
        results = [module(x) for module in (ours, theirs)]
        results = [result if isinstance(result, tuple) else (result,) for result in results]
        grads = [torch.autograd.grad(r[0].sum(), m.parameters()) for r, m in zip(results, (ours, theirs), strict=True)]
    torch.testing.assert_close(results[0], results[1])
    torch.testing.assert_close(grads[0], grads[1])


# One layer of each kind of Triton kernel, for all that follows: they share compiled kernels with each other.
ONE_OF_EACH = {
    "whole": layer("lstm", 20, 17, 7, 63, "bf16", bidirectional=True),
    "whole, lengths": layer("gru", 20, 17, 7, 63, "tf32", ragged="lengths"),
    "whole, packed": layer("lstm", 20, 17, 7, 63, "bf16", bidirectional=True, ragged="unsorted"),
    "group": layer("lstm", 20, 17, 7, 256, "bf16"),
    "group, both directions": layer("gru", 20, 17, 7, 256, "tf32", bidirectional=True),
    "step": layer("gru", 20, 17, 7, 130, "ieee"),
    "step, projected": layer("lstm_projected", 20, 17, 7, 130, "bf16", ragged="lengths"),
}
# The same of CUDA's tiers.
OF_EACH_TIER = {
    "cta": layer("lstm", 20, 17, 7, 63, "bf16", bidirectional=True),
    "cta, packed": layer("gru", 20, 17, 7, 63, "tf32", ragged="unsorted"),
    "cluster": layer("gru", 20, 17, 7, 256, "tf32", bidirectional=True),
    "cluster, lengths": layer("lstm", 20, 17, 7, 256, "bf16", ragged="lengths"),
    "group": layer("lstm", 20, 17, 7, 512, "bf16", bidirectional=True),
    "group, packed": layer("gru", 20, 17, 7, 512, "tf32", ragged="unsorted"),
    "step": layer("gru", 20, 17, 7, 130, "ieee"),
}
KINDS = [pytest.param(None, case, id=f"triton-{name}") for name, case in ONE_OF_EACH.items()]
KINDS += [pytest.param(name.split(",")[0], case, id=f"cuda-{name}") for name, case in OF_EACH_TIER.items()]
each_kind = pytest.mark.parametrize(("tier", "case"), KINDS)


class Training:
    """A layer with static leaves on the GPU; a call is forward and backward and gives all results by name."""

    def __init__(self, case: Case, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.case = case
        self.module = make_module(rnnfast, case).to(DEVICE)
        self.data = Data(Case(**{**vars(case), "seed": seed}))
        lengths = self.data.lengths
        self.options = {"lengths": lengths.to(DEVICE)} if case.ragged == "lengths" else {}
        x, self.packing = self.data.input.to(DEVICE), None
        if case.ragged == "unsorted":
            packed = torch.nn.utils.rnn.pack_padded_sequence(x, lengths, enforce_sorted=False)
            x, *self.packing = packed
        self.x = x.clone().requires_grad_()
        states = [self.data.hx, self.data.cx] if case.cell == "lstm" else [self.data.hx]
        self.states = [state.to(DEVICE).requires_grad_() for state in states]
        self.leaves = [self.x, *self.states, *self.module.parameters()]
        self.grad = None

    def __call__(self) -> list[torch.Tensor]:
        x = self.x if self.packing is None else torch.nn.utils.rnn.PackedSequence(self.x, *self.packing)
        hx = tuple(self.states) if len(self.states) > 1 else self.states[0]
        output, states = self.module(x, hx, **self.options)
        output = output if self.packing is None else output.data
        results = [output, *(states if isinstance(states, tuple) else (states,))]
        if self.grad is None:
            self.grad = [torch.randn_like(result) for result in results]
        return [*(r.detach() for r in results), *torch.autograd.grad(results, self.leaves, self.grad)]

    def renew(self) -> None:
        """Other numbers in the same memory."""
        with torch.no_grad():
            for tensor in (self.x, *self.states, *self.grad):
                tensor.copy_(torch.randn_like(tensor))


def same_bits(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    finite = all(tensor.isfinite().all() for tensor in first)
    return finite and all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.fixture
def asked(tier, case, monkeypatch):
    """Calls take a tier of the CUDA kernels, or Triton's where there is none."""
    force(tier, case, monkeypatch) if tier else needs("triton")
    with rnnfast.backend("cuda" if tier else "triton", strict=True):
        yield


@each_kind
def test_the_same_call_gives_the_same_bits(case, asked):
    with float32_products(case.products):
        training = Training(case)
        first = training()
        elsewhere = [torch.empty(1 << 20, device=DEVICE) for _ in range(3)]  # results lie at other addresses
        assert all(same_bits(first, training()) for _ in range(3)) and elsewhere


@each_kind
def test_a_call_does_not_wait_for_the_gpu(case, asked):
    with float32_products(case.products):
        training = Training(case)
        training()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            training()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@each_kind
def test_cuda_graph_of_forward_and_backward(case, asked):
    """Captured once, replayed on other numbers."""
    if case.ragged == "unsorted":
        pytest.skip("batch_sizes are in host memory and copied at every call, which a replay would not repeat")
    with float32_products(case.products):
        training = Training(case)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # compiles, and gives cuBLAS its workspace
            for _ in range(3):
                training()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = training()
        for _ in range(2):
            training.renew()
            graph.replay()
            replayed = [tensor.clone() for tensor in captured]
            for ours, eager in zip(replayed, training(), strict=True):
                torch.testing.assert_close(ours, eager, rtol=0, atol=1e-2 * float(eager.abs().max()))
                assert ours.isfinite().all()


@each_kind
def test_two_side_streams_at_once(case, asked):
    with float32_products(case.products):
        trainings = [Training(case, seed) for seed in (1, 2)]
        expected = [training() for training in trainings]
        streams = [torch.cuda.Stream() for _ in trainings]
        torch.cuda.synchronize()
        results = []
        for _ in range(4):
            for training, stream in zip(trainings, streams, strict=True):
                with torch.cuda.stream(stream):
                    results.append(training())
        torch.cuda.synchronize()
        assert all(same_bits(expected[i % 2], result) for i, result in enumerate(results))


@only_triton
def test_autotune(name, monkeypatch, tmp_path):
    from rnnfast.triton import autotune

    monkeypatch.setenv("RNNFAST_AUTOTUNE", "1")
    monkeypatch.setenv("RNNFAST_CACHE_DIR", str(tmp_path))
    case = layer("lstm", 9, 17, 5, 256, "bf16")
    check(case, name, DEVICE)
    kept = autotune.cache_file().read_text()
    assert "group" in kept and "step" in kept
    check(case, name, DEVICE)
    assert autotune.cache_file().read_text() == kept


def test_rows_beyond_2_to_the_31(name):
    """The last rows of a batch whose gates have more than 2^31 elements are what those rows give alone."""
    steps, rows, hidden_size, few = 64, 140_000, 64, 16
    if torch.cuda.get_device_properties(0).total_memory < 40 << 30:
        pytest.skip("needs 40 GiB of GPU memory")
    module = rnnfast.LSTM(1, hidden_size, dtype=BF16, device=DEVICE)
    x = torch.randn(steps, rows, 1, dtype=BF16, device=DEVICE, requires_grad=True)
    last = x[:, -few:].detach().clone().requires_grad_()
    grad = torch.randn(steps, few, hidden_size, dtype=BF16, device=DEVICE)
    with rnnfast.backend(name, strict=True):
        output, _ = module(x)
        (gradient,) = torch.autograd.grad(output[:, -few:], x, grad)
        alone, _ = module(last)
        (expected,) = torch.autograd.grad(alone, last, grad)
    torch.testing.assert_close(output[:, -few:], alone, rtol=0, atol=0.03)
    torch.testing.assert_close(gradient[:, -few:], expected, rtol=0, atol=0.05 * float(expected.abs().max()))


def test_results_of_run_lie_on_the_gpu(name):
    """The harness above really ran there."""
    case = ONE_OF_EACH["whole"]
    module = make_module(rnnfast, case).to(DEVICE)

    def forward(x, hx):
        output, (h_n, c_n) = module(x, hx)
        return output, h_n, c_n

    with rnnfast.backend(name, strict=True):
        results = run(case, Data(case), forward, dict(module.named_parameters()), case.dtype)
    assert all(result.device.type == DEVICE for result in results.values())
