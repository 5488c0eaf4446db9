"""Lets torch.compile trace rnnfast's modules, and only those.

Dynamo refuses to trace any instance of nn.RNN, nn.LSTM and nn.GRU unless torch._dynamo.config.allow_rnn is set, because
torch's own operators unroll. Ours do not. So allow_rnn is set only while Dynamo wraps an instance of ours. Importing
torch._dynamo takes seconds, and most programs never need it, so rnnfast waits until the program imports it.
"""

import functools
from types import ModuleType

from . import _backends, select
from ._imports import after_import
from ._torch_internals import DYNAMO_BUILDER, assume_constant
from .modules import _Recurrent

state = "waiting for torch._dynamo to be imported"
"""For env_report."""


def _allow_ours(builder: ModuleType) -> None:
    global state
    wrap_module = getattr(builder.VariableBuilder, "wrap_module", None)
    if wrap_module is None or not hasattr(builder.config, "allow_rnn"):
        state = "this torch has another way of refusing recurrent modules: torch.compile breaks the graph at them"
        return

    @functools.wraps(wrap_module)
    def wrap_module_or_ours(self, value):
        # Without kernels of ours, torch's own operator would unroll. Then Dynamo keeps its graph break.
        if isinstance(value, _Recurrent) and not all(backend.unavailable() for backend in _backends.OURS):
            with builder.config.patch(allow_rnn=True):
                return wrap_module(self, value)
        return wrap_module(self, value)

    builder.VariableBuilder.wrap_module = wrap_module_or_ours
    state = "rnnfast's modules are traced whole"


def install() -> None:
    assume_constant(select.warn_once)  # so that a warning while tracing breaks no graph
    after_import(DYNAMO_BUILDER, _allow_ours)
