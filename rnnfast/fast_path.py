"""The fast path: which calls go straight to the CPU kernels, without a decision (select.py)."""

from typing import Any, TypeGuard

import torch
from torch import Tensor, compiler

from . import _ext
from ._backends import DTYPES, request
from ._torch_internals import is_nothing_active

STEP_DTYPES = DTYPES[:2]
"""The dtypes in which one step of a cell module never loses against torch's (select.step_loses)."""


def is_open_to(input: Any, dtypes: tuple[torch.dtype, ...] = DTYPES) -> TypeGuard[Tensor]:
    """Whether a call with this input may take the fast path, because nothing about it is unusual.

    `select.decide` would choose the CPU kernels too, but takes as long as a small call. The operators check all that
    they get before they compute anything. A call that they refuse goes to `decide`.
    """
    return (
        type(input) is Tensor
        and input.dtype in dtypes
        and input.is_cpu
        and not input.is_nested
        and not compiler.is_dynamo_compiling()
        and (request.name is None or request.name == "cpu")
        and _ext.failure is None
        and is_nothing_active()
    )
