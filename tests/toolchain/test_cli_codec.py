"""`toolchain encode` and `toolchain decode`: there and back as a user does it, and what rubbish gets."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from toolchain_support import conv_net, save, toolchain, toolchain_json

from toolchain.codecs import MAGIC


def test_there_and_back(tmp_path: Path) -> None:
    model = save(conv_net(channels=64), tmp_path / "net.onnx")
    found = toolchain_json("encode", model, "-o", tmp_path / "net.codec", "--levels", "32", "--smallest", "512")
    assert found["size"] == (tmp_path / "net.codec").stat().st_size < found["compressed_float_size"]
    assert abs(found["float_size"] - model.stat().st_size) < 500
    assert found["compressor"].split()[0] in ("zstd", "lzma")
    assert [t["name"] for t in found["tensors"]] == ["w", "fc_w"]
    assert 0 < found["outputs"]["logits"]["nmse"] < 0.05
    assert found["not_compared"] is None
    done = toolchain("decode", tmp_path / "net.codec", "-o", tmp_path / "back.onnx")
    assert "wrote" in done.stdout
    before, after = (ir.from_proto(onnx.load(p)).graph.initializers for p in (model, tmp_path / "back.onnx"))
    assert list(before) == list(after)
    for name in before:
        a, b = before[name].const_value.numpy(), after[name].const_value.numpy()
        if name in ("w", "fc_w"):
            # each channel takes at most as many values as there are
            assert max(len(np.unique(channel)) for channel in b) <= 32
            lost = next(t["nmse"] for t in found["tensors"] if t["name"] == name)
            np.testing.assert_allclose(np.square(a - b).sum() / np.square(a).sum(), lost, rtol=1e-3)
        else:
            np.testing.assert_array_equal(a, b)


def test_what_is_shown(tmp_path: Path) -> None:
    model = save(conv_net(channels=64), tmp_path / "net.onnx")
    shown = toolchain("encode", model, "-o", tmp_path / "net.codec", "--codec", "log", "--levels", "15").stdout
    assert "bits each" in shown
    assert "the same, " in shown
    assert "logits" in shown
    assert "kept fc_w: it has 640 elements, less than 1024" in shown
    done = toolchain("encode", model, "-o", tmp_path / "net.codec", "--smallest", "100000")
    assert "no weight was encoded" in done.stderr


def test_mistakes(tmp_path: Path) -> None:
    model = save(conv_net(), tmp_path / "net.onnx")
    (tmp_path / "rubbish.onnx").write_bytes(b"rubbish")
    (tmp_path / "rubbish.codec").write_bytes(MAGIC + b"rubbish" * 20)
    for arguments, said in (
        (["encode", "absent.onnx", "-o", "x"], "no such file"),
        (["encode", "rubbish.onnx", "-o", "x"], "rubbish.onnx"),
        (["encode", "net.onnx", "-o", "net.onnx"], "the file that is read"),
        (["encode", "net.onnx", "-o", "x", "--codec", "zip"], "take kmeans or log"),
        (["encode", "net.onnx", "-o", "x", "--levels", "300"], "wanted: 2 to 256"),
        (["encode", "net.onnx", "-o", "x", "--codec", "log"], "an odd number"),
        (["decode", "net.onnx", "-o", "x"], "not a file of encoded weights"),
        (["decode", "rubbish.codec", "-o", "x"], "SHA-256"),
        (["decode", "absent", "-o", "x"], "no such file"),
    ):
        done = toolchain(*arguments, cwd=tmp_path, check=2)
        assert said in done.stderr, done.stderr
        assert "Traceback" not in done.stderr
        assert not (tmp_path / "x").exists()
    assert model.read_bytes() == conv_net().SerializeToString()


def test_a_model_that_takes_no_made_up_inputs_is_encoded_all_the_same(tmp_path: Path) -> None:
    text = """<ir_version: 8, opset_import: ["" : 20]> agraph (float[N, 32] x, float[M, 64] z) => (float[N, 64] y)
        { h = MatMul (x, w)
          y = Add (h, z) }"""
    proto = onnx.parser.parse_model(text)
    weight = np.random.default_rng(0).standard_normal((32, 64)).astype(np.float32)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(weight, "w"))
    path = save(proto, tmp_path / "net.onnx")
    found = toolchain_json("encode", path, "-o", tmp_path / "x", "--dim", "N=3", "--dim", "M=4")
    assert found["outputs"] == {}
    assert found["not_compared"]
    assert (tmp_path / "x").exists()


@pytest.mark.parametrize("levels", [16, 256])
def test_real_weights(assets: Path, tmp_path: Path, levels: int) -> None:
    found = toolchain_json(
        "encode", assets / "models/cifar10-resnets/cifar_resnet20.onnx", "-o", tmp_path / "x", "--levels", str(levels)
    )
    assert found["size"] < {16: 0.2, 256: 0.32}[levels] * found["compressed_float_size"]
    assert max(t["nmse"] for t in found["tensors"]) < {16: 0.013, 256: 1e-4}[levels]
