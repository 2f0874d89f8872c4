"""Whether rows of a batch know of each other, asked of models where they do and where they do not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from versions_support import model_bytes

import runtimes
from runtimes import TensorSpec
from toolchain.serving.independence import batch_axis, why_rows_depend

FEEDS = {"x": np.array([[1.0, -2.0], [3.0, 4.0]], np.float32)}


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ("y = Softmax <axis = 1> (x)", None),
        ("y = Softmax <axis = 0> (x)", "with other rows beside it"),
        ("m = ReduceMax <axes = [0]> (x) y = Div(x, m)", "with other rows beside it"),
        ("y = ReduceSum <keepdims = 1> (x)", "of one row has the shape"),
        (
            "s = Shape(x) f = Cast <to = 1> (s) r = ReduceMax <keepdims = 0> (f) y = Mul(x, r)",
            "with other rows beside it",
        ),
        (
            "q, s, z = DynamicQuantizeLinear(x) y = DequantizeLinear(q, s, z)",
            "with other rows beside it",
        ),
    ],
)
def test_models(tmp_path: Path, body: str, why: str | None) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(model_bytes(f"g (float[n, 2] x) => (float[n, 2] y) {{ {body} }}"))
    with runtimes.load(path) as session:
        found = why_rows_depend(session, FEEDS)
    assert found is None if why is None else why in str(found)


def test_a_model_that_takes_one_row_only(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(
        model_bytes("g (float[n, 2] x) => (float[n, 2] y) <int64[2] one = {1, 2}> { y = Reshape(x, one) }")
    )
    with runtimes.load(path) as session:
        assert "does not run three rows" in str(why_rows_depend(session, FEEDS))


@pytest.mark.parametrize(
    ("inputs", "outputs", "batched"),
    [
        ([("n", 2)], [("n", 3)], True),
        ([(None, 2)], [("unk__7",)], True),
        ([("n", 2), ("n",)], [("n", 3)], True),
        ([("n", 2), ("m",)], [("n", 3)], False),
        ([(1, 2)], [("n", 3)], False),
        ([("n", 2)], [(1, 3)], False),
        ([("n", 2)], [()], False),
        ([None], [("n",)], False),
        ([], [("n",)], False),
    ],
)
def test_batch_axes(
    inputs: list[tuple[int | str | None, ...] | None], outputs: list[tuple[int | str | None, ...] | None], batched: bool
) -> None:
    def specs(shapes: list[tuple[int | str | None, ...] | None]) -> list[TensorSpec]:
        return [TensorSpec(str(index), "float32", shape) for index, shape in enumerate(shapes)]

    assert batch_axis(specs(inputs), specs(outputs)) is batched
