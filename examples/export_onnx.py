"""Export: a model becomes an ONNX file that takes any length, and a torch.export program that takes any batch.

Run it: python examples/export_onnx.py [--small]
It needs the packages onnx and onnxruntime.
"""

import sys
import tempfile
import warnings

import onnx
import onnxruntime
import torch
from torch import Tensor, nn

import rnnfast

SMALL = "--small" in sys.argv
HIDDEN = 16 if SMALL else 128
FEATURES = 8


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = rnnfast.LSTM(FEATURES, HIDDEN, num_layers=2, batch_first=True, bidirectional=True)
        self.head = nn.Linear(2 * HIDDEN, 3)

    def forward(self, x: Tensor) -> Tensor:
        output, _ = self.lstm(x)
        return self.head(output)


def export_onnx(model: Model, path: str) -> None:
    """The exporter by tracing writes one ONNX LSTM node per layer, of any batch and length."""
    torch.onnx.export(
        model,
        (torch.randn(2, 5, FEATURES),),
        path,
        dynamo=False,  # the newer exporter writes this length into the shape of the scores
        input_names=["x"],
        output_names=["scores"],
        dynamic_axes={"x": {0: "batch", 1: "time"}, "scores": {0: "batch", 1: "time"}},
    )


def export_program(model: Model, path: str) -> None:
    """torch.export leaves the batch free. It fixes the length, of torch.nn's layers too."""
    batch = torch.export.Dim("batch")
    program = torch.export.export(model, (torch.randn(2, 5, FEATURES),), dynamic_shapes=({0: batch},))
    torch.export.save(program, path)


def check(name: str, actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    print(f"{name}, shape {tuple(actual.shape)}: largest difference {(actual - expected).abs().max():.1e}")


warnings.simplefilter("ignore")  # both exporters warn, and do so for torch.nn's layers too
torch.manual_seed(0)
model = Model().eval()
# Neither file needs rnnfast: during an export the layers call torch's own operators.
with tempfile.TemporaryDirectory() as folder, torch.no_grad():
    export_onnx(model, f"{folder}/model.onnx")
    nodes = [node.op_type for node in onnx.load(f"{folder}/model.onnx").graph.node]
    print(f"the ONNX file has {nodes.count('LSTM')} LSTM nodes")
    session = onnxruntime.InferenceSession(f"{folder}/model.onnx", providers=["CPUExecutionProvider"])
    for batch, length in ((2, 5), (1, 1), (3, 40)):
        x = torch.randn(batch, length, FEATURES)
        (scores,) = session.run(None, {"x": x.numpy()})
        check("ONNX Runtime", torch.from_numpy(scores), model(x))

    export_program(model, f"{folder}/model.pt2")
    program = torch.export.load(f"{folder}/model.pt2").module()
    for batch in (2, 7):
        x = torch.randn(batch, 5, FEATURES)
        check("torch.export", program(x), model(x))
