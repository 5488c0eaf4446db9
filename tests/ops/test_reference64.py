"""The oracle and the rule themselves: the oracle equals torch.nn in float64, and the rule can fail."""

from __future__ import annotations

import pytest
import torch
from support import harness
from support.harness import CELLS, Case, Data
from support.tolerances import CEILING, allowed_error, assert_parity, max_error, violation

F64 = torch.float64
CASES = [Case(cell, T=7, B=4, I=3, H=5, dtype=F64) for cell in CELLS]
CASES += [
    Case(cell, T=6, B=3, I=2, H=4, layers=2, bidirectional=True, bias=False, hx=False, dtype=F64) for cell in CELLS
]
CASES += [Case(cell, T=6, B=5, I=3, H=4, layers=2, bidirectional=True, ragged="sorted", dtype=F64) for cell in CELLS]
CASES += [
    Case("lstm", T=5, B=3, I=3, H=5, proj=2, dtype=F64),
    Case("lstm", T=5, B=4, I=3, H=5, proj=2, layers=2, bidirectional=True, ragged="unsorted", dtype=F64),
    Case("lstm", T=5, B=4, I=3, H=5, proj=2, layers=3, bias=False, ragged="lengths", dtype=F64),
    Case("gru", T=5, B=6, I=3, H=4, bidirectional=True, layers=2, ragged="lengths", dtype=F64),
    Case("gru", T=5, B=3, I=3, H=4, hx=False, ragged="lengths", layout="expanded", grads="sum", dtype=F64),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_oracle_equals_torch(case):
    module = harness.make_module(torch.nn, case)
    data = Data(case)
    reference = harness.run_oracle(case, data, module)
    of_torch = harness.run_stock(case, data, module)
    assert reference.keys() == of_torch.keys()
    for name, value in reference.items():
        torch.testing.assert_close(
            value, of_torch[name], rtol=1e-11, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}"
        )


def test_lengths_equal_rows_run_alone():
    case = Case("lstm", T=6, B=4, I=3, H=5, proj=2, bidirectional=True, layers=2, ragged="lengths", dtype=F64)
    module, data = harness.make_module(torch.nn, case), Data(case)
    together = harness.run_oracle(case, data, module)
    for row, length in enumerate(data.lengths.tolist()):
        assert not together["output"][length:, row].any()
        if length == 0:
            assert torch.equal(together["h_n"][:, row], data.hx[:, row])
            assert torch.equal(together["c_n"][:, row], data.cx[:, row])
            continue
        states = data.hx[:, row : row + 1], data.cx[:, row : row + 1]
        alone, (h_n, c_n) = module(data.input[:length, row : row + 1], states)
        torch.testing.assert_close(together["output"][:length, row], alone[:, 0])
        torch.testing.assert_close(together["h_n"][:, row], h_n[:, 0])
        torch.testing.assert_close(together["c_n"][:, row], c_n[:, 0])


@pytest.mark.parametrize("dtype", CEILING, ids=str)
def test_rule_accepts_torch_and_refuses_more(dtype):
    """The rule must be able to fail: torch itself passes, and twice the error that it allows does not."""
    case = Case("gru", T=9, B=4, I=3, H=8, dtype=dtype)
    module, data = harness.make_module(torch.nn, case), Data(case)
    reference, of_torch = harness.run_oracle(case, data, module), harness.run_stock(case, data, module)
    assert_parity(of_torch, of_torch, reference, dtype)
    for name, truth in reference.items():
        torch_error = max_error(of_torch[name], truth)
        allowed = allowed_error(truth, torch_error, dtype, name.startswith("grad_"))
        assert 0 < allowed <= 3e-2 * float(truth.abs().max())
        spoiled = truth.clone().flatten()
        spoiled[0] += 2 * allowed
        assert violation(name, spoiled.view_as(truth).to(F64), of_torch[name].double(), truth, dtype) is not None
        spoiled[0] = torch.nan
        assert violation(name, spoiled.view_as(truth).to(dtype), of_torch[name], truth, dtype) is not None
    with pytest.raises(AssertionError, match="parity rule broken"):
        assert_parity({**of_torch, "output": of_torch["output"] * 1.1}, of_torch, reference, dtype)


def test_uninitialised_memory_is_poisoned():
    x = torch.ones(2, 3)
    for poisoned in (torch.empty(4), torch.empty_like(x), x.new_empty(5), torch.empty_strided((3,), (2,))):
        assert poisoned.isnan().all()
