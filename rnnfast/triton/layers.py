"""One layer through the Triton kernels: the products with the input, the launches, the results.

Nothing here waits for the device or reads its memory, so a call of padded rows can be captured in a CUDA graph. The
kernels do the recurrence. The large products before and after it are torch's.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from ..autocast import dtype_of
from ..call import Call, batch_of
from ..cells import BIAS, SPECS
from ..ops import refusal
from ..precision import float32_products
from ..rows import Rows
from . import autotune, interpreted
from .gru import gru_backward, gru_forward
from .lstm import lstm_backward, lstm_forward, lstm_project, lstm_unproject
from .plan import KINDS, Device, Plan, candidates, plan
from .rnn import rnn_backward, rnn_forward
from .rows import Layer, check_results, layer_of, previous_h, zero_padding

if triton.knobs.runtime.interpret != interpreted:
    raise RuntimeError("TRITON_INTERPRET changed after rnnfast was imported: set it before")


def device_of(tensor: Tensor) -> Device:
    """The limits of the GPU that a tensor is on. The interpreter has the limits of an H200."""
    if not tensor.is_cuda:
        return Device("interpreter", (9, 0), 232_448, 132)
    properties: Any = torch.cuda.get_device_properties(tensor.device)
    capability = properties.major, properties.minor
    return Device(
        properties.name, capability, properties.shared_memory_per_block_optin, properties.multi_processor_count
    )


def products_of(dtype: torch.dtype, device: torch.device) -> str:
    """`plan`'s word for the recurrent products of tensors of this dtype."""
    return float32_products(device) if dtype is torch.float32 else "16-bit"


def _size(layer: Layer, input: Tensor, backward: bool) -> tuple:
    """The arguments of `plan` for one pass of a layer."""
    return (
        layer.cell, backward, layer.hidden_size, layer.output_size, layer.batch, layer.directions,
        products_of(input.dtype, input.device), device_of(input),
    )  # fmt: skip


def _choose(layer: Layer, input: Tensor, backward: bool, run: Callable[[Plan], Any]) -> Plan:
    """The plan of one pass of a layer. `run` runs a plan, for a measurement. Refuses if no plan is possible."""
    size = _size(layer, input, backward)
    if autotune.wanted(input):
        plans = list(candidates(*size, interpreted=interpreted, reasons=[]))
        if plans:
            return autotune.best((*size[:4], *size[5:7]), plans, run)
    chosen = plan(*size, interpreted=interpreted)
    if isinstance(chosen, str):
        raise refusal(f"no Triton kernel takes this layer; {chosen}")
    return chosen


def refuses(call: Call) -> str | None:
    """Why forward or backward of a stack of layers has no plan, or None."""
    spec, output_size = SPECS[call.cell], call.weights[1].size(1)
    hidden_size = call.weights[1].size(0) // len(spec.gates)
    dtype = dtype_of(call.input)
    for backward in (False, True):
        chosen = plan(
            spec.operators, backward, hidden_size, output_size, batch_of(call), 1 + call.bidirectional,
            products_of(dtype, call.input.device), device_of(call.input), interpreted=interpreted,
        )  # fmt: skip
        if isinstance(chosen, str):
            return chosen
    return None


class _Kernel:
    """A kernel and its arguments. Only the first launch looks up the compiled kernel."""

    def __init__(self, kernel, grid: tuple[int, int, int], config, arguments: dict[str, Any], cooperative=False):
        self.kernel, self.grid = kernel, grid
        self.arguments = {name: arguments.get(name) for name in kernel.arg_names}
        self.options = {"num_warps": config.warps, "num_stages": config.stages, "enable_fp_fusion": True}
        if cooperative:
            self.options["launch_cooperative_grid"] = True
        self.compiled: Any = None

    def launch(self, **steps: int) -> None:
        self.arguments.update(steps)
        if self.compiled is None:
            self.compiled = self.kernel[self.grid](**self.arguments, **self.options)  # None in the interpreter
        else:
            self.compiled[self.grid](*self.arguments.values())


@contextlib.contextmanager
def _on(tensor: Tensor) -> Iterator[None]:
    """The place of launches: the tensors' device, without autograd and autocast.

    Both would still act on torch's own products inside an operator.
    """
    device = torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()
    with device, torch.no_grad(), torch.autocast(tensor.device.type, enabled=False):
        yield


