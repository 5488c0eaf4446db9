"""Lets torch.compile trace rnnfast's modules, and only them.

Dynamo refuses to trace any instance of nn.RNN, nn.LSTM and nn.GRU unless torch._dynamo.config.allow_rnn is set, since
torch's own operators unroll. Ours do not: so allow_rnn is set just while Dynamo wraps an instance of ours. As the
import of torch._dynamo takes seconds and most programs never need it, a finder on sys.meta_path waits for it.
"""

import functools
import importlib.abc
import importlib.machinery
import sys
from types import ModuleType

from . import select
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
        if isinstance(value, _Recurrent) and not all(backend.unavailable() for backend in select.OURS):
            with builder.config.patch(allow_rnn=True):
                return wrap_module(self, value)
        return wrap_module(self, value)

    builder.VariableBuilder.wrap_module = wrap_module_or_ours
    state = "rnnfast's modules are traced whole"


class _Finder(importlib.abc.MetaPathFinder):
    """Runs _allow_ours right after the import of Dynamo's builder."""

    def find_spec(self, fullname, path=None, target=None):
        if fullname != _BUILDER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module):
                execute(module)
                _allow_ours(module)

            spec.loader.exec_module = exec_module
        return spec


def install() -> None:
    # torch._dynamo.assume_constant_result, without its import: it acts while tracing, and breaks no graph.
    select._warn_once._dynamo_marked_constant = True
    builder = sys.modules.get(_BUILDER)
    if builder is not None:
        _allow_ours(builder)
    else:
        sys.meta_path.insert(0, _Finder())
