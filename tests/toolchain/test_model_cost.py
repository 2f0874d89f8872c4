"""Costs at real sizes: where inference gives up, a run tells."""

from __future__ import annotations

import onnx
import onnx_ir as ir
import pytest

from toolchain.errors import DataError
from toolchain.model_cost import cost_of


def model(text: str) -> ir.Model:
    return ir.from_proto(onnx.parser.parse_model('<ir_version: 8, opset_import: ["" : 20]>\n' + text))


#: how many rows NonZero gives only a run can tell: the inputs are drawn from a seed, none of them is zero
DYNAMIC = model(
    "agraph (float[N, 4] x, float[2, 6] w) => (float[K, 6] y) "
    "{ z = NonZero (x)\n t = Transpose (z)\n f = Cast <to = 1> (t)\n y = MatMul (f, w) }"
)


def test_a_shape_that_only_a_run_tells() -> None:
    found = cost_of(DYNAMIC, batch=3)
    assert found.unknown == ()
    assert found.macs == 12 * 2 * 6


def test_sizes() -> None:
    fixed = model("agraph (float[N, S] x, float[S, T] w) => (float[N, T] y) { y = MatMul (x, w) }")
    assert cost_of(fixed, batch=2, dims={"S": 5, "T": 7}).macs == 2 * 5 * 7
    with pytest.raises(DataError, match="no input has a dimension 'U'"):
        cost_of(fixed, dims={"U": 5})
