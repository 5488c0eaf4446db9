"""The parity rule over calling conventions: packed, lengths, strides, what the loss uses and what needs a gradient."""

from __future__ import annotations

import pytest
import torch
from support import harness
from support.harness import CELLS, Case, check

import rnnfast

# Each cell once, the LSTM also projected.
KINDS = [(cell, 0) for cell in CELLS] + [("lstm", 4)]


def cases(**options) -> list[Case]:
    shape = {"T": 8, "B": 6, "I": 5, "H": 10, **options}
    return [Case(cell, proj=proj, **shape) for cell, proj in KINDS]


RAGGED = cases(ragged="sorted", seed=1) + cases(ragged="unsorted", seed=2) + cases(ragged="lengths", seed=3)
RAGGED += cases(ragged="unsorted", bidirectional=True, layers=2, seed=4, hx=False)
RAGGED += cases(ragged="lengths", bidirectional=True, layers=3, seed=5, bias=False)
RAGGED += cases(ragged="lengths", batch_first=True, seed=6) + cases(ragged="sorted", batch_first=True, seed=7)
RAGGED += cases(ragged="unsorted", T=33, B=17, I=3, H=21, bidirectional=True, seed=8)
RAGGED += cases(ragged="lengths", T=33, B=17, I=3, H=21, bidirectional=True, hx=False, seed=9)
RAGGED += cases(ragged="lengths", loss=("h_n",), bidirectional=True, grads="sum", seed=10)
RAGGED += cases(ragged="sorted", loss=("h_n",), bidirectional=True, layers=2, seed=11)
RAGGED += cases(ragged="lengths", layout="transposed", grads="transposed", seed=12)


@pytest.mark.parametrize("case", RAGGED, ids=str)
def test_ragged(case):
    check(case)


STATE = cases(hx=False) + cases(hx=False, batch_first=True, bidirectional=True) + cases(batch_first=True, layers=2)


@pytest.mark.parametrize("case", STATE, ids=str)
def test_state_and_batch_first(case):
    check(case)


LAYOUTS = [
    case
    for layout, grads in [
        ("transposed", "sum"),
        ("strided", "transposed"),
        ("expanded", "sum"),
        ("expanded", "transposed"),
    ]
    for case in cases(layout=layout, grads=grads, bidirectional=grads == "sum", layers=2)
]


@pytest.mark.parametrize("case", LAYOUTS, ids=str)
def test_strides(case):
    check(case)


LOSSES = (
    cases(loss=("output",)) + cases(loss=("h_n",), layers=2) + cases(loss=("output",), grads="sum", bidirectional=True)
)
LOSSES += [
    case for case in cases(loss=("c_n",)) + cases(loss=("h_n", "c_n"), bidirectional=True) if case.cell == "lstm"
]


@pytest.mark.parametrize("case", LOSSES, ids=str)
def test_partial_losses(case):
    check(case)


WRT = [
    ("input",),
    ("hx",),
    ("weights",),
    ("input", "hx", "cx"),
    ("weight_hh_l0",),
    ("bias_ih_l0", "weight_ih_l1_reverse"),
]


@pytest.mark.parametrize(
    "case", [case for wrt in WRT for case in cases(wrt=wrt, layers=2, bidirectional=True)], ids=str
)
def test_partial_gradients(case):
    check(case)


def test_lstm_wrt_cx_only():
    check(Case("lstm", 4, 3, 5, 6, wrt=("cx",)))
    check(Case("lstm", 4, 3, 5, 6, proj=2, wrt=("cx",), loss=("c_n",)))


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_lengths_equal_rows_run_alone(cell, index_dtype):
    """Close to each row run alone (bit equality is not asked); beyond a row's length the output is exactly 0."""
    case = Case(cell, T=9, B=7, I=4, H=13, bidirectional=True, ragged="lengths", seed=2)
    module, data = harness.make_module(rnnfast, case), harness.Data(case)
    with rnnfast.backend("cpu", strict=True), torch.no_grad():
        hx = (data.hx, data.cx) if cell == "lstm" else data.hx
        output, states = module(data.input, hx, lengths=data.lengths.to(index_dtype))
        states = states if cell == "lstm" else (states,)
        for row, length in enumerate(data.lengths.tolist()):
            assert not output[length:, row].any()
            row_hx = (data.hx[:, [row]], data.cx[:, [row]]) if cell == "lstm" else data.hx[:, [row]]
            if length == 0:
                for state, initial in zip(states, hx if cell == "lstm" else (hx,), strict=True):
                    assert torch.equal(state[:, row], initial[:, row])
                continue
            alone, alone_states = module(data.input[:length, [row]], row_hx)
            torch.testing.assert_close(output[:length, [row]], alone, rtol=1e-5, atol=1e-6)
            for state, own in zip(states, alone_states if cell == "lstm" else (alone_states,), strict=True):
                torch.testing.assert_close(state[:, [row]], own, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("cell", CELLS)
def test_what_lies_beyond_a_length_is_never_read(cell):
    """NaN in the padding changes nothing, neither values nor gradients; the padding's own gradient is 0."""
    case = Case(cell, T=6, B=5, I=4, H=9, bidirectional=True, ragged="lengths", seed=1)
    module, data = harness.make_module(rnnfast, case), harness.Data(case)
    beyond = torch.arange(case.T)[:, None] >= data.lengths[None, :]
    results = []
    for filler in (0.0, torch.nan):
        x = data.input.masked_fill(beyond[:, :, None], filler).requires_grad_()
        with rnnfast.backend("cpu", strict=True):
            output, _ = module(x, lengths=data.lengths)
        grad_output = data.grads["output"].masked_fill(beyond[:, :, None], filler)
        grads = torch.autograd.grad(output, [x, *module.parameters()], grad_output)
        assert not grads[0][beyond].any()
        results.append([output.detach(), *grads])
    for clean, poisoned in zip(*results, strict=True):
        assert torch.equal(clean, poisoned)
