"""How float32 products are made on a GPU, where tensor cores round their operands to TF32 (10 bits of mantissa).

The TF32 setting is process-wide in the CUDA library, so Python refreshes it before every float32 pass. Eager calls do
so themselves. Compiled graphs use operators in a namespace of their own, `{namespace}_graph`, which do it.
"""

import os
from typing import Any

import torch

from . import _ext, ops
from .cells import FAMILIES

PRODUCTS = ("tf32", "tf32x3", "ieee")
_RNN: Any = torch.backends.cudnn.rnn  # each dot of it costs half a microsecond


def float32_products(device: torch.device) -> str:
    """One of PRODUCTS, for the recurrent product of float32 layers; "tf32x3" is three TF32 products, nearly exact.

    On a GPU this follows torch's switch for recurrent layers, torch.backends.cudnn.rnn.fp32_precision (default: TF32).
    On CPU tensors (interpreter, emulator) products are exact, as torch's are there. RNNFAST_FLOAT32_PRODUCTS in the
    environment overrules both; another word than the three raises ValueError. The products with the input and those
    of the weights' gradients are torch's own. They follow torch.backends.cuda.matmul.fp32_precision.
    """
    asked = os.environ.get("RNNFAST_FLOAT32_PRODUCTS")
    if not asked and device.type != "cuda":
        return "ieee"
    if not asked:
        return "tf32" if _RNN.fp32_precision == "tf32" else "ieee"
    if asked not in PRODUCTS:
        raise ValueError(f"RNNFAST_FLOAT32_PRODUCTS: expected one of {', '.join(PRODUCTS)}, got {asked!r}")
    return asked


DEVICES: dict[str, torch.device] = {}  # namespace -> the device of its CUDA kernels
_told: dict[str, bool] = {}  # namespace -> whether its library was told to take TF32


def follow_switch(namespace: str) -> None:
    """Tells the CUDA kernels of a namespace of DEVICES the current state of the switch."""
    allow = float32_products(DEVICES[namespace]) == "tf32"
    if _told.get(namespace) is not allow:
        _ext.allow_tf32(allow, namespace)
        _told[namespace] = allow


def follow_switch_in_backward(namespace: str, input: torch.Tensor) -> None:
    """`follow_switch` before an eager backward, if its tensors are float32 and on the device of the kernels."""
    if input.dtype is torch.float32 and namespace in DEVICES and (input.is_cuda or namespace != "rnnfast"):
        follow_switch(namespace)


def graph_namespace(namespace: str) -> str:
    """The namespace of the operators that compiled graphs take for float32, for a namespace of DEVICES."""
    return f"{namespace}_graph"


def _define_for_graphs(namespace: str) -> torch.library.Library:
    graph = graph_namespace(namespace)
    ops.OPERATORS[graph] = ops.define(graph)
    library = torch.library.Library(graph, "IMPL")

    def following(operator):
        def run(*arguments):
            follow_switch(namespace)
            return operator(*arguments)

        return run

    for spec in FAMILIES.values():
        of_cell = ops.OPERATORS[namespace][spec.name]
        for operator in (*of_cell.layer, *of_cell.step):
            name = operator.name().partition("::")[2]
            library.impl(name, following(operator), DEVICES[namespace].type.upper())
    return library


if _ext.cuda_failure is None:
    DEVICES["rnnfast"] = torch.device("cuda")
if _ext.emulator_failure is None:
    DEVICES[_ext.EMULATOR_NAMESPACE] = torch.device("cpu")
_libraries = [_define_for_graphs(namespace) for namespace in DEVICES]  # they live as long as the module
