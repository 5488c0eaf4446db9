"""rnnfast/cells.py: the operators' schemas follow from its tables, and a new cell runs on the reference alone."""

import pytest
import torch
import torch.nn.functional as F

import rnnfast
from rnnfast import cells, functional, ops, reference, select
from rnnfast.call import Call

# What csrc/ and saved programs rely on, to the letter.
SCHEMAS = """
rnn_infer(Tensor input, Tensor? hx, Tensor[] weights, Tensor? batch_sizes, Tensor? lengths, bool relu, int num_layers=1) -> (Tensor output, Tensor h_n)
rnn_fwd(Tensor input, Tensor? hx, Tensor[] weights, Tensor? batch_sizes, Tensor? lengths, bool relu) -> (Tensor output, Tensor h_n)
rnn_bwd(Tensor? grad_output, Tensor? grad_h_n, Tensor input, Tensor? hx, Tensor[] weights, Tensor? batch_sizes, Tensor? lengths, bool relu, Tensor output, bool need_grad_input, bool need_grad_states, bool need_grad_weights) -> (Tensor grad_input, Tensor grad_hx, Tensor[] grad_weights)
rnn_step_infer(Tensor input, Tensor? hx, Tensor weight_ih, Tensor weight_hh, Tensor? bias_ih, Tensor? bias_hh, bool relu) -> Tensor h_n
rnn_step_fwd(Tensor input, Tensor? hx, Tensor weight_ih, Tensor weight_hh, Tensor? bias_ih, Tensor? bias_hh, bool relu) -> Tensor h_n
rnn_step_bwd(Tensor? grad_h_n, Tensor input, Tensor? hx, Tensor weight_ih, Tensor weight_hh, Tensor? bias_ih, Tensor? bias_hh, bool relu, Tensor h_n, bool need_grad_input, bool need_grad_states, bool need_grad_weights) -> (Tensor grad_input, Tensor grad_hx, Tensor[] grad_weights)
gru_infer(Tensor input, Tensor? hx, Tensor[] weights, Tensor? batch_sizes, Tensor? lengths, int num_layers=1) -> (Tensor output, Tensor h_n)
gru_fwd(Tensor input, Tensor? hx, Tensor[] weights, Tensor? batch_sizes, Tensor? lengths) -> (Tensor output, Tensor h_n, Tensor saved_0)
gru_bwd(Tensor? grad_output, Tensor? grad_h_n, Tensor input, Tensor? hx, Tensor[] weights, Tensor? batch_sizes, Tensor? lengths, Tensor output, Tensor saved_0, bool need_grad_input, bool need_grad_states, bool need_grad_weights) -> (Tensor grad_input, Tensor grad_hx, Tensor[] grad_weights)
gru_step_infer(Tensor input, Tensor? hx, Tensor weight_ih, Tensor weight_hh, Tensor? bias_ih, Tensor? bias_hh) -> Tensor h_n
gru_step_fwd(Tensor input, Tensor? hx, Tensor weight_ih, Tensor weight_hh, Tensor? bias_ih, Tensor? bias_hh) -> (Tensor h_n, Tensor saved_0)
gru_step_bwd(Tensor? grad_h_n, Tensor input, Tensor? hx, Tensor weight_ih, Tensor weight_hh, Tensor? bias_ih, Tensor? bias_hh, Tensor saved_0, bool need_grad_input, bool need_grad_states, bool need_grad_weights) -> (Tensor grad_input, Tensor grad_hx, Tensor[] grad_weights)
lstm_infer(Tensor input, Tensor? hx, Tensor? cx, Tensor[] weights, Tensor? batch_sizes, Tensor? lengths, int num_layers=1) -> (Tensor output, Tensor h_n, Tensor c_n)
lstm_fwd(Tensor input, Tensor? hx, Tensor? cx, Tensor[] weights, Tensor? batch_sizes, Tensor? lengths) -> (Tensor output, Tensor h_n, Tensor c_n, Tensor saved_0, Tensor saved_1)
lstm_bwd(Tensor? grad_output, Tensor? grad_h_n, Tensor? grad_c_n, Tensor input, Tensor? hx, Tensor? cx, Tensor[] weights, Tensor? batch_sizes, Tensor? lengths, Tensor output, Tensor saved_0, Tensor saved_1, bool need_grad_input, bool need_grad_states, bool need_grad_weights) -> (Tensor grad_input, Tensor grad_hx, Tensor grad_cx, Tensor[] grad_weights)
lstm_step_infer(Tensor input, Tensor? hx, Tensor? cx, Tensor weight_ih, Tensor weight_hh, Tensor? bias_ih, Tensor? bias_hh) -> (Tensor h_n, Tensor c_n)
lstm_step_fwd(Tensor input, Tensor? hx, Tensor? cx, Tensor weight_ih, Tensor weight_hh, Tensor? bias_ih, Tensor? bias_hh) -> (Tensor h_n, Tensor c_n, Tensor saved_0, Tensor saved_1)
lstm_step_bwd(Tensor? grad_h_n, Tensor? grad_c_n, Tensor input, Tensor? hx, Tensor? cx, Tensor weight_ih, Tensor weight_hh, Tensor? bias_ih, Tensor? bias_hh, Tensor saved_0, Tensor saved_1, bool need_grad_input, bool need_grad_states, bool need_grad_weights) -> (Tensor grad_input, Tensor grad_hx, Tensor grad_cx, Tensor[] grad_weights)
""".split("\n")[1:-1]  # noqa: E501 (schemas as torch prints them)


