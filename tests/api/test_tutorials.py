"""Five public PyTorch tutorials, each program written afresh with rnnfast in place of torch.nn.

Where a tutorial prints weights and the states computed from them, those printed numbers are the expected values here.
"""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import rnnfast


def assert_printed(actual, expected):
    """Equality with numbers that a tutorial printed with four decimals, from weights printed with four decimals."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=4e-4)


def rnn_by_hand(inputs, weight_ih, weight_hh, bias_ih=0.0, bias_hh=0.0):
    """Every hidden state of tanh(W_ih x_t + b_ih + W_hh h_(t-1) + b_hh), starting at zero. inputs: [T, I] -> [T, H]."""
    hidden, states = torch.zeros(weight_hh.shape[0]), []
    for x in inputs:
        hidden = torch.tanh(x @ weight_ih.T + bias_ih + hidden @ weight_hh.T + bias_hh)
        states.append(hidden)
    return torch.stack(states)


# ------------------------------------------------ tutorial 000: a cell from scratch, then the library's LSTM


class HandWrittenCell(nn.Module):
    def __init__(self, in_size, hidden_size, out_size):
        super().__init__()
        self.W = nn.Linear(hidden_size, hidden_size)
        self.U = nn.Linear(in_size, hidden_size)
        self.V = nn.Linear(hidden_size, out_size)

    def forward(self, x, hidden):
        hidden = torch.tanh(self.W(hidden) + self.U(x))
        return self.V(hidden), hidden

    def weights(self):
        """The same weights in torch.nn's names."""
        weights = (self.U.weight, self.W.weight, self.U.bias, self.W.bias)
        return dict(zip(("weight_ih", "weight_hh", "bias_ih", "bias_hh"), weights, strict=True))


class HandWrittenRNN(nn.Module):
    def __init__(self, cell):
        super().__init__()
        self.cell = cell

    def forward(self, inputs):
        hidden, outs = torch.zeros(self.cell.W.out_features), []
        for x in inputs:
            out, hidden = self.cell(x, hidden)
            outs.append(out)
        return torch.stack(outs)


@pytest.fixture
def hand_written():
    torch.manual_seed(0)
    return HandWrittenCell(2, 8, 3)


def test_000_single_step_of_the_hand_written_cell_is_rnncell(hand_written):
    cell = rnnfast.RNNCell(2, 8)
    cell.load_state_dict(hand_written.weights())
    x, hidden = torch.randn(2), torch.randn(8)
    out, expected = hand_written(x, hidden)
    actual = cell(x, hidden)
    assert actual.shape == (8,)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(hand_written.V(actual), out)


def test_000_hand_written_rnn_is_rnn(hand_written):
    layer = rnnfast.RNN(2, 8)
    layer.load_state_dict({name + "_l0": weight for name, weight in hand_written.weights().items()})
    inputs = torch.randn(10, 2)
    expected = HandWrittenRNN(hand_written)(inputs)
    states, last = layer(inputs)
    assert states.shape == (10, 8) and last.shape == (1, 8)
    torch.testing.assert_close(hand_written.V(states), expected)
    assert torch.equal(states[-1], last[0])


@pytest.fixture
def word_classifier():
    torch.manual_seed(0)
    kwargs = {"input_size": 768, "hidden_size": 8, "num_layers": 2, "batch_first": True, "proj_size": 2}
    theirs, lstm = nn.LSTM(**kwargs), rnnfast.LSTM(**kwargs)
    lstm.load_state_dict(theirs.state_dict())
    return lstm, theirs, torch.randn(16, 10, 768), torch.randint(0, 2, (16, 10))


def test_000_projected_lstm_with_and_without_initial_state(word_classifier):
    lstm, theirs, inputs, _ = word_classifier
    h0, c0 = torch.zeros(2, 16, 2), torch.zeros(2, 16, 8)
    outputs, (hn, cn) = lstm(inputs, (h0, c0))
    assert (outputs.shape, hn.shape, cn.shape) == ((16, 10, 2), (2, 16, 2), (2, 16, 8))
    torch.testing.assert_close((outputs, (hn, cn)), theirs(inputs, (h0, c0)), rtol=1e-5, atol=1e-5)
    assert torch.equal(outputs[:, -1], hn[-1])
    without, (hn_without, cn_without) = lstm(inputs)
    assert torch.equal(without, outputs) and torch.equal(hn_without, hn) and torch.equal(cn_without, cn)


