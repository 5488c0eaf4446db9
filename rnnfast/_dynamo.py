"""Lets torch.compile trace rnnfast's modules, and only them.

Dynamo refuses to trace any instance of nn.RNN, nn.LSTM and nn.GRU unless torch._dynamo.config.allow_rnn is set, since
torch's own operators unroll. Ours do not: so allow_rnn is set just while Dynamo wraps an instance of ours. As the
import of torch._dynamo takes seconds and most programs never need it, rnnfast waits for it.
"""

import functools
from types import ModuleType

from . import _backends, select
from ._imports import after_import
from .modules import _Recurrent

_BUILDER = "torch._dynamo.variables.builder"

state = "waiting for torch._dynamo to be imported"
"""What became of it, for env_report."""


def _allow_ours(builder: ModuleType) -> None:
    global state
    wrap_module = getattr(builder.VariableBuilder, "wrap_module", None)
    if wrap_module is None or not hasattr(builder.config, "allow_rnn"):
        state = "this torch has another way of refusing recurrent modules: torch.compile breaks the graph at them"
        return

    @functools.wraps(wrap_module)
    def wrap_module_or_ours(self, value):
        # Without kernels of ours, torch's own operator would unroll: then leave Dynamo its graph break.
        if isinstance(value, _Recurrent) and not all(backend.unavailable() for backend in _backends.OURS):
            with builder.config.patch(allow_rnn=True):
                return wrap_module(self, value)
        return wrap_module(self, value)

    builder.VariableBuilder.wrap_module = wrap_module_or_ours
    state = "rnnfast's modules are traced whole"


def install() -> None:
    # torch._dynamo.assume_constant_result, without its import: it acts while tracing, and breaks no graph.
    select._warn_once._dynamo_marked_constant = True
    after_import(_BUILDER, _allow_ours)