def aligned(tensor: Tensor) -> Tensor:
    """The tensor itself if it is contiguous and starts on a 16-byte boundary, as kernels load it; else a copy."""
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


def _arguments(
    layer: Layer, chosen: Plan, input: Tensor, weights: dict[str, list[Tensor]], unused: Tensor
) -> dict[str, Any]:
    """The arguments of all kernels: sizes, rows, tiles, weights of both directions. `unused`: any aligned tensor."""
    config = chosen.config
    products = float32_products(input.device) if input.dtype is torch.float32 else "ieee"  # no choice in 16 bits
    arguments = dict(
        steps=layer.steps, batch=layer.batch, rows=layer.rows,
        lengths=unused if layer.lengths is None else layer.lengths,
        offsets=unused if layer.offsets is None else layer.offsets,
        H=layer.hidden_size, P=layer.output_size, D=layer.directions, RAGGED=layer.ragged, KIND=KINDS[chosen.kind],
        BLOCK_B=config.block_b, BLOCK_H=config.block_h, BLOCK_K=config.block_k, STAGES=config.stages,
        PRECISION=products, UPCAST=interpreted and input.dtype is torch.bfloat16,
    )  # fmt: skip
    for name, tensors in weights.items():
        arguments[name], arguments[f"{name}_reverse"] = aligned(tensors[0]), aligned(tensors[-1])
    return arguments


def _weights(layer: Layer, weights: Sequence[Tensor]) -> dict[str, list[Tensor]]:
    """The weights by name, of each direction."""
    names = layer.layout.names
    return {name: list(weights[i :: len(names)]) for i, name in enumerate(names)}


def _grid(layer: Layer, chosen: Plan, columns: int) -> tuple[int, int, int]:
    """Programs over units, batch rows and directions."""
    config = chosen.config
    tiles = 1 if chosen.kind == "whole" else triton.cdiv(columns, config.block_h)
    return tiles, triton.cdiv(layer.batch, config.block_b), layer.directions


def _project_input(layer: Layer, input: Tensor, by_name: dict[str, list[Tensor]]) -> Tensor:
    """gates_x [D, rows, G*H]: x W_ih^T with all biases but the GRU's b_hn, which cannot be added here."""
    rows = input.reshape(layer.rows, layer.input_size)
    gates_x = input.new_empty(layer.directions, layer.rows, by_name["weight_ih"][0].size(0))
    for d, weight_ih in enumerate(by_name["weight_ih"]):
        if BIAS not in layer.layout.options:
            torch.mm(rows, weight_ih.t(), out=gates_x[d])
            continue
        bias = by_name["bias_hh"][d]
        if layer.cell == "gru":
            bias = torch.cat([bias[: 2 * layer.hidden_size], bias.new_zeros(layer.hidden_size)])
        torch.addmm(by_name["bias_ih"][d] + bias, rows, weight_ih.t(), out=gates_x[d])
    return gates_x


def forward(
    cell: str,
    relu: bool,
    save: bool,
    input: Tensor,
    states: Sequence[Tensor | None],
    weights: Sequence[Tensor],
    rows: Rows,
) -> tuple[Tensor, ...]:
    """(output, *final states, *saved tensors if `save`) of one layer; see ops.py."""
    layer = layer_of(cell, input, states, weights, rows)
    with _on(input):
        run = functools.partial(_forward, layer, relu, save, input, states, weights)
        return run(_choose(layer, input, False, run))