def test_000_loss_and_backward_over_flattened_outputs(word_classifier):
    lstm, theirs, inputs, targets = word_classifier
    losses = []
    for module in (lstm, theirs):
        outputs, _ = module(inputs)
        flattened_outputs, flattened_targets = outputs.reshape(-1, 2), targets.view(-1)
        assert (flattened_outputs.shape, flattened_targets.shape) == ((160, 2), (160,))
        losses.append(F.cross_entropy(flattened_outputs, flattened_targets))
        losses[-1].backward()
    torch.testing.assert_close(losses[0], losses[1])
    assert 0.6 < losses[0].item() < 0.8, "two classes and an untrained network: about ln 2"
    for (name, ours), expected in zip(lstm.named_parameters(), theirs.parameters(), strict=True):
        assert ours.grad.abs().max() > 0, name
        torch.testing.assert_close(ours.grad, expected.grad, rtol=1e-4, atol=1e-6, msg=lambda m, name=name: name + m)


# ------------------------------------------------ tutorial 001: the tour of shapes

TOUR = [
    # class, constructor arguments, input, initial state (None: omitted), output, final state
    ("RNN", (10, 5, 1), {}, (12, 64, 10), (1, 64, 5), (12, 64, 5), (1, 64, 5)),
    ("RNN", (10, 5, 2), {"batch_first": True}, (64, 12, 10), (2, 64, 5), (64, 12, 5), (2, 64, 5)),
    ("RNN", (20, 10, 4), {"bidirectional": True}, (5, 64, 20), (8, 64, 10), (5, 64, 20), (8, 64, 10)),
    ("GRU", (10, 5, 1), {}, (12, 64, 10), (1, 64, 5), (12, 64, 5), (1, 64, 5)),
    ("LSTM", (10, 5, 1), {}, (1, 64, 10), None, (1, 64, 5), (1, 64, 5)),
    ("LSTM", (10, 5, 1), {}, (1, 64, 10), (1, 64, 5), (1, 64, 5), (1, 64, 5)),
    ("LSTM", (10, 5, 2), {"bidirectional": True}, (5, 64, 10), (4, 64, 5), (5, 64, 10), (4, 64, 5)),
]


@pytest.mark.parametrize(
    "name, args, kwargs, x_shape, h_shape, out_shape, hn_shape",
    TOUR,
    ids=[
        "rnn",
        "rnn-stacked-batch_first",
        "rnn-4-bidirectional",
        "gru",
        "lstm-no-state",
        "lstm",
        "lstm-2-bidirectional",
    ],
)
def test_001_shapes(name, args, kwargs, x_shape, h_shape, out_shape, hn_shape):
    np = pytest.importorskip("numpy", reason="numpy is not installed")
    torch.manual_seed(0)
    theirs, layer = getattr(nn, name)(*args, **kwargs), getattr(rnnfast, name)(*args, **kwargs)
    layer.load_state_dict(theirs.state_dict())
    x = torch.from_numpy(np.random.default_rng(0).standard_normal(x_shape)).float()
    hx = None
    if h_shape is not None:
        hx = torch.from_numpy(np.zeros(h_shape)).float()
        hx = (hx, torch.from_numpy(np.zeros(h_shape)).float()) if name == "LSTM" else hx
    out, state = layer(x, hx)
    assert out.shape == out_shape
    for final in state if name == "LSTM" else (state,):
        assert final.shape == hn_shape
    torch.testing.assert_close((out, state), theirs(x, hx))
    assert torch.equal(out, layer(x)[0]), "a zero state is what an omitted one means"


# ------------------------------------------------ tutorial 002: every hidden state by hand

SEQ = torch.tensor([[1.0, 1, 1], [1, 2, 1], [2, 3, 1], [1, 3, 1]])


def load(layer, **weights):
    layer.load_state_dict({name: torch.tensor(value) for name, value in weights.items()})
    return layer


