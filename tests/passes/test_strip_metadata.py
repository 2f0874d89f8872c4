"""strip_metadata: nothing of the exporting machine is left, and every name is."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from pass_support import check, parse

from passes.strip_metadata import StripMetadata

SECRET = "/home/someone/secret.py"


def marked() -> onnx.ModelProto:
    """A model that names a path wherever a model can."""
    text = """<ir_version: 10, opset_import: ["" : 20, "local" : 1]>
    agraph (float[2] x, bool b, float[2] c) => (float[2] y) {
        n = local.f (x)
        k = Constant <value = float[2] {1.0, 2.0}> ()
        m = Add (n, k)
        y = If (b) <then_branch = t () => (float[2] p) { p = Add (m, c) },
                    else_branch = e () => (float[2] q) { q = Abs (m) }>
    }
    <domain: "local", opset_import: ["" : 20]>
    f (a) => (r) { r = Neg (a) }"""
    proto = parse(text, c=np.ones(2, np.float32))

    def mark(thing) -> None:
        fields = thing.DESCRIPTOR.fields_by_name
        if "doc_string" in fields:
            thing.doc_string = SECRET
        if "metadata_props" in fields:
            thing.metadata_props.add(key="pkg.torch.onnx.stack_trace", value=SECRET)
        for _, value in thing.ListFields():
            children = value if hasattr(value, "add") else [value]
            for child in children:
                if hasattr(child, "DESCRIPTOR") and child.DESCRIPTOR.name != "StringStringEntryProto":
                    mark(child)

    proto.graph.value_info.append(onnx.helper.make_tensor_value_info("m", onnx.TensorProto.FLOAT, [2]))
    mark(proto)
    assert proto.SerializeToString().count(SECRET.encode()) > 20
    return proto


def test_no_path_is_left() -> None:
    proto = marked()
    for value in (*proto.graph.input, *proto.graph.output):  # check() holds these to their bytes
        value.ClearField("doc_string")
        value.ClearField("metadata_props")
    model, _ = check(proto, StripMetadata(), seeds=3)
    import onnx_ir as ir

    after = ir.to_proto(model)
    assert SECRET.encode() not in after.SerializeToString()
    assert [n.name for n in after.graph.node] == [n.name for n in proto.graph.node]
    assert [o for n in after.graph.node for o in n.output] == [o for n in proto.graph.node for o in n.output]


@pytest.mark.parametrize("keep", [False, True])
def test_the_models_own_metadata(keep: bool) -> None:
    proto = parse("agraph (float[2] x) => (float[2] y) { y = Neg (x) }")
    proto.metadata_props.add(key="author", value="me")
    model, outcome = check(proto, StripMetadata(keep_model_metadata=keep))
    assert outcome.modified is not keep
    assert bool(model.metadata_props) is keep


def test_inputs_and_outputs_too() -> None:
    import onnx_ir as ir

    model = ir.from_proto(marked())
    StripMetadata()(model)
    assert SECRET.encode() not in ir.to_proto(model).SerializeToString()
