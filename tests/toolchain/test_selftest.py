"""Self-test vectors: equal for equal models, bounded by what the variant computes, and absent with a reason."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import onnx
import pytest
from toolchain_support import conv_net, save

import runtimes
from runtimes._selftest import read_vectors
from toolchain import selftest
from toolchain.artifact import Variant

HEADER = '<ir_version: 9, opset_import: ["": 19]>\n'


def parsed(path: Path, text: str) -> Path:
    return save(onnx.parser.parse_model(HEADER + text), path)


def compiled(model: Path, directory: Path, precision: str = "fp32") -> Variant:
    return Variant(runtimes.compile(model, "ort-cpu", directory), precision, {"intra_op_threads": 1})


def vectors(test: selftest.SelfTest, tmp_path: Path) -> dict[str, np.ndarray]:
    (tmp_path / "x").write_bytes(test.contents[selftest.FILE])
    return read_vectors(tmp_path / "x")


def test_a_variants_own_outputs_are_stored(tmp_path: Path) -> None:
    model = save(conv_net(), tmp_path / "model.onnx")
    variant = compiled(model, tmp_path / "v")
    test = selftest.make_selftest(model, [variant])
    assert test == selftest.make_selftest(model, [variant])
    found = vectors(test, tmp_path)
    assert {name: array.shape for name, array in found.items()} == {
        "inputs/0/image": (1, 3, 16, 16), "inputs/1/image": (2, 3, 16, 16),
        "outputs/0/ort-cpu-fp32/logits": (1, 10), "outputs/1/ort-cpu-fp32/logits": (2, 10),
    }  # fmt: skip
    with runtimes.backend("ort-cpu").load(variant.compiled) as session:
        np.testing.assert_allclose(
            session.run({"image": found["inputs/1/image"]})["logits"],
            found["outputs/1/ort-cpu-fp32/logits"],
            rtol=1e-4,
            atol=1e-5,
        )
    assert test.metadata["variants"] == {"ort-cpu-fp32": {"outputs": "ort-cpu-fp32", "max_error": 1e-4}}
    assert selftest.make_selftest(model, [variant], seed=1) != test


def test_a_variant_whose_device_is_not_here_is_held_against_the_reference(tmp_path: Path) -> None:
    model = save(conv_net(), tmp_path / "model.onnx")
    variant = compiled(model, tmp_path / "v", "int8")
    absent = dataclasses.replace(variant.compiled, target=runtimes.Target("ort-cuda", "99"))
    test = selftest.make_selftest(model, [dataclasses.replace(variant, compiled=absent), variant])
    assert test.metadata["variants"] == {
        "ort-cuda-99-int8": {"outputs": "reference", "max_error": 0.1},
        "ort-cpu-int8": {"outputs": "ort-cpu-int8", "max_error": 1e-2},
    }
    found = vectors(test, tmp_path)
    np.testing.assert_allclose(
        found["outputs/0/reference/logits"], found["outputs/0/ort-cpu-int8/logits"], rtol=1e-3, atol=1e-4
    )


@pytest.mark.parametrize(
    ("graph", "why"),
    [
        ("g (string[N] x) => (string[N] y) { y = Identity(x) }", "cannot hold"),
        ("g (float[N, 3] x) => (float[N, 3] y) { r = RandomNormalLike(x)\n y = Add(x, r) }", "from run to run"),
        ("g (float[1, 3] x, int64[2] s) => (float[A, B] y) { y = Reshape(x, s) }", "reshape"),
    ],
)
def test_where_there_is_nothing_to_compare_it_says_why(tmp_path: Path, graph: str, why: str) -> None:
    model = parsed(tmp_path / "model.onnx", graph)
    test = selftest.make_selftest(model, [compiled(model, tmp_path / "v")])
    assert not test.contents
    assert test.metadata["cases"] == 0
    assert why in test.metadata["why"].lower()


def test_a_model_of_fixed_batch(tmp_path: Path) -> None:
    model = save(conv_net(dynamic=False), tmp_path / "model.onnx")
    test = selftest.make_selftest(model, [compiled(model, tmp_path / "v")])
    assert {a.shape[0] for a in vectors(test, tmp_path).values()} == {1}
