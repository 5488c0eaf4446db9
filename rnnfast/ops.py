"""The operators torch.ops.rnnfast.*: schemas, fake kernels and documentation. Backends register only implementations.

Every namespace holds the same operators. "rnnfast" has those of the compiled libraries, for the CPU and for CUDA.
"rnnfast_triton" has those of the Triton kernels, which may be asked for on the same tensors.

One operator is one layer with all its directions, input projection included. `infer` is a stack of `num_layers`
layers (default 1), with the weights and states of all layers in torch.nn's order. In every schema:

    input         [T, B, I] of any strides, or packed [sum(batch_sizes), I]
    hx, cx        [D, B, Hout], [D, B, H] of any strides, or None for zeros (not with batch_sizes); D = 1 or 2
                  directions, Hout = proj_size if projected, else H
    weights       per direction weight_ih [G*H, I], weight_hh [G*H, Hout], then, if the layer has them, bias_ih and
                  bias_hh [G*H], then weight_hr [Hout, H]; G = 1 (RNN), 3 (GRU: r z n), 4 (LSTM: i f g o)
    batch_sizes   PackedSequence's: int64 [T] on the CPU, descending. None: padded input
    lengths       padded input only: int32 or int64 [B], unsorted, zeros allowed. Steps t >= length give zero output,
                  h_n and c_n are the states after a row's last step, direction 1 starts at step length - 1
    output        [T, B, D*Hout] or [sum(batch_sizes), D*Hout], contiguous; h_n [D, B, Hout], c_n [D, B, H]
    saved         tensors from `fwd` to `bwd`, private to the implementation of the device (docs/design/maths.md); the
                  RNN has none

`{cell}_step_*` is one step of a cell module: input [B, I], hx and cx [B, H] or None, the weights one by one. It has
no output but h_n [B, H] and c_n [B, H]. Its `bwd` takes the saved tensors, or h_n if there are none.

All floating tensors share one device and one dtype (float32, float64, bfloat16, float16). `saved` has that dtype too,
except for the LSTM's c, which is float32 for the 16-bit types. `infer` saves nothing and may round otherwise than
`fwd`. In `bwd` a gradient of None counts as zero. A gradient that the flags need_grad_* do not ask for comes back
empty. No output aliases an input. Wrong shapes, dtypes, devices or lengths are refused before anything is computed,
with a RuntimeError that `is_refusal` recognises.
"""

import math
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from ._torch_internals import without_python_frame
from .cells import FAMILIES, SPECS, CellSpec, Sizes, arrangement_of, step_weights
from .rows import Rows


class Refused(RuntimeError):
    """An operator does not take these arguments and has computed nothing. Only this error sends a call elsewhere."""


_REFUSAL = "rnnfast refuses: "  # as RNNFAST_REQUIRE in csrc/common/check.h begins: C++ cannot raise Refused
_NO_KERNEL = "Could not run 'rnnfast"  # the dispatcher's words for tensors on devices or in layouts without a kernel


def is_refusal(error: RuntimeError) -> bool:
    """Whether an operator, or the dispatcher on its way to one, has refused its arguments."""
    return isinstance(error, Refused) or _REFUSAL in (message := str(error)) or message.startswith(_NO_KERNEL)


def reraise(error: RuntimeError) -> NoReturn:
    """Raises an operator's error again, a refusal as Refused. For an except clause around a call of an operator."""
    if is_refusal(error):
        raise Refused(str(error)) from error
    raise error


def refusal(message: str) -> Refused:
    """The exception of an operator that refuses; `message` names what was expected and what was given."""
    return Refused(f"{_REFUSAL}{message}")


def words_of(refusal: RuntimeError) -> str:
    """The words of a refusal alone, without the place in C++ that refused."""
    return str(refusal).partition(_REFUSAL)[2].partition("\n")[0] or str(refusal)


def require(condition: bool, message: str) -> None:
    """Raises Refused unless `condition` holds."""
    if not condition:
        raise refusal(message)


