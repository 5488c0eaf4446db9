"""Attributes changed after construction: what torch.nn's forward reads at a call, ours reads too."""

import copy

import pytest
import torch
from support.torch_tools import (
    CELLS,
    LAYERS,
    Rows,
    assert_plant_is_caught,
    packed_of,
    sample,
    trained,
)
from support.twins import (
    assert_same,
    cells_take_the_kernels,  # noqa: F401
    gradients,
    total,
    twins,
)
from torch import multiprocessing, nn

ROWS = Rows(kinds=LAYERS)
STACK = {"num_layers": 2, "bidirectional": True}


# ------------------------------------------------ _flat_weights


def halved(module):
    module._flat_weights = [w * 0.5 for w in module._flat_weights]


@ROWS.add()
def flat_weights_assigned(module):
    halved(module)
    return trained(module)


@ROWS.add(**STACK)
def flat_weights_assigned_deep(module):
    halved(module)
    return trained(module)


@ROWS.add()
def flat_weights_assigned_under_no_grad(module):
    halved(module)
    with torch.no_grad():
        return module(sample(module))


@ROWS.add()
def flat_weights_assigned_packed(module):
    halved(module)
    result = module(packed_of(module))
    total(result).backward()
    return result


@ROWS.add(num_layers=2)
def one_flat_weight_replaced(module):
    module._flat_weights[5] = module._flat_weights[5] * 0.5
    return trained(module)


@ROWS.add()
def first_flat_weight_replaced(module):
    module._flat_weights[0] = nn.Parameter(module._flat_weights[0].detach() * 0.5)
    return trained(module), module._flat_weights[0].grad


@ROWS.add()
def last_flat_weight_replaced(module):
    module._flat_weights[-1] = module._flat_weights[-1].detach() * 0.5
    return trained(module)


@ROWS.add()
def flat_weights_then_a_parameter(module):
    """Setting a named parameter refreshes the list."""
    halved(module)
    module.weight_ih_l0 = nn.Parameter(module.weight_ih_l0.detach() + 0.1)
    return trained(module)


@ROWS.add()
def flat_weights_then_to(module):
    halved(module)
    module.to(torch.float32)
    return trained(module)


@ROWS.add()
def flat_weights_then_double(module):
    halved(module)
    module.double()
    return trained(module)


@ROWS.add()
def flat_weights_then_load(module):
    halved(module)
    module.load_state_dict(module.state_dict())
    return trained(module)


@ROWS.add()
def flat_weights_then_flatten(module):
    halved(module)
    module.flatten_parameters()
    return trained(module)


@ROWS.add()
def flat_weights_of_another_module(module):
    other = copy.deepcopy(module).requires_grad_(False)
    for parameter in other.parameters():
        parameter.mul_(0.5)
    module._flat_weights = list(other.requires_grad_()._flat_weights)
    return trained(module), gradients(other)


@ROWS.add()
def flat_weights_of_double(module):
    module._flat_weights = [w.double() for w in module._flat_weights]
    return module(sample(module))


@ROWS.add()
def flat_weights_too_few(module):
    module._flat_weights = module._flat_weights[:-1]
    return module(sample(module))


@ROWS.add()
def flat_weights_as_a_tuple(module):
    module._flat_weights = tuple(w * 0.5 for w in module._flat_weights)
    return module(sample(module))


def recurrent_dropout(base):
    class Dropped(base):
        def forward(self, *args):
            before = self._flat_weights
            self._flat_weights = [nn.functional.dropout(w, 0.5) if w.dim() == 2 else w for w in before]
            try:
                return super().forward(*args)
            finally:
                self._flat_weights = before

    return Dropped


@ROWS.add()
def subclass_with_dropped_weights(module):
    module.__class__ = recurrent_dropout(type(module))
    return trained(module)


@ROWS.add()
def flat_weights_names_changed(module):
    """Only the next attribute that is set reads the names."""
    module._flat_weights_names = [name.replace("weight_ih", "other_ih") for name in module._flat_weights_names]
    module.other_ih_l0 = nn.Parameter(module.weight_ih_l0.detach() * 0.5)
    return trained(module), module.other_ih_l0.grad


@ROWS.add()
def flat_weights_names_alone(module):
    module._flat_weights_names = list(reversed(module._flat_weights_names))
    return module(sample(module))