def test_002_one_feature_without_bias():
    layer = rnnfast.RNN(input_size=1, hidden_size=1, num_layers=1, bias=False, batch_first=True)
    assert list(layer.state_dict()) == ["weight_ih_l0", "weight_hh_l0"]
    load(layer, weight_ih_l0=[[-0.8769]], weight_hh_l0=[[-0.8218]])
    seq = torch.tensor([[3.0, 4, 5]]).unsqueeze(2)
    out_all, out_last = layer(seq)
    assert out_all.shape == (1, 3, 1) and out_last.shape == (1, 1, 1)
    assert_printed(out_all, torch.tensor([[[-0.9897], [-0.9909], [-0.9984]]]))
    torch.testing.assert_close(out_all[0], rnn_by_hand(seq[0], layer.weight_ih_l0, layer.weight_hh_l0))


@pytest.mark.parametrize("hidden_size", [1, 2])
def test_002_more_features_with_bias(hidden_size):
    torch.manual_seed(0)
    layer = rnnfast.RNN(input_size=3, hidden_size=hidden_size, num_layers=1, bias=True, batch_first=True)
    if hidden_size == 2:
        load(
            layer,
            weight_ih_l0=[[0.5886, -0.0840, 0.1099], [-0.1125, 0.0505, -0.1764]],
            weight_hh_l0=[[0.1692, 0.4006], [0.4108, 0.7006]],
            bias_ih_l0=[0.5332, 0.4121],
            bias_hh_l0=[-0.5042, -0.1715],
        )
    out_all, out_last = layer(SEQ.unsqueeze(0))
    assert out_all.shape == (1, 4, hidden_size) and out_last.shape == (1, 1, hidden_size)
    if hidden_size == 2:
        rows = [[0.5673, 0.0021], [0.5759, 0.2795], [0.8547, 0.3994], [0.6527, 0.6255]]
        assert_printed(out_all, torch.tensor([rows]))
    by_hand = rnn_by_hand(SEQ, *layer.all_weights[0])
    torch.testing.assert_close(out_all[0], by_hand)
    torch.testing.assert_close(out_last[0, 0], by_hand[-1])


def test_002_bidirectional():
    layer = rnnfast.RNN(input_size=3, hidden_size=2, num_layers=1, bias=True, batch_first=True, bidirectional=True)
    load(
        layer,
        weight_ih_l0=[[-0.6735, 0.2324, 0.5187], [-0.5421, -0.4331, 0.1564]],
        weight_hh_l0=[[0.5985, 0.5866], [-0.0808, 0.6500]],
        bias_ih_l0=[0.5015, -0.3184],
        bias_hh_l0=[0.1460, 0.4912],
        weight_ih_l0_reverse=[[0.4697, -0.3869, -0.4899], [0.4505, 0.4845, -0.3718]],
        weight_hh_l0_reverse=[[0.3995, 0.3990], [-0.0386, -0.3703]],
        bias_ih_l0_reverse=[-0.3801, -0.4178],
        bias_hh_l0_reverse=[-0.3645, 0.4508],
    )
    out_all, out_last = layer(SEQ.unsqueeze(0))
    assert out_all.shape == (1, 4, 4) and out_last.shape == (2, 1, 2)
    rows = [[0.6201, -0.5690, -0.8503, 0.3732], [0.7594, -0.9050, -0.9095, 0.6461]]
    rows += [[0.4136, -0.9911, -0.9002, 0.9371], [0.6942, -0.9752, -0.9584, 0.9163]]
    assert_printed(out_all, torch.tensor([rows]))
    assert_printed(out_last, torch.tensor([[[0.6942, -0.9752]], [[-0.8503, 0.3732]]]))
    forward = rnn_by_hand(SEQ, *layer.all_weights[0])
    backward = rnn_by_hand(SEQ.flip(0), *layer.all_weights[1]).flip(0)
    torch.testing.assert_close(out_all[0], torch.cat([forward, backward], 1))


