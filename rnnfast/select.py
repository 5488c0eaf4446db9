"""Which implementation a call takes, with the reason for every faster one that it does not take.

The decision is made once per call, for the whole stack of layers. It depends on what is static under torch.compile:
shapes, dtypes, devices and modes, never values. `decide` makes it, `choose` acts on it, `explain` prints it.
"""

import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor, compiler

from . import gpu_table
from ._backends import ATEN, BACKENDS, CPU, Backend, first_that_takes, request
from ._torch_internals import forward_ad_level, has_bf16_products, is_exporting, is_transforming, tracing_state
from .autocast import dtype_of
from .call import Call
from .check import fits
from .frozen import Frozen


def only_torch() -> str | None:
    """Why torch's own operator must run, whatever the call, so that passing it on loses nothing; or None."""
    if is_exporting():
        return "the graph is being exported, which wants torch's own operators"
    if tracing_state() is not None:
        return "torch.jit is tracing, which wants torch's own operators"
    if is_transforming():
        return "a torch.func transform is active"
    if forward_ad_level() >= 0:
        return "forward-mode AD is active"
    return None


_HAS_BF16_PRODUCTS = has_bf16_products()
_CONVERTED_STEP_ROWS = 8


def step_loses(input: Tensor) -> str | None:
    """Why torch's own operator is faster for one step of a cell module, or None; a request overrules it.

    Measured on one core with AVX-512-BF16 (2026-11-21), H 32 to 512, 1 to 256 rows: float32 and float64 without
    gradients 0.9-2.4x, a training loop 1.0-1.7x. 16-bit types are converted to float32 at every step: float16 with one
    row 0.35-1.0x, with 16 rows 1.4-1.9x; bfloat16 in training 0.4-1.4x. A compiled graph fuses torch's step.
    """
    if request.name is not None:
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


class Decision(NamedTuple):
    """The backend that runs a call, and why not the ones before it."""

    backend: Backend
    passed_over: dict[str, str]
    """Backend -> reason, in the order in which they were asked."""
    misfit: bool = False
    """Whether the arguments do not fit together, so that torch must judge them."""
    only_torch: bool = False
    """Whether passing a call on to torch loses nothing here."""
    measured: gpu_table.Measured | None = None
    """The measurement by which CUDA tensors choose."""


def decide(call: Call) -> Decision:
    """Which backend runs `call`. Changes nothing and warns of nothing. Torch judges a call that does not fit."""
    reason = only_torch()
    if call.step and not reason:
        reason = step_loses(call.input)
    if call.input.is_meta:
        reason = "meta tensors hold no data"
    if (call.input.is_meta or not reason) and not fits(call):
        return Decision(ATEN, {CPU.name: "its tensors do not fit together as documented, so torch is the judge"}, True)
    measured = gpu_table.measured(call) if call.input.is_cuda else None
    backend, passed_over = first_that_takes(call, reason, measured)
    return Decision(backend, passed_over, False, bool(reason), measured)


def choose(call: Call) -> Backend:
    """The backend that runs `call`.

    A strict request that cannot be met raises RuntimeError with the reason. A request or a backend of the tensors'
    device that is passed over, to the loss of speed, warns once per reason.
    """
    decision = decide(call)
    asked = request.name
    for name, reason in decision.passed_over.items():
        if decision.misfit:
            break
        if name == asked and request.strict:
            raise RuntimeError(f"rnnfast backend {name!r} was requested with strict=True, but {reason}")
        if name == asked or (_loses(name, call, decision.measured) and not decision.only_torch):
            warn_once(f"rnnfast backend {name!r} is passed over: {reason}")
    return decision.backend


def _loses(name: str, call: Call, measured: gpu_table.Measured | None) -> bool:
    """Whether it is a loss not to take a backend."""
    of_device = BACKENDS[name].device == call.input.device.type
    return of_device and (measured is None or name in measured.backends)


_warned: set[str] = set()


def warn_once(message: str) -> None:
    """Warns of each message once in this process."""
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
    frozen: str | None = None
    """Of a frozen layer: the format of its weights and the instruction set that multiplies them."""

    def __str__(self) -> str:
        lines = [f"{self.call} takes backend {self.backend!r}" + ", which was requested" * self.requested]
        lines += [f"  measured: {self.measured}"] if self.measured else []
        lines += [f"  {self.frozen}"] if self.frozen else []
        return "\n".join(lines + [f"  not {name!r}: {reason}" for name, reason in self.passed_over.items()])


def explain(module: torch.nn.Module, input: Any, hx: Any = None, *, lengths: Tensor | None = None) -> Explanation:
    """Which implementation `module(input, hx)` takes at this place, and why not the faster ones. Runs nothing.

    Args:
        module: one of rnnfast; raises TypeError for any other.
        input, hx, lengths: the arguments of its forward.
    """
    if isinstance(module, Frozen):
        return Explanation(CPU.name, {}, f"{module} on {input.dtype} cpu tensors", frozen=module.kernel)
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
    return Explanation(chosen, decision.passed_over, what, measured, chosen == request.name)