@pytest.mark.parametrize("namespace", ["rnnfast", "rnnfast_triton"])
@pytest.mark.parametrize("schema", SCHEMAS, ids=lambda schema: schema.partition("(")[0])
def test_schemas(namespace, schema):
    operator = getattr(getattr(torch.ops, namespace), schema.partition("(")[0])
    assert str(operator.default._schema) == f"{namespace}::{schema}"


def flat(spec, options, directions):
    """The weights of one layer, in torch.nn's flat order."""
    layout = next(layout for layout in spec.layouts if layout.options == options)
    sizes = cells.Sizes(3, 5 * len(spec.gates), 5, 4 if "projection" in options else 5)
    return [torch.empty(shape) for shape in cells.shapes_of(layout, sizes)] * directions


def normalized():
    """An LSTM with the weights of layer normalization as roles of an option."""
    roles = [
        cells.Weight(f"{kind}_ln_{name}", (axis,), "layer_norm")
        for name, axis in (("ih", cells.GATES), ("hh", cells.GATES), ("c", cells.HIDDEN))
        for kind in ("weight", "bias")
    ]
    return cells.spec_of("normalized", None, None, "ifgo", "hc", [*cells.SPECS["lstm"].layouts[-1].weights, *roles])


@pytest.mark.parametrize("spec", [*cells.SPECS.values(), normalized()], ids=lambda spec: spec.name)
def test_every_arrangement_is_recognised(spec):
    for layout in spec.layouts:
        for directions in (1, 2):
            found = cells.arrangement_of(spec, flat(spec, layout.options, directions))
            assert (found.layout, found.directions) == (layout, directions)
    assert cells.arrangement_of(spec, []) is None
    assert cells.arrangement_of(spec, [torch.empty(1)] * 7) is None


def test_weights_that_cannot_be_told_apart_are_refused():
    matrices = [
        cells.Weight(f"weight_{i}", (cells.GATES, cells.INPUT), option) for i, option in enumerate((None, "more"))
    ]
    with pytest.raises(ValueError, match="cannot be told from others"):
        cells.spec_of("doubtful", None, None, "a", "h", matrices)


def test_counts_are_those_of_torch():
    for cls in (torch.nn.RNN, torch.nn.GRU, torch.nn.LSTM):
        spec = cells.SPECS[{"RNN": "rnn_tanh", "GRU": "gru", "LSTM": "lstm"}[cls.__name__]]
        for bias in (False, True):
            for proj_size in (0, 2) if cls is torch.nn.LSTM else (0,):
                options = {"proj_size": proj_size} if proj_size else {}
                module = cls(3, 5, bias=bias, bidirectional=True, **options)
                assert 2 * spec.counts[bias + 2 * (proj_size > 0)] == len(module._flat_weights)
                names = cells.layout_with(spec, bias, proj_size > 0).names
                assert [f"{name}_l0" for name in names] == module._flat_weights_names[: len(names)]


@pytest.fixture
def new_cell(monkeypatch):
    """A minimal gated unit: a cell that neither torch nor any of our kernels has."""

    def step(x, states, weights):
        (h,) = states
        x_f, x_n = x.chunk(2, -1)
        h_f, h_n = F.linear(h, weights["weight_hh"], weights.get("bias_hh")).chunk(2, -1)
        f = torch.sigmoid(x_f + h_f)
        return (h + f * (torch.tanh(x_n + f * h_n) - h),)

    roles = cells.SPECS["gru"].layouts[-1].weights
    monkeypatch.setitem(cells.SPECS, "mgu", cells.spec_of("mgu", None, None, "fn", "h", roles))
    monkeypatch.setitem(reference.STEPS, "mgu", step)
    monkeypatch.setattr(select, "_warned", set())
    return "mgu"


def test_a_new_cell_runs_on_the_reference_alone(new_cell):
    assert new_cell not in ops.CELLS
    weights = [torch.randn(shape) for shape in ((10, 3), (10, 5), (10,), (10,), (10, 5), (10, 5), (10,), (10,))]
    x = torch.randn(7, 2, 3)
    decision = select.decide(Call(new_cell, x, None, weights, num_layers=2))
    assert decision.backend.name == "reference"
    assert decision.passed_over["cpu"] == "it has no kernel for the cell mgu"
    assert decision.passed_over["aten"] == "torch has no operator for the cell mgu"
    function = functional._stack_of(new_cell, "")
    with pytest.warns(RuntimeWarning, match="no kernel for the cell mgu"):
        output, h_n = function(x, None, weights, num_layers=2)
    assert output.shape == (7, 2, 5) and h_n.shape == (2, 2, 5)
    with pytest.raises(RuntimeError, match="mgu: expected tensors that fit together"):
        function(x, None, weights[:3])
    with rnnfast.backend("cpu", strict=True), pytest.raises(RuntimeError, match="no kernel for the cell mgu"):
        function(x, None, weights, num_layers=2)
