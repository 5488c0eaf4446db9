"""Weights that change between calls, in every way a program can change them: the next call must use the new ones."""

import gc
import warnings
import weakref

import pytest
import torch
from support.twins import (
    CELLS,
    LAYERS,
    assert_bitwise,
    assert_same,
    cells_take_the_kernels,  # noqa: F401
    gradients,
    state_of,
    tensors,
    total,
    twins,
)
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import rnnfast


def sample(kind, batch=2):
    return torch.randn(batch, 3) if kind in CELLS else torch.randn(5, batch, 3)


def hh(module):
    return "weight_hh" if isinstance(module, nn.RNNCellBase) else "weight_hh_l0"


def weight(module):
    return getattr(module, hh(module))


# ------------------------------------------------ in place and by replacement


def optimizer_step(module, make):
    optimizer = make(module.parameters())
    for i, parameter in enumerate(module.parameters()):
        parameter.grad = torch.full_like(parameter, 0.1 * (i + 1))
    optimizer.step()


def write_through_numpy(module):
    weight(module).detach().numpy()[...] *= -1.5  # neither data_ptr nor _version changes


def in_inference_mode(module):
    with torch.inference_mode():
        weight(module).mul_(-1.5)


def copy_under_no_grad(module):
    with torch.no_grad():
        weight(module).copy_(weight(module).flip(0))


def swap_data(module):
    weight(module).data = weight(module).detach().flip(0).clone()


def swap_data_at_the_same_address(module):
    """A new tensor of version 0 where the old one lay."""
    parameter = weight(module)
    values = parameter.detach().flip(0).clone()
    parameter.data = torch.empty(0)
    parameter.data = values.clone()


def replace_parameter(module):
    setattr(module, hh(module), nn.Parameter(weight(module).detach().flip(0).clone()))


def replace_in_dict(module):
    module._parameters[hh(module)] = nn.Parameter(weight(module).detach().flip(0).clone())


def replace_by_plain_tensor(module):
    values = weight(module).detach().flip(0).clone()
    delattr(module, hh(module))
    setattr(module, hh(module), values)


def load(module, assign):
    state = {name: value.flip(0).clone() for name, value in module.state_dict().items()}
    module.load_state_dict(state, assign=assign)


def transposed_storage(module):
    """The same shape over memory of another order."""
    parameter = weight(module)
    parameter.data = parameter.detach().flip(0).t().contiguous().t()


def from_vector(module):
    vector = nn.utils.parameters_to_vector(module.parameters())
    nn.utils.vector_to_parameters(vector.detach() * -1.5, module.parameters())


def through_other_dtype(module):
    with torch.no_grad():
        module.double()
        weight(module).mul_(-1.5)
        module.float()


