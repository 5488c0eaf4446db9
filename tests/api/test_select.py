"""Which implementation runs: explain, backends, backend, RNNFAST_BACKEND, fallbacks with one warning, env_report."""

import contextlib
import os
import subprocess
import sys
import textwrap
import threading
import warnings

import pytest
import torch
from support.twins import CELLS, LAYERS, assert_same, state_of, tensors, twins
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils._python_dispatch import TorchDispatchMode

import rnnfast
from rnnfast import _backends, select

KINDS = [*LAYERS, *CELLS]
BACKENDS = ["cpu", "cuda", "triton", "emulator", "aten", "reference"]
built = pytest.mark.skipif(rnnfast.backends()["cpu"] != "available", reason=f"backend cpu: {rnnfast.backends()['cpu']}")


def sample(kind, **factory):
    return torch.randn(2, 3, **factory) if kind in CELLS else torch.randn(5, 2, 3, **factory)


@pytest.fixture(autouse=True)
def _no_request_and_no_warning_yet(monkeypatch):
    """As in a fresh process without RNNFAST_BACKEND."""
    monkeypatch.setattr(select, "_warned", set())
    monkeypatch.setattr(_backends.request, "name", None)
    monkeypatch.setattr(_backends.request, "strict", False)


VIEWS = {"aten.unsqueeze.default", "aten.select.int"}


class Recorder(TorchDispatchMode):
    """Names of all operators that run."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(str(func))
        return func(*args, **(kwargs or {}))


# ------------------------------------------------ backends and explain


def test_backends_lists_all_in_order():
    found = rnnfast.backends()
    assert list(found) == BACKENDS
    assert found["aten"] == found["reference"] == "available"
    assert all(isinstance(reason, str) and reason for reason in found.values())


@built
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_runs_by_default(kind, grad):
    """The layer's or the step's operator, its saving form only where a gradient is wanted."""
    ours, _ = twins(kind)
    x, hx = sample(kind), state_of(ours, 2)
    with torch.set_grad_enabled(grad), warnings.catch_warnings(), Recorder() as recorder:
        warnings.simplefilter("error")
        ours(x, hx)
        explanation = rnnfast.explain(ours, x, hx)
    found = {name for name in recorder.names if name.startswith("rnnfast.")}
    cell = kind.split("_")[0].removesuffix("cell") + ("_step" if kind in CELLS else "")
    assert found == {f"rnnfast.{cell}_{'fwd' if grad else 'infer'}.default"}
    assert explanation.backend == "cpu" and not explanation.passed_over and "cpu" in str(explanation)


@pytest.mark.parametrize("kind", CELLS)
def test_cells_in_16_bit_types_run_the_kernel_where_it_is_faster(kind):
    name, options = CELLS[kind]

    def taken(dtype, rows, autocast=None):
        module = getattr(rnnfast, name)(3, 4, **options, dtype=dtype)
        with torch.autocast("cpu", autocast) if autocast else contextlib.nullcontext():
            explanation = rnnfast.explain(module, torch.zeros(rows, 3, dtype=dtype))
        assert explanation.backend == "cpu" or "faster in torch" in explanation.passed_over["cpu"]
        return explanation.backend

    native = torch.cpu._is_avx512_bf16_supported()
    assert taken(torch.float16, 1) == taken(torch.float32, 1, autocast=torch.float16) == "aten"
    assert taken(torch.float16, 16) == taken(torch.float64, 1) == "cpu"
    assert taken(torch.bfloat16, 16) == ("aten" if native else "cpu")
    with torch.no_grad():
        assert taken(torch.bfloat16, 1) == ("cpu" if native else "aten")
    with rnnfast.backend("cpu"):
        assert taken(torch.float16, 1) == "cpu"


@pytest.mark.parametrize("kind", [*CELLS, "lstm", "gru"])
def test_the_short_way_leaves_errors_to_torch(kind):
    """What the operators refuse goes the long way round and ends in torch's own words."""
    ours, theirs = twins(kind)
    x, hx = sample(kind), state_of(ours, 2)
    state = hx[0] if isinstance(hx, tuple) else hx
    for bad in (state[..., :2], (state,), [state, None], "hx", state.double()):
        with pytest.raises(Exception) as expected:  # noqa: PT011 - the very same, whatever it is
            theirs(x, bad)
        with pytest.raises(type(expected.value)) as actual:
            ours(x, bad)
        assert str(actual.value) == str(expected.value)