def _define(library: torch.library.Library, spec: CellSpec) -> None:
    """Defines the operators of a cell with their fake kernels (shapes, dtypes and devices, no values)."""
    letters = [state.letter for state in spec.states]

    def tensors(pattern: str) -> str:
        return ", ".join(pattern.format(letter) for letter in letters)

    flags = "".join(f", bool {name}" for name, _ in spec.flags)
    inputs = f"Tensor input, {tensors('Tensor? {}x')}"
    rows = ", ".join(f"Tensor? {name}" for name in Rows._fields)
    layer = f"{inputs}, Tensor[] weights, {rows}{flags}"
    own = [f"Tensor{'?' if weight.option else ''} {weight.name}" for weight in step_weights(spec)]
    step = f"{inputs}, {', '.join(own)}{flags}"
    saved = "".join(f", Tensor saved_{i}" for i in range(len(spec.saved)))
    known = saved or ", Tensor h_n"
    finals, incoming = tensors("Tensor {}_n"), tensors("Tensor? grad_{}_n")
    needs = "bool need_grad_input, bool need_grad_states, bool need_grad_weights"
    grads = f"(Tensor grad_input, {tensors('Tensor grad_{}x')}, Tensor[] grad_weights)"
    fakes = _Fakes(spec)
    for schema, fake in (
        (f"infer({layer}, int num_layers=1) -> (Tensor output, {finals})", fakes.infer),
        (f"fwd({layer}) -> (Tensor output, {finals}{saved})", fakes.fwd),
        (f"bwd(Tensor? grad_output, {incoming}, {layer}, Tensor output{saved}, {needs}) -> {grads}", fakes.bwd),
        (f"step_infer({step}) -> ({finals})", fakes.step_infer),
        (f"step_fwd({step}) -> ({finals}{saved})", fakes.step_fwd),
        (f"step_bwd({incoming}, {step}{known}, {needs}) -> {grads}", fakes.step_bwd),
    ):
        library.define(f"{spec.operators}_{schema}", tags=(torch.Tag.pt2_compliant_tag,))
        name = f"{library.ns}::{spec.operators}_{schema.partition('(')[0]}"
        torch.library.register_fake(name, fake, lib=library)