CHANGES = {
    "sgd": lambda m: optimizer_step(m, lambda p: torch.optim.SGD(p, lr=1.0)),
    "sgd_foreach": lambda m: optimizer_step(m, lambda p: torch.optim.SGD(p, lr=1.0, foreach=True)),
    "adam_fused": lambda m: optimizer_step(m, lambda p: torch.optim.Adam(p, lr=0.5, fused=True)),
    "data.mul_": lambda m: weight(m).data.mul_(-1.5),
    "detach.fill_": lambda m: weight(m).detach()[0].fill_(1.0),
    "data=": swap_data,
    "data=_same_address": swap_data_at_the_same_address,
    "copy_": copy_under_no_grad,
    "numpy": write_through_numpy,
    "inference_mode": in_inference_mode,
    "init": lambda m: nn.init.orthogonal_(weight(m), generator=torch.Generator().manual_seed(3)),
    "setattr": replace_parameter,
    "_parameters": replace_in_dict,
    "plain_tensor": replace_by_plain_tensor,
    "load_state_dict": lambda m: load(m, assign=False),
    "load_state_dict_assign": lambda m: load(m, assign=True),
    "transposed": transposed_storage,
    "vector_to_parameters": from_vector,
    "to_double_and_back": through_other_dtype,
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("kind", ["rnn_tanh", "gru", "lstm", "lstm_proj", "rnncell_tanh", "grucell", "lstmcell"])
def test_next_call_sees_the_change(kind, change):
    ours, theirs = twins(kind)
    x, hx = sample(kind), state_of(theirs, 2)
    with torch.no_grad():
        before = ours(x, hx)
    assert_same(ours(x, hx), before)
    for module in (ours, theirs):
        CHANGES[change](module)
    expected = theirs(x, hx)
    assert not torch.allclose(tensors(expected)[0], tensors(before)[0], atol=1e-3), "the change changes nothing"
    with torch.no_grad():
        assert_same(ours(x, hx), expected, "no_grad")
    with torch.inference_mode():
        assert_same(ours(x, hx), expected, "inference_mode")
    assert_same(ours(x, hx), expected, "grad")


@pytest.mark.parametrize("kind", [*LAYERS, *CELLS])
def test_training_steps_coincide(kind):
    ours, theirs = twins(kind)
    x = sample(kind)
    losses = [[], []]
    for module, history in zip((ours, theirs), losses, strict=True):
        optimizer = torch.optim.Adam(module.parameters(), lr=0.05)
        for _ in range(8):
            optimizer.zero_grad()
            loss = sum((t - 0.5).square().mean() for t in tensors(module(x)))
            loss.backward()
            optimizer.step()
            with torch.no_grad():  # an evaluation between the steps must not freeze anything
                history.append(sum((t - 0.5).square().mean() for t in tensors(module(x))))
    assert losses[1][-1] < losses[1][0]
    torch.testing.assert_close(torch.stack(losses[0]), torch.stack(losses[1]), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=1e-3, atol=1e-5)


def test_nested_modules_train_alike():
    """Encoder and decoder with attention over all states, states carried across, gradient clipping."""

    class Model(nn.Module):
        def __init__(self, library):
            super().__init__()
            self.encoder = library.GRU(3, 4, bidirectional=True)
            self.decoder = library.GRUCell(8, 8)
            self.readout = nn.Linear(8, 3)

        def forward(self, x):
            memory, state = self.encoder(x)
            hidden, outputs = torch.cat([state[0], state[1]], -1), []
            for _ in range(3):
                attention = torch.softmax(torch.einsum("tbh,bh->tb", memory, hidden), 0)
                hidden = self.decoder(torch.einsum("tb,tbh->bh", attention, memory), hidden)
                outputs.append(self.readout(hidden))
            return torch.stack(outputs)

    ours, theirs = Model(rnnfast), Model(nn)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(5, 2, 3)
    histories = []
    for model in (ours, theirs):
        optimizer, history = torch.optim.Adam(model.parameters(), lr=0.01), []
        for _ in range(5):
            optimizer.zero_grad()
            loss = (model(x) - x[:3]).square().mean()
            loss.backward()
            history.append((loss.detach(), nn.utils.clip_grad_norm_(model.parameters(), 0.5)))
            optimizer.step()
        histories.append(torch.tensor(history))
    torch.testing.assert_close(histories[0], histories[1], rtol=1e-4, atol=1e-6)


# ------------------------------------------------ sharing


def test_one_parameter_in_two_modules():
    pairs = [twins("gru"), twins("gru")]
    x = torch.randn(5, 2, 3)
    for side in (0, 1):
        first, second = pairs[0][side], pairs[1][side]
        for name in first._flat_weights_names:
            setattr(second, name, getattr(first, name))
        optimizer = torch.optim.SGD(first.parameters(), lr=0.5)
        total(second(first(x)[0][..., :3])).backward()
        optimizer.step()
    (ours, theirs), (ours_second, theirs_second) = pairs
    assert_same(gradients(ours), gradients(theirs))
    assert_bitwise(ours(x), ours_second(x))
    assert_same(ours_second(x), theirs_second(x))


def test_one_parameter_twice_in_one_module():
    ours, theirs = twins("lstm", 4, 4, num_layers=2)
    x = torch.randn(5, 2, 4)
    for module in (ours, theirs):
        module.weight_hh_l1 = module.weight_hh_l0
        total(module(x)).backward()
    assert_same(gradients(ours), gradients(theirs))


def test_replicas_made_by_hand_share_weights():
    """The way torch.nn.parallel.replicate builds a module: a new object, parameters set as plain attributes."""
    ours, theirs = twins("lstm")
    replica = ours._replicate_for_data_parallel()
    for name, parameter in ours.named_parameters():
        setattr(replica, name, parameter.clone())
    x = torch.randn(5, 2, 3)
    assert_same(replica(x), theirs(x))
    total(replica(x)).backward()
    total(theirs(x)).backward()
    assert_same(gradients(ours), gradients(theirs))


# ------------------------------------------------ parametrizations


def legacy_weight_norm(module, name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.utils.weight_norm(module, name)


class Doubled(nn.Module):
    def forward(self, value):
        return 2 * value


PARAMETRIZATIONS = {
    "weight_norm": parametrizations.weight_norm,
    "legacy_weight_norm": legacy_weight_norm,
    # Every read of the weight iterates once more, and torch.nn reads it several times a call: iterate until it rests.
    "spectral_norm": lambda module, name: parametrizations.spectral_norm(module, name, n_power_iterations=50),
    "orthogonal": parametrizations.orthogonal,
    "own": lambda module, name: parametrize.register_parametrization(module, name, Doubled()),
    "prune": lambda module, name: prune.l1_unstructured(module, name, 0.5),
}


@pytest.mark.parametrize("how", PARAMETRIZATIONS)
@pytest.mark.parametrize("kind", ["rnn_tanh", "gru", "lstm", "lstm_proj", "grucell"])
def test_parametrization(kind, how):
    ours, theirs = twins(kind)
    x, results = sample(kind), []
    for module in (ours, theirs):
        torch.manual_seed(1)
        PARAMETRIZATIONS[how](module, hh(module))
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        history = []
        for _ in range(3):
            optimizer.zero_grad()
            output = module(x)
            total(output).backward()
            history.append((output, dict(gradients(module))))
            optimizer.step()
        results.append(history)
    assert isinstance(ours, type(twins(kind)[0]))
    for (output, grads), (expected, expected_grads) in zip(*results, strict=True):
        torch.testing.assert_close(tensors(output), tensors(expected), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(grads, expected_grads, rtol=1e-3, atol=1e-5)
    assert not torch.equal(tensors(results[0][0][0])[0], tensors(results[0][-1][0])[0])
    if how in ("own", "weight_norm"):
        parametrize.remove_parametrizations(ours, hh(ours))
        parametrize.remove_parametrizations(theirs, hh(theirs))
        assert_same(ours(x), theirs(x))


class WeightDrop(nn.Module):
    """DropConnect on the recurrent weights: the layer sees another plain tensor at every forward."""

    def __init__(self, layer, p=0.5):
        super().__init__()
        self.layer, self.p = layer, p
        raw = layer.weight_hh_l0
        del layer._parameters["weight_hh_l0"]
        self.raw = nn.Parameter(raw.detach())
        layer.flatten_parameters = lambda *args, **kwargs: None

    def forward(self, *args):
        self.layer.weight_hh_l0 = nn.functional.dropout(self.raw, self.p, self.training)
        return self.layer(*args)


@pytest.mark.parametrize("kind", LAYERS)
def test_weight_drop(kind):
    ours, theirs = (WeightDrop(module) for module in twins(kind))
    x, hx = torch.randn(5, 2, 3), state_of(ours.layer, 2)
    outputs = []
    for _ in range(3):
        torch.manual_seed(len(outputs))
        output = ours(x, hx)
        torch.manual_seed(len(outputs))
        expected = theirs(x, hx)
        assert_same(output, expected)
        total(output).backward()
        total(expected).backward()
        outputs.append(tensors(output)[0])
    assert_same(gradients(ours), gradients(theirs))
    assert not torch.equal(outputs[0], outputs[1])
    assert_same(ours.eval()(x, hx), theirs.eval()(x, hx))


@pytest.mark.parametrize("kind", [*LAYERS, *CELLS])
def test_functional_call(kind):
    ours, theirs = twins(kind)
    x, before = sample(kind), ours.state_dict()
    before = {name: value.clone() for name, value in before.items()}
    results = []
    for module in (ours, theirs):
        given = {name: (p.detach() * -1.5).requires_grad_() for name, p in module.named_parameters()}
        output = torch.func.functional_call(module, given, (x,))
        total(output).backward()
        results.append((output, {name: value.grad for name, value in given.items()}))
        assert all(parameter.grad is None for parameter in module.parameters())
    assert_same(*results)
    assert not torch.equal(tensors(results[0])[0], tensors(ours(x))[0])
    assert_bitwise(ours.state_dict(), before)
    assert_same(ours(x), theirs(x))


@pytest.mark.parametrize("kind", LAYERS)
def test_partial_functional_call(kind):
    ours, theirs = twins(kind, num_layers=2)
    x, given = sample(kind), {"weight_hh_l1": torch.randn_like(theirs.weight_hh_l1)}
    assert_same(torch.func.functional_call(ours, given, x), torch.func.functional_call(theirs, given, x))
    assert_same(ours(x), theirs(x))


def test_dead_modules_free_their_weights():
    """No registry of ours may keep weights alive."""
    ours = rnnfast.GRU(3, 4)
    total(ours(torch.randn(5, 2, 3))).backward()
    references = [weakref.ref(parameter) for parameter in ours.parameters()]
    del ours
    gc.collect()
    assert [reference() for reference in references] == [None] * len(references)
