"""A model's configuration in Triton's form."""

from __future__ import annotations

import json

import pytest
from google.protobuf import json_format
from tritonclient.grpc import model_config_pb2

from runtimes import TensorSpec
from toolchain.serving import model_config
from toolchain.serving.base import ModelInfo
from toolchain.serving.options import Batching, ModelOptions, VersionPolicy

INFO = ModelInfo(
    "m", "3",
    (TensorSpec("x", "float32", ("N", 3, "H", None)), TensorSpec("s", "string", ("N",))),
    (TensorSpec("y", "bfloat16", ("N", 5)),),
    max_batch_size=16, platform="ort-cpu",
)  # fmt: skip
OPTIONS = ModelOptions(
    batching=Batching(
        preferred_batch_size=(4, 8), max_queue_delay_us=500, priority_levels=3, queue_size=9, default_timeout_ms=7,
        instances=2,
    ),
    version_policy=VersionPolicy(specific=(1, 3)),
)  # fmt: skip


def test_a_batched_model() -> None:
    config = model_config.as_message(INFO, OPTIONS, cached=True)
    assert (config.name, config.platform, config.max_batch_size) == ("m", "ort-cpu", 16)
    # Without the batch axis, as Triton has it.
    assert [(one.name, list(one.dims)) for one in config.input] == [("x", [3, -1, -1]), ("s", [])]
    assert [list(one.dims) for one in config.output] == [[5]]
    types = model_config_pb2.DataType
    assert [one.data_type for one in (*config.input, *config.output)] == [
        types.TYPE_FP32, types.TYPE_STRING, types.TYPE_BF16,
    ]  # fmt: skip
    batching = config.dynamic_batching
    assert list(batching.preferred_batch_size) == [4, 8]
    assert (batching.max_queue_delay_microseconds, batching.priority_levels, batching.default_priority_level) == (
        500, 3, 3,
    )  # fmt: skip
    assert batching.default_queue_policy.max_queue_size == 9
    assert batching.default_queue_policy.default_timeout_microseconds == 7000
    assert list(config.version_policy.specific.versions) == [1, 3]
    assert (config.instance_group[0].count, config.instance_group[0].kind) == (
        2, model_config_pb2.ModelInstanceGroup.KIND_CPU,
    )  # fmt: skip
    assert config.response_cache.enable


def test_a_model_without_batching() -> None:
    info = ModelInfo("m", "1", (TensorSpec("x", "int8", (1, "T")),), (TensorSpec("y", "bool", None),))
    config = model_config.as_message(info, ModelOptions(), cached=False)
    assert config.max_batch_size == 0
    assert not config.HasField("dynamic_batching")
    assert list(config.input[0].dims) == [1, -1]
    assert list(config.output[0].dims) == [-1]
    assert not config.response_cache.enable


@pytest.mark.parametrize(
    ("policy", "wanted"),
    [
        (VersionPolicy(latest=2), {"latest": {"num_versions": 2}}),
        (VersionPolicy(all=True), {"all": {}}),
        (VersionPolicy(specific=(4,)), {"specific": {"versions": [4]}}),
    ],
)
def test_version_policies(policy: VersionPolicy, wanted: object) -> None:
    options = ModelOptions(version_policy=policy)
    assert model_config.as_json(INFO, options, cached=False)["version_policy"] == wanted


@pytest.mark.parametrize(("platform", "kind"), [("ort-cpu", 2), ("ort-cuda", 1), ("tensorrt-rtx", 1)])
def test_where_it_runs(platform: str, kind: int) -> None:
    info = ModelInfo("m", "1", (), (), platform=platform)
    assert model_config.as_message(info, ModelOptions(), cached=False).instance_group[0].kind == kind


def test_json_has_numbers_where_triton_has_and_is_the_same_message() -> None:
    for info in (INFO, ModelInfo("m", "1", INFO.inputs, INFO.outputs)):
        tree = json.loads(json.dumps(model_config.as_json(info, OPTIONS, cached=True)))
        assert all(type(size) is int for tensor in tree["input"] + tree["output"] for size in tensor["dims"])
        if info is INFO:
            assert type(tree["dynamic_batching"]["max_queue_delay_microseconds"]) is int
        read = json_format.ParseDict(tree, model_config_pb2.ModelConfig())
        assert read == model_config.as_message(info, OPTIONS, cached=True)
