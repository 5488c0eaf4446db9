"""Which implementation a call takes, with the reason for every faster one that it does not take.

The decision is made once per call, for the whole stack of layers, from what is static under torch.compile: shapes,
dtypes, devices and modes, never values. `decide` makes it, `choose` acts on it, `explain` prints it.
"""

import warnings
from typing import Any, NamedTuple

import torch
from torch import _C, Tensor, compiler
from torch.autograd import forward_ad

from . import _ext, gpu_table, triton
from ._backends import ATEN, BACKENDS, CPU, CUDA, DTYPES, REFERENCE, TRITON, Backend, known, request, requested
from .call import Call, dtype_of
from .check import fits

STEP_DTYPES = DTYPES[:2]
"""Those in which a cell module's step never loses against torch's (see `step_loses`)."""


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


def fast_path_open(input: Any, dtypes: tuple[torch.dtype, ...] = DTYPES) -> bool:
    """Whether a call with this input may go to the CPU kernels without a decision, because nothing is unusual.

    `decide` would say the same (no reason of its is about `dtypes`), but takes as long as a small call. The operators
    check all that they get before they compute anything; a call that they refuse comes to `decide`.
    """
    return (
        type(input) is Tensor
        and input.dtype in dtypes
        and input.is_cpu
        and not input.is_nested
        and not compiler.is_compiling()
        and (request.name is None or request.name == "cpu")
        and _ext.failure is None
        and not _C._is_any_autocast_enabled()
        # What only_torch asks, in place: its call takes as long as its questions.
        and not compiler._is_exporting_flag
        and _C._get_tracing_state() is None
        and not _C._are_functorch_transforms_active()
        and forward_ad._current_level < 0
    )


class Decision(NamedTuple):
    """The backend that runs a call, and why not the ones before it."""

    backend: Backend
    passed_over: dict[str, str]
    """Backend -> reason, in the order in which they were asked."""
    misfit: bool = False
    """Whether torch must judge arguments that do not fit together."""
    only_torch: bool = False
    """Whether passing a call on to torch loses nothing here."""
    measured: gpu_table.Measured | None = None
    """The measurement by which CUDA tensors choose."""


_UNMEASURED = "no GPU has measured it yet, so it must be asked for: rnnfast.backend({!r})"


def decide(call: Call) -> Decision:
    """Which backend runs `call`. Changes nothing, warns of nothing; a call that does not fit is torch's to judge."""
    asked = requested()
    torchs = only_torch()
    if call.step and not torchs:
        torchs = step_loses(call.input)
    if call.input.is_meta:
        torchs = "meta tensors hold no data"
    if (call.input.is_meta or not torchs) and not fits(call):
        return Decision(ATEN, {CPU.name: "its tensors do not fit together as documented, so torch is the judge"}, True)
    measured = gpu_table.measured(call) if call.input.is_cuda else None
    names = (*measured.backends, *BACKENDS) if measured else BACKENDS
    passed_over: dict[str, str] = {}
    for name in names if asked is None else (asked, *names):
        candidate = BACKENDS[known(name)]
        reason = candidate.unavailable() or (name != asked and _must_be_asked_for(name, call, measured))
        reason = reason or candidate.refuses(call) or (candidate is not ATEN and torchs)
        if not reason:
            return Decision(candidate, passed_over, False, bool(torchs), measured)
        passed_over.setdefault(name, reason)
    return Decision(REFERENCE, passed_over, False, bool(torchs), measured)


def choose(call: Call) -> Backend:
    """The backend that runs `call`.

    A strict request that cannot be met raises RuntimeError with the reason. A request or a backend of the tensors'
    device that is passed over, to the loss of speed, warns once per reason.
    """
    decision = decide(call)
    asked = requested()
    for name, reason in decision.passed_over.items():
        if decision.misfit:
            break
        if name == asked and request.strict:
            raise RuntimeError(f"rnnfast backend {name!r} was requested with strict=True, but {reason}")
        if name == asked or (_loses(name, call, decision.measured) and not decision.only_torch):
            _warn_once(f"rnnfast backend {name!r} is passed over: {reason}")
    return decision.backend


def _must_be_asked_for(name: str, call: Call, measured: gpu_table.Measured | None) -> str | None:
    """Why a backend for GPUs is not the default of a call, or None."""
    runs_here = call.input.is_cuda or (name == TRITON.name and triton.interpreted)
    if name not in (CUDA.name, TRITON.name) or not runs_here:
        return None
    if measured is None:
        return _UNMEASURED.format(name)
    return None if name in measured.backends else f"it is slower than torch's own operator: {measured.text}"


def _loses(name: str, call: Call, measured: gpu_table.Measured | None) -> bool:
    """Whether it is a loss not to take a backend."""
    of_device = BACKENDS[name].device == call.input.device.type
    return of_device and (measured is None or name in measured.backends)


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
    requested: bool = False
    """Whether `backend` or RNNFAST_BACKEND asked for it."""

    def __str__(self) -> str:
        lines = [f"{self.call} takes backend {self.backend!r}" + ", which was requested" * self.requested]
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
    decision = decide(call)
    what = f"{module} on {call.input.dtype} {call.input.device.type} tensors"
    measured = decision.measured and decision.measured.text
    chosen = decision.backend.name
    return Explanation(chosen, decision.passed_over, what, measured, chosen == requested())
