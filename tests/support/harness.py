"""One parity case: the same numbers through rnnfast, torch.nn and the float64 oracle; every output and gradient."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, fields

import torch

import rnnfast
from support import reference64
from support.tolerances import CEILING, accumulation, assert_parity, max_error

Tensor = torch.Tensor
CELLS = ("rnn_tanh", "rnn_relu", "gru", "lstm")


@dataclass(frozen=True)
class Case:
    """A configuration. `ragged`: None, "sorted", "unsorted" (both packed) or "lengths" (the keyword, with zeros)."""

    cell: str
    T: int
    B: int
    I: int  # noqa: E741
    H: int
    proj: int = 0
    layers: int = 1
    bidirectional: bool = False
    bias: bool = True
    hx: bool = True
    batch_first: bool = False
    ragged: str | None = None
    dtype: torch.dtype = torch.float32
    layout: str = "contiguous"  # also "transposed", "strided", "expanded" (input over time, states over the batch)
    loss: tuple[str, ...] = ("output", "h_n", "c_n")  # what the loss depends on
    grads: str = "random"  # also "sum" (expanded ones) and "transposed"
    wrt: tuple[str, ...] = ("input", "hx", "cx", "weights")  # what needs a gradient; or parameter names
    threads: int = 1
    seed: int = 0
    products: str = "ieee"  # of float32 on a GPU, torch's and ours alike; also "tf32". A CPU knows no other than exact

    @property
    def rounding(self) -> torch.dtype:
        """The dtype whose rounding counts: TF32 keeps as many bits of a product's operands as float16."""
        return torch.float16 if self.dtype is torch.float32 and self.products == "tf32" else self.dtype

    @property
    def directions(self) -> int:
        return 2 if self.bidirectional else 1

    def __str__(self) -> str:
        text = f"{self.cell}-T{self.T}-B{self.B}-I{self.I}-H{self.H}"
        for field in fields(self)[5:]:
            value = getattr(self, field.name)
            if value != field.default:
                value = "+".join(value) if isinstance(value, tuple) else str(value).removeprefix("torch.")
                text += f"-{field.name}_{value}"
        return text


@contextlib.contextmanager
def num_threads(n: int):
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def float32_products(products: str):
    """torch's switches for the products of recurrent layers and for all others on a GPU; ours follow them."""
    switches = torch.backends.cudnn.rnn, torch.backends.cuda.matmul
    before = [switch.fp32_precision for switch in switches]
    for switch in switches:
        switch.fp32_precision = products
    try:
        yield
    finally:
        for switch, value in zip(switches, before, strict=True):
            switch.fp32_precision = value


def make_module(package, case: Case) -> torch.nn.Module:
    """The case's module of `package` (torch.nn or rnnfast); its weights follow from the seed alone."""
    options = {
        "num_layers": case.layers,
        "bias": case.bias,
        "batch_first": case.batch_first,
        "bidirectional": case.bidirectional,
        "dtype": case.dtype,
    }
    if case.cell == "lstm":
        module = package.LSTM(case.I, case.H, proj_size=case.proj, **options)
    elif case.cell == "gru":
        module = package.GRU(case.I, case.H, **options)
    else:
        module = package.RNN(case.I, case.H, nonlinearity=case.cell.removeprefix("rnn_"), **options)
    generator = torch.Generator().manual_seed(case.seed + 1)
    with torch.no_grad():
        for parameter in module.parameters():
            values = torch.rand(parameter.shape, generator=generator, dtype=torch.float64) * 2 - 1
            # By the fan-in where that is larger: saturated units would only measure the cancellation in 1 - h^2.
            parameter.copy_(values / max(case.H, parameter.shape[-1]) ** 0.5)
        if case.cell == "rnn_relu" and case.bias and case.rounding in (torch.bfloat16, torch.float16):
            decide_relu(module)
    return module


def decide_relu(module: torch.nn.Module) -> None:
    """Makes every unit clearly on or off: in 16 bits each row of some length would otherwise meet relu's kink."""
    for name, parameter in module.named_parameters():
        parameter *= 0.3
        if name.startswith("bias_ih"):
            parameter[::2] += 1
            parameter[1::2] -= 1


