"""Which implementation a call takes, with the reason for every faster one that it does not take.

The decision is made once per call, for the whole stack of layers, from what is static under torch.compile: shapes,
dtypes, devices and modes, never values. `explain` asks the same `choose` that the call asks.
"""

import functools
import importlib.metadata
import os
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import _C, Tensor, compiler
from torch.autograd import forward_ad

from . import _ext, autograd, dispatch, reference, triton
from ._call import Call, autocast_dtype, batch_of, dtype_of, fits
from .ops import CELLS
from .precision import follow_switch, graph_namespace
from .triton import operators

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
STEP_DTYPES = DTYPES[:2]
"""Those in which a cell module's step never loses against torch's (see `step_loses`)."""


class Backend(NamedTuple):
    """One implementation. `stack` and `step` run one (see reference.py); None: torch's own operator runs it all."""

    name: str
    device: str | None
    """The type of the devices that it makes faster: there it is a loss not to take it. None: of none."""
    unavailable: Callable[[], str | None]
    """Why it can run nothing here, or None."""
    refuses: Callable[[Call], str | None]
    """Why it cannot run this call, or None."""
    stack: Callable[..., tuple[Tensor, ...]] | None
    step: Callable[..., tuple[Tensor, ...]] | None


def only_torch() -> str | None:
    """Why torch's own operator must run, whatever the call, so that passing it on loses nothing; or None."""
    if compiler._is_exporting_flag:  # is_exporting() reads it too, but Dynamo of torch 2.11 takes that for true
        return "the graph is being exported, which wants torch's own operators"
    if _C._get_tracing_state() is not None:
        return "torch.jit is tracing, which wants torch's own operators"
    if _C._are_functorch_transforms_active():
        return "a torch.func transform is active"
    if forward_ad._current_level >= 0:
        return "forward-mode AD is active"
    return None


_HAS_BF16_PRODUCTS = torch.cpu._is_avx512_bf16_supported()
_CONVERTED_STEP_ROWS = 8


def step_loses(input: Tensor) -> str | None:
    """Why torch's own operator is the faster for one step of a cell module, or None; a request overrules it.

    Measured on one core with AVX-512-BF16 (2026-11-21), H 32 to 512, 1 to 256 rows: float32 and float64 without
    gradients 0.9-2.4x, a training loop 1.0-1.7x. The 16-bit types that we convert to float32 at every step: float16
    with one row 0.35-1.0x, with 16 rows 1.4-1.9x; bfloat16 in training 0.4-1.4x. A compiled graph fuses torch's step.
    """
    if requested() is not None:
        return None
    if compiler.is_compiling():
        return "one step in a compiled graph is fused with what surrounds it in torch's own operator"
    dtype = dtype_of(input)
    if dtype is torch.bfloat16 and _HAS_BF16_PRODUCTS:
        trains = torch.is_grad_enabled()
        return "one step in bfloat16 with gradients is faster in torch's own operator" if trains else None
    if dtype in (torch.bfloat16, torch.float16) and (input.dim() < 2 or input.size(0) < _CONVERTED_STEP_ROWS):
        return f"one step of so few rows in {dtype} is faster in torch's own operator"
    return None


def _cpu_refuses(call: Call) -> str | None:
    if call.input.device.type != "cpu":
        return f"it runs on CPU tensors, not on {call.input.device.type}"
    if call.input.dtype not in DTYPES:
        return f"it has no kernel for {call.input.dtype}"
    return None


def _cuda_unavailable() -> str | None:
    if _ext.cuda_failure is None and not torch.cuda.is_available():
        return "there is no CUDA device"
    return _ext.cuda_failure


def _cuda_refuses(call: Call) -> str | None:
    if not call.input.is_cuda:
        return f"it runs on CUDA tensors, not on {call.input.device.type}"
    return _no_cuda_plan(call, "rnnfast")


def _emulator_refuses(call: Call) -> str | None:
    if not call.input.is_cpu:
        return f"it runs on CPU tensors, not on {call.input.device.type}"
    if requested() != EMULATOR.name:
        return "it is a test tool, thousands of times slower than a GPU"
    return _no_cuda_plan(call, _ext.EMULATOR_NAMESPACE)


def _no_cuda_plan(call: Call, namespace: str) -> str | None:
    """Why the CUDA kernels cannot run this call, or None; in a compiled graph, of unknown sizes, the operator says."""
    dtype = dtype_of(call.input)
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"it has no kernel for {dtype}"
    if compiler.is_compiling():
        return None
    if dtype is torch.float32:
        follow_switch(namespace)  # the plan asks it, and so do the kernels
    rows, output_size = call.weights[1].shape
    hidden_size = rows // CELLS[call.cell].gates
    proj_size = output_size if output_size != hidden_size else 0
    size = call.cell.split("_")[0], dtype, hidden_size, proj_size, batch_of(call), 1 + call.bidirectional
    device = call.input.device.index or 0
    for backward in (False, True):
        reason = _ext.cuda_refuses(*size, backward=backward, device=device, namespace=namespace)
        if reason is not None:
            return reason
    return None


