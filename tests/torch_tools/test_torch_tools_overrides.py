"""Methods overridden in a subclass or on the instance: what torch.nn's forward calls, ours calls too."""

import types

from support.torch_tools import (
    CELLS,
    LAYERS,
    Rows,
    assert_plant_is_caught,
    call,
    first,
    leaf,
    leaves,
    packed_of,
    sample,
    train,
    weight,
    weight_name,
)
from support.twins import (
    cells_take_the_kernels,  # noqa: F401
    state_of,
    tensors,
    total,
)
from torch import nn

ROWS = Rows(kinds=LAYERS)


# ------------------------------------------------ overridden methods, in a subclass or on the instance


class Asked(Exception):
    """An overridden method was asked."""


def refuse(self, *args, **kwargs):
    raise Asked


def overridden(name, method, run, on_instance):
    def program(module):
        if on_instance:
            setattr(module, name, types.MethodType(method, module))
        else:
            module.__class__ = type("Own", (type(module),), {name: method})
        return run(module)

    return program


RUNS = {
    "padded_hx": lambda m: call(m, *leaves(m)),
    "unbatched": lambda m: m(sample(m)[:, 0]),
    "packed": lambda m: m(packed_of(m)),
}
METHODS = ["check_forward_args", "check_input", "check_hidden_size", "get_expected_hidden_size", "permute_hidden"]
METHODS += ["get_expected_cell_size"]
for name in METHODS:
    for how, run in RUNS.items():
        for on_instance in (False, True):
            where = "instance" if on_instance else "subclass"
            ROWS[f"{name}_{how}_{where}"] = overridden(name, refuse, run, on_instance)


@ROWS.add()
def check_input_that_accepts_more(module):
    """A subclass that widens what is accepted leaves the rest to the operator."""
    module.__class__ = type("Own", (type(module),), {"check_input": lambda self, input, sizes: None})
    return module(sample(module)[..., :2])


@ROWS.add()
def permuted_hidden(module):
    """A subclass that changes the states on their way."""

    def permute_hidden(self, hx, permutation):
        return tuple(h * 2 for h in hx) if isinstance(hx, tuple) else hx * 2

    module.__class__ = type("Own", (type(module),), {"permute_hidden": permute_hidden})
    return module(sample(module), state_of(module, 2)), module(packed_of(module), state_of(module, 2))


@ROWS.add()
def check_forward_args_logs(module):
    seen = []
    module.check_forward_args = lambda input, hidden, sizes: seen.append(tuple(input.shape))
    return module(sample(module)), seen, module(packed_of(module)), len(seen)


@ROWS.add(kinds=(*LAYERS, *CELLS))
def forward_on_the_instance(module):
    inner = module.forward
    module.forward = lambda x: inner(x * 2)
    return train(module)


@ROWS.add(kinds=(*LAYERS, *CELLS))
def forward_in_a_subclass(module):
    class Own(type(module)):
        def forward(self, x, hx=None):
            result = super().forward(x * 2, hx)
            return first(result) * 2

    module.__class__ = Own
    return train(module)


@ROWS.add(kinds=(*LAYERS, *CELLS))
def getattr_in_a_subclass(module):
    """A weight that a subclass computes, as weight-normalizing code does."""
    name = weight_name(module)
    raw = nn.Parameter(weight(module).detach().clone())
    delattr(module, name)
    module.raw = raw
    module.__class__ = type("Own", (type(module),), {name: property(lambda self: self.raw * 0.5)})
    return module(sample(module))


@ROWS.add(kinds=(*LAYERS, *CELLS))
def call_in_a_subclass(module):
    class Own(type(module)):
        def __call__(self, *args):
            return first(super().__call__(*args))

    module.__class__ = Own
    return train(module)


@ROWS.add(kinds=(*LAYERS, *CELLS))
def unbound_forward(module):
    """The class's forward, called by hand."""
    x = leaf(module)
    result = type(module).forward(module, x)
    total(result).backward()
    return result, x.grad


@ROWS.add(kinds=CELLS)
def reset_parameters_in_a_subclass(module):
    class Own(type(module)):
        def reset_parameters(self):
            for parameter in self.parameters():
                nn.init.constant_(parameter, 0.1)

    return train(Own(3, 4))


@ROWS.add()
def reset_parameters_in_a_layers_subclass(module):
    class Own(type(module)):
        def reset_parameters(self):
            for parameter in self.parameters():
                nn.init.constant_(parameter, 0.1)

    return train(Own(3, 4, proj_size=module.proj_size) if module.proj_size else Own(3, 4))


@ROWS.add()
def all_weights_read(module):
    return [w * 1 for layer in module.all_weights for w in layer], len(tensors(module(sample(module))))


@ROWS.parametrize()
def test_row(name, kind):
    ROWS.check(name, kind)


def test_a_difference_is_caught():
    assert_plant_is_caught(ROWS)