class _Fakes:
    """The fake kernels of a cell's operators. Their arguments are those of the schemas, by position."""

    def __init__(self, spec: CellSpec):
        self.spec, self.states = spec, len(spec.states)
        # Ends of parts of a layer's arguments after the input: states, weights, rows, flags.
        self.rows_end = self.states + 1 + len(Rows._fields)
        self.flags_end = self.rows_end + len(spec.flags)
        self.weights_of_step = slice(self.states, self.states + len(step_weights(spec)))

    def infer(self, input, *rest):
        (num_layers,) = rest[self.flags_end :] or (1,)
        require(num_layers > 0, f"num_layers: expected at least 1, got {num_layers}")
        states, weights, rows = self._split(rest)
        _check_devices(input, *states, *weights, *rows[1:], batch_sizes=rows.batch_sizes)
        shapes = self._state_shapes(input, states, weights[: len(weights) // num_layers])
        directions, _, output_size = shapes[0]
        output = input.new_empty(*input.shape[:-1], directions * output_size)
        return (output, *(input.new_empty(num_layers * directions, *shape) for _, *shape in shapes))

    def _split(self, rest):
        """(states, weights, rows) of a layer's arguments after the input."""
        return rest[: self.states], rest[self.states], Rows(*rest[self.states + 1 : self.rows_end])

    def fwd(self, input, *rest):
        shapes = self._state_shapes(input, rest[: self.states], rest[self.states])
        return (*self.infer(input, *rest), *self._saved(input, shapes))

    def bwd(self, *args):
        input, *rest = args[1 + self.states :]
        states, weights, rows = self._split(rest)
        known = [value for value in rest[self.rows_end :] if isinstance(value, Tensor)]
        given = *args[: 1 + self.states], *states, *weights, *rows[1:], *known
        _check_devices(input, *given, batch_sizes=rows.batch_sizes)
        return self._gradients(input, self._state_shapes(input, states, weights), weights, args[-3:])

    def step_infer(self, input, *rest):
        h_n, *others = self._step_states(input, *rest)
        return (h_n, *others) if others else h_n

    def step_fwd(self, input, *rest):
        final = self._step_states(input, *rest)
        results = (*final, *self._saved(input, [(1, *state.shape) for state in final]))
        return results if len(results) > 1 else results[0]

    def step_bwd(self, *args):
        input, *rest = args[self.states :]
        _check_devices(input, *(value for value in args if isinstance(value, Tensor)))
        weights = [weight for weight in rest[self.weights_of_step] if weight is not None]
        shapes = [state.shape for state in self._step_states(input, *rest)]
        return self._gradients(input, shapes, weights, args[-3:])

    def _state_shapes(self, input, states, weights):
        """The shapes of h_n and c_n of one layer, [D, B, Hout] and [D, B, H]."""
        arrangement = arrangement_of(self.spec, weights)
        if arrangement is None:
            raise refusal(f"weights: expected those of 1 or 2 directions, got {len(weights)}")
        named = dict(zip(arrangement.layout.names, weights, strict=False))
        output_size = named["weight_hh"].size(1)
        hidden_size = named["weight_hr"].size(1) if "weight_hr" in named else output_size
        sizes = Sizes(input.size(-1), named["weight_ih"].size(0), hidden_size, output_size)
        batch = input.size(1) if states[0] is None else states[0].size(1)
        return [(arrangement.directions, batch, sizes[state.axis]) for state in self.spec.states]

    def _step_states(self, input, *rest):
        _check_devices(input, *rest[: self.weights_of_step.stop])
        shape = input.size(0), rest[self.states + 1].size(1)  # of weight_hh
        return [input.new_empty(shape) for _ in range(self.states)]

    def _saved(self, input, shapes):
        rows = math.prod(input.shape[:-1])  # not Size.numel(), which would fix a dynamic T
        directions, _, hidden_size = shapes[-1]  # of the last state: hx is narrower where projected
        wide = torch.float32 if input.dtype.itemsize == 2 else input.dtype
        return tuple(
            input.new_empty(directions, rows, saved.planes * hidden_size, dtype=wide if saved.wide else input.dtype)
            for saved in self.spec.saved
        )

    def _gradients(self, input, shapes, weights, needed):
        need_grad_input, need_grad_states, need_grad_weights = needed
        return (
            input.new_empty(input.shape if need_grad_input else 0),
            *(input.new_empty(shape if need_grad_states else 0) for shape in shapes),
            [weight.new_empty(weight.shape if need_grad_weights else 0) for weight in weights],
        )


def _check_devices(input, *tensors, batch_sizes=None):
    # With meta tensors among others, the dispatcher gives the fakes real tensors too.
    devices = {tensor.device for tensor in (input, *tensors) if tensor is not None}
    require(len(devices) == 1, f"expected all tensors on one device, got {devices}")
    if batch_sizes is not None:
        known = batch_sizes.device.type in ("cpu", input.device.type)
        require(known, f"batch_sizes: expected a tensor on the CPU, got {batch_sizes.device}")


class Operators(NamedTuple):
    """The three operators of a layer, or of a step."""

    infer: Any  # an OpOverload, or what it calls
    fwd: Any
    bwd: Any


class Cell(NamedTuple):
    """The operators of one cell, and what their callers need to know of it at every call."""

    spec: CellSpec
    states: int  # 1 (hx) or 2 (hx, cx)
    flags: tuple[bool, ...]  # the operators' own trailing arguments
    counts: tuple[int, ...]  # CellSpec.counts as a tuple, which unpacks faster
    no_states: tuple[None, ...]  # stands for states of zeros
    step_count: int  # weights of a step's operators, biases included
    layer: Operators
    step: Operators
    eager_layer: Operators  # the same for eager calls (without_python_frame)
    eager_step: Operators


_libraries: list[torch.library.Library] = []  # they live as long as the module: dropping one unregisters its operators


def define(namespace: str) -> dict[str, Cell]:
    """Defines all operators in a namespace, once per process. Returns them by cell."""
    library = torch.library.Library(namespace, "DEF")
    _libraries.append(library)
    for spec in FAMILIES.values():
        _define(library, spec)

    def operators(prefix: str) -> tuple[Operators, Operators]:
        """(the overloads, the same for eager calls)."""
        packets = (getattr(getattr(torch.ops, namespace), f"{prefix}_{name}") for name in Operators._fields)
        overloads = [packet.default for packet in packets]
        return Operators(*overloads), Operators(*map(without_python_frame, overloads))

    cells = {}
    for name, spec in SPECS.items():
        if spec.operators is None:
            continue
        layer, eager_layer = operators(spec.operators)
        step, eager_step = operators(f"{spec.operators}_step")
        cells[name] = Cell(
            spec,
            len(spec.states),
            tuple(value for _, value in spec.flags),
            tuple(spec.counts),
            spec.no_states,
            len(step_weights(spec)),
            layer,
            step,
            eager_layer,
            eager_step,
        )
    return cells


OPERATORS = {namespace: define(namespace) for namespace in ("rnnfast", "rnnfast_triton")}
CELLS = OPERATORS["rnnfast"]
_libraries[0].define("_cpu_isa() -> str")
