"""rnnfast: torch.nn's RNN, GRU and LSTM with faster kernels and the same numbers.

Replace torch.nn.LSTM by rnnfast.LSTM, or call rnnfast.convert(model); rnnfast.explain(module, input) says what runs.
"""

from . import _dynamo, _flops, functional
from ._backends import backend, backends
from .freeze import freeze
from .modules import GRU, LSTM, RNN, GRUCell, LSTMCell, RNNCell
from .patch import convert, patch, patched, revert, unpatch
from .select import explain
from .streaming import Stream, stream

__version__ = "0.1.0"

__all__ = [
    "GRU",
    "GRUCell",
    "LSTM",
    "LSTMCell",
    "RNN",
    "RNNCell",
    "Stream",
    "backend",
    "backends",
    "convert",
    "explain",
    "freeze",
    "functional",
    "patch",
    "patched",
    "revert",
    "stream",
    "unpatch",
]

_dynamo.install()
_flops.install()