OLDEST_TRITON = (3, 6)


def _triton_missing() -> str | None:
    if torch.version.hip is not None:
        return "its kernels are for NVIDIA GPUs, and this torch is for AMD's"
    for distribution in ("triton", "pytorch-triton", "triton-windows"):
        try:
            version = importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
        if tuple(map(int, version.split(".")[:2])) < OLDEST_TRITON:
            return f"it needs Triton >= {'.'.join(map(str, OLDEST_TRITON))}, this is {version}"
        return None
    return "Triton is not installed"


_TRITON_MISSING = _triton_missing()


def _triton_unavailable() -> str | None:
    if _TRITON_MISSING is None and not triton.interpreted and not torch.cuda.is_available():
        return "there is no CUDA device; with TRITON_INTERPRET=1 in the environment it takes CPU tensors, slowly"
    return _TRITON_MISSING


def _triton_refuses(call: Call) -> str | None:
    if not call.input.is_cuda and not (triton.interpreted and call.input.device.type == "cpu"):
        return f"it runs on CUDA tensors, not on {call.input.device.type}"
    if dtype_of(call.input) not in (torch.float32, torch.bfloat16, torch.float16):
        return f"it has no kernel for {call.input.dtype}"
    return None if compiler.is_compiling() else operators.refuses(call)


def _aten_refuses(call: Call) -> str | None:
    return None if call.lengths is None else "torch's own operator knows no `lengths`"


def _by_cuda(run: Callable[..., tuple[Tensor, ...]], namespace: str) -> Callable[..., tuple[Tensor, ...]]:
    """`run` of autograd.py with CUDA kernels; compiled graphs of float32 get operators that ask for torch's switch."""

    def run_here(cell: str, input: Tensor, *rest) -> tuple[Tensor, ...]:
        in_graph = compiler.is_compiling() and input.dtype is torch.float32
        return run(cell, input, *rest, namespace=graph_namespace(namespace) if in_graph else namespace)

    return run_here


CPU = Backend("cpu", "cpu", lambda: _ext.failure, _cpu_refuses, autograd.stack, autograd.step)
CUDA = Backend(
    "cuda",
    "cuda",
    _cuda_unavailable,
    _cuda_refuses,
    _by_cuda(autograd.stack, "rnnfast"),
    _by_cuda(autograd.step, "rnnfast"),
)
TRITON = Backend(
    "triton",
    "cuda",
    _triton_unavailable,
    _triton_refuses,
    functools.partial(autograd.stack, namespace="rnnfast_triton"),
    functools.partial(autograd.step, namespace="rnnfast_triton"),
)
EMULATOR = Backend(
    "emulator",
    None,
    lambda: _ext.emulator_failure,
    _emulator_refuses,
    _by_cuda(autograd.stack, _ext.EMULATOR_NAMESPACE),
    _by_cuda(autograd.step, _ext.EMULATOR_NAMESPACE),
)
ATEN = Backend("aten", None, lambda: None, _aten_refuses, None, None)
REFERENCE = Backend(
    "reference",
    None,
    lambda: None,
    lambda call: None,
    functools.partial(reference.stack, reference.layer),
    reference.step,
)
BACKENDS = {backend.name: backend for backend in (CPU, CUDA, TRITON, EMULATOR, ATEN, REFERENCE)}
"""In the order of preference."""
OURS = CPU, CUDA, TRITON  # those whose kernels make a device faster
UNMEASURED = "no GPU has measured it yet, so it must be asked for: rnnfast.backend({!r})"


def _must_be_asked_for(name: str, call: Call, measured: dispatch.Measured | None) -> str | None:
    """Why a backend for GPUs is not the default of a call, or None."""
    runs_here = call.input.is_cuda or (name == TRITON.name and triton.interpreted)
    if name not in (CUDA.name, TRITON.name) or not runs_here:
        return None
    if measured is None:
        return UNMEASURED.format(name)
    return None if name in measured.backends else f"it is slower than torch's own operator: {measured.text}"


class _Request(threading.local):
    """What this thread asked for; read as plain attributes, so that compiled graphs are guarded on it."""

    def __init__(self):
        self.name: str | None = os.environ.get("RNNFAST_BACKEND") or None
        self.strict = False


_request = _Request()


def requested() -> str | None:
    """The backend that this thread asked for, or None."""
    return _request.name


def _known(name: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"unknown rnnfast backend {name!r}; known are {', '.join(BACKENDS)}")
    return name


@contextmanager
def backend(name: str, strict: bool = False) -> Iterator[None]:
    """Within the block, calls of this thread take the backend `name`.

    Args:
        name: a key of `backends()`.
        strict: raise RuntimeError, naming the reason, where a call cannot take it. Without, such a call falls back
            to the default order with one warning per reason.

    Raises ValueError for an unknown name. RNNFAST_BACKEND in the environment is the same for the whole process.
    """
    before = _request.name, _request.strict
    _request.name, _request.strict = _known(name), strict
    try:
        yield
    finally:
        _request.name, _request.strict = before