def test_002_stacked():
    layer = rnnfast.RNN(input_size=3, hidden_size=3, num_layers=2, bias=True, batch_first=True, bidirectional=False)
    load(
        layer,
        weight_ih_l0=[[-0.0067, 0.5169, -0.4285], [0.4447, -0.5474, 0.3089], [-0.1507, 0.2443, 0.1886]],
        weight_hh_l0=[[-0.1682, -0.2060, -0.0155], [-0.2151, -0.5301, -0.4871], [-0.4436, -0.2902, -0.5667]],
        bias_ih_l0=[-0.0591, -0.4937, 0.2946],
        bias_hh_l0=[-0.1003, 0.4496, 0.4387],
        weight_ih_l1=[[0.2131, 0.1153, 0.4454], [-0.3610, 0.0018, -0.3609], [-0.4575, 0.0097, -0.0236]],
        weight_hh_l1=[[0.0889, -0.0294, -0.3185], [0.1371, 0.1975, 0.5522], [0.3690, 0.3262, -0.1692]],
        bias_ih_l1=[0.1758, -0.5126, 0.3801],
        bias_hh_l1=[0.3563, -0.0351, 0.2165],
    )
    out_all, out_last = layer(SEQ.unsqueeze(0))
    assert out_all.shape == (1, 4, 3) and out_last.shape == (2, 1, 3)
    rows = [[0.7045, -0.6622, 0.5480], [0.6306, -0.5797, 0.3353], [0.7372, -0.7367, 0.2066], [0.7282, -0.7595, 0.2329]]
    assert_printed(out_all, torch.tensor([rows]))
    assert_printed(out_last, torch.tensor([[[0.7242, -0.8361, 0.7038]], [rows[-1]]]))
    output_1 = rnn_by_hand(SEQ, *layer.all_weights[0])
    output_2 = rnn_by_hand(output_1, *layer.all_weights[1])
    torch.testing.assert_close(out_all[0], output_2)
    torch.testing.assert_close(out_last[:, 0], torch.stack([output_1[-1], output_2[-1]]))


# ------------------------------------------------ tutorial 003: characters, tags, images


class Stateful(nn.Module):
    """A recurrent layer of batch 1 whose state is carried, detached, from call to call, and a linear layer on top."""

    def __init__(self, layer, num_classes, embedding=None):
        super().__init__()
        self.layer, self.embedding, self.state = layer, embedding, None
        self.linear = nn.Linear(layer.hidden_size, num_classes)

    def forward(self, x):
        x = x if self.embedding is None else self.embedding(x).unsqueeze(0)
        out, state = self.layer(x, self.state)
        self.state = tuple(s.detach() for s in state) if isinstance(state, tuple) else state.detach()
        return self.linear(out.view(-1, self.layer.hidden_size))


def train(model, samples, epochs, lr):
    """Adam and cross entropy, one sample a step; the list of losses."""
    optimizer, losses = torch.optim.Adam(model.parameters(), lr=lr), []
    for _ in range(epochs):
        for x, y in samples:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return losses


def train_from_seed_0(library, build, *args):
    torch.manual_seed(0)
    model = build(library)
    return model, train(model, *args)


def test_003_char_rnn_learns_hihell_to_ihello():
    idx2char = ["h", "i", "e", "l", "o"]
    x = F.one_hot(torch.tensor([idx2char.index(c) for c in "hihell"]), 5).float().unsqueeze(0)
    y = torch.tensor([idx2char.index(c) for c in "ihello"])
    assert x.shape == (1, 6, 5)

    def build(library):
        return Stateful(library.RNN(input_size=5, hidden_size=5, num_layers=1, batch_first=True), 5)

    model, losses = train_from_seed_0(rnnfast, build, [(x, y)], 80, 0.1)
    answer = "".join(idx2char[i] for i in model(x).argmax(1))
    assert answer == "ihello"
    assert losses[0] > 1 and losses[-1] < 0.05
    _, expected = train_from_seed_0(nn, build, [(x, y)], 20, 0.1)
    torch.testing.assert_close(losses[:20], expected, rtol=1e-3, atol=1e-4)


