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
    saved         what `bwd` needs of `fwd`, private to the implementation of the device (docs/design/maths.md); the RNN
                  has none

`{cell}_step_*` is the one step of a cell module: input [B, I], hx and cx [B, H] or None, the weights one by one, and no
output but h_n [B, H] and c_n [B, H]; its `bwd` wants what is saved, or h_n where nothing is.

All floating tensors share one dtype (float32, float64, bfloat16, float16) and one device, and `saved` has it too, but
the LSTM's c, which is float32 for the 16-bit types. `infer` saves nothing and may round otherwise than `fwd`. In `bwd`
a gradient of None counts as zero; what the flags need_grad_* do not ask for comes back empty. No output aliases an
input. Wrong shapes, dtypes, devices or lengths are refused: a RuntimeError that `is_refusal` recognises, raised before
anything is computed.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Refused(RuntimeError):
    """An operator does not take these arguments, and has computed nothing. Only this sends a call to another path."""


_REFUSAL = "rnnfast refuses: "  # RNNFAST_REQUIRE of csrc/common/check.h begins so: C++ can raise no class of Python's
_NO_KERNEL = "Could not run 'rnnfast"  # the dispatcher's words for tensors on devices or in layouts without a kernel


def is_refusal(error: RuntimeError) -> bool:
    """Whether an operator, or the dispatcher on its way to one, has refused its arguments."""
    return isinstance(error, Refused) or _REFUSAL in (message := str(error)) or message.startswith(_NO_KERNEL)


def require(condition: bool, message: str) -> None:
    """Raises Refused unless `condition` holds; `message` names what was expected and what was given."""
    if not condition:
        raise Refused(f"{_REFUSAL}{message}")


def directions_of(weights: Sequence[Tensor]) -> int:
    """1 or 2, of the weights of one layer. Biases are vectors, so 4 weights are 1 direction with them or 2 without."""
    return 2 if len(weights) > 5 or (len(weights) == 4 and weights[2].dim() == 2) else 1


@functools.cache
def _later_shapes(weight_ih, weight_hh, count: int, directions: int, layers: int) -> list[tuple[int, ...]]:
    """The shapes of the weights of `layers` layers that follow one with `count` weights, whose first two are given."""
    rows, output_size = weight_ih[0], weight_hh[1]
    each = count // directions
    shapes = [(rows, directions * output_size), weight_hh]
    shapes += [(rows,), (rows,)] if each >= 4 else []
    shapes += [(output_size, rows // 4)] if each % 2 == 1 else []  # of an LSTM's projection
    return shapes * (directions * layers)


def require_later_layers(states: Sequence[Tensor | None], weights: Sequence[Tensor], num_layers: int) -> None:
    """Refuses a stack whose later layers have other shapes than its first asks for; an operator checks the first.

    For those who run a stack layer by layer: nothing may be computed before a refusal.
    """
    count, rest = divmod(len(weights), num_layers) if num_layers > 0 else (0, 0)
    if count < 2 or rest or weights[0].dim() != 2 or weights[1].dim() != 2:
        require(False, f"weights: expected as many for each of {num_layers} layers, got {len(weights)}")
    directions = directions_of(weights[:count])
    shapes = _later_shapes(weights[0].shape, weights[1].shape, count, directions, num_layers - 1)
    given = [weight.shape for weight in weights[count:]]
    if given != shapes:
        require(False, f"weights of layers 1 to {num_layers - 1}: expected shapes {shapes}, got {given}")
    for name, state in zip(("hx", "cx"), states, strict=False):
        if state is not None and (state.dim() != 3 or state.size(0) != num_layers * directions):
            require(False, f"{name}: expected [{num_layers * directions}, batch, size], got {list(state.shape)}")


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
        require(num_layers > 0, f"num_layers: expected at least 1, got {num_layers}")
        given, weights, batch_sizes, lengths = rest[:states], *rest[states : states + 3]
        _check_devices(input, *given, *weights, lengths, batch_sizes=batch_sizes)
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
        _check_devices(input, *rest[: states + 4])
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
        given, weights, batch_sizes, lengths = rest[:states], *rest[states : states + 3]
        known = [value for value in rest[states + 3 :] if isinstance(value, Tensor)]
        _check_devices(input, *args[: 1 + states], *given, *weights, lengths, *known, batch_sizes=batch_sizes)
        return fake_gradients(input, _state_shapes(input, rest[:states], rest[states]), rest[states], args[-3:])

    def fake_step_bwd(*args):
        input, *rest = args[states:]
        _check_devices(input, *(value for value in args if isinstance(value, Tensor)))
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


def _check_devices(input, *tensors, batch_sizes=None):
    # Where some tensors are meta tensors and others are not, the dispatcher comes to the fakes with real ones too.
    devices = {tensor.device for tensor in (input, *tensors) if tensor is not None}
    require(len(devices) == 1, f"expected all tensors on one device, got {devices}")
    if batch_sizes is not None:
        known = batch_sizes.device.type in ("cpu", input.device.type)
        require(known, f"batch_sizes: expected a tensor on the CPU, got {batch_sizes.device}")


def _state_shapes(input, states, weights):
    """The shapes of h_n and c_n of one layer, [D, B, Hout] and [D, B, H]."""
    directions, output_size = directions_of(weights), weights[1].size(1)
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
    eager_layer: Operators  # the same without OpOverload's Python frame, 0.2 us of each call, which Dynamo wants to see
    eager_step: Operators


_libraries: list[torch.library.Library] = []  # they live as long as the module: dropping one unregisters its operators


def define(namespace: str) -> dict[str, Cell]:
    """Defines all operators in a namespace, once per process. Returns them by cell."""
    library = torch.library.Library(namespace, "DEF")
    _libraries.append(library)
    _define(library, "rnn", states=1, saved_widths=(), flags=", bool relu")
    _define(library, "gru", states=1, saved_widths=(4,))  # r z n and W_hn h + b_hn
    _define(library, "lstm", states=2, saved_widths=(4, 1))  # i f g o; c

    def operators(cell: str) -> tuple[Operators, ...]:
        packets = [
            [getattr(getattr(torch.ops, namespace), f"{prefix}_{name}") for name in Operators._fields]
            for prefix in (cell, f"{cell}_step")
        ]
        overloads = [Operators(*(packet.default for packet in three)) for three in packets]
        return *overloads, *(Operators(*(overload._op for overload in three)) for three in overloads)

    rnn, gru, lstm = (operators(cell) for cell in ("rnn", "gru", "lstm"))
    return {
        "rnn_tanh": Cell(1, 1, (False,), *rnn),
        "rnn_relu": Cell(1, 1, (True,), *rnn),
        "gru": Cell(3, 1, (), *gru),
        "lstm": Cell(4, 2, (), *lstm),
    }


OPERATORS = {namespace: define(namespace) for namespace in ("rnnfast", "rnnfast_triton")}
CELLS = OPERATORS["rnnfast"]
_libraries[0].define("_cpu_isa() -> str")
