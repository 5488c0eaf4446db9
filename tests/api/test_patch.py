"""convert and revert of live models; patch, unpatch and patched for code that builds models itself."""

import copy
import inspect
import io
import pickle
import subprocess
import sys

import pytest
import torch
from support.twins import CELLS, LAYERS, NAMES, assert_bitwise, assert_same, gradients, total, twins
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import rnnfast

KINDS = [*LAYERS, *CELLS]
NAMESPACES = (torch.nn, torch.nn.modules, torch.nn.modules.rnn)


def sample(kind):
    return torch.randn(2, 3) if kind in CELLS else torch.randn(5, 2, 3)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.GRU(3, 4), nn.LSTM(4, 4, proj_size=2), nn.RNN(2, 4, nonlinearity="relu")])
        self.cells = nn.ModuleDict({"lstm": nn.LSTMCell(4, 4), "gru": nn.GRUCell(4, 4), "rnn": nn.RNNCell(4, 4)})
        self.again = self.layers[0]
        self.readout = nn.Linear(4, 2)

    def forward(self, x):
        for layer in self.layers:
            x, _ = layer(x)
        h, _ = self.cells["lstm"](x[-1])
        return self.readout(self.cells["rnn"](self.cells["gru"](h), h))


def recurrent(model):
    return [m for m in model.modules() if isinstance(m, (nn.RNNBase, nn.RNNCellBase))]


# ------------------------------------------------ convert and revert


def test_convert_and_revert_a_model():
    model = Net()
    x = torch.randn(5, 2, 3)
    expected, parameters = model(x), dict(model.named_parameters())
    assert rnnfast.convert(model) is model
    assert {type(m) for m in recurrent(model)} == {getattr(rnnfast, name) for name in NAMES}
    assert model.again is model.layers[0]
    assert_same(model(x), expected)
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    classes = [type(m) for m in model.modules()]
    assert [type(m) for m in rnnfast.convert(model).modules()] == classes, "twice is once"
    assert rnnfast.revert(model) is model
    assert {type(m) for m in recurrent(model)} == {getattr(nn, name) for name in NAMES}
    assert torch.equal(model(x), expected)
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())


def test_not_in_place():
    model = Net().eval()
    x = torch.randn(5, 2, 3)
    converted = rnnfast.convert(model, inplace=False)
    assert {type(m) for m in recurrent(model)} == {getattr(nn, name) for name in NAMES}
    assert {type(m) for m in recurrent(converted)} == {getattr(rnnfast, name) for name in NAMES}
    assert not converted.training and not converted.again.training
    assert_same(converted(x), model(x))
    assert not {id(p) for p in model.parameters()} & {id(p) for p in converted.parameters()}
    reverted = rnnfast.revert(converted, inplace=False)
    assert type(converted.again) is rnnfast.GRU and type(reverted.again) is nn.GRU
    assert_bitwise(reverted.state_dict(), model.state_dict())


@pytest.mark.parametrize("kind", KINDS)
def test_a_module_alone(kind):
    _, theirs = twins(kind)
    x, attributes = sample(kind), dict(vars(theirs))
    expected = theirs(x)
    assert rnnfast.convert(theirs) is theirs
    assert type(theirs) is getattr(rnnfast, (LAYERS | CELLS)[kind][0])
    assert vars(theirs).keys() == attributes.keys()
    assert_same(theirs(x), expected)
    assert type(rnnfast.revert(theirs)).__module__ == "torch.nn.modules.rnn"


def test_what_others_hold_stays_valid():
    """Optimizer, hooks, shared parameters and training flags."""
    models = [Net(), Net()]
    models[1].load_state_dict(models[0].state_dict())
    x, calls, losses = torch.randn(5, 2, 3), [], [[], []]
    for model, history in zip(models, losses, strict=True):
        model.cells["rnn"].weight_ih = nn.Parameter(torch.ones(4, 4) * 0.1)
        model.cells["rnn"].weight_hh = model.cells["rnn"].weight_ih
        model.layers[1].eval()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        model.layers[0].register_forward_hook(lambda m, args, out: calls.append(type(m)))
        model.layers[0].weight_hh_l0.register_hook(lambda grad: grad * 2)
        for _ in range(4):
            optimizer.zero_grad()
            loss = model(x).square().sum()
            loss.backward()
            optimizer.step()
            history.append(loss.item())
            if model is models[0] and len(history) == 2:
                rnnfast.convert(model)
        assert model.training and not model.layers[1].training
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-4, atol=1e-6)
    assert calls == [nn.GRU] * 2 + [rnnfast.GRU] * 2 + [nn.GRU] * 4
    assert models[0].cells["rnn"].weight_hh is models[0].cells["rnn"].weight_ih