@pytest.mark.parametrize("kind", KINDS)
def test_explain_runs_nothing(kind):
    ours, _ = twins(kind)
    x, hx = sample(kind), state_of(ours, 2)
    with Recorder() as recorder:
        rnnfast.explain(ours, x)
        rnnfast.explain(ours, x, hx)
    assert recorder.names <= VIEWS


def under_vmap(module, x):
    found = []
    torch.func.vmap(lambda x: (found.append(rnnfast.explain(module, x)), x)[1])(torch.stack([x, x]))
    return found[0]


def under_forward_ad(module, x):
    with torch.autograd.forward_ad.dual_level():
        return rnnfast.explain(module, x)


class Explained(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module, self.found = module, []

    def forward(self, x):
        self.found.append(rnnfast.explain(self.module, x))
        return x * 2


def under_trace(module, x):
    explained = Explained(module)
    torch.jit.trace(explained, x, check_trace=False)
    return explained.found[0]


# what -> (how to explain, words that the reason has)
TO_TORCH = {
    "meta": (lambda m, x: rnnfast.explain(m.to("meta"), x.to("meta")), "meta"),
    "complex": (lambda m, x: rnnfast.explain(m.to(torch.complex64), x.to(torch.complex64)), "complex64"),
    "vmap": (under_vmap, "torch.func"),
    "forward_ad": (under_forward_ad, "forward-mode"),
    "trace": (under_trace, "trac"),
    "wrong_shape": (lambda m, x: rnnfast.explain(m, x[..., :2]), "torch"),
    "wrong_dtype": (lambda m, x: rnnfast.explain(m, x.double()), "torch"),
}


@built
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("what", TO_TORCH)
@pytest.mark.parametrize("kind", ["rnn_tanh", "gru", "lstm", "grucell"])
@torch.no_grad()
def test_explain_names_the_reason(kind, what):
    ours, _ = twins(kind)
    explain, words = TO_TORCH[what]
    explanation = explain(ours, sample(kind))
    assert explanation.backend == "aten"
    assert words in explanation.passed_over["cpu"]
    assert explanation.passed_over["cpu"] in str(explanation) and "aten" in str(explanation)


def test_explain_takes_what_forward_takes():
    ours, _ = twins("lstm", num_layers=2, bidirectional=True, batch_first=True)
    x, lengths = torch.randn(3, 5, 3), torch.tensor([5, 0, 2])
    packed = pack_padded_sequence(x, torch.tensor([2, 5, 1]), batch_first=True, enforce_sorted=False)
    hx = state_of(ours, 3)
    for call in (
        rnnfast.explain(ours, x),
        rnnfast.explain(ours, x, hx),
        rnnfast.explain(ours, x, list(hx)),
        rnnfast.explain(ours, x[0], tuple(h[:, 0] for h in hx)),
        rnnfast.explain(ours, packed, hx),
        rnnfast.explain(ours, input=x, hx=hx),
        rnnfast.explain(ours, x, lengths=lengths),
    ):
        assert call.backend in BACKENDS and "LSTM" in str(call)
    assert rnnfast.explain(ours, None).backend == "aten"


def test_explain_says_what_was_requested():
    ours, _ = twins("gru")
    with rnnfast.backend("aten"):
        explanation = rnnfast.explain(ours, sample("gru"))
    assert explanation.requested and "backend 'aten', which was requested" in str(explanation)
    assert not rnnfast.explain(ours, sample("gru")).requested


@pytest.mark.parametrize("module", [nn.LSTM(3, 4), nn.Linear(3, 4), "LSTM"], ids=str)
def test_explain_wants_a_module_of_ours(module):
    with pytest.raises(TypeError, match="rnnfast"):
        rnnfast.explain(module, torch.randn(5, 2, 3))


# ------------------------------------------------ backend(...)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_backend_forces(kind, name):
    if rnnfast.backends()[name] != "available":
        pytest.skip(f"backend {name}: {rnnfast.backends()[name]}")
    ours, theirs = twins(kind)
    x = sample(kind)
    with rnnfast.backend(name, strict=True), Recorder() as recorder:
        result = ours(x)
        assert rnnfast.explain(ours, x).backend == name
    assert_same(result, theirs(x))
    with Recorder() as stock:
        theirs(x)
    assert any(n.startswith("rnnfast.") for n in recorder.names) == (name == "cpu")
    if name == "aten":
        assert recorder.names - VIEWS == stock.names - VIEWS
    elif name == "reference":
        assert recorder.names != stock.names and any("mm" in n for n in recorder.names)


def test_unknown_backend():
    with pytest.raises(ValueError, match="'gpu'.*cpu, cuda, triton, emulator, aten, reference"), rnnfast.backend("gpu"):
        pytest.fail("entered")
    assert rnnfast.explain(rnnfast.GRU(3, 4), torch.randn(5, 2, 3)).backend in BACKENDS


def test_backend_nests_and_survives_exceptions():
    ours, x = rnnfast.GRU(3, 4), torch.randn(5, 2, 3)
    default = rnnfast.explain(ours, x).backend
    with rnnfast.backend("aten"):
        with rnnfast.backend("reference"):
            assert rnnfast.explain(ours, x).backend == "reference"
        assert rnnfast.explain(ours, x).backend == "aten"
        with pytest.raises(KeyError), rnnfast.backend("reference", strict=True):
            raise KeyError
        assert rnnfast.explain(ours, x).backend == "aten"
    assert rnnfast.explain(ours, x).backend == default


def test_backend_as_a_decorator_and_reused_is_each_time_the_same():
    ours, x = rnnfast.GRU(3, 4), torch.randn(5, 2, 3)

    @rnnfast.backend("reference")
    def forced():
        return rnnfast.explain(ours, x).backend

    assert forced() == forced() == "reference"


def test_backend_is_this_threads_own():
    ours, x, seen = rnnfast.GRU(3, 4), torch.randn(5, 2, 3), {}
    default = rnnfast.explain(ours, x).backend
    inside, outside = threading.Event(), threading.Event()

    def other():
        with rnnfast.backend("reference"):
            inside.set()
            outside.wait(30)
            seen["other"] = rnnfast.explain(ours, x).backend

    thread = threading.Thread(target=other)
    thread.start()
    assert inside.wait(30)
    seen["this"] = rnnfast.explain(ours, x).backend
    outside.set()
    thread.join(30)
    assert seen == {"this": default, "other": "reference"}


def test_strict_raises_and_names_the_reason():
    ours, _ = twins("gru")
    x = torch.randn(5, 2, 3)
    with rnnfast.backend("aten", strict=True), pytest.raises(RuntimeError, match="'aten'.*strict.*lengths"):
        ours(x, lengths=torch.tensor([5, 2]))
    ours.to("meta")
    with rnnfast.backend("reference", strict=True), pytest.raises(RuntimeError, match="'reference'.*strict.*meta"):
        ours(x.to("meta"))


def test_fallback_warns_once_per_reason():
    ours, _ = twins("gru")
    x, lengths = torch.randn(5, 2, 3), torch.tensor([5, 2])
    with rnnfast.backend("aten"), pytest.warns(RuntimeWarning, match="'aten'.*lengths") as caught:
        first = ours(x, lengths=lengths)
        ours(x, lengths=lengths)
    assert ["'aten'" in str(warning.message) for warning in caught].count(True) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with rnnfast.backend("aten"):
            assert_same(ours(x, lengths=lengths), first)
        ours.to("meta")(x.to("meta"))  # nothing is lost there, so nothing is said


@built
def test_a_dtype_without_kernels_warns_and_works():
    ours, theirs = twins("gru")
    x = torch.randn(5, 2, 3, dtype=torch.complex64)
    ours, theirs = ours.to(torch.complex64), theirs.to(torch.complex64)
    with pytest.warns(RuntimeWarning, match="complex64"):
        result = ours(x)
    torch.testing.assert_close(tensors(result), tensors(theirs(x)))


# ------------------------------------------------ the environment, in fresh processes


def python(program, **environment):
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**{k: v for k, v in os.environ.items() if not k.startswith("RNNFAST_")}, **environment},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_environment_names_a_backend():
    python(
        """
        import threading, torch, rnnfast
        ours, x = rnnfast.GRU(3, 4), torch.randn(5, 2, 3)
        seen = [rnnfast.explain(ours, x).backend]
        thread = threading.Thread(target=lambda: seen.append(rnnfast.explain(ours, x).backend))
        thread.start(); thread.join()
        with rnnfast.backend("aten"):
            seen.append(rnnfast.explain(ours, x).backend)
        assert seen == ["reference", "reference", "aten"], seen
        """,
        RNNFAST_BACKEND="reference",
    )


