"""What strangers hand in: refused with a typed error that names file and next step, before a runtime sees it."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper
from toolchain_support import conv_net, save

import runtimes
from runtimes import Error, InvalidModel
from toolchain import onnx_file
from toolchain.errors import GraphError
from toolchain.onnx_file import read_onnx, write_onnx


def refused(path: Path, kind: type[Error], said: str) -> None:
    with pytest.raises(kind) as caught:
        read_onnx(path)
    assert said in str(caught.value)
    assert path.name in str(caught.value)


def test_a_good_model_comes_through(tmp_path: Path) -> None:
    model = read_onnx(save(conv_net(), tmp_path / "m.onnx"))
    assert [node.op_type for node in model.graph][:2] == ["Conv", "BatchNormalization"]


@pytest.mark.parametrize(
    "content", [b"", b"\x08", b"not a model at all", b"PK\x03\x04" + b"\0" * 100, os.urandom(2000)], ids=range(5)
)
def test_no_model_at_all(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(content)
    refused(path, InvalidModel, "m.onnx")


@pytest.mark.parametrize("keep", [0.1, 0.5, 0.9, 0.999])
def test_a_truncated_model(tmp_path: Path, keep: float) -> None:
    path = save(conv_net(), tmp_path / "m.onnx")
    os.truncate(path, int(path.stat().st_size * keep))
    refused(path, InvalidModel, "m.onnx")


def test_a_folder_and_a_missing_file(tmp_path: Path) -> None:
    refused(tmp_path / "absent.onnx", InvalidModel, "absent.onnx")
    (tmp_path / "d.onnx").mkdir()
    refused(tmp_path / "d.onnx", InvalidModel, "d.onnx")


def test_a_newer_opset(tmp_path: Path) -> None:
    model = conv_net()
    model.opset_import[0].version = onnx.defs.onnx_opset_version() + 1
    refused(save(model, tmp_path / "m.onnx"), GraphError, f"uses opset {onnx.defs.onnx_opset_version() + 1}")


def test_a_newer_ir_version(tmp_path: Path) -> None:
    model = conv_net()
    model.ir_version = onnx.IR_VERSION + 1
    refused(save(model, tmp_path / "m.onnx"), GraphError, f"IR version {onnx.IR_VERSION + 1}")


def test_a_cycle(tmp_path: Path) -> None:
    model = conv_net()
    model.graph.node[0].input[0] = "relu"
    refused(save(model, tmp_path / "m.onnx"), GraphError, "conv")


def test_an_ill_typed_graph(tmp_path: Path) -> None:
    model = conv_net()
    model.graph.node.insert(0, helper.make_node("Cast", ["image"], ["whole"], "cast", to=TensorProto.INT64))
    model.graph.node[1].input[0] = "whole"
    refused(save(model, tmp_path / "m.onnx"), GraphError, "conv")


def test_shapes_that_do_not_fit(tmp_path: Path) -> None:
    model = conv_net()
    model.graph.initializer[5].CopyFrom(numpy_helper.from_array(np.ones((10, 99), np.float32), "fc_w"))
    refused(save(model, tmp_path / "m.onnx"), GraphError, "fc")


def test_an_unknown_op(tmp_path: Path) -> None:
    model = conv_net()
    model.graph.node[2].op_type = "Reluu"
    refused(save(model, tmp_path / "m.onnx"), GraphError, "Reluu")


def test_an_unknown_domain_is_refused_by_the_runtime_that_lacks_it(tmp_path: Path) -> None:
    model = conv_net()
    model.graph.node[2].domain = "com.nobody"
    model.opset_import.append(helper.make_opsetid("com.nobody", 1))
    path = save(model, tmp_path / "m.onnx")
    with pytest.raises(runtimes.Error) as caught:
        runtimes.load(path)
    assert "com.nobody" in str(caught.value)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.float64])
def test_nan_weights(tmp_path: Path, dtype: type) -> None:
    model = conv_net()
    weight = numpy_helper.to_array(model.graph.initializer[0]).copy()
    weight[1, 2, 0, 1] = np.nan
    model.graph.initializer.append(numpy_helper.from_array(weight.astype(dtype), "unused_or_not"))
    if dtype is np.float32:
        model.graph.initializer[0].CopyFrom(numpy_helper.from_array(weight, "w"))
    refused(save(model, tmp_path / "m.onnx"), GraphError, "NaN")


def test_infinite_weights_are_a_mask_and_allowed(tmp_path: Path) -> None:
    model = conv_net()
    model.graph.initializer.append(numpy_helper.from_array(np.array([np.inf, -np.inf], np.float32), "mask"))
    read_onnx(save(model, tmp_path / "m.onnx"))


def test_sparse_weights_are_refused_not_dropped(tmp_path: Path) -> None:
    model = conv_net()
    dense = model.graph.initializer.pop()  # fc_b
    values = numpy_helper.from_array(np.ones(2, np.float32), dense.name)
    model.graph.sparse_initializer.append(
        helper.make_sparse_tensor(values, numpy_helper.from_array(np.array([1, 4]), "indices"), [10])
    )
    refused(save(model, tmp_path / "m.onnx"), GraphError, "weight 'fc_b' is a sparse initializer")


def external(tmp_path: Path, location: str, *, length: int | None = None) -> Path:
    """The model with its first weight at ``location``."""
    model = conv_net()
    tensor = model.graph.initializer[0]
    data = tensor.raw_data
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (
        ("location", location),
        ("offset", "0"),
        ("length", str(len(data) if length is None else length)),
    ):
        entry = tensor.external_data.add()
        entry.key, entry.value = key, value
    (tmp_path / "model").mkdir()
    (tmp_path / "outside.bin").write_bytes(data)
    (tmp_path / "model" / "w.bin").write_bytes(data)
    return save(model, tmp_path / "model" / "m.onnx")


def test_external_data_beside_the_model_is_read(tmp_path: Path) -> None:
    model = read_onnx(external(tmp_path, "w.bin"))
    value = model.graph.initializers["w"].const_value
    assert value is not None
    assert value.numpy().shape == (8, 3, 3, 3)


def test_external_data_outside_is_refused(tmp_path: Path) -> None:
    refused(external(tmp_path, "../outside.bin"), InvalidModel, "outside.bin")


def test_external_data_at_an_absolute_path_is_refused(tmp_path: Path) -> None:
    refused(external(tmp_path, str(tmp_path / "outside.bin")), InvalidModel, "outside.bin")


@pytest.mark.parametrize("link", ["symlink", "hard link"])
def test_external_data_through_a_link_is_refused(tmp_path: Path, link: str) -> None:
    path = external(tmp_path, "l.bin")
    if link == "symlink":
        (path.parent / "l.bin").symlink_to(tmp_path / "outside.bin")
    else:
        os.link(tmp_path / "outside.bin", path.parent / "l.bin")
    refused(path, InvalidModel, "l.bin")


def test_external_data_beyond_the_file_is_refused(tmp_path: Path) -> None:
    refused(external(tmp_path, "w.bin", length=10**6), InvalidModel, "w.bin")


def test_a_crash_of_the_checker_is_a_typed_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The child dies as on a native fault."""
    die = [sys.executable, "-c", "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"]
    monkeypatch.setattr(onnx_file.child, "command", lambda module, *arguments: die)
    refused(save(conv_net(), tmp_path / "m.onnx"), GraphError, "signal 11")


def test_beyond_protobufs_limit_weights_go_beside_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_file, "EXTERNAL_DATA_FROM", 1000)
    model = ir.from_proto(conv_net(channels=64))
    write_onnx(model, tmp_path / "m.onnx")
    assert (tmp_path / "m.onnx.data").stat().st_size > 6000
    again = read_onnx(tmp_path / "m.onnx")
    feeds = {"image": np.random.default_rng(0).normal(size=(2, 3, 16, 16)).astype(np.float32)}
    save(conv_net(channels=64), tmp_path / "whole.onnx")
    with runtimes.load(tmp_path / "m.onnx") as left, runtimes.load(tmp_path / "whole.onnx") as right:
        np.testing.assert_array_equal(left.run(feeds)["logits"], right.run(feeds)["logits"])
    write_onnx(again, tmp_path / "again.onnx")
    assert (tmp_path / "again.onnx.data").exists()
