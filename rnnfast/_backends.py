"""The backends: what each can run, why it cannot run the rest, and which one this thread has asked for."""

import functools
import importlib.metadata
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, compiler

from . import _ext, autograd, reference, triton
from .autocast import dtype_of
from .call import Call, batch_of
from .cells import SPECS
from .gpu_table import Measured
from .precision import follow_switch, graph_namespace
from .stack import layer_by_layer
from .triton import operators

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class Backend(NamedTuple):
    """One implementation. `stack` runs a stack of layers (stack.py), `step` one step of a cell (reference.py)."""

    name: str
    device: str | None
    """The type of devices that it makes faster, where a fallback costs speed. None: no device."""
    unavailable: Callable[[], str | None]
    """Why it can run nothing here, or None."""
    refuses: Callable[[Call], str | None]
    """Why it cannot run this call, or None."""
    stack: Callable[..., tuple[Tensor, ...]]
    step: Callable[..., tuple[Tensor, ...]]


class _Request(threading.local):
    """What this thread has asked for. Compiled graphs are guarded on its plain attributes."""

    def __init__(self):
        self.name: str | None = os.environ.get("RNNFAST_BACKEND") or None
        self.strict = False


request = _Request()


def requested() -> str | None:
    """The backend that this thread has asked for, or None."""
    return request.name


def known(name: str) -> str:
    """`name`, if it is the name of a backend; else raises ValueError."""
    if name not in BACKENDS:
        raise ValueError(f"unknown rnnfast backend {name!r}; known are {', '.join(BACKENDS)}")
    return name


@contextmanager
def backend(name: str, strict: bool = False) -> Iterator[None]:
    """Within the block, calls of this thread take the backend `name`.

    Args:
        name: a key of `backends()`.
        strict: raise RuntimeError with the reason if a call cannot take the backend. Otherwise such a call falls
            back to the default order, with one warning per reason.

    Raises ValueError for an unknown name. RNNFAST_BACKEND in the environment does the same for the whole process.
    """
    before = request.name, request.strict
    request.name, request.strict = known(name), strict
    try:
        yield
    finally:
        request.name, request.strict = before


def backends() -> dict[str, str]:
    """Every backend by name, in the order of preference, with "available" or the reason against it."""
    return {name: backend.unavailable() or "available" for name, backend in BACKENDS.items()}


def _no_kernels(call: Call) -> str | None:
    """Why no kernels take the cell of a call, or None."""
    return None if SPECS[call.cell].operators else f"it has no kernel for the cell {call.cell}"


def _cpu_refuses(call: Call) -> str | None:
    if call.input.device.type != "cpu":
        return f"it runs on CPU tensors, not on {call.input.device.type}"
    if call.input.dtype not in DTYPES:
        return f"it has no kernel for {call.input.dtype}"
    return _no_kernels(call)


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
    """Why the CUDA kernels cannot run this call, or None. In a graph of unknown sizes the operator checks."""
    spec, dtype = SPECS[call.cell], dtype_of(call.input)
    if spec.operators is None:
        return _no_kernels(call)
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"it has no kernel for {dtype}"
    if compiler.is_compiling():
        return None
    if dtype is torch.float32:
        follow_switch(namespace)  # the plan and the kernels read it
    rows, output_size = call.weights[1].shape
    hidden_size = rows // len(spec.gates)
    proj_size = output_size if output_size != hidden_size else 0
    size = spec.operators, dtype, hidden_size, proj_size, batch_of(call), 1 + call.bidirectional
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
    return _no_kernels(call) or (None if compiler.is_compiling() else operators.refuses(call))


def _aten_refuses(call: Call) -> str | None:
    if SPECS[call.cell].torch_operator is None:
        return f"torch has no operator for the cell {call.cell}"
    return None if call.rows.lengths is None else "torch's own operator knows no `lengths`"


def _by_cuda(run: Callable[..., tuple[Tensor, ...]], namespace: str) -> Callable[..., tuple[Tensor, ...]]:
    """`run` of autograd.py with CUDA kernels. Compiled graphs of float32 get operators that read torch's switch."""

    def run_here(cell: str, input: Tensor, *rest) -> tuple[Tensor, ...]:
        in_graph = compiler.is_compiling() and input.dtype is torch.float32
        return run(cell, input, *rest, namespace=graph_namespace(namespace) if in_graph else namespace)

    return run_here


def _by_caller(*_: object) -> tuple[Tensor, ...]:
    raise AssertionError("torch's own operator takes a whole call: run.run leaves it to its caller")


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
ATEN = Backend("aten", None, lambda: None, _aten_refuses, _by_caller, _by_caller)
REFERENCE = Backend(
    "reference",
    None,
    lambda: None,
    lambda call: None,
    functools.partial(layer_by_layer, reference.layer),
    reference.step,
)
BACKENDS = {backend.name: backend for backend in (CPU, CUDA, TRITON, EMULATOR, ATEN, REFERENCE)}
"""In the order of preference."""
OURS = CPU, CUDA, TRITON  # the backends that make a device faster


def first_that_takes(call: Call, only_torch: str | None, measured: Measured | None) -> tuple[Backend, dict[str, str]]:
    """The first backend that runs a call, and why not those before it. A requested backend is asked first.

    only_torch: why no backend but torch's own operator may run the call, or None.
    measured: the measurement by which CUDA tensors choose, or None.
    """
    asked = request.name
    names = [*measured.backends, *BACKENDS] if measured else BACKENDS
    passed_over: dict[str, str] = {}
    for name in names if asked is None else (known(asked), *names):
        backend = BACKENDS[name]
        reason = backend.unavailable() or (name != asked and _must_be_asked_for(name, call, measured))
        reason = reason or backend.refuses(call) or (backend is not ATEN and only_torch)
        if not reason:
            return backend, passed_over
        passed_over.setdefault(name, reason)
    return REFERENCE, passed_over


_UNMEASURED = "no GPU has measured it yet, so it must be asked for: rnnfast.backend({!r})"


def _must_be_asked_for(name: str, call: Call, measured: Measured | None) -> str | None:
    """Why a backend for GPUs is not the default of a call, or None."""
    runs_here = call.input.is_cuda or (name == TRITON.name and triton.interpreted)
    if name not in (CUDA.name, TRITON.name) or not runs_here:
        return None
    if measured is None:
        return _UNMEASURED.format(name)
    return None if name in measured.backends else f"it is slower than torch's own operator: {measured.text}"
