"""Frozen layers beside what else runs fixed weights: ONNX Runtime, OpenVINO, torch's dynamic quantization; on the same.

A run of the section "frozen" has these sides: torch.nn, rnnfast frozen with float32 weights (which counts as rnnfast),
and in `beside_ms` every name of SIDES that can run the case.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from rnnfast.freeze import freeze

from . import onnx_runtime, parity
from .providers import Problem, Runner

SECTION = "frozen"
OWN = ("bfloat16", "int8")
INT8_RIVALS = ("onnxruntime int8", "torch int8")
SIDES = (*OWN, "onnxruntime", *INT8_RIVALS, "openvino")  # the last only where it is installed
# The largest root mean square of errors, in units of that of the output: what is worse is not timed.
CEILING = {"bfloat16": 2e-2, "int8": 5e-2, "onnxruntime int8": 0.1, "torch int8": 0.2}
CEILING |= {"onnxruntime": 1e-5, "openvino": 1e-5}


def torch_int8(module: nn.Module) -> nn.Module:
    """The layer as torch.ao.quantization.quantize_dynamic makes it; LSTM and GRU, and cells."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch deprecates the tensors that its own function makes
        return torch.ao.quantization.quantize_dynamic(nn.Sequential(module), {type(module)}, dtype=torch.qint8)[0]


def openvino_call(module: nn.Module, problem: Problem) -> Callable[[], Tensor]:
    """OpenVINO on the same ONNX nodes, in float32."""
    import openvino

    case, core = problem.case, openvino.Core()
    options = {"INFERENCE_NUM_THREADS": case.threads, "NUM_STREAMS": 1, "INFERENCE_PRECISION_HINT": "f32"}
    proto = onnx_runtime.model(module, case).SerializeToString()
    request = core.compile_model(core.read_model(proto, b""), "CPU", options).create_infer_request()
    feed = onnx_runtime.feed_of(case, problem.input, problem.states)
    return lambda: torch.from_numpy(request.infer(feed, share_inputs=True, share_outputs=True)["output"])


def outputs(problem: Problem, module: nn.Module) -> dict[str, Callable[[], Tensor]]:
    """By side the call that gives its output. `module`: torch.nn's, with the problem's weights."""
    case, states = problem.case, problem.states[0] if len(problem.states) == 1 else problem.states or None
    calls: dict[str, Callable[[], Tensor]] = {}
    for weights in OWN:
        layer = freeze(module, weights)
        calls[weights] = lambda layer=layer: layer(problem.input, states)[0]
    if onnx_runtime.takes(case) and not onnx_runtime.missing():
        for int8 in (False, True)[: 2 if case.cell == "LSTM" else 1]:
            run = onnx_runtime.new_call(module, case, problem.input, problem.states, int8)
            calls["onnxruntime" + " int8" * int8] = lambda run=run: torch.from_numpy(run())
        if importlib.util.find_spec("openvino"):
            calls["openvino"] = openvino_call(module, problem)
    if case.cell != "RNN":
        quantised = torch_int8(module)
        calls["torch int8"] = lambda: quantised(problem.input, states)[0]
    return calls


def rms_error(output: Tensor, truth: Tensor) -> float:
    """Root mean square of the errors, in units of that of the truth."""
    return float((output.double() - truth).norm() / truth.norm())


def turns(
    problem: Problem, of_torch: Runner, of_float32: Runner
) -> tuple[dict[str, Callable[[], object]], dict[str, str], dict[str, float]]:
    """All calls that take turns; what is wrong with those that are left out; every rms error.

    With several threads rivals stay out, and each of rnnfast's sides takes a turn with one thread, too.
    """
    case = problem.case
    truth = parity.reference(replace(case, threads=1))["output"]
    calls: dict[str, Callable[[], object]] = {"torch": of_torch.timed, "rnnfast": of_float32.timed}
    failures, errors = {}, {}
    for name, call in outputs(problem, of_torch.module).items():
        if case.threads > 1 and name not in OWN:
            continue
        errors[name] = rms_error(call(), truth)
        if errors[name] <= CEILING[name]:
            calls[name] = call
        else:
            failures[name] = f"rms error {errors[name]:.1e} > {CEILING[name]:.0e} of the output's"
    if case.threads > 1:
        own = {"float32": calls["rnnfast"], **{name: calls[name] for name in OWN if name in calls}}
        alone = {f"{name}, 1 thread": _with_threads(1, call) for name, call in own.items()}
        calls = {name: _with_threads(case.threads, call) for name, call in calls.items()} | alone
    return calls, failures, errors


def _with_threads(count: int, call: Callable[[], object]) -> Callable[[], object]:
    """Only the first call of a sample, which is not timed, changes the number of threads."""

    def switched() -> object:
        if torch.get_num_threads() != count:
            torch.set_num_threads(count)
        return call()

    return switched
