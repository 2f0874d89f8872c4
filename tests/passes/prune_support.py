"""How pruning is tested: small graphs from a pool of weights, and the proof that a cut is what it says."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
from pass_support import assert_close, parse, random_feeds, run_ort, signature

from passes._channel_cut import Cut, apply, masked
from passes._channel_groups import analyze
from passes._channel_scores import importance, plan
from passes.prune_channels import prepare

KINDS = {np.dtype(np.float32): "float"} | {np.dtype(name): name for name in ("int32", "int64", "bool")}


def weight(*shape: int, seed: int = 0) -> np.ndarray:
    """Numbers that differ from channel to channel."""
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


def graph(
    body: str, constants: dict[str, np.ndarray], *, x: str = "N, 4, 6, 6", y: str | None = None, opset: int = 20
) -> onnx.ModelProto:
    """A graph from ``x`` to ``y`` in ONNX text; the constants that it names become initializers."""
    words = body.replace("(", " ").replace(")", " ").replace(",", " ").split()
    used = {name: data for name, data in constants.items() if name in words}
    declared = "".join(
        f", {KINDS[c.dtype]}[{', '.join(map(str, c.shape))}] {name}" if c.ndim else f", {KINDS[c.dtype]} {name}"
        for name, c in used.items()
    )
    out = "float y" if y is None else f"float[{y}] y"
    proto = parse(f"agraph (float[{x}] x{declared}) => ({out}) {{ {body} }}", opset=opset, **used)
    if y is None:
        proto.graph.output[0].type.tensor_type.ClearField("shape")
    return onnx.shape_inference.infer_shapes(proto, data_prop=True)


def shapes(model: ir.Model) -> dict[str, tuple[int, ...]]:
    """The shapes of the model's initializers."""
    return {
        name: tuple(int(n) for n in value.const_value.shape.numpy())
        for name, value in model.graph.initializers.items()
        if value.const_value is not None
    }


def parameters(model: ir.Model) -> int:
    """Numbers in the model's initializers."""
    return sum(int(np.prod(shape)) for shape in shapes(model).values())


def prove(
    proto: onnx.ModelProto,
    *,
    ratio: float = 0.5,
    cut: Cut | None = None,
    nmse: float = 1e-10,
    feeds: dict[str, np.ndarray] | None = None,
    sizes: dict[str, int] | None = None,
    run=run_ort,
    **options,
) -> tuple[ir.Model, Cut]:
    """Cuts the graph and holds that it is valid, has its signature, and computes what the masked whole one does."""
    model = ir.from_proto(proto)
    prepare(model)
    whole = ir.to_proto(model)
    analysis = analyze(model)
    if cut is None:
        cut = plan(analysis.groups, importance(model, analysis.groups), ratio=ratio, **options)
    twin = masked(model, cut)
    assert ir.to_proto(model).SerializeToString(deterministic=True) == whole.SerializeToString(deterministic=True)
    apply(model, cut)
    after = ir.to_proto(model)
    onnx.checker.check_model(after, full_check=True)
    onnx.shape_inference.infer_shapes(after, check_type=True, strict_mode=True, data_prop=True)
    assert signature(after) == signature(proto)
    for seed in range(2):
        given = random_feeds(proto, seed, sizes) if feeds is None else feeds
        expected = run(ir.to_proto(twin), given)
        assert_close(expected, run(after, given), nmse)
    return model, cut
