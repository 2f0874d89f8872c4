"""Requests laid out as a batch, and taken apart again."""

from __future__ import annotations

import numpy as np
import pytest

from runtimes import InvalidInput, TensorSpec
from toolchain.serving.base import ModelInfo
from toolchain.serving.padding import SHORT, Layout

TEXT = ModelInfo(
    "bert",
    "1",
    (TensorSpec("ids", "int64", ("n", "seq")), TensorSpec("mask", "float32", ("n", "seq"))),
    (TensorSpec("states", "float32", ("n", "seq", 3)), TensorSpec("pooled", "float32", ("n", 3))),
    max_batch_size=8,
)


def text(rows: int, length: int, value: int) -> dict[str, np.ndarray]:
    return {"ids": np.full((rows, length), value, np.int64), "mask": np.ones((rows, length), np.float32)}


def test_inputs_are_filled_up_to_the_longest_and_outputs_cut_back() -> None:
    layout = Layout(TEXT, {"ids": 7, "mask": 0})
    batch = [text(1, 2, 1), text(2, 4, 2), text(1, 3, 3)]
    feeds = layout.gather(batch)
    assert feeds["ids"].dtype == np.int64
    assert feeds["ids"].tolist() == [[1, 1, 7, 7], [2, 2, 2, 2], [2, 2, 2, 2], [3, 3, 3, 7]]
    assert feeds["mask"].sum(1).tolist() == [2, 4, 4, 3]
    outputs = {
        "states": np.arange(48, dtype=np.float32).reshape(4, 4, 3),
        "pooled": np.arange(12, dtype=np.float32).reshape(4, 3),
    }
    parts = layout.hand_out(outputs, batch, [1, 2, 1])
    assert [part["states"].shape for part in parts] == [(1, 2, 3), (2, 4, 3), (1, 3, 3)]
    assert [part["pooled"].shape for part in parts] == [(1, 3), (2, 3), (1, 3)]
    assert parts[2]["states"].tolist() == outputs["states"][3:4, :3].tolist()
    assert all(part[name].base is not None for part in parts for name in part)  # views, not copies


def test_equal_lengths_are_put_below_each_other() -> None:
    batch = [text(1, 5, 1), text(2, 5, 2)]
    for layout in (Layout(TEXT), Layout(TEXT, {"ids": 0, "mask": 0})):
        assert layout.gather(batch)["ids"].tolist() == [[1] * 5, [2] * 5, [2] * 5]


def test_lengths_go_together_where_they_are_alike() -> None:
    plain, padded = Layout(TEXT), Layout(TEXT, {"ids": 0, "mask": 0})
    assert plain.key(text(1, 5, 1)) == plain.key(text(3, 5, 2)) != plain.key(text(1, 6, 1))
    assert padded.key(text(1, 1, 1)) == padded.key(text(4, SHORT, 1)) != padded.key(text(1, SHORT + 1, 1))
    by_class: dict[object, list[int]] = {}
    for length in range(SHORT + 1, 2000):
        by_class.setdefault(padded.key(text(1, length, 1)), []).append(length)
    for lengths in by_class.values():
        assert lengths == list(range(lengths[0], lengths[-1] + 1))
        assert lengths[-1] <= 2**0.25 * lengths[0]
    assert len(by_class) <= 30


def test_fixed_axes_have_to_be_equal_whatever_is_padded() -> None:
    info = ModelInfo(
        "m", "1", (TensorSpec("x", "float32", ("n", "t", None, 4)),), (TensorSpec("y", "float32", ("n", "t")),), 8
    )
    layout = Layout(info, {"x": 0.5})
    a, b, c = (np.ones((1, t, k, 4), np.float32) for t, k in ((2, 3), (5, 3), (5, 2)))
    assert layout.key({"x": a}) == layout.key({"x": b}) != layout.key({"x": c})
    whole = layout.gather([{"x": a}, {"x": b}])["x"]
    assert whole.shape == (2, 5, 3, 4)
    assert (whole[0, 2:] == 0.5).all()
    assert (whole[0, :2] == 1).all()


@pytest.mark.parametrize(
    ("fill", "said"),
    [
        ({"tokens": 0}, "does not have"),
        ({"ids": 0}, "nothing to fill it up with"),
        ({"scale": 0}, "no symbolic axis"),
    ],
)
def test_options_that_do_not_fit_the_model(fill: dict[str, float], said: str) -> None:
    info = ModelInfo("m", "1", (*TEXT.inputs, TensorSpec("scale", "float32", ("n", 2))), TEXT.outputs, 8)
    with pytest.raises(InvalidInput, match=said):
        Layout(info, fill)