def _forward(layer, relu, save, input, states, weights, chosen):
    hidden_size, directions, batch = layer.hidden_size, layer.directions, layer.batch
    state_shapes = layer.state_shapes
    states = [
        input.new_zeros(shape) if state is None else aligned(state)
        for state, shape in zip(states, state_shapes, strict=True)
    ]
    by_name = _weights(layer, weights)
    output_shape = (*input.shape[:-1], directions * layer.output_size)
    new = input.new_zeros if layer.padding else input.new_empty  # no kernel writes at or after a row's length
    output = new(output_shape)
    final = [torch.empty_like(state) for state in states]
    if layer.ragged:
        final[0].copy_(states[0])  # a row of length 0 keeps its hx
    saved = []
    gates_x = _project_input(layer, input, by_name)
    if save and layer.cell == "gru":
        saved.append(new(directions, layer.rows, 4 * hidden_size))
    if save and layer.cell == "lstm":
        saved.append(gates_x)  # the kernel puts the activated gates in their place
        saved.append(new(directions, layer.rows, hidden_size, dtype=torch.float32))
    if batch == 0:
        return (output, *final, *saved)

    arguments = _arguments(layer, chosen, input, by_name, output) | dict(
        gates_x=gates_x, hx=states[0], output=output, h_n=final[0], gates=saved[0] if saved else output, SAVE=save,
        RELU=relu, arrivals=_arrivals(layer, chosen, output),
    )  # fmt: skip
    if layer.cell == "gru":
        biases = [aligned(bias[2 * hidden_size :]) for bias in by_name.get("bias_hh", [])]
        biases = biases or [input.new_zeros(hidden_size)]
        arguments |= dict(bias_hn=biases[0], bias_hn_reverse=biases[-1])
    c = None
    if layer.cell == "lstm":
        # One step per launch carries c from launch to launch, in float32 as inside the others.
        c = states[1].to(torch.float32, copy=True) if chosen.kind == "step" else None
        arguments |= dict(
            cx=states[1] if c is None else c, c_n=final[1] if c is None else c,
            c_saved=saved[1] if saved else output,
            hidden=input.new_empty(directions, batch, hidden_size) if c is not None and layer.projected else output,
        )  # fmt: skip
        for name in ("weight_hr", "weight_hr_reverse"):
            arguments.setdefault(name, output)
    kernel = {"rnn": rnn_forward, "gru": gru_forward, "lstm": lstm_forward}[layer.cell]
    main = _Kernel(kernel, _grid(layer, chosen, hidden_size), chosen.config, arguments, chosen.kind == "group")
    if chosen.kind != "step":
        main.launch(first=0, last=layer.steps)
        return (output, *final, *saved)
    project = None
    if layer.projected:
        project = _Kernel(lstm_project, _grid(layer, chosen, layer.output_size), chosen.config, arguments)
    for s in range(layer.steps):
        main.launch(first=s, last=s + 1)
        if project:
            project.launch(s=s)
    if c is not None:
        final[1] = c.to(input.dtype)
    return (output, *final, *saved)


def _arrivals(layer: Layer, chosen: Plan, unused: Tensor) -> Tensor:
    """The counters of GROUP's barriers, zero at first: one per batch tile and direction. `unused` for other kinds."""
    if chosen.kind != "group":
        return unused
    count = triton.cdiv(layer.batch, chosen.config.block_b) * layer.directions
    return torch.zeros(count, dtype=torch.int32, device=unused.device)


def backward(
    cell: str,
    relu: bool,
    grads: Sequence[Tensor | None],
    input: Tensor,
    states: Sequence[Tensor | None],
    weights: Sequence[Tensor],
    rows: Rows,
    output: Tensor,
    saved: Sequence[Tensor],
    needs: Sequence[bool],
) -> tuple[Tensor | list[Tensor], ...]:
    """(grad_input, *grads of the states, [grads of the weights]); `grads` of output and final states, None for zero."""
    layer = layer_of(cell, input, states, weights, rows)
    check_results(layer, input, grads, output, saved)
    with _on(input):
        run = functools.partial(_backward, layer, relu, grads, input, states, weights, output, saved, needs)
        return run(_choose(layer, input, True, run))


