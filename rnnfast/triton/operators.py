"""Registers the Triton kernels as the operators torch.ops.rnnfast_triton.* of ops.py."""

import torch
from torch import Tensor

from .. import reference
from ..cells import FAMILIES, CellSpec, step_weights
from ..ops import require_later_layers
from . import interpreted


def _layers():
    from . import layers  # with Triton, at the first call

    return layers


def _layer_operators(spec: CellSpec):
    """(infer, fwd, bwd) of a cell, with the arguments of their schemas."""
    cell, states, flags = spec.operators, len(spec.states), len(spec.flags)

    def split(arguments):
        """(relu, then what `layers` takes: input, states, weights, batch_sizes, lengths), and what follows."""
        input, *rest = arguments
        relu = bool(flags and rest[states + 3])
        return (relu, input, rest[:states], *rest[states : states + 3]), rest[states + 3 + flags :]

    def infer(*arguments):
        (relu, input, given, weights, *rows), more = split(arguments)
        (num_layers,) = more or (1,)
        if num_layers != 1:
            require_later_layers(spec.name, given, weights, num_layers)

        def layer(cell, *of_layer):
            return _layers().forward(cell, relu, False, *of_layer)

        return reference.stack(layer, cell, input, given, weights, num_layers, 0.0, *rows)

    def fwd(*arguments):
        (relu, *layer), _ = split(arguments)
        return _layers().forward(cell, relu, True, *layer)

    def bwd(*arguments):
        grads = arguments[: 1 + states]
        (relu, *layer), (output, *saved) = split(arguments[1 + states :])
        return _layers().backward(cell, relu, grads, *layer, output, saved[:-3], saved[-3:])

    return infer, fwd, bwd


def _step_operators(spec: CellSpec):
    """(infer, fwd, bwd) of one step of a cell: a layer of one time step and no `output` but h_n."""
    cell, states, flags = spec.operators, len(spec.states), len(spec.flags)
    end = states + len(step_weights(spec))  # of the weights, after the input

    def as_layer(arguments):
        input, *rest = arguments
        given = [weight is not None for weight in rest[states + 2 : end]]
        if sum(given) == 1:
            raise RuntimeError("biases: expected bias_ih and bias_hh or neither, got 1 of them")
        hx = [state if state is None else state[None] for state in rest[:states]]
        weights = [weight for weight in rest[states:end] if weight is not None]
        relu = bool(flags and rest[end])
        return (relu, input[None], hx, weights, None, None), rest[end + flags :]

    def run(arguments, save):
        _check_step(arguments[0])
        (relu, *layer), _ = as_layer(arguments)
        results = _layers().forward(cell, relu, save, *layer)[1:]
        results = (*(state[0] for state in results[:states]), *results[states:])
        return results if len(results) > 1 else results[0]

    def bwd(*arguments):
        grads = [None if grad is None else grad[None] for grad in arguments[:states]]
        (relu, *layer), (*saved, need_input, need_states, need_weights) = as_layer(arguments[states:])
        output = saved.pop()[None] if cell == "rnn" else _output_of(cell, layer, saved)
        needs = need_input, need_states, need_weights
        grad_input, *grad_states, grad_weights = _layers().backward(
            cell, relu, (None, *grads), *layer, output, saved, needs
        )
        first = [grad[0] if need_states else grad for grad in grad_states]
        return grad_input[0] if need_input else grad_input, *first, grad_weights

    return lambda *arguments: run(arguments, False), lambda *arguments: run(arguments, True), bwd


def _check_step(input: Tensor) -> None:
    if input.dim() != 2:
        raise RuntimeError(f"input: expected 2 dimensions, got shape {list(input.shape)}")


def _output_of(cell: str, layer, saved) -> Tensor:
    """The h of a single step, which is not saved: its backward reads no row of it, only its shape is checked."""
    input, states, weights = layer[:3]
    return input.new_empty(*input.shape[:-1], weights[1].size(1))


def refuses(call) -> str | None:
    """Why the kernels cannot run this call (call.Call) of a stack of layers on its device, or None."""
    return _layers().refuses(call)


def register() -> torch.library.Library:
    """Gives rnnfast_triton::* their implementations, for CUDA tensors, and for those of the CPU where interpreted.

    They last as long as the library that is returned.
    """
    library = torch.library.Library("rnnfast_triton", "IMPL")
    for cell, spec in FAMILIES.items():
        for prefix, operators in ((cell, _layer_operators), (f"{cell}_step", _step_operators)):
            for name, function in zip(("infer", "fwd", "bwd"), operators(spec), strict=True):
                for key in ("CUDA", "CPU") if interpreted else ("CUDA",):
                    library.impl(f"{prefix}_{name}", function, key)
    return library


_registered = register()  # lives as long as the module
