"""The class of torch.nn that corresponds to a class of rnnfast, and the other way round."""

from collections.abc import Mapping

import torch
from torch.nn.utils import parametrize


def counterpart(module: torch.nn.Module, classes: Mapping[type, type]) -> type | None:
    """The class in `classes` that corresponds to the class of `module`; None if there is none.

    torch.nn.utils.parametrize makes a class for each module, with a property for each parametrized weight. For such a
    module this function makes a class in the same way.
    """
    cls = type(module)
    if cls in classes or not parametrize.is_parametrized(module) or cls.__bases__[0] not in classes:
        return classes.get(cls)
    namespace = {key: value for key, value in vars(cls).items() if key not in ("__dict__", "__weakref__")}
    return type(cls.__name__, (classes[cls.__bases__[0]],), namespace)
