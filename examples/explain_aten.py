"""What to do when `explain` says "aten": the usual causes that torch's own operator runs, and their cures.

Run it: python examples/explain_aten.py [--small]
"""

import sys

import torch
from torch import nn

import rnnfast

SMALL = "--small" in sys.argv
HIDDEN = 16 if SMALL else 128


def show(cause: str, before, cure: str, after) -> None:
    """Prints what `explain` answered before and after the cure."""
    reason = "it was requested" if before.requested else next(iter(before.passed_over.values()))
    print(f"\n{cause}\n  explain says {before.backend!r}: {reason}\n  {cure}\n  explain says {after.backend!r}")


torch.manual_seed(0)
lstm, x = rnnfast.LSTM(8, HIDDEN), torch.randn(20, 4, 8)
usual = rnnfast.explain(lstm, x)
print(usual)  # str() of an explanation is the whole text; its fields are for programs

# RNNFAST_BACKEND=aten in the environment does the same for a whole process.
with rnnfast.backend("aten"):
    explanation = rnnfast.explain(lstm, x)
show("1. A backend was requested.", explanation, "Leave the block, or unset RNNFAST_BACKEND.", usual)

explanation = rnnfast.explain(lstm, x.double())  # torch's operator raises its own error for this call
cured = rnnfast.explain(lstm, x.double().to(lstm.weight_ih_l0.dtype))
show("2. Input and weights differ in dtype.", explanation, "Give both the same dtype, or use autocast.", cured)

explanation = rnnfast.explain(lstm.to("meta"), x.to("meta"))
lstm.to_empty(device="cpu").reset_parameters()  # or load_state_dict
show("3. The tensors are on a device without kernels.", explanation, "Move both.", rnnfast.explain(lstm, x))

# Torch's operator is the faster one here, so this "aten" needs no cure. A request overrules it.
cell, row = rnnfast.GRUCell(8, HIDDEN).half(), torch.randn(1, 8).half()
explanation = rnnfast.explain(cell, row)
with rnnfast.backend("cpu"):
    cured = rnnfast.explain(cell, row)
show("4. A cell takes one row in a 16-bit type.", explanation, "Ask for backend 'cpu', or use float32.", cured)

explanations = []


def loss(x: torch.Tensor) -> torch.Tensor:
    explanations.append(rnnfast.explain(lstm, x))
    return lstm(x)[0].sum()


gradient = torch.func.grad(loss)(x)
x.requires_grad_()
loss(x).backward()
torch.testing.assert_close(x.grad, gradient, rtol=1e-4, atol=1e-5)
show("5. A torch.func transform is active.", explanations[0], "Call backward() instead.", explanations[1])

# Some tools look for exactly torch.nn.LSTM. revert() serves them, and convert() brings the kernels back.
model = rnnfast.revert(nn.Sequential(lstm))
try:
    rnnfast.explain(model[0], x)
except TypeError as error:
    print(f"\n6. The layer is torch.nn's own.\n  explain raises TypeError: {error}")
print(f"  Call rnnfast.convert(model).\n  explain says {rnnfast.explain(rnnfast.convert(model)[0], x).backend!r}")

# A program that must not lose speed unnoticed asks strictly: what cannot be met raises.
try:
    with rnnfast.backend("cpu", strict=True):
        torch.func.grad(loss)(x)
except RuntimeError as error:
    print(f"\nWith strict=True the call raises: {error}")
