"""The Triton kernels in Triton's interpreter: the parity rule. See also test_triton_group.py and test_triton_ops.py.

conftest.py sets TRITON_INTERPRET, so the backend takes CPU tensors. The interpreter costs 10 to 50 ms per time step and
program, hence the small shapes.
"""

import pytest
import torch
from support.harness import CELLS, Case, check

from rnnfast.triton import configs, plan

KINDS = [(cell, 0) for cell in CELLS] + [("lstm", 9)]
BF16, F16 = torch.bfloat16, torch.float16
DTYPES = (torch.float32, BF16, F16)


@pytest.fixture(params=["whole", "step"])
def kind(request, monkeypatch):
    """The two kinds of kernel that the interpreter can run one program after the other."""
    if request.param == "whole":  # no other kind may stand in for it
        # Exact projected layers have no tile. The interpreter multiplies exactly in any case.
        monkeypatch.setenv("RNNFAST_FLOAT32_PRODUCTS", "tf32")
        monkeypatch.setattr(plan, "STEP_TILES", {key: [] for key in plan.STEP_TILES})
    else:
        monkeypatch.setattr(plan, "WHOLE_TILES", {})
        small = configs.StepTile(0, 16, 16, 32, 4, 2, 0)  # several blocks of columns, several programs
        monkeypatch.setattr(plan, "STEP_TILES", {key: [small] for key in plan.STEP_TILES})
    return request.param


@pytest.mark.parametrize("ragged", [None, "lengths", "unsorted"])
@pytest.mark.parametrize("bidirectional", [False, True], ids=["one-way", "both-ways"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("cell", "proj"), KINDS)
def test_parity(cell, proj, dtype, bidirectional, ragged, kind):
    check(Case(cell, 3, 5, 7, 20, proj=proj, bidirectional=bidirectional, ragged=ragged, dtype=dtype), "triton")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("cell", "steps", "batch", "hidden_size"),
    [(cell, *shape) for cell in CELLS for shape in ((1, 1, 1), (2, 17, 5), (3, 1, 33))],
)
def test_odd_shapes(cell, steps, batch, hidden_size, dtype):
    check(Case(cell, steps, batch, 3, hidden_size, dtype=dtype, bidirectional=batch == 17), "triton")


@pytest.mark.quick(1)
@pytest.mark.parametrize("cell", CELLS)
def test_units_that_do_not_fit_into_one_program(cell):
    check(Case(cell, 2, 3, 4, 257), "triton")