@ROWS.add()
def parameter_deleted(module):
    del module.weight_hh_l0
    return module(sample(module))


@ROWS.add()
def parameter_is_none(module):
    module.bias_hh_l0 = None
    return module(sample(module))


@ROWS.add(kinds=CELLS)
def cell_parameter_deleted(module):
    del module.weight_hh
    return module(sample(module))


@ROWS.add(kinds=CELLS)
def cell_bias_is_none(module):
    module.bias_ih = None
    return module(sample(module))


@ROWS.add(kinds=CELLS)
def cell_biases_are_none(module):
    module.bias_ih = module.bias_hh = None
    return trained(module)


@ROWS.add(kinds=CELLS)
def cell_bias_attribute_false(module):
    module.bias = False
    return trained(module)


# ------------------------------------------------ attributes that forward reads


def changed(name, value, **options):
    def with_padded(module):
        setattr(module, name, value)
        return module(sample(module))

    def with_states(module):
        setattr(module, name, value)
        return trained(module)

    def with_packed(module):
        setattr(module, name, value)
        return module(packed_of(module))

    def unbatched(module):
        setattr(module, name, value)
        return module(sample(module)[:, 0])

    suffix = "".join(f"_from_{option}" for option in options.values())
    for program in (with_padded, with_states, with_packed, unbatched):
        ROWS.put(f"{name}_{value}_{program.__name__}{suffix}", program, kinds=LAYERS, **options)


changed("bias", False)
changed("bias", True, bias=False)
changed("batch_first", True)
changed("batch_first", False, batch_first=True)
changed("bidirectional", True)
changed("bidirectional", False, bidirectional=True)
changed("num_layers", 2)
changed("num_layers", 1, num_layers=2)
changed("dropout", 0.5, num_layers=2)
changed("dropout", 0, num_layers=2, dropout=0.5)
changed("dropout", 1, num_layers=2)
changed("dropout", 0.5)
changed("dropout", 2.0)
changed("training", False, num_layers=2, dropout=0.5)
changed("mode", "GRU")
changed("mode", "LSTM")
changed("mode", "RNN_RELU")
changed("mode", "RNN_TANH")
changed("mode", "other")
changed("nonlinearity", "relu")


def changed_cell(name, value):
    def program(module):
        setattr(module, name, value)
        return trained(module)

    def without_states(module):
        setattr(module, name, value)
        return module(sample(module))

    ROWS.put(f"cell_{name}_{value}", program, kinds=CELLS)
    ROWS.put(f"cell_{name}_{value}_without_states", without_states, kinds=CELLS)


changed_cell("bias", True)
changed_cell("input_size", 2)
changed_cell("nonlinearity", "relu")
changed_cell("nonlinearity", "other")


@ROWS.add(dropout=0.5, num_layers=2)
def eval_after_training(module):
    module.eval()
    before = module(sample(module))
    module.train()
    return before, trained(module)


@ROWS.parametrize()
def test_row(name, kind):
    ROWS.check(name, kind)


def test_a_difference_is_caught():
    assert_plant_is_caught(ROWS)


SIZES = {"hidden_size": 3, "input_size": 2, "proj_size": 1}


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("kind", [*LAYERS, *CELLS])
def test_sizes_come_from_the_weights(kind, name):
    """torch.nn only checks by these attributes, or ends the process; ours asks the weights and does as before."""
    ours, _ = twins(kind)
    x = sample(ours)
    before = ours(x)
    if hasattr(ours, name):
        setattr(ours, name, SIZES[name])
    assert_same(ours(x), before)


def refused(module):
    torch.set_num_threads(1)
    states = tuple(torch.zeros(1, 2, module.hidden_size) for _ in range(2))
    with pytest.raises((RuntimeError, ValueError)):
        module(sample(module), states)


@pytest.mark.parametrize("size", [3, 5, 500])
def test_a_hidden_size_that_is_not_the_weights_is_refused(size):
    """In a child, for torch.nn's LSTM takes its weights for those of that size and ends the process."""
    ours, _ = twins("lstm")
    ours.hidden_size = size
    process = multiprocessing.get_context("fork").Process(target=refused, args=(ours,))
    process.start()
    process.join(60)
    assert process.exitcode == 0
