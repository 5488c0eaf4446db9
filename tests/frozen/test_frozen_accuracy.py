"""How exact int8 is: never worse than other int8 on the same weights, or than theory says; trained models keep it.

The errors are of the output against float64 with the weights before they were rounded.
"""

from __future__ import annotations

import math
from importlib.util import find_spec
from statistics import fmean, geometric_mean, stdev

import pytest
import torch
from torch import Tensor, nn

import rnnfast
from bench import data, frozen, onnx_runtime
from bench.cases import Case
from bench.providers import Problem, Runner
from bench.workloads import CharacterModel, DigitReader, Model, Tagger
from rnnfast import _ext
from rnnfast.freeze import freeze

pytestmark = pytest.mark.skipif(_ext.failure is not None, reason=f"the compiled kernels are absent: {_ext.failure}")

SEEDS = 8
RMS, MAX = 0, 1
# (H, T, B); one layer, input size = H. With one row of one step, activations have 16 bits.
SHAPES = [
    (16, 1, 1),
    (16, 500, 1),
    (64, 1, 1),
    (64, 5, 1),
    (64, 100, 16),
    (128, 1, 4),
    (256, 1, 1),
    (256, 5, 4),
    (256, 500, 1),
    (512, 1, 1),
    (512, 1, 16),
    (512, 100, 1),
    (1024, 1, 1),
    (1024, 5, 1),
]


def problem_of(case: Case, seed: int, scale: float) -> Problem:
    """Weights as torch.nn draws them, times `scale`; normal input, states in -1..1."""
    problem, generator = Problem(case), torch.Generator().manual_seed(seed)

    def uniform(like: Tensor, size: float) -> Tensor:
        return (2 * torch.rand(like.shape, generator=generator) - 1) * size

    problem.state = {name: uniform(w, scale / case.hidden_size**0.5) for name, w in problem.state.items()}
    problem.input = torch.randn(problem.input.shape, generator=generator)
    problem.states = tuple(uniform(state, 1.0) for state in problem.states)
    return problem


def errors(case: Case, seed: int, scale: float) -> dict[str, tuple[float, float]]:
    """Of every side: root mean square and largest error of the output."""
    problem = problem_of(case, seed, scale)
    with torch.no_grad():
        module = Runner(nn, problem).module
        truth = Runner(nn, problem.double()).run()["output"]
        found = {}
        for name, call in frozen.outputs(problem, module).items():
            distance = (call().double() - truth).abs()
            found[name] = float(distance.square().mean().sqrt()), float(distance.max())
    return found


def compared(values: list[float], others: list[float]) -> tuple[float, float]:
    """The geometric mean of values / others, and the standard error of its logarithm."""
    logs = [math.log(value / other) for value, other in zip(values, others, strict=True)]
    return math.exp(fmean(logs)), stdev(logs) / len(logs) ** 0.5


@pytest.mark.skipif(bool(onnx_runtime.missing()), reason="onnxruntime is not installed")
@pytest.mark.parametrize("scale", [1, 3])
@pytest.mark.parametrize("cell", ["LSTM", "GRU"])
def test_int8_is_as_exact_as_any_other(cell, scale):
    """Means over seeds, beside the better rival of each shape. A mean of a few largest errors is off by 5 to 10 % by
    chance: of one shape it may be above a rival's by two standard errors, of all shapes together it must not."""
    largest = []
    for hidden, steps, batch in SHAPES:
        case = Case(cell, "inference", hidden, batch, seq_len=steps, hx=True)
        found = [errors(case, seed, scale) for seed in range(SEEDS)]
        rivals = [name for name in frozen.INT8_RIVALS if name in found[0]]
        for kind in (RMS, MAX):
            of = {name: [one[name][kind] for one in found] for name in ("int8", "bfloat16", *rivals)}
            best = min(rivals, key=lambda name: geometric_mean(of[name]))
            ratio, deviation = compared(of["int8"], of[best])
            assert ratio <= (1 if kind == RMS else math.exp(2 * deviation)), (case.name, best, ratio)
            assert compared(of["bfloat16"], of[best])[0] <= 0.6, case.name
        largest.append(ratio)
    assert geometric_mean(largest) <= 0.95, largest


