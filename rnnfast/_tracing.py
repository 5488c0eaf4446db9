"""What torch.fx and torch.jit find on rnnfast's modules: one node, and the source of torch.nn's forward.

torch.jit.script asks each module for `__prepare_scriptable__` (modules.py) and gets torch.nn's class. A
torch.jit.ScriptModule that holds one of our modules asks the class for its compiled methods instead. It reads
`_methods`, and `__overloads__` for the forward of layers, which takes a tensor or a PackedSequence.
"""

import functools
from typing import Any

import torch
from torch.fx import Proxy

from ._torch_internals import methods_to_script


@functools.cache
def _stubs(torch_class: type[torch.nn.Module]) -> tuple[dict[str, Any], dict[str, list[str]]]:
    """The (methods, overloads) of a class of torch.nn that torch.jit compiles."""
    stock: Any = torch_class(1, 1)
    stubs = methods_to_script(stock)
    return {f"{i}": stub for i, stub in enumerate(stubs)}, stock.__overloads__


class OfTorchClass:
    """A class attribute of classes with rnnfast's forward. A subclass with another forward has no such attribute."""

    def __init__(self, part: int):
        self.part = part

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, module: torch.nn.Module | None, cls: Any) -> Any:
        if cls.forward.__module__ != "rnnfast.modules":
            raise AttributeError(f"type object {cls.__name__!r} has no attribute {self.name!r}")
        return _stubs(cls._torch_class)[self.part]


def proxy_in(*values: Any) -> Proxy | None:
    """A proxy of torch.fx among the arguments, or in a tuple or list among them; None if there is none."""
    for value in values:
        if isinstance(value, (tuple, list)):
            value = proxy_in(*value)
        if isinstance(value, Proxy):
            return value
    return None


def record(module: torch.nn.Module, proxy: Proxy, input: Any, **given: Any) -> Proxy:
    """Records one call_module node under torch.fx.symbolic_trace, with all that is not None, as for torch.nn."""
    given = {name: value for name, value in given.items() if value is not None}
    args = (input, given.pop("hx")) if "hx" in given else (input,)
    return proxy.tracer.create_proxy("call_module", path_of(module, proxy), args, given)


def path_of(module: torch.nn.Module, proxy: Proxy) -> str:
    """The name of a module within the one that is being traced; empty for that one itself."""
    tracer: Any = proxy.tracer
    return tracer.path_of_module(module)