@pytest.mark.parametrize("kind", ["rnn_tanh", "gru", "lstm", "grucell"])
def test_parametrized_modules(kind):
    _, theirs = twins(kind)
    name = "weight_hh" if kind in CELLS else "weight_hh_l0"
    parametrizations.weight_norm(theirs, name)
    stock, model = copy.deepcopy(theirs), nn.Sequential(theirs)
    x = sample(kind)
    rnnfast.convert(model)
    ours = model[0]
    assert ours is theirs and isinstance(ours, getattr(rnnfast, (LAYERS | CELLS)[kind][0]))
    assert parametrize.is_parametrized(ours, name) and type(ours).__name__ == type(stock).__name__
    assert_same(ours(x), stock(x))
    for module in (ours, stock):
        total(module(x)).backward()
        torch.optim.SGD(module.parameters(), lr=0.5).step()
    assert_same(gradients(ours), gradients(stock))
    assert_same(ours(x), stock(x))
    rnnfast.revert(model)
    assert not isinstance(ours, getattr(rnnfast, (LAYERS | CELLS)[kind][0]))
    assert_same(ours(x), stock(x))
    rnnfast.convert(model)
    for module in (ours, stock):
        parametrize.remove_parametrizations(module, name)
    assert type(ours) is getattr(rnnfast, (LAYERS | CELLS)[kind][0])
    assert_same(ours(x), stock(x))


class OwnForward(nn.LSTM):
    def forward(self, input, hx=None):
        output, state = super().forward(input, hx)
        return output * 2, state


def test_subclasses_are_left_alone_and_named():
    model = nn.ModuleDict({"own": OwnForward(3, 4), "stock": nn.LSTM(3, 4)})
    with pytest.warns(RuntimeWarning, match="own.*OwnForward") as caught:
        rnnfast.convert(model)
    assert len(caught) == 1 and caught[0].filename == __file__
    assert type(model["own"]) is OwnForward and type(model["stock"]) is rnnfast.LSTM


def test_models_without_recurrent_modules_pass_through():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU())
    assert rnnfast.convert(model) is model and [type(m) for m in model] == [nn.Linear, nn.ReLU]


def test_converted_models_are_saved_and_loaded():
    model, buffer = rnnfast.convert(Net()), io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    x = torch.randn(5, 2, 3)
    assert type(loaded.again) is rnnfast.GRU
    assert_bitwise(loaded(x), model(x))
    fresh = Net()
    fresh.load_state_dict(model.state_dict())
    assert_same(fresh(x), model(x))


# ------------------------------------------------ patch, unpatch, patched


def snapshot():
    spaces = (*NAMESPACES, *(getattr(nn, name) for name in NAMES))
    return [{name: x for name, x in vars(space).items() if name != "__warningregistry__"} for space in spaces]


@pytest.fixture(autouse=True)
def _torch_is_left_untouched():
    """Every test of this file: each namespace of torch has the same names bound to the same objects afterwards."""
    before = snapshot()
    yield
    assert snapshot() == before


def bound():
    return {getattr(namespace, name) for namespace in NAMESPACES for name in NAMES}


OURS, STOCK = {getattr(rnnfast, name) for name in NAMES}, {getattr(nn, name) for name in NAMES}


def test_patched_builds_ours_with_the_same_weights():
    torch.manual_seed(3)
    stock = Net()
    with rnnfast.patched():
        assert bound() == OURS
        from torch.nn.modules.rnn import GRU

        assert GRU is rnnfast.GRU
        torch.manual_seed(3)
        model = Net()
    assert bound() == STOCK
    assert {type(m) for m in recurrent(model)} == OURS and {type(m) for m in recurrent(stock)} == STOCK
    assert_bitwise(model.state_dict(), stock.state_dict())
    x = torch.randn(5, 2, 3)
    assert_same(model(x), stock(x))


