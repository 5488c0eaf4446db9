"""The CUDA path on CPU tensors: parity cases of harness.py through the operators that the emulator runs."""

from __future__ import annotations

import contextlib

import pytest
import torch

from rnnfast import _ext, autograd
from rnnfast.precision import follow_switch
from rnnfast.rows import Rows
from support.harness import Case, Data, conditioning, decide_relu, make_module, run, run_oracle, run_stock, run_values
from support.tolerances import CEILING, assert_parity, max_error

Tensor = torch.Tensor
NAMESPACE = _ext.EMULATOR_NAMESPACE
needs_emulator = pytest.mark.skipif(_ext.emulator_failure is not None, reason=str(_ext.emulator_failure))


@contextlib.contextmanager
def tf32():
    """Within the block float32 layers multiply in TF32."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RNNFAST_FLOAT32_PRODUCTS", "tf32")
        follow_switch(NAMESPACE)
        try:
            yield
        finally:
            patch.undo()
            follow_switch(NAMESPACE)


def layer_forward(case: Case, data: Data, weights: list[Tensor]):
    """`forward` of harness.run: one layer, packed and padded as the case says."""

    def forward(x, hx):
        states = [None] * (2 if case.cell == "lstm" else 1)
        batch_sizes = lengths = packed = None
        if hx is not None:
            states = list(hx) if case.cell == "lstm" else [hx]
        if case.ragged == "lengths":
            lengths = data.lengths
        elif case.ragged:
            packed = torch.nn.utils.rnn.pack_padded_sequence(x, data.lengths)
            x, batch_sizes = packed.data, packed.batch_sizes
        output, *finals = autograd.layer(case.cell, x, states, weights, Rows(batch_sizes, lengths), NAMESPACE)
        if packed is not None:
            packed = packed._replace(data=output)
            output, _ = torch.nn.utils.rnn.pad_packed_sequence(packed, total_length=case.T)
        return output, *finals, *([None] * (2 - len(finals)))

    return forward


def check(case: Case) -> None:
    """Asserts the parity rule for one layer, with gradients and under no_grad."""
    assert case.layers == 1 and case.ragged in (None, "sorted", "lengths")
    data = Data(case)
    stock = make_module(torch.nn, case)
    reference, of_torch = run_oracle(case, data, stock), run_stock(case, data, stock)
    parameters = {name: parameter.detach().clone() for name, parameter in stock.named_parameters()}
    forward = layer_forward(case, data, list(parameters.values()))
    actual = run(case, data, forward, parameters, case.dtype)
    inferred = run_values(case, data, forward, case.dtype)
    options = {
        "value_terms": case.I + case.H,
        "gradient_terms": max(case.T * case.B, 4 * case.H),
        "conditioning": lambda: conditioning(case, data, stock),
    }
    assert_parity(actual, of_torch, reference, case.dtype, **options)
    values = ({name: results[name] for name in inferred} for results in (of_torch, reference))
    assert_parity(inferred, *values, case.dtype, **options)


def check_tf32(case: Case) -> None:
    """TF32 has float16's mantissa, so its ceiling; torch's CPU products have no TF32 to compare with."""
    assert case.dtype == torch.float32
    data = Data(case)
    stock = make_module(torch.nn, case)
    if case.cell == "rnn_relu":
        with torch.no_grad():
            decide_relu(stock)
    reference = run_oracle(case, data, stock)
    parameters = {name: parameter.detach().clone() for name, parameter in stock.named_parameters()}
    with tf32():
        actual = run(case, data, layer_forward(case, data, list(parameters.values())), parameters, case.dtype)
    errors = {
        name: max_error(actual[name], truth) / max(float(truth.abs().max()), 1e-3) for name, truth in reference.items()
    }
    assert max(errors.values()) <= CEILING[torch.float16], errors
    if case.H > 4 and case.T > 1:
        assert errors["output"] > 1e-6, f"no product was rounded to TF32: {errors}"