def _backward(layer, relu, grads, input, states, weights, output, saved, needs, chosen):
    need_input, need_states, need_weights = needs
    hidden_size, directions, batch = layer.hidden_size, layer.directions, layer.batch
    state_shapes = layer.state_shapes
    if batch == 0 or not any(needs):
        return _no_gradients(input, state_shapes, weights, needs)
    states = [
        input.new_zeros(shape) if state is None else aligned(state)
        for state, shape in zip(states, state_shapes, strict=True)
    ]
    grad_output, *given = (grad if grad is None else aligned(grad) for grad in grads)
    grad_states = [
        input.new_zeros(shape) if grad is None else grad for grad, shape in zip(given, state_shapes, strict=True)
    ]
    by_name = _weights(layer, weights)
    planes = 1 if layer.cell == "rnn" else 4
    new = input.new_zeros if layer.padding else input.new_empty  # what no kernel writes enters the products below
    grad_gates = new(directions, layer.rows, planes * hidden_size)
    grad_projected = new(directions, layer.rows, layer.output_size) if layer.projected else grad_gates
    grad_final = [torch.empty_like(state) for state in states]
    arguments = _arguments(layer, chosen, input, by_name, grad_gates) | dict(
        grad_output=output if grad_output is None else grad_output, GRAD_OUTPUT=grad_output is not None, RELU=relu,
        grad_h_n=grad_states[0], output=output, hx=states[0], gates=saved[0] if saved else output,
        grad_gates=grad_gates, grad_hx=grad_final[0], arrivals=_arrivals(layer, chosen, grad_gates),
    )  # fmt: skip
    step = chosen.kind == "step"
    if layer.cell == "gru":
        carry = input.new_zeros(state_shapes[0], dtype=torch.float32) if step else grad_gates
        arguments |= dict(carry_state=carry)
    dc = None
    if layer.cell == "lstm":
        dc = grad_states[1].to(torch.float32, copy=True) if step else None
        arguments |= dict(
            cx=states[1], c_saved=saved[1], grad_projected=grad_projected,
            grad_c_n=grad_states[1] if dc is None else dc, grad_cx=grad_final[1] if dc is None else dc,
        )  # fmt: skip
        for name in ("weight_hr", "weight_hr_reverse"):
            arguments.setdefault(name, output)
    kernel = {"rnn": rnn_backward, "gru": gru_backward, "lstm": lstm_backward}[layer.cell]
    main = _Kernel(kernel, _grid(layer, chosen, hidden_size), chosen.config, arguments, chosen.kind == "group")
    if not step:
        main.launch(first=0, last=layer.steps)
    else:
        unproject = None
        if layer.projected:
            unproject = _Kernel(lstm_unproject, _grid(layer, chosen, layer.output_size), chosen.config, arguments)
        for s in range(layer.steps):
            if unproject:
                unproject.launch(s=s)
            main.launch(first=s, last=s + 1)
        if need_states:
            main.launch(first=layer.steps, last=layer.steps)
        if dc is not None:
            grad_final[1] = dc.to(input.dtype)

    grad_input, grad_weights = _products(
        layer, input, states[0], by_name, output, saved, grad_gates, grad_projected, needs
    )
    empty = [input.new_empty(0) for _ in states]
    return grad_input, *(grad_final if need_states else empty), grad_weights


def _no_gradients(input, state_shapes, weights, needs):
    """Zeros for each wanted gradient, where there is nothing to sum."""
    need_input, need_states, need_weights = needs
    return (
        input.new_zeros(input.shape if need_input else 0),
        *(input.new_zeros(shape if need_states else 0) for shape in state_shapes),
        [weight.new_zeros(weight.shape if need_weights else 0) for weight in weights],
    )


def _products(layer, input, hx, by_name, output, saved, grad_gates, grad_projected, needs):
    """The large products after the recurrence: the gradients of the input and of the weights."""
    need_input, _, need_weights = needs
    hidden_size = layer.hidden_size
    grad_input = input.new_empty(0)
    if need_input:
        grad_rows: Any = None
        for d, weight_ih in enumerate(by_name["weight_ih"]):
            gradient = grad_gates[d]
            if layer.cell == "gru":  # n_x r z multiply x; W_ih has r z n
                gradient, weight_ih = gradient[:, : 3 * hidden_size], weight_ih.roll(hidden_size, 0)
            grad_rows = gradient @ weight_ih if grad_rows is None else grad_rows.addmm_(gradient, weight_ih)
        grad_input = grad_rows.view(input.shape)
    if not need_weights:
        return grad_input, [
            tensor.new_empty(0) for tensors in zip(*by_name.values(), strict=True) for tensor in tensors
        ]
    rows = zero_padding(layer, input).reshape(layer.rows, layer.input_size)
    grad_weights = []
    for d in range(layer.directions):
        of_x = of_h = grad_gates[d]
        if layer.cell == "gru":
            of_x, of_h = of_x[:, : 3 * hidden_size], of_x[:, hidden_size:]
        own = [of_x.t() @ rows, of_h.t() @ previous_h(layer, output, hx[d], d)]
        if BIAS in layer.layout.options:
            own += [of_x.sum(0), of_h.sum(0)]
        if layer.cell == "gru":  # n_x r z, in this order, to r z n
            own[::2] = [tensor.roll(-hidden_size, 0) for tensor in own[::2]]
        if layer.projected:
            o = saved[0][d, :, 3 * hidden_size :]
            own.append(grad_projected[d].t() @ zero_padding(layer, (o * torch.tanh(saved[1][d])).to(o.dtype)))
        grad_weights += own
    return grad_input, grad_weights