def test_003_lstm_tagger_learns_the_tags():
    sentences = [
        ("The dog ate the apple".split(), "DET NN V DET NN".split()),
        ("Everybody read that book".split(), "NN V DET NN".split()),
    ]
    words = {word: i for i, word in enumerate(dict.fromkeys(w for sentence, _ in sentences for w in sentence))}
    tags = ["DET", "NN", "V"]
    samples = [
        (torch.tensor([words[w] for w in sentence]), torch.tensor([tags.index(t) for t in tagged]))
        for sentence, tagged in sentences
    ]

    def build(library):
        return Stateful(library.LSTM(6, 3, 1, batch_first=True), len(tags), nn.Embedding(len(words), 6))

    model, losses = train_from_seed_0(rnnfast, build, samples, 60, 0.1)
    for (x, _), (_, expected) in zip(samples, sentences, strict=True):
        assert [tags[i] for i in model(x).argmax(1)] == expected
    assert losses[-1] < 0.1
    _, expected = train_from_seed_0(nn, build, samples, 10, 0.1)
    torch.testing.assert_close(losses[:20], expected, rtol=1e-3, atol=1e-4)


class RowReader(nn.Module):
    """Reads an image row by row; classifies it by the last state and the mean of all."""

    def __init__(self, layer, num_classes=10):
        super().__init__()
        self.layer, self.linear = layer, nn.Linear(2 * layer.hidden_size, num_classes)

    def forward(self, images):
        out, _ = self.layer(images)
        return self.linear(torch.cat([out[:, -1], out.mean(1)], 1))


@pytest.mark.quick(1)
@pytest.mark.parametrize("name", ["GRU", "LSTM"])
def test_003_image_rows_are_classified(name):
    datasets = pytest.importorskip("sklearn.datasets", reason="scikit-learn is not installed")
    digits = datasets.load_digits()
    images, labels = torch.from_numpy(digits.images).float() / 16, torch.from_numpy(digits.target).long()
    torch.manual_seed(0)
    held_out, kept = torch.randperm(len(images)).split([360, len(images) - 360])
    model = RowReader(getattr(rnnfast, name)(8, 64, batch_first=True))
    for lr in [1e-2] * 8 + [1e-3] * 3:
        train(model, [(images[i], labels[i]) for i in kept[torch.randperm(len(kept))].split(32)], epochs=1, lr=lr)
    with torch.no_grad():
        accuracy = (model(images[held_out]).argmax(1) == labels[held_out]).float().mean().item()
    assert accuracy >= 0.95


# ------------------------------------------------ tutorial 004: step by step and all at once


def test_004_one_call_reproduces_the_printed_numbers():
    torch.manual_seed(1)
    lstm = rnnfast.LSTM(input_size=3, hidden_size=4)
    sequence = [torch.randn(1, 1, 3) for _ in range(5)]
    torch.testing.assert_close(sequence[0], torch.tensor([[[0.0939, 1.2381, -1.3459]]]), rtol=0, atol=5e-5)
    torch.randn(2, 4)  # the initial state of the tutorial's step-by-step loop
    inputs = torch.cat(sequence).view(len(sequence), 1, -1)
    hidden = (torch.randn(1, 1, 4), torch.randn(1, 1, 4))
    out, (hn, cn) = lstm(inputs, hidden)
    rows = [[-0.2566, 0.1294, 0.0441, -0.5235], [-0.4444, 0.0762, 0.0304, -0.3889], [-0.1741, 0.1061, -0.0179, -0.1505]]
    rows += [[-0.1409, 0.1110, 0.0773, -0.2373], [-0.2308, 0.1164, -0.0115, -0.2423]]
    assert_printed(out, torch.tensor(rows).unsqueeze(1))
    assert_printed(hn, torch.tensor([[rows[-1]]]))
    assert_printed(cn, torch.tensor([[[-0.4093, 0.6065, -0.0288, -0.4107]]]))


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", ["RNN", "GRU", "LSTM"])
def test_004_step_by_step_equals_the_one_call(name, batch):
    torch.manual_seed(1)
    layer = getattr(rnnfast, name)(input_size=3, hidden_size=4)
    inputs = torch.randn(5, batch, 3)
    state = torch.randn(1, batch, 4)
    state = (state, torch.randn(1, batch, 4)) if name == "LSTM" else state
    out, final = layer(inputs, state)
    steps = []
    for x in inputs:
        step, state = layer(x.view(1, batch, -1), state)
        steps.append(step)
    torch.testing.assert_close(torch.cat(steps), out)
    torch.testing.assert_close(state, final)
