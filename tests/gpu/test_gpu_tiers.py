"""Every tier of the CUDA kernels on a GPU, whatever the plan prefers: the parity rule; the rest is in test_gpu.py."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from test_gpu import KINDS_OF_LAYERS, NUMBERS, check_here, force, layer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

# Sizes that a tier pads, and some of its largest.
TIERS = {"cta": (5, 63), "cluster": (63, 200), "group": (63, 256), "step": (100,)}
LARGE = {"cluster": (500,), "group": (1000, 2000)}
FORCED_TIERS = []
for tier, sizes in TIERS.items():
    for turn, (kind, H, numbers) in enumerate(product(KINDS_OF_LAYERS, sizes, NUMBERS)):
        ragged = (None, "lengths", "unsorted")[turn % 3]
        case = layer(kind, 9, 17, 5, H, numbers, bidirectional=turn % 2 == 0, ragged=ragged, seed=8)
        FORCED_TIERS.append((tier, case))
for tier, sizes in LARGE.items():
    FORCED_TIERS += [
        (tier, layer(kind, 5, 9, 5, H, "bf16", seed=9)) for kind, H in product(("rnn_tanh", "gru", "lstm"), sizes)
    ]


@pytest.mark.parametrize(("tier", "case"), FORCED_TIERS, ids=str)
def test_parity_of_every_tier(tier, case, monkeypatch, record_property):
    force(tier, case, monkeypatch)
    check_here(case, "cuda", record_property)