def backends() -> dict[str, str]:
    """Every backend by name, in the order of preference, with "available" or the reason why it is not."""
    return {name: backend.unavailable() or "available" for name, backend in BACKENDS.items()}


def is_plain(input: Any, dtypes: tuple[torch.dtype, ...] = DTYPES) -> bool:
    """Whether a call with this input takes the CPU kernels without further questions, because nothing is unusual.

    `choose` would say the same (no reason of its is about `dtypes`), but takes as long as a small call. The operators
    check all that they get before they touch it; a caller whose call they refuse asks `choose`.
    """
    return (
        type(input) is Tensor
        and input.dtype in dtypes
        and input.is_cpu
        and not compiler.is_compiling()
        and (_request.name is None or _request.name == "cpu")
        and _ext.failure is None
        and not _C._is_any_autocast_enabled()
        and only_torch() is None
        and input.numel() > 0
    )


def choose(call: Call, passed_over: dict[str, str] | None = None) -> Backend:
    """The backend that runs `call`.

    Where `passed_over` is given the reasons against the backends before it are written there; else they are acted on:
    a strict request that cannot be met raises RuntimeError, and a loss of speed warns once per reason. A call that does
    not fit goes to torch, which raises its own error.

    A plain eager call is not examined with `fits`: the operators check all that they get before they touch it, and the
    caller takes to torch what they refused and what does not fit.
    """
    request = requested()
    torchs = only_torch()
    if call.step and not torchs:
        torchs = step_loses(call.input)
    plain = request in (None, CPU.name) and passed_over is None and call.lengths is None
    plain = plain and (not dispatch.TABLES or call.input.is_cpu)
    plain = plain and not compiler.is_compiling() and autocast_dtype(call.input.device) is None
    plain = plain and call.input.numel() > 0
    if not plain and not torchs and not fits(call):
        if passed_over is not None:
            passed_over[CPU.name] = "its tensors do not fit together as documented, so torch is the judge"
        return ATEN
    if call.input.is_meta:
        torchs = "meta tensors hold no data"
    measured = dispatch.measured(call) if call.input.is_cuda else None
    names = (*measured.backends, *BACKENDS) if measured else BACKENDS
    for name in names if request is None else (request, *names):
        candidate = BACKENDS[_known(name)]
        reason = candidate.unavailable() or (name != request and _must_be_asked_for(name, call, measured))
        reason = reason or candidate.refuses(call) or (candidate is not ATEN and torchs)
        if not reason:
            return candidate
        if passed_over is not None:
            passed_over.setdefault(name, reason)
        elif name == request and _request.strict:
            if (call.input.is_meta or not torchs) and not fits(call):
                return ATEN
            raise RuntimeError(f"rnnfast backend {name!r} was requested with strict=True, but {reason}")
        elif name == request or (_loses(candidate, call, measured) and not torchs):
            _warn_once(f"rnnfast backend {name!r} is passed over: {reason}")
    return REFERENCE


def _loses(candidate: Backend, call: Call, measured: dispatch.Measured | None) -> bool:
    """Whether it is a loss not to take a backend."""
    of_device = candidate.device == call.input.device.type
    return of_device and (measured is None or candidate.name in measured.backends)


_warned: set[str] = set()


def _warn_once(message: str) -> None:
    if message not in _warned:
        _warned.add(message)
        warnings.warn(message, RuntimeWarning, stacklevel=2)


class Explanation(NamedTuple):
    """What `explain` answers; str() of it is a readable text."""

    backend: str
    passed_over: dict[str, str]
    call: str
    measured: str | None = None
    """The measurement by which CUDA tensors take it, and its date."""

    def __str__(self) -> str:
        lines = [f"{self.call} takes backend {self.backend!r}"]
        lines += [f"  measured: {self.measured}"] if self.measured else []
        return "\n".join(lines + [f"  not {name!r}: {reason}" for name, reason in self.passed_over.items()])


def explain(module: torch.nn.Module, input: Any, hx: Any = None, *, lengths: Tensor | None = None) -> Explanation:
    """Which implementation `module(input, hx)` takes at this place, and why not the ones before it.

    Runs nothing. Takes an rnnfast module; raises TypeError for any other.
    """
    prepare = getattr(module, "_call", None)
    if prepare is None:
        raise TypeError(f"{type(module).__name__} is not a module of rnnfast; see rnnfast.convert")
    call = prepare(input, hx, lengths) if lengths is not None else prepare(input, hx)
    if call is None:
        return Explanation(ATEN.name, {}, f"{module} on arguments that torch refuses")
    passed_over: dict[str, str] = {}
    chosen = choose(call, passed_over)
    measured = dispatch.measured(call) if call.input.is_cuda else None
    what = f"{module} on {call.input.dtype} {call.input.device.type} tensors"
    return Explanation(chosen.name, passed_over, what, measured and measured.text)
