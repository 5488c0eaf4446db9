"""The operators torch.ops.rnnfast.*: schemas, fake kernels and documentation. Backends register only implementations.

Every namespace holds the same operators: "rnnfast" those of the compiled libraries, the one for the CPU and the one for
CUDA; "rnnfast_triton" those of the Triton kernels, which may be asked for on the same tensors.

One operator is one layer with all its directions, input projection included; `infer` is a stack of `num_layers` of
them, 1 if it isn't given, with the weights and states of all layers in torch.nn's order. In every schema:

    input         [T, B, I] of any strides, or packed [sum(batch_sizes), I]
    hx, cx        [D, B, Hout], [D, B, H] of any strides, or None for zeros (not with batch_sizes); D = 1 or 2
                  directions, Hout = proj_size if projected, else H
    weights       per direction weight_ih [G*H, I], weight_hh [G*H, Hout], then, where the layer has them, bias_ih and
                  bias_hh [G*H], then weight_hr [Hout, H]; G = 1 (RNN), 3 (GRU: r z n), 4 (LSTM: i f g o)
    batch_sizes   PackedSequence's: int64 [T] on the CPU, descending. None: padded input
    lengths       padded input only: int32 or int64 [B], unsorted, zeros allowed. Steps t >= length give zero output,
                  h_n and c_n are the states after a row's last step, direction 1 starts at step length - 1
    output        [T, B, D*Hout] or [sum(batch_sizes), D*Hout], contiguous; h_n [D, B, Hout], c_n [D, B, H]
    saved         what `bwd` needs of `fwd`, private to the implementation of the device (see csrc/README.md); the RNN
                  has none

`{cell}_step_*` is the one step of a cell module: input [B, I], hx and cx [B, H] or None, the weights one by one, and no
output but h_n [B, H] and c_n [B, H]; its `bwd` wants what is saved, or h_n where nothing is.

All floating tensors share one dtype (float32, float64, bfloat16, float16) and one device, and `saved` has it too, but
the LSTM's c, which is float32 for the 16-bit types. `infer` saves nothing and may round otherwise than `fwd`. In `bwd`
a gradient of None counts as zero; what the flags need_grad_* do not ask for comes back empty. No output aliases an
input. Wrong shapes, dtypes, devices or lengths raise RuntimeError before anything is computed.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch


def _define(library: torch.library.Library, cell: str, states: int, saved_widths: tuple[int, ...], flags: str = ""):
    """Defines the operators of a cell with their fake kernels (shapes, dtypes and devices, no values).

    `saved` are tensors [D, T*B or sum(batch_sizes), width * H] for each of `saved_widths`.
    """
    names = ("h", "c")[:states]

    def tensors(pattern: str) -> str:
        return ", ".join(pattern.format(name) for name in names)

    inputs = f"Tensor input, {tensors('Tensor? {}x')}"
    layer = f"{inputs}, Tensor[] weights, Tensor? batch_sizes, Tensor? lengths{flags}"
    step = f"{inputs}, Tensor weight_ih, Tensor weight_hh, Tensor? bias_ih, Tensor? bias_hh{flags}"
    arguments = states + 3 + bool(flags)  # of `layer`, after the input
    saved = "".join(f", Tensor saved_{i}" for i in range(len(saved_widths)))
    known = saved or ", Tensor h_n"
    finals, incoming = tensors("Tensor {}_n"), tensors("Tensor? grad_{}_n")
    needs = "bool need_grad_input, bool need_grad_states, bool need_grad_weights"
    grads = f"(Tensor grad_input, {tensors('Tensor grad_{}x')}, Tensor[] grad_weights)"

    def fake_infer(input, *rest):
        (num_layers,) = rest[arguments:] or (1,)
        torch._check(num_layers > 0, lambda: f"num_layers: expected at least 1, got {num_layers}")
        given, weights = rest[:states], rest[states]
        _check_one_device(input, *given, *weights)
        shapes = _state_shapes(input, given, weights[: len(weights) // num_layers])
        directions, _, output_size = shapes[0]
        output = input.new_empty(*input.shape[:-1], directions * output_size)
        return (output, *(input.new_empty(num_layers * directions, *shape) for _, *shape in shapes))

    def fake_fwd(input, *rest):
        return (*fake_infer(input, *rest), *fake_saved(input, _state_shapes(input, rest[:states], rest[states])))

    def fake_step_infer(input, *rest):
        h_n, *others = step_states(input, *rest)
        return (h_n, *others) if others else h_n

    def fake_step_fwd(input, *rest):
        final = step_states(input, *rest)
        results = (*final, *fake_saved(input, [(1, *h.shape) for h in final]))
        return results if len(results) > 1 else results[0]

    def step_states(input, *rest):
        _check_one_device(input, *rest[: states + 4])
        shape = input.size(0), rest[states + 1].size(1)  # of weight_hh
        return [input.new_empty(shape) for _ in range(states)]

    def fake_saved(input, shapes):
        rows = math.prod(input.shape[:-1])  # not Size.numel(), which would fix a dynamic T
        directions, _, hidden_size = shapes[-1]  # of the last state: hx is narrower where projected
        wide = torch.float32 if input.dtype.itemsize == 2 else input.dtype
        return tuple(
            input.new_empty(directions, rows, width * hidden_size, dtype=dtype)
            for width, dtype in zip(saved_widths, (input.dtype, wide), strict=False)
        )

    def fake_bwd(*args):
        input, *rest = args[1 + states :]
        return fake_gradients(input, _state_shapes(input, rest[:states], rest[states]), rest[states], args[-3:])

    def fake_step_bwd(*args):
        input, *rest = args[states:]
        weights = [weight for weight in rest[states : states + 4] if weight is not None]
        return fake_gradients(input, [h.shape for h in step_states(input, *rest)], weights, args[-3:])

    def fake_gradients(input, shapes, weights, needed):
        need_grad_input, need_grad_states, need_grad_weights = needed
        return (
            input.new_empty(input.shape if need_grad_input else 0),
            *(input.new_empty(shape if need_grad_states else 0) for shape in shapes),
            [weight.new_empty(weight.shape if need_grad_weights else 0) for weight in weights],
        )

    for schema, fake in (
        (f"{cell}_infer({layer}, int num_layers=1) -> (Tensor output, {finals})", fake_infer),
        (f"{cell}_fwd({layer}) -> (Tensor output, {finals}{saved})", fake_fwd),
        (f"{cell}_bwd(Tensor? grad_output, {incoming}, {layer}, Tensor output{saved}, {needs}) -> {grads}", fake_bwd),
        (f"{cell}_step_infer({step}) -> ({finals})", fake_step_infer),
        (f"{cell}_step_fwd({step}) -> ({finals}{saved})", fake_step_fwd),
        (f"{cell}_step_bwd({incoming}, {step}{known}, {needs}) -> {grads}", fake_step_bwd),
    ):
        library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.register_fake(f"{library.ns}::{schema.partition('(')[0]}", fake, lib=library)


def _check_one_device(*tensors):
    # Where some tensors are meta tensors and others are not, the dispatcher comes to the fakes with real ones too.
    devices = {tensor.device for tensor in tensors if tensor is not None}
    torch._check(len(devices) == 1, lambda: f"expected all tensors on one device, got {devices}")


def _state_shapes(input, states, weights):
    """The shapes of h_n and c_n of one layer, [D, B, Hout] and [D, B, H]."""
    directions = 2 if len(weights) > 5 or (len(weights) == 4 and weights[2].dim() == 2) else 1  # biases are vectors
    output_size = weights[1].size(1)
    projected = len(weights) // directions % 2 == 1
    hidden_size = weights[len(weights) // directions - 1].size(1) if projected else output_size  # of weight_hr
    batch = input.size(1) if states[0] is None else states[0].size(1)
    return [(directions, batch, size) for size in (output_size, hidden_size)[: len(states)]]


class Operators(NamedTuple):
    """The three of a layer or of a step."""

    infer: Callable
    fwd: Callable
    bwd: Callable


class Cell(NamedTuple):
    """What the Python layers need to know about one cell."""

    gates: int  # G: the rows of weight_ih are G * H
    states: int  # 1 (hx) or 2 (hx, cx)
    flags: tuple[bool, ...]  # the operators' own trailing arguments
    layer: Operators
    step: Operators


_libraries: list[torch.library.Library] = []  # they live as long as the module: dropping one unregisters its operators


def define(namespace: str) -> dict[str, Cell]:
    """Defines all operators in a namespace, once per process. Returns them by cell."""
    library = torch.library.Library(namespace, "DEF")
    _libraries.append(library)
    _define(library, "rnn", states=1, saved_widths=(), flags=", bool relu")
    _define(library, "gru", states=1, saved_widths=(4,))  # r z n and W_hn h + b_hn
    _define(library, "lstm", states=2, saved_widths=(4, 1))  # i f g o; c

    def operators(prefix: str) -> Operators:
        packets = (getattr(getattr(torch.ops, namespace), f"{prefix}_{name}") for name in Operators._fields)
        return Operators(*(packet.default for packet in packets))

    rnn, gru, lstm = ((operators(cell), operators(f"{cell}_step")) for cell in ("rnn", "gru", "lstm"))
    return {
        "rnn_tanh": Cell(1, 1, (False,), *rnn),
        "rnn_relu": Cell(1, 1, (True,), *rnn),
        "gru": Cell(3, 1, (), *gru),
        "lstm": Cell(4, 2, (), *lstm),
    }


OPERATORS = {namespace: define(namespace) for namespace in ("rnnfast", "rnnfast_triton")}
CELLS = OPERATORS["rnnfast"]
_libraries[0].define("_cpu_isa() -> str")
