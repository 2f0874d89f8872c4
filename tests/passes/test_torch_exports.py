"""The default pipeline on raw exports of torch: equal to PyTorch, no clutter left, the batch still dynamic."""

from __future__ import annotations

import collections
import functools

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from pass_support import assert_close, run_ort

from passes import DEFAULT_PIPELINE, make

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

#: what an export carries that no static shape needs
CLUTTER = {"BatchNormalization", "CastLike", "Constant", "Dropout", "Identity", "Pad", "Size"}


class OneOutput(torch.nn.Module):  # type: ignore[misc, name-defined]
    """Gives the first tensor of what a transformers model gives, whatever it is called there."""

    def __init__(self, model: torch.nn.Module, names: tuple[str, ...]) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        result = self.model(**dict(zip(self.names, inputs, strict=True)))
        return result[0]


def with_statistics(model: torch.nn.Module) -> torch.nn.Module:
    """Random BatchNormalization parameters: those of a new model would hide a wrong fusion."""
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
            module.weight.data.uniform_(0.5, 1.5)
            module.bias.data.normal_(0, 0.1)
    return model.eval()


@functools.cache
def exported(name: str) -> tuple[onnx.ModelProto, torch.nn.Module]:
    """The raw export with a dynamic batch (and sequence), and the model that it was made from."""
    torch.manual_seed(0)
    batch, sequence = torch.export.Dim("batch", min=1), torch.export.Dim("sequence", min=2, max=32)
    inputs: tuple[torch.Tensor, ...] = (torch.randn(2, 3, 64, 64),)
    names: tuple[str, ...] = ("pixel_values",)
    dynamic = ({0: batch},)
    if name == "resnet":
        config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[2, 1])
        model = transformers.ResNetForImageClassification(config)
    elif name == "mobilenet_v2":
        config = transformers.MobileNetV2Config(depth_multiplier=0.25, image_size=64)
        model = transformers.MobileNetV2ForImageClassification(config)
    elif name == "vit":
        size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
        model = transformers.ViTForImageClassification(transformers.ViTConfig(image_size=64, patch_size=16, **size))
    else:
        size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
        config = transformers.BertConfig(vocab_size=100, max_position_embeddings=32, **size)
        model = transformers.BertModel(config)
        mask = torch.ones(2, 7, dtype=torch.long)
        mask[0, 4:] = 0
        inputs, names = (torch.randint(0, 100, (2, 7)), mask), ("input_ids", "attention_mask")
        dynamic = ({0: batch, 1: sequence}, {0: batch, 1: sequence})
    wrapped = OneOutput(with_statistics(model), names)
    with torch.no_grad():
        program = torch.onnx.export(
            wrapped,
            inputs,
            dynamo=True,
            optimize=False,
            dynamic_shapes=(dynamic,),
            input_names=list(names),
            output_names=["out"],
            verbose=False,
        )
    return ir.to_proto(program.model), wrapped


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["resnet", "mobilenet_v2", "vit", "bert"])
def test_export(name: str) -> None:
    proto, module = exported(name)
    model = ir.from_proto(proto)
    passes = [make(each) for each in DEFAULT_PIPELINE]
    for each in passes:
        if each(model).modified:
            onnx.checker.check_model(ir.to_proto(model), full_check=True)
    assert not any(each(model).modified for each in passes)
    after = ir.to_proto(model)

    ops = collections.Counter(node.op_type for node in after.graph.node)
    assert not set(ops) & (CLUTTER - ({"Pad"} if name == "mobilenet_v2" else set())), ops
    if name in ("resnet", "mobilenet_v2"):
        assert not set(ops) & {"Shape", "Expand", "Concat", "Squeeze"}, ops
    if name == "mobilenet_v2":
        assert ops["Pad"] == 0, ops
    if name == "vit":
        assert ops["Shape"] == ops["Expand"] == 1, ops  # the class token, once a batch
        assert ops["Add"] < sum(node.op_type == "Add" for node in proto.graph.node) - 4  # biases stay, the mask goes

    for size in (1, 3):
        torch.manual_seed(size)
        if name == "bert":
            mask = torch.ones(size, 5 + size, dtype=torch.long)
            mask[0, 3:] = 0
            inputs = {"input_ids": torch.randint(0, 100, (size, 5 + size)), "attention_mask": mask}
        else:
            inputs = {"pixel_values": torch.randn(size, 3, 64, 64)}
        with torch.no_grad():
            expected = module(*inputs.values()).numpy()
        feeds = {key: value.numpy() for key, value in inputs.items()}
        got = run_ort(after, feeds)[0]
        assert got.dtype == np.float32
        assert_close([expected], [got], 1e-11)


def test_no_path_of_this_machine_is_left() -> None:
    proto, _ = exported("resnet")
    model = ir.from_proto(proto)
    assert b".py" in proto.SerializeToString()
    for each in DEFAULT_PIPELINE:
        make(each)(model)
    assert b".py" not in ir.to_proto(model).SerializeToString()
