"""A model's configuration in Triton's form, which its clients ask for before they send anything.

The message is model_config.proto of https://github.com/triton-inference-server/common, as tritonclient carries it.
"""

from __future__ import annotations

from typing import Any

from google.protobuf import json_format
from tritonclient.grpc import model_config_pb2

from runtimes import TensorSpec
from toolchain.serving import wire
from toolchain.serving.base import ModelInfo
from toolchain.serving.options import ModelOptions, VersionPolicy


def as_message(info: ModelInfo, options: ModelOptions, *, cached: bool) -> model_config_pb2.ModelConfig:
    """The configuration of one version of a model.

    Where ``max_batch_size`` is above 0, the dims of inputs and outputs are without the batch axis, as Triton has them.
    ``cached`` says whether the server keeps any results.
    """
    batching = options.batching
    config = model_config_pb2.ModelConfig(
        name=info.name,
        platform=info.platform,
        max_batch_size=info.max_batch_size,
        version_policy=_version_policy(options.version_policy),
        input=[
            model_config_pb2.ModelInput(name=spec.name, data_type=_type(spec), dims=_dims(spec, info))
            for spec in info.inputs
        ],
        output=[
            model_config_pb2.ModelOutput(name=spec.name, data_type=_type(spec), dims=_dims(spec, info))
            for spec in info.outputs
        ],
        instance_group=[
            model_config_pb2.ModelInstanceGroup(
                name=f"{info.name}_0", kind=_instance_kind(info.platform), count=batching.instances
            )
        ],
        response_cache=model_config_pb2.ModelResponseCache(enable=cached and options.result_cache),
    )
    if info.max_batch_size:
        queue = model_config_pb2.ModelQueuePolicy(
            max_queue_size=batching.queue_size,
            default_timeout_microseconds=(batching.default_timeout_ms or 0) * 1000,
            allow_timeout_override=True,
        )
        config.dynamic_batching.CopyFrom(
            model_config_pb2.ModelDynamicBatching(
                preferred_batch_size=batching.preferred_batch_size,
                max_queue_delay_microseconds=batching.max_queue_delay_us,
                priority_levels=batching.priority_levels if batching.priority_levels > 1 else 0,
                default_priority_level=batching.priority_levels if batching.priority_levels > 1 else 0,
                default_queue_policy=queue,
            )
        )
    return config


def as_json(info: ModelInfo, options: ModelOptions, *, cached: bool) -> dict[str, Any]:
    """The same as JSON values, with every field that has no presence of its own, as Triton writes it."""
    tree: dict[str, Any] = json_format.MessageToDict(
        as_message(info, options, cached=cached),
        preserving_proto_field_name=True,
        always_print_fields_with_no_presence=True,
    )
    # Triton writes numbers where protobuf's own mapping writes 64-bit integers as text, and its clients count on it.
    for tensor in tree["input"] + tree["output"]:
        tensor["dims"] = [int(size) for size in tensor["dims"]]
    specific = tree["version_policy"].get("specific")
    if specific:
        specific["versions"] = [int(version) for version in specific["versions"]]
    dynamic = tree.get("dynamic_batching")
    if dynamic:
        for field in ("max_queue_delay_microseconds", "priority_levels", "default_priority_level"):
            dynamic[field] = int(dynamic[field])
        policy = dynamic["default_queue_policy"]
        policy["default_timeout_microseconds"] = int(policy["default_timeout_microseconds"])
    return tree


def _version_policy(policy: VersionPolicy) -> model_config_pb2.ModelVersionPolicy:
    kinds = model_config_pb2.ModelVersionPolicy
    if policy.latest is not None:
        return kinds(latest=kinds.Latest(num_versions=policy.latest))
    if policy.specific is not None:
        return kinds(specific=kinds.Specific(versions=policy.specific))
    return kinds(all=kinds.All())


def _instance_kind(platform: str) -> int:
    kinds = model_config_pb2.ModelInstanceGroup
    on_gpu = platform.startswith(("ort-cuda", "tensorrt"))
    return int(kinds.KIND_GPU if on_gpu else kinds.KIND_CPU)


def _type(spec: TensorSpec) -> int:
    name = wire.datatype(spec)
    return int(model_config_pb2.DataType.Value("TYPE_STRING" if name == "BYTES" else f"TYPE_{name}"))


def _dims(spec: TensorSpec, info: ModelInfo) -> list[int]:
    dims = wire.dims(spec)
    return dims[1:] if info.max_batch_size else dims
