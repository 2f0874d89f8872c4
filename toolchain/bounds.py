"""How far numbers may be from those of a reference, by the narrowest float that a graph computes in.

Normalised MSE of an output. Float32 graphs with reordered sums were measured at 1e-13 to 1e-11 on the zoo, so 1e-8
(80 dB) leaves room for deep ones; a wrong graph is at 1e-2 or more.
"""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

FLOAT_BOUNDS: Mapping[str, float] = {"float64": 1e-12, "float32": 1e-8, "float16": 1e-4, "bfloat16": 1e-2}
#: INT8 is judged by its budget; beyond 10 dB the graph is wrong, not rounded.
INT8_BOUND = 0.1

_NAMES = {
    ir.DataType.DOUBLE: "float64",
    ir.DataType.FLOAT: "float32",
    ir.DataType.FLOAT16: "float16",
    ir.DataType.BFLOAT16: "bfloat16",
}


def float_bound(model: ir.Model) -> float:
    """The bound of the narrowest float among the graph's weights, inputs and values; float32's where there is none."""
    values = [*model.graph.inputs, *model.graph.initializers.values()]
    values += [value for node in model.graph for value in node.outputs]
    found = {_NAMES[value.dtype] for value in values if value.dtype in _NAMES}
    return max((FLOAT_BOUNDS[name] for name in found), default=FLOAT_BOUNDS["float32"])


def bound(precision: str, model: ir.Model) -> float:
    """What an artifact of this precision may be off from the float model that it was made of."""
    if precision == "fp16":
        return FLOAT_BOUNDS["float16"]
    return INT8_BOUND if precision.startswith("int8") else float_bound(model)
