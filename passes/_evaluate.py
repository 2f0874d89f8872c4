"""Computes one deterministic operator on constant arrays, with onnx's own reference implementation."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
import onnx_ir as ir
from onnx.reference import ReferenceEvaluator

#: What is folded. A list of what is known to be right beats a list of what is known to be wrong: an
#: operator belongs here once tests/passes/test_fold_constants.py has folded onnx's own test cases of it.
#: Left out on purpose: anything random, Q/DQ (they mark precision, they are not arithmetic), control
#: flow, sequences, strings, and operators whose output is much larger than their inputs by design.
FOLDABLE = frozenset(
    """
    Abs Add And ArgMax ArgMin Cast CastLike Ceil Clip Compress Concat ConstantOfShape Cos CumSum Div Equal
    Erf Exp Expand EyeLike Flatten Floor Gather GatherElements GatherND Gemm Greater GreaterOrEqual
    Identity IsInf IsNaN Less LessOrEqual Log MatMul Max Mean Min Mod Mul Neg NonZero Not OneHot Or Pad Pow
    Range Reciprocal ReduceL1 ReduceL2 ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum
    ReduceSumSquare Relu Reshape Round ScatterElements ScatterND Shape Sigmoid Sign Sin Size Slice Softmax
    Split Sqrt Squeeze Sub Sum Tanh Tile TopK Transpose Trilu Unsqueeze Where Xor
    """.split()
)

#: the element types that numpy computes the way runtimes do
ELEMENT_TYPES = frozenset(
    {
        ir.DataType.BOOL,
        ir.DataType.INT8,
        ir.DataType.INT16,
        ir.DataType.INT32,
        ir.DataType.INT64,
        ir.DataType.UINT8,
        ir.DataType.UINT16,
        ir.DataType.UINT32,
        ir.DataType.UINT64,
        ir.DataType.FLOAT16,
        ir.DataType.BFLOAT16,
        ir.DataType.FLOAT,
        ir.DataType.DOUBLE,
    }
)


class CannotEvaluate(Exception):
    """The node cannot be computed here; the message says why, for a person."""


def evaluate(node: ir.Node, opset: int, inputs: Sequence[ir.TensorProtocol | None]) -> list[np.ndarray]:
    """Computes the node on constant inputs.

    Args:
        node: a node of ``FOLDABLE``, without subgraphs and without references to a function's attributes.
        opset: the version of the default domain that holds where the node stands.
        inputs: a tensor for each input; None for one that is left out.

    Returns:
        An array for each output of the node, in the dtype and shape that ONNX gives it.

    Raises:
        CannotEvaluate: an element type beyond ``ELEMENT_TYPES``, a cast out of range, or onnx refuses.
    """
    if any(tensor is not None and tensor.dtype not in ELEMENT_TYPES for tensor in inputs):
        raise CannotEvaluate("an input has an element type that is not folded")
    arrays = [None if tensor is None else tensor.numpy() for tensor in inputs]
    if node.op_type in ("Div", "Mod") and arrays[1] is not None and arrays[1].dtype.kind in "iu":
        if not arrays[1].all():
            raise CannotEvaluate("integer division by zero")
    target = _cast_target(node, inputs)
    if target is not None:
        data = arrays[0]
        assert data is not None
        return [_cast(data, target)]
    with np.errstate(all="ignore"):
        return _reference(node, opset, arrays)


def _cast_target(node: ir.Node, inputs: Sequence[ir.TensorProtocol | None]) -> ir.DataType | None:
    if node.op_type == "Cast":
        return ir.DataType(node.attributes["to"].as_int())
    if node.op_type == "CastLike":
        like = inputs[1]
        assert like is not None
        return like.dtype
    return None


def _cast(data: np.ndarray, target: ir.DataType) -> np.ndarray:
    if target not in ELEMENT_TYPES:
        raise CannotEvaluate(f"a cast to {target.name} is not folded")
    to = target.numpy()
    floating = ir.DataType.from_numpy(data.dtype) in (
        ir.DataType.FLOAT16,
        ir.DataType.BFLOAT16,
        ir.DataType.FLOAT,
        ir.DataType.DOUBLE,
    )
    if floating and target.name.startswith(("INT", "UINT")) and data.size:
        wide = data.astype(np.float64)
        limits = np.iinfo(to)
        # Out of range the result is whatever the processor does, and processors differ.
        if not (np.isfinite(wide).all() and wide.min() >= limits.min and wide.max() < float(limits.max) + 1):
            raise CannotEvaluate("a cast from float to integer is out of range")
    with np.errstate(all="ignore"):
        return data.astype(to)


def _reference(node: ir.Node, opset: int, arrays: Sequence[np.ndarray | None]) -> list[np.ndarray]:
    names = ["" if data is None else f"i{index}" for index, data in enumerate(arrays)]
    outputs = [f"o{index}" for index in range(len(node.outputs))]
    proto = onnx.NodeProto(op_type=node.op_type, input=names, output=outputs)
    proto.attribute.extend(ir.to_proto(attribute) for attribute in node.attributes.values())
    given = {name: data for name, data in zip(names, arrays, strict=True) if data is not None}
    graph = onnx.helper.make_graph(
        [proto],
        "one_node",
        [
            onnx.helper.make_tensor_value_info(name, ir.DataType.from_numpy(data.dtype), data.shape)
            for name, data in given.items()
        ],
        [onnx.helper.make_empty_tensor_value_info(name) for name in outputs],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)])
    try:
        results = ReferenceEvaluator(model).run(None, given)
    except Exception as error:
        raise CannotEvaluate(f"onnx's reference cannot compute it: {error}") from error
    if not all(isinstance(result, np.ndarray | np.generic) for result in results):
        raise CannotEvaluate("an output is no tensor")
    return [np.asarray(result) for result in results]
