"""RNNCell, GRUCell and LSTMCell by the parity rule: one step, many steps, unbatched, every gradient."""

from __future__ import annotations

import pytest
import torch
from support import reference64
from support.tolerances import CEILING, assert_parity

import rnnfast

KINDS = {
    "rnn_tanh": ("RNNCell", {"nonlinearity": "tanh"}),
    "rnn_relu": ("RNNCell", {"nonlinearity": "relu"}),
    "gru": ("GRUCell", {}),
    "lstm": ("LSTMCell", {}),
}
SHAPES = [(1, 2, 1), (3, 4, 5), (65, 33, 63), (1, 7, 100), (2, 130, 640), (16, 3, 128)]  # B, I, H
DTYPES = list(CEILING)


def make(kind: str, input_size: int, hidden_size: int, dtype: torch.dtype, bias: bool = True):
    """The cell of torch.nn and that of rnnfast with equal weights."""
    name, options = KINDS[kind]
    stock = getattr(torch.nn, name)(input_size, hidden_size, bias=bias, dtype=dtype, **options)
    fast = getattr(rnnfast, name)(input_size, hidden_size, bias=bias, dtype=dtype, **options)
    fast.load_state_dict(stock.state_dict())
    return stock, fast


def steps(forward, xs, states, parameters, grads) -> dict[str, torch.Tensor]:
    """Runs the cell over the first dimension of `xs`; the last states and the gradients of everything."""
    leaves = {"input": xs, **dict(zip(("hx", "cx"), states, strict=False)), **parameters}
    leaves = {name: leaf.detach().requires_grad_() for name, leaf in leaves.items()}
    states = [leaves[name] for name in ("hx", "cx") if name in leaves]
    own = {name: leaves[name] for name in parameters}
    for x in leaves["input"]:
        states = forward(own, x, states)
    found = torch.autograd.grad(states, list(leaves.values()), [grad.to(xs.dtype) for grad in grads])
    results = dict(zip(("h", "c"), (state.detach() for state in states), strict=False))
    return results | {f"grad_{name}": grad for name, grad in zip(leaves, found, strict=True)}


def run_module(module, kind, xs, states, grads):
    def forward(parameters, x, states):
        hx = tuple(states) if kind == "lstm" else states[0]
        new = torch.func.functional_call(module, parameters, (x, hx))
        return list(new) if kind == "lstm" else [new]

    return steps(forward, xs, states, dict(module.named_parameters()), grads)


def run_oracle(module, kind, xs, states, grads, pre_activations):
    def forward(parameters, x, states):
        parameters = {"bias_ih": None, "bias_hh": None, "weight_hr": None, **parameters}
        if kind == "lstm":
            return list(reference64.lstm_step(x, *states, parameters))
        if kind == "gru":
            return [reference64.gru_step(x, *states, parameters)]
        h, pre = reference64.rnn_step(x, *states, parameters, kind.removeprefix("rnn_"))
        pre_activations.append(pre.detach())
        return [h]

    parameters = {name: p.detach().double() for name, p in module.named_parameters()}
    return steps(forward, xs.double(), [s.double() for s in states], parameters, grads)


def check(
    kind: str, batch: int, input_size: int, hidden_size: int, dtype: torch.dtype, count: int = 1, bias: bool = True
):
    stock, fast = make(kind, input_size, hidden_size, dtype, bias)
    generator = torch.Generator().manual_seed(batch + hidden_size)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    xs = randn(count, batch, input_size)
    states = [randn(batch, hidden_size) for _ in range(2 if kind == "lstm" else 1)]
    grads = [randn(batch, hidden_size) for _ in states]
    pre_activations: list[torch.Tensor] = []
    run_oracle(stock, kind, xs, states, grads, pre_activations)
    if kind == "rnn_relu":  # no gradient into units of a row that is at relu's kink
        kink = torch.stack([pre.abs() <= CEILING[dtype] for pre in pre_activations]).any(dim=0)
        grads = [grad.masked_fill(kink if count == 1 else kink.any(dim=1, keepdim=True), 0) for grad in grads]
        assert grads[0].any()
    reference = run_oracle(stock, kind, xs, states, grads, [])
    of_torch = run_module(stock, kind, xs, states, grads)
    with rnnfast.backend("cpu", strict=True):
        actual = run_module(fast, kind, xs, states, grads)
    terms = {"value_terms": input_size + hidden_size, "gradient_terms": max(batch * count, 4 * hidden_size)}
    assert_parity(actual, of_torch, reference, dtype, **terms)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_one_step_fp32(kind, shape):
    check(kind, *shape, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_dtypes_and_no_bias(kind, dtype):
    check(kind, 5, 4, 21, dtype)
    check(kind, 5, 4, 21, dtype, bias=False)


@pytest.mark.parametrize("kind", KINDS)
def test_many_steps(kind):
    check(kind, 8, 5, 17, torch.float32, count=12)


@pytest.mark.parametrize("kind", KINDS)
def test_unbatched_default_state_and_strides(kind):
    stock, fast = make(kind, 6, 11, torch.float32)
    x = torch.randn(6, 9).t()  # [9, 6], not contiguous
    state = torch.randn(1, 11).expand(9, 11)
    hx = (state, state * 0.5) if kind == "lstm" else state
    row_hx = (state[0], state[1] * 0.5) if kind == "lstm" else state[0]
    with rnnfast.backend("cpu", strict=True):
        for arguments in [(x,), (x, hx), (x[0],), (x[0], row_hx)]:
            torch.testing.assert_close(fast(*arguments), stock(*arguments), rtol=1e-5, atol=1e-6)
    assert torch.equal(state, state[:1].expand(9, 11))


@pytest.mark.parametrize("kind", KINDS)
def test_cell_steps_equal_the_layer(kind):
    """The layer run step by step through the cell, with the layer's own weights."""
    _, cell = make(kind, 5, 19, torch.float32)
    name, options = KINDS[kind]
    layer = getattr(rnnfast, name.removesuffix("Cell"))(5, 19, **options)
    layer.load_state_dict({f"{key}_l0": value for key, value in cell.state_dict().items()})
    xs = torch.randn(10, 3, 5)
    with rnnfast.backend("cpu", strict=True), torch.no_grad():
        output, _ = layer(xs)
        hx = None
        for x, expected in zip(xs, output, strict=True):
            hx = cell(x, hx)
            torch.testing.assert_close(hx[0] if kind == "lstm" else hx, expected, rtol=1e-5, atol=1e-6)
