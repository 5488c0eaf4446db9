"""What type checkers and help() find: annotations, py.typed, the arguments of forward."""

import inspect
import pydoc
import typing
from pathlib import Path

import pytest
import torch

import rnnfast

LAYERS = ["RNN", "GRU", "LSTM"]
CELLS = ["RNNCell", "GRUCell", "LSTMCell"]


def test_the_package_is_typed():
    assert Path(rnnfast.__file__).with_name("py.typed").exists()


@pytest.mark.parametrize("name", [*LAYERS, *CELLS])
def test_forward_is_annotated(name):
    forward = getattr(rnnfast, name).forward
    hints = typing.get_type_hints(forward)
    assert {"input", "hx", "return"} <= hints.keys() and ("lengths" in hints) == (name in LAYERS)


@pytest.mark.parametrize("name", LAYERS)
def test_help_shows_lengths(name):
    text = pydoc.plain(pydoc.render_doc(getattr(rnnfast, name).forward))
    assert "forward(input, hx=None, *, lengths=None)" in text


@pytest.mark.parametrize("name", LAYERS)
def test_the_signature_is_that_of_torch(name):
    ours, theirs = (inspect.signature(getattr(library, name).forward) for library in (rnnfast, torch.nn))
    assert list(ours.parameters) == list(theirs.parameters)