@pytest.mark.quick(0)
def test_environment_names_an_unknown_backend():
    python(
        """
        import torch, rnnfast
        try:
            rnnfast.GRU(3, 4)(torch.randn(5, 2, 3))
        except ValueError as error:
            assert "'gpu'" in str(error) and "cpu, cuda, triton, emulator, aten, reference" in str(error), error
        else:
            raise SystemExit("no error")
        """,
        RNNFAST_BACKEND="gpu",
    )


def test_without_the_extension():
    """Everything works, slower, and says so once; strict refuses; env_report and backends name the reason."""
    python(
        """
        import warnings, torch, rnnfast
        from rnnfast import env_report
        assert "RNNFAST_SKIP_EXT" in rnnfast.backends()["cpu"], rnnfast.backends()
        torch.manual_seed(0)
        theirs = torch.nn.LSTM(3, 4, 2, bidirectional=True)
        ours = rnnfast.LSTM(3, 4, 2, bidirectional=True)
        ours.load_state_dict(theirs.state_dict())
        x = torch.randn(5, 2, 3)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(3):
                output, _ = ours(x)
            rnnfast.GRUCell(3, 4)(x[0])
        told = [str(w.message) for w in caught if issubclass(w.category, RuntimeWarning)]
        assert len(told) == 1 and "RNNFAST_SKIP_EXT" in told[0], told
        assert torch.equal(output, theirs(x)[0])
        output.sum().backward()
        explanation = rnnfast.explain(ours, x)
        assert explanation.backend == "aten" and "RNNFAST_SKIP_EXT" in explanation.passed_over["cpu"]
        assert rnnfast.explain(ours, x, lengths=torch.tensor([5, 2])).backend == "reference"
        assert (ours(x, lengths=torch.tensor([5, 2]))[0][2:, 1] == 0).all()
        try:
            with rnnfast.backend("cpu", strict=True):
                ours(x)
        except RuntimeError as error:
            assert "RNNFAST_SKIP_EXT" in str(error), error
        else:
            raise SystemExit("strict did not raise")
        assert "RNNFAST_SKIP_EXT" in env_report.report()
        """,
        RNNFAST_SKIP_EXT="1",
    )


@pytest.mark.quick(0)
def test_env_report_as_a_program():
    environment = {**os.environ, "RNNFAST_BACKEND": "reference", "RNNFAST_CPU_ISA": "abacus"}
    done = subprocess.run(
        [sys.executable, "-m", "rnnfast.env_report"], capture_output=True, text=True, timeout=120, env=environment
    )
    assert done.returncode == 0, done.stderr
    for fact in (rnnfast.__version__, torch.__version__, "backend cpu", "backend aten", "backend reference", "abacus"):
        assert fact in done.stdout