class Data:
    """Leaves (input, hx, cx), lengths and output gradients of a case, rounded to its dtype. Time-major throughout."""

    def __init__(self, case: Case):
        generator = torch.Generator().manual_seed(case.seed)

        def randn(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(case.dtype)

        steps, batch = (1, 1) if case.layout == "expanded" else (case.T, case.B)
        stack, h_out = case.layers * case.directions, case.proj or case.H
        self.input = randn(steps, case.B, case.I)
        self.hx, self.cx = randn(stack, batch, h_out), randn(stack, batch, case.H)
        self.lengths = None
        if case.ragged:
            low = 0 if case.ragged == "lengths" else 1
            lengths = torch.randint(low, case.T + 1, (case.B,), generator=generator)
            if case.ragged != "lengths":
                lengths[int(torch.randint(case.B, (1,), generator=generator))] = case.T
            elif case.B > 2:
                lengths[1] = 0
            self.lengths = lengths.sort(descending=True).values if case.ragged == "sorted" else lengths
        self.grads = {
            "output": randn(case.T, case.B, case.directions * h_out),
            "h_n": randn(stack, case.B, h_out),
            "c_n": randn(stack, case.B, case.H),
        }
        if case.grads == "sum":
            self.grads = {name: torch.ones((), dtype=case.dtype).expand_as(grad) for name, grad in self.grads.items()}

    def zero_rows(self, rows: Tensor) -> None:
        """Takes these batch rows out of every loss."""
        if rows.any():
            self.grads = {name: grad.masked_fill(rows[:, None], 0) for name, grad in self.grads.items()}


def laid_out(leaf: Tensor, case: Case, steps: int = -1) -> Tensor:
    """The input (`steps`: T) or a state made of `leaf`, with the strides that the case asks for, differentiable."""
    if case.layout == "expanded":
        return leaf.expand(steps, case.B, -1)
    if case.layout == "transposed":
        return leaf.permute(2, 1, 0).contiguous().permute(2, 1, 0)
    if case.layout == "strided":
        return torch.stack([leaf, torch.full_like(leaf, torch.nan)], dim=-1).flatten(-2)[..., ::2]
    assert case.layout == "contiguous"
    return leaf


def grad_layout(grad: Tensor, case: Case) -> Tensor:
    return grad.permute(2, 1, 0).contiguous().permute(2, 1, 0) if case.grads == "transposed" else grad


def module_forward(module, case: Case, x: Tensor, hx, lengths: Tensor | None):
    """Time-major padded output, h_n, c_n (None unless LSTM) of a module, called as the case says."""
    if case.ragged in ("sorted", "unsorted"):
        fed = x.transpose(0, 1) if case.batch_first else x
        fed = torch.nn.utils.rnn.pack_padded_sequence(
            fed, lengths, batch_first=case.batch_first, enforce_sorted=case.ragged == "sorted"
        )
        packed, states = module(fed, hx)
        output, _ = torch.nn.utils.rnn.pad_packed_sequence(packed, total_length=case.T)
    else:
        fed = x.transpose(0, 1) if case.batch_first else x
        options = {} if lengths is None else {"lengths": lengths.to(x.device)}
        output, states = module(fed, hx, **options)
        output = output.transpose(0, 1) if case.batch_first else output
    return (output, *states) if case.cell == "lstm" else (output, states, None)


def stock_with_lengths(module, case: Case, x: Tensor, hx, lengths: Tensor):
    """What stock torch can do for `lengths`: pack the rows that are not empty, pass the others' state through."""
    stack, h_out = case.layers * case.directions, case.proj or case.H
    if hx is None:
        hx = x.new_zeros(stack, case.B, h_out)
        hx = (hx, x.new_zeros(stack, case.B, case.H)) if case.cell == "lstm" else hx
    rows = lengths.nonzero().flatten()
    nonzero, rows = lengths[rows], rows.to(x.device)
    if rows.numel() == 0:
        return (x.new_zeros(case.T, case.B, case.directions * h_out), *(hx if case.cell == "lstm" else (hx, None)))
    packed = torch.nn.utils.rnn.pack_padded_sequence(x[:, rows], nonzero, enforce_sorted=False)
    if case.cell == "lstm":
        packed, (h, c) = module(packed, (hx[0][:, rows], hx[1][:, rows]))
        h_n, c_n = hx[0].index_copy(1, rows, h), hx[1].index_copy(1, rows, c)
    else:
        packed, h = module(packed, hx[:, rows])
        h_n, c_n = hx.index_copy(1, rows, h), None
    padded, _ = torch.nn.utils.rnn.pad_packed_sequence(packed, total_length=case.T)
    output = x.new_zeros(case.T, case.B, padded.shape[2]).index_copy(1, rows, padded)
    return output, h_n, c_n


def run(case: Case, data: Data, forward, parameters: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Outputs and all gradients asked for, on the device of the parameters. Unused inputs get zeros.

    `forward(x, hx)` -> output, h_n, c_n.
    """
    device = next(iter(parameters.values())).device
    wanted = set(parameters) if "weights" in case.wrt else set(case.wrt) & set(parameters)
    leaves = {name: getattr(data, name).to(device, dtype).detach() for name in ("input", "hx", "cx")}
    if not case.hx or case.cell != "lstm":
        leaves = {name: leaves[name] for name in (("input", "hx") if case.hx else ("input",))}
    needs = {name: leaf.requires_grad_() for name, leaf in leaves.items() if name in case.wrt}
    for name, parameter in parameters.items():
        parameter.requires_grad_(name in wanted)
        if name in wanted:
            needs[name] = parameter
    x = laid_out(leaves["input"], case, case.T)
    hx = laid_out(leaves["hx"], case) if case.hx else None
    if case.hx and case.cell == "lstm":
        hx = (hx, laid_out(leaves["cx"], case))
    results = dict(zip(("output", "h_n", "c_n"), forward(x, hx), strict=True))
    results = {name: value for name, value in results.items() if value is not None}
    lost = [
        (results[name], grad_layout(data.grads[name].to(device, dtype), case)) for name in case.loss if name in results
    ]
    lost = [(value, grad) for value, grad in lost if value.requires_grad]
    grads = torch.autograd.grad(
        [value for value, _ in lost], list(needs.values()), [grad for _, grad in lost], allow_unused=True
    )
    results = {name: value.detach() for name, value in results.items()}
    for (name, leaf), grad in zip(needs.items(), grads, strict=True):
        results[f"grad_{name}"] = torch.zeros_like(leaf) if grad is None else grad
    return results


def oracle_forward(case: Case, data: Data, parameters: dict[str, Tensor], pre_activations: list[Tensor]):
    def forward(x, hx):
        stack, h_out = case.layers * case.directions, case.proj or case.H
        h0, c0 = x.new_zeros(stack, case.B, h_out), None
        if case.cell == "lstm":
            h0, c0 = hx if hx is not None else (h0, x.new_zeros(stack, case.B, case.H))
        elif hx is not None:
            h0 = hx
        *results, seen = reference64.run(
            case.cell,
            x,
            h0,
            c0,
            list(parameters.values()),
            has_biases=case.bias,
            num_layers=case.layers,
            bidirectional=case.bidirectional,
            projected=case.proj > 0,
            lengths=data.lengths,
        )
        pre_activations.extend(seen)
        return results

    return forward


def run_oracle(case: Case, data: Data, module: torch.nn.Module) -> dict[str, Tensor]:
    parameters = {name: p.detach().double() for name, p in module.named_parameters()}
    pre_activations: list[Tensor] = []
    forward = oracle_forward(case, data, parameters, pre_activations)
    if case.cell == "rnn_relu":
        with torch.no_grad():
            run_values(case, data, forward, torch.float64)
        data.zero_rows(~relu_safe_rows(pre_activations, case.rounding))
    return run(case, data, forward, parameters, torch.float64)


def conditioning(case: Case, data: Data, module: torch.nn.Module) -> dict[str, float]:
    """How far rounding alone moves each result of the oracle: the most that three inexact runs show."""
    parameters = {name: p.detach().double() for name, p in module.named_parameters()}
    forward = oracle_forward(case, data, parameters, [])
    reference, moved = run(case, data, forward, parameters, torch.float64), {}
    # Results are stored in the case's dtype (TF32: rounded when they are multiplied); activations are right to 2 ulp of
    # the dtype that they are computed in.
    with reference64.rounded_activations(
        torch.finfo(case.rounding).eps / 2 + 2 * torch.finfo(accumulation(case.dtype)).eps
    ):
        for _ in range(3):
            for name, value in run(case, data, forward, parameters, torch.float64).items():
                moved[name] = max(moved.get(name, 0.0), max_error(value, reference[name]))
    return moved


def run_values(case: Case, data: Data, forward, dtype: torch.dtype, device: str = "cpu") -> dict[str, Tensor]:
    """Outputs and states only, under no_grad."""
    with torch.no_grad():
        x = laid_out(data.input.to(device, dtype), case, case.T)
        hx, cx = (laid_out(state.to(device, dtype), case) for state in (data.hx, data.cx))
        values = forward(x, ((hx, cx) if case.cell == "lstm" else hx) if case.hx else None)
    return {name: value for name, value in zip(("output", "h_n", "c_n"), values, strict=True) if value is not None}


def relu_safe_rows(pre_activations: list[Tensor], dtype: torch.dtype) -> Tensor:
    """Batch rows with no pre-activation so near to relu's kink that rounding to dtype could choose the other side."""
    sizes = torch.stack([pre.abs() for pre in pre_activations])
    safe = ((sizes > CEILING[dtype]) | (sizes == 0)).all(dim=2).all(dim=0)  # exactly 0 in every dtype: no input at all
    assert safe.any(), "every row has a pre-activation at relu's kink: choose a smaller case"
    return safe


def run_stock(case: Case, data: Data, module: torch.nn.Module) -> dict[str, Tensor]:
    def forward(x, hx):
        if case.ragged != "lengths":
            return module_forward(module, case, x, hx, data.lengths)
        return stock_with_lengths(module, case, x, hx, data.lengths)

    return run(case, data, forward, dict(module.named_parameters()), case.dtype)


def check(case: Case, backend: str = "cpu", device: str = "cpu") -> None:
    """Asserts the parity rule for one case, with gradients and under no_grad; the oracle runs on the CPU."""
    data = Data(case)
    stock_case = case if case.ragged != "lengths" else Case(**{**vars(case), "batch_first": False})
    stock, fast = make_module(torch.nn, stock_case), make_module(rnnfast, case)
    reference = run_oracle(case, data, stock)

    def forward(x, hx):
        return module_forward(fast, case, x, hx, data.lengths)

    exactness = contextlib.nullcontext() if device == "cpu" else float32_products(case.products)
    with num_threads(case.threads), exactness:
        of_torch = run_stock(stock_case, data, stock.to(device))
        fast.to(device)
        with rnnfast.backend(backend, strict=True):
            actual = run(case, data, forward, dict(fast.named_parameters()), case.dtype)
            inferred = run_values(case, data, forward, case.dtype, device)
    of_torch, actual, inferred = (
        {name: result.cpu() for name, result in results.items()} for results in (of_torch, actual, inferred)
    )
    gates = {"lstm": 4, "gru": 3}.get(case.cell, 1)
    options = {
        "value_terms": case.I + case.H,
        "gradient_terms": max(case.T * case.B, gates * case.H),
        "conditioning": lambda: conditioning(case, data, stock.cpu()),
    }
    assert_parity(actual, of_torch, reference, case.rounding, **options)
    values = ({name: results[name] for name in inferred} for results in (of_torch, reference))
    assert_parity(inferred, *values, case.rounding, **options)
