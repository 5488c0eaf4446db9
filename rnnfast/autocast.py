"""torch.autocast: in which dtype a call computes, and in which dtypes torch's operators give its results."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ._torch_internals import is_any_autocast_enabled, onednn_dtypes
from .call import Call
from .cells import SPECS

AUTOCAST_DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # what autocast casts; float64 stays


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype that autocast casts to on this device; None where it is off."""
    if not is_any_autocast_enabled() or not torch.is_autocast_enabled(device.type):
        return None
    return torch.get_autocast_dtype(device.type)


def dtype_of(input: Tensor) -> torch.dtype:
    """The dtype that a call with this input computes in: autocast's, where it is on and casts such tensors."""
    low = autocast_dtype(input.device)
    return input.dtype if low is None or input.dtype not in AUTOCAST_DTYPES else low


def result_dtypes(call: Call, states: Sequence[Tensor], low: torch.dtype) -> tuple[torch.dtype, ...]:
    """The dtypes of (output, *final states) that torch's own operators give under autocast to `low`.

    A matrix product has the dtype `low`, and pointwise operators promote it with the states. An RNN ends in a product,
    and so does a projected h. A GRU's h and an LSTM's c are promoted. oneDNN's LSTM gives `low` for all.
    """
    promoted = torch.promote_types(low, states[0].dtype)
    projected = states[0].size(-1) != states[-1].size(-1)
    if len(SPECS[call.cell].gates) == 1 or (not projected and _onednn_lstm(call)):
        return (low,) * (1 + len(states))
    return (low, low, promoted) if projected else (promoted,) * (1 + len(states))


_ONEDNN_DTYPES = tuple(onednn_dtypes())


def _onednn_lstm(call: Call) -> bool:
    """Whether torch's own operator would take oneDNN's LSTM for this call (use_mkldnn in ATen/native/RNN.cpp)."""
    lstm = SPECS[call.cell].torch_operator == "lstm"
    if not lstm or call.rows.batch_sizes is not None or call.step or call.input.device.type != "cpu":
        return False
    if not torch.backends.mkldnn.enabled or (call.input.dtype is torch.float16 and torch.is_grad_enabled()):
        return False
    return call.input.dtype in _ONEDNN_DTYPES