def test_nested_and_counted():
    with rnnfast.patched():
        rnnfast.patch()
        with rnnfast.patched():
            assert bound() == OURS
        assert bound() == OURS
        rnnfast.unpatch()
        assert bound() == OURS
    assert bound() == STOCK
    with pytest.raises(RuntimeError, match="unpatch"):
        rnnfast.unpatch()
    assert bound() == STOCK


def test_exceptions_restore():
    with pytest.raises(KeyError, match="inside"), rnnfast.patched():
        raise KeyError("inside")
    assert bound() == STOCK


def test_subclass_defined_under_patched():
    with rnnfast.patched():

        class Doubled(torch.nn.LSTM):
            """A subclass of whatever torch.nn.LSTM is."""

            def __init__(self, *args, **kwargs):
                super().__init__(*args, **kwargs)
                self.scale = 2.0

            def forward(self, input, hx=None):
                output, state = super().forward(input, hx)
                return output * self.scale, state

    assert issubclass(Doubled, rnnfast.LSTM)
    ours, theirs = Doubled(3, 4), nn.LSTM(3, 4)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(5, 2, 3)
    output, state = theirs(x)
    assert_same(ours(x), (output * 2, state))
    assert isinstance(ours, nn.LSTM)


def test_modules_built_before_work_while_patched():
    stock, x = Net(), torch.randn(5, 2, 3)
    expected = stock(x)
    with rnnfast.patched():
        assert torch.equal(stock(x), expected)
        assert torch.equal(copy.deepcopy(stock)(x), expected)
        assert {type(m) for m in recurrent(rnnfast.convert(stock, inplace=False))} == OURS
        assert {type(m) for m in recurrent(stock)} == STOCK
        stock.load_state_dict(stock.state_dict())
        assert isinstance(stock.again, nn.RNNBase)


@pytest.mark.parametrize("name", NAMES)
def test_pickles_cross_the_border(name):
    """Ours pickle and load in and out of patched(); a pickle of a stock module loaded while patched is ours."""
    stock, x = getattr(nn, name)(3, 4), torch.randn(2, 3) if "Cell" in name else torch.randn(5, 2, 3)
    saved = pickle.dumps(stock)
    with rnnfast.patched():
        built = getattr(nn, name)(3, 4)
        inside = pickle.dumps(built)
        assert type(pickle.loads(inside)) is getattr(rnnfast, name)
        revived = pickle.loads(saved)
    assert type(revived) is getattr(rnnfast, name)
    assert_same(revived(x), stock(x))
    assert type(pickle.loads(inside)) is getattr(rnnfast, name)
    assert type(pickle.loads(saved)) is type(stock) is getattr(nn, name)
    assert_bitwise(pickle.loads(inside).state_dict(), built.state_dict())


def test_importing_rnnfast_changes_nothing_in_torch():
    """In a fresh process; and nothing slow is imported on the way."""
    program = """
import sys, torch
before = {space: dict(vars(sys.modules[space])) for space in ("torch", "torch.nn", "torch.nn.modules.rnn", "torch._VF")}
loaded = set(sys.modules)
import rnnfast
for space, names in before.items():
    assert vars(sys.modules[space]) == names, space
new = {name for name in set(sys.modules) - loaded if not name.startswith("rnnfast")}
assert not any(name.split(".")[0] == "torch" and "_dynamo" in name for name in new), sorted(new)
assert not any(name.startswith(("torch._inductor", "torch._functorch", "sympy", "numpy")) for name in new), sorted(new)
rnnfast.GRU(3, 4)(torch.zeros(5, 2, 3))
assert "torch._dynamo" not in sys.modules and "torch._inductor" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_public_names_are_documented():
    for name in ("convert", "revert", "patch", "unpatch", "patched", "explain", "backends", "backend"):
        assert inspect.getdoc(getattr(rnnfast, name)), name
    assert set(rnnfast.__all__) >= {*NAMES, "convert", "revert", "patched", "patch", "unpatch", "functional"}
