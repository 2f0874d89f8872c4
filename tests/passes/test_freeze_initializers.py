"""freeze_initializers: constants in the list of inputs, and defaults that a caller may override."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from pass_support import check, parse

from passes.freeze_initializers import FreezeInitializers


def listed(ir_version: int) -> onnx.ModelProto:
    text = "agraph (float[2] x, float[2] c) => (float[2] y) { y = Add (x, c) }"
    proto = parse(text, opset=9, ir_version=ir_version)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(np.array([1, 2], np.float32), "c"))
    return proto


def test_before_ir_version_4() -> None:
    model, _ = check(listed(3), FreezeInitializers(), fired=1)
    assert [v.name for v in model.graph.inputs] == ["x"]
    assert model.ir_version == 4
    assert list(model.graph.initializers) == ["c"]


@pytest.mark.parametrize("overridable", [False, True])
def test_since_ir_version_4(overridable: bool) -> None:
    model, outcome = check(listed(8), FreezeInitializers(overridable=overridable), fired=int(overridable))
    assert len(model.graph.inputs) == 2 - overridable
    assert [each.node for each in outcome.declined] == ([] if overridable else ["c"])