@pytest.mark.parametrize("scale", [1, 2])
@pytest.mark.parametrize("shape", [(16, 100, 4), (64, 1, 1), (128, 25, 4), (256, 500, 1), (1024, 5, 1)], ids=str)
@pytest.mark.parametrize("nonlinearity", ["tanh", "relu"])
def test_int8_rnn_obeys_theory(nonlinearity, shape, scale):
    """Nobody else has an RNN in int8. Rounding to steps of s is noise of variance s^2/12; products add variances; a
    step passes at most rho^2 = the squared norm of a row of W_hh on to the next one, for no slope is above 1."""
    hidden, steps, batch = shape
    torch.manual_seed(0)
    layer = nn.RNN(hidden, hidden, nonlinearity=nonlinearity)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter *= scale if nonlinearity == "tanh" else 1.0
        x = torch.randn(steps, batch, hidden)
        output, truth = freeze(layer, "int8")(x)[0], layer.double()(x.double())[0]
    variance = 0.0
    for weight, rows, levels in ((layer.weight_ih_l0, x, 255), (layer.weight_hh_l0, truth, 254)):
        of_weight = weight.abs().amax(1).max() / 127
        of_rows = (rows.amax(2) - rows.amin(2)).max() if rows is x else 2 * rows.abs().amax()
        per_row = weight.square().sum(1).mean() * (of_rows / levels) ** 2 / 12
        variance += float(per_row + rows.square().mean() * hidden * of_weight**2 / 12)
    passed = float(layer.weight_hh_l0.square().sum(1).mean())
    bound = (variance * sum(passed**k for k in range(steps))) ** 0.5
    distance = (output.double() - truth).abs()
    assert float(distance.square().mean().sqrt()) <= bound
    assert float(distance.max()) <= 6 * bound


def batches_of(model: str) -> list[tuple]:
    if model == "digits":
        return data.digit_batches(64)
    if model == "tagger":
        return data.tagger_batches(1280, 32, 1000, 40)
    return data.streams(data.characters(16 * 32 * 200 + 1), 16, 32)


def trained(model: Model, batches: list[tuple], epochs: int) -> Model:
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(epochs):
        state = None
        for batch in batches:
            loss, state = model.loss(batch, state)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model.eval()


@torch.no_grad()
def judged(model: Model, batches: list[tuple]) -> tuple[float, float]:
    """Accuracy and perplexity."""
    logits: list[Tensor] = []
    hook = model.head.register_forward_hook(lambda module, arguments, result: logits.append(result.flatten(0, -2)))
    losses, state = [], None
    for batch in batches:
        loss, state = model.loss(batch, state)
        losses.append(float(loss))
    hook.remove()
    right = torch.cat(logits).argmax(1) == torch.cat([batch[1].flatten() for batch in batches])
    return float(right.double().mean()), math.exp(sum(losses) / len(losses))


@pytest.mark.parametrize(
    ("name", "new", "epochs", "least"),
    [
        ("digits", lambda: DigitReader(rnnfast, 128), 20, 0.85),
        ("tagger", lambda: Tagger(rnnfast, 64, 1000), 4, 0.85),
        ("characters", lambda: CharacterModel(rnnfast, 128), 1, 0.35),
    ],
    ids=["digits", "tagger", "characters"],
)
def test_trained_models_keep_their_accuracy(name, new, epochs, least):
    """On input that the training has not seen."""
    if name == "digits" and not find_spec("sklearn"):
        pytest.skip("scikit-learn is not installed")
    torch.manual_seed(0)
    batches = batches_of(name)
    seen = len(batches) * 3 // 4
    model = trained(new(), batches[:seen], epochs)
    accuracy, perplexity = judged(model, batches[seen:])
    assert accuracy > least, "the model had learned"
    for weights in ("float32", "bfloat16", "int8"):
        own_accuracy, own_perplexity = judged(freeze(model, weights), batches[seen:])
        assert own_accuracy >= accuracy - 0.005, weights
        assert own_perplexity <= 1.01 * perplexity, weights
        if weights == "float32":
            assert abs(own_perplexity - perplexity) < 1e-4 * perplexity
