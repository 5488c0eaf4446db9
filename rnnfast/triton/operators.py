"""Registers the Triton kernels as the operators torch.ops.rnnfast_triton.* of ops.py."""

import torch
from torch import Tensor

from ..cells import FAMILIES, CellSpec, step_weights
from ..rows import PADDED, Rows
from ..stack import layer_by_layer, require_later_layers
from . import interpreted


def _layers():
    from . import layers  # with Triton, at the first call

    return layers


def _layer_operators(cell: str, spec: CellSpec):
    """(infer, fwd, bwd) of a cell, with the arguments of their schemas."""
    states, flags = len(spec.states), len(spec.flags)
    end = states + 1 + len(Rows._fields)  # of the rows, after the input, the states and the weights

    def split(arguments):
        """((relu, input, states, weights, rows), the arguments after these)."""
        input, *rest = arguments
        relu = bool(flags and rest[end])
        return (relu, input, rest[:states], rest[states], Rows(*rest[states + 1 : end])), rest[end + flags :]

    def infer(*arguments):
        (relu, input, given, weights, rows), more = split(arguments)
        (num_layers,) = more or (1,)
        if num_layers != 1:
            require_later_layers(spec.name, given, weights, num_layers)

        def layer(cell, *of_layer):
            return _layers().forward(cell, relu, False, *of_layer)

        return layer_by_layer(layer, cell, input, given, weights, num_layers, 0.0, rows)

    def fwd(*arguments):
        (relu, *layer), _ = split(arguments)
        return _layers().forward(cell, relu, True, *layer)

    def bwd(*arguments):
        grads = arguments[: 1 + states]
        (relu, *layer), (output, *saved) = split(arguments[1 + states :])
        return _layers().backward(cell, relu, grads, *layer, output, saved[:-3], saved[-3:])

    return infer, fwd, bwd


def _step_operators(cell: str, spec: CellSpec):
    """(infer, fwd, bwd) of one step of a cell: a layer of one time step, whose only output is h_n."""
    states, flags = len(spec.states), len(spec.flags)
    end = states + len(step_weights(spec))  # of the weights, after the input

    def as_layer(arguments):
        input, *rest = arguments
        given = [weight is not None for weight in rest[states + 2 : end]]
        if sum(given) == 1:
            raise RuntimeError("biases: expected bias_ih and bias_hh or neither, got 1 of them")
        hx = [state if state is None else state[None] for state in rest[:states]]
        weights = [weight for weight in rest[states:end] if weight is not None]
        relu = bool(flags and rest[end])
        return (relu, input[None], hx, weights, PADDED), rest[end + flags :]

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
    """A tensor in the place of the output of a single step. Backward checks its shape and reads none of it."""
    input, states, weights = layer[:3]
    return input.new_empty(*input.shape[:-1], weights[1].size(1))


def refuses(call) -> str | None:
    """Why the kernels cannot run this call (call.Call) of a stack of layers on its device, or None."""
    return _layers().refuses(call)


def register() -> torch.library.Library:
    """Implements rnnfast_triton::* for CUDA tensors, and in the interpreter for CPU tensors.

    The implementations last as long as the returned library.
    """
    library = torch.library.Library("rnnfast_triton", "IMPL")
    for cell, spec in FAMILIES.items():
        for prefix, operators in ((cell, _layer_operators), (f"{cell}_step", _step_operators)):
            for name, function in zip(("infer", "fwd", "bwd"), operators(cell, spec), strict=True):
                for key in ("CUDA", "CPU") if interpreted else ("CUDA",):
                    library.impl(f"{prefix}_{name}", function, key)
    return library


_registered = register()  # lives as long as the module
