"""The least time per step of a recurrence on an H200 or H100, by a model: an estimate, no measurement.

Per step the model adds the product with the recurrent weights at the rate that one processor's tensor cores reach (or,
where it is longer, the reading of those weights that lie in shared memory), the chain of latencies of one step (load
fragments, last product, activations, barriers: 0.18 us forward), and the exchange of h between the processors that
share the weights (none for one; 0.2 us in a cluster; 0.6 us and the L2's latency beyond). The numbers are the lower
ends of its ranges at 1.755 GHz; products with the input and those of the weights' gradients come on top (peak.py).
"""

from __future__ import annotations

from .cases import Case

# (cell, precision, pass) -> {hidden size: {rows from which on: microseconds}}
FLOOR_US = {
    ("LSTM", "16-bit", "forward"): {
        64: {1: 0.26},
        128: {1: 0.43},
        256: {1: 0.56, 256: 0.88},
        512: {1: 0.74, 64: 1.1, 256: 2.0},
        1024: {1: 1.75, 16: 1.9, 64: 3.4, 256: 5.0},
        2048: {1: 3.4, 16: 5.3, 64: 8.5, 256: 15.0},
    },
    ("LSTM", "tf32", "forward"): {
        64: {1: 0.32},
        128: {1: 0.56, 256: 0.62},
        256: {1: 0.74, 256: 1.5},
        512: {1: 1.6, 64: 2.3, 256: 4.3},
        1024: {1: 2.9, 16: 3.4, 64: 5.5, 256: 11.0},
        2048: {1: 18.0, 256: 36.0},
    },
    ("LSTM", "16-bit", "backward"): {
        64: {1: 0.28},
        128: {1: 0.45},
        256: {1: 0.62, 256: 0.96},
        512: {1: 0.84, 256: 2.2},
        1024: {1: 2.0, 64: 4.0},
    },
    ("LSTM", "tf32", "backward"): {64: {1: 0.34}, 128: {1: 0.6}, 256: {1: 0.8}, 512: {1: 1.8}},
    ("GRU", "16-bit", "forward"): {
        128: {1: 0.37},
        192: {1: 0.5},
        256: {1: 0.56},
        512: {1: 0.74},
        1024: {1: 1.58},
        2048: {1: 2.55},
    },
}
PRECISION = {"bf16": "16-bit", "fp16": "16-bit", "fp32-tf32": "tf32"}


def step_us(case: Case) -> float | None:
    """Microseconds per step of the case's recurrence, with backward where it has one; None where nothing is known.

    Between the sizes of the table that of the next smaller one counts, so that it stays a lower limit.
    """
    plain = case.form == "padded" and case.num_layers == 1 and not case.bidirectional and not case.proj_size
    if not plain or case.dtype not in PRECISION:
        return None
    passes = ("forward", "backward") if case.has_gradients else ("forward",)
    total = 0.0
    for name in passes:
        sizes = FLOOR_US.get((case.cell, PRECISION[case.dtype], name), {})
        known = [size for size in sizes if size <= case.hidden_size]
        if not known:
            return None
        rows = sizes[max(known)]
        total += rows[max(count for count in rows if count <= case.batch)]
    return total
