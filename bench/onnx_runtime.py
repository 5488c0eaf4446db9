"""ONNX Runtime as a third provider for inference: the module's weights in ONNX's own LSTM, GRU and RNN nodes."""

from __future__ import annotations

import importlib.util
import logging
import tempfile
from collections.abc import Callable
from itertools import product
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from .cases import GATES, Case

# Where ONNX's gates stand in PyTorch's order: LSTM i o f g of i f g o, GRU z r n of r z n.
GATE_ORDER = {"LSTM": (0, 3, 1, 2), "GRU": (1, 0, 2), "RNN": (0,)}
OPSET, IR_VERSION = 17, 9


def missing() -> str | None:
    """Why this provider is absent, or None."""
    absent = [name for name in ("onnx", "onnxruntime") if importlib.util.find_spec(name) is None]
    return f"{' and '.join(absent)} not installed: pip install 'rnnfast[onnxruntime]'" if absent else None


def takes(case: Case) -> bool:
    """Whether the nodes can express the case: no projection, no unequal lengths; and it is inference in float32."""
    plain = case.form == "padded" and case.proj_size == 0 and case.device == "cpu"
    return plain and case.mode == "inference" and case.dtype == "fp32"


def new_call(
    module: nn.Module, case: Case, x: Tensor, states: tuple[Tensor, ...] = (), int8: bool = False
) -> Callable[[], np.ndarray]:
    """A call that runs `module` on x [T, B, I] with the case's threads; returns the output [T, B, D H].

    states: (h,) or (h, c) where the case has them. int8: an LSTM as ONNX Runtime's own quantisation makes it."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = case.threads
    options.log_severity_level = 3
    # Its threads would spin on after a call and hold the cores of the provider whose turn is next.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    proto = quantised(model(module, case)) if int8 else model(module, case).SerializeToString()
    session = onnxruntime.InferenceSession(proto, options, providers=["CPUExecutionProvider"])
    feed = feed_of(case, x, states)
    return lambda: session.run(None, feed)[0]


def feed_of(case: Case, x: Tensor, states: tuple[Tensor, ...]) -> dict[str, np.ndarray]:
    """The inputs of `model` by name."""
    feed = {"x": x.numpy()}
    for layer, (name, state) in product(range(case.num_layers), zip(("h_0", "c_0"), states, strict=False)):
        directions = 1 + case.bidirectional
        feed[f"{name}{layer}"] = state[layer * directions : (layer + 1) * directions].numpy()
    return feed


def quantised(proto) -> bytes:
    """The model with int8 weights: every LSTM becomes a DynamicQuantizeLSTM. There is no such GRU or RNN."""
    from onnxruntime.quantization import quantize_dynamic

    logger, level = logging.getLogger(), logging.getLogger().level
    logger.setLevel(logging.ERROR)  # it advises on a pre-processing that does nothing to these nodes
    try:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "int8.onnx"
            quantize_dynamic(proto, path, op_types_to_quantize=["LSTM"])
            return path.read_bytes()
    finally:
        logger.setLevel(level)


def model(module: nn.Module, case: Case):
    """The onnx.ModelProto: one node per layer, with all results that the module gives."""
    from onnx import TensorProto, helper, numpy_helper

    directions, gates = 1 + case.bidirectional, GATES[case.cell]
    order = torch.tensor(GATE_ORDER[case.cell])

    def stacked(names: list[str]) -> Tensor:
        """Parameters of all directions [D, gates H, ...] with their gates in ONNX's order."""
        values = [module.get_parameter(name).detach() for name in names]
        return torch.stack([v.unflatten(0, (gates, -1))[order].flatten(0, 1) for v in values])

    nodes, constants, source = [], [], "x"
    states, initial = (names[: 2 if case.cell == "LSTM" else 1] for names in (("h_n", "c_n"), ("h_0", "c_0")))

    def constant(name: str, value: np.ndarray) -> str:
        constants.append(numpy_helper.from_array(value, name))
        return name

    for layer in range(case.num_layers):
        suffixes = [f"l{layer}", f"l{layer}_reverse"][:directions]
        w, r = (stacked([f"weight_{kind}_{suffix}" for suffix in suffixes]) for kind in ("ih", "hh"))
        b = torch.cat([stacked([f"bias_{kind}_{suffix}" for suffix in suffixes]) for kind in ("ih", "hh")], 1)
        weights = [constant(f"{name}{layer}", value.numpy()) for name, value in (("w", w), ("r", r), ("b", b))]
        options = {"hidden_size": case.hidden_size, "direction": "bidirectional" if directions == 2 else "forward"}
        if case.cell == "GRU":
            options["linear_before_reset"] = 1  # PyTorch's formula: r multiplies W_hn h + b_hn
        outputs = [f"steps{layer}", *(f"{state}{layer}" for state in states)]
        given = ["", *(f"{state}{layer}" for state in initial)] * case.hx  # "": no sequence_lens
        nodes.append(helper.make_node(case.cell, [source, *weights, *given], outputs, **options))
        source = "output" if layer == case.num_layers - 1 else f"output{layer}"
        if directions == 1:  # [T, 1, B, H]
            axis = constant(f"axis{layer}", np.array([1]))
            nodes.append(helper.make_node("Squeeze", [outputs[0], axis], [source]))
        else:  # [T, 2, B, H]
            shape = constant(f"shape{layer}", np.array([0, 0, -1]))
            nodes.append(helper.make_node("Transpose", [outputs[0]], [f"turned{layer}"], perm=[0, 2, 1, 3]))
            nodes.append(helper.make_node("Reshape", [f"turned{layer}", shape], [source]))
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [case.seq_len, case.batch, case.input_size])
    last = [f"{state}{layer}" for layer in range(case.num_layers) for state in states]
    results = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("output", *last)]
    shape = [directions, case.batch, case.hidden_size]
    names = [f"{state}{layer}" for layer in range(case.num_layers) for state in initial] * case.hx
    inputs = [x, *(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in names)]
    graph = helper.make_graph(nodes, case.name, inputs, results, constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
