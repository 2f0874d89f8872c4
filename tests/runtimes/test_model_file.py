"""The scanner of ONNX files: real models, every way out of the folder, damage at every byte."""

from __future__ import annotations

import os
import random
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import onnx
import pytest
from google.protobuf.message import DecodeError, Message
from runtime_support import save_model, save_with_data

import runtimes
from runtimes.model_file import CHILDREN, check_model_file, copy_model

TINY = "g (float[N] x) => (float[N] y) { y = Relu(x) }"


def varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def field(number: int, content: bytes | int) -> bytes:
    """One protobuf field: a varint, or a length and its bytes."""
    if isinstance(content, int):
        return varint(number << 3) + varint(content)
    return varint(number << 3 | 2) + varint(len(content)) + content


def test_every_path_to_a_tensor_is_walked() -> None:
    """Our table against onnx's own descriptors: a message that can hold a tensor, and is not in it, is a hole."""
    messages: dict[str, dict[int, str]] = {}

    def visit(descriptor: object) -> None:
        if descriptor.name in messages:  # type: ignore[attr-defined]
            return
        children = messages[descriptor.name] = {}  # type: ignore[attr-defined]
        for entry in descriptor.fields:  # type: ignore[attr-defined]
            if entry.message_type:
                children[entry.number] = entry.message_type.name
                visit(entry.message_type)

    visit(onnx.ModelProto.DESCRIPTOR)
    reaching = {"TensorProto"}
    while more := {m for m, c in messages.items() if reaching & set(c.values())} - reaching:
        reaching |= more
    wanted = {
        message: {number: child for number, child in messages[message].items() if child in reaching}
        for message in reaching
    }
    wanted["ModelProto"][8] = "OperatorSetIdProto"
    wanted["TensorProto"] = {13: "StringStringEntryProto"}
    assert wanted == CHILDREN


def test_what_it_reports(tmp_path: Path) -> None:
    path = save_with_data(tmp_path / "m.onnx", location="sub/./w.bin")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "w.bin").write_bytes(bytes(16))
    model = onnx.load(path, load_external_data=False)
    model.producer_name = "someone"
    model.opset_import.add(domain="com.example", version=3)
    path.write_bytes(model.SerializeToString())
    found = check_model_file(path)
    assert found.path == path
    assert found.data_files == (tmp_path / "sub" / "w.bin",)
    assert found.opset_imports == {"": 19, "com.example": 3}
    assert (found.ir_version, found.producer, found.unranked) == (9, "someone", frozenset())
    assert (found.inputs, found.outputs) == (("x",), ("y",))
    copy_model(found, tmp_path / "copy")
    assert check_model_file(tmp_path / "copy" / "model.onnx").data_files == (tmp_path / "copy/sub/w.bin",)


def test_unranked(tmp_path: Path) -> None:
    model = onnx.parser.parse_model(
        '<ir_version: 9, opset_import: ["": 19]> g (float[N] x, float s) => (float[N] y) { y = Add(x, s) }'
    )
    model.graph.input[0].type.tensor_type.ClearField("shape")
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    assert check_model_file(tmp_path / "m.onnx").unranked == {"x"}


def test_assets(assets: Path) -> None:
    files = sorted(assets.glob("models/**/*.onnx"))
    assert files
    for path in files:
        wanted = onnx.load(path, load_external_data=False)
        found = check_model_file(path)
        assert found.ir_version == wanted.ir_version
        assert found.producer == wanted.producer_name
        assert found.opset_imports == {
            ("" if o.domain == "ai.onnx" else o.domain): o.version for o in wanted.opset_import
        }


# --- locations


@pytest.mark.parametrize(
    ("location", "said"),
    [
        ("/etc/passwd", "not a relative POSIX path"),
        ("../w.bin", "leads out"),
        ("sub/../../w.bin", "leads out"),
        ("..", "leads out"),
        (".", "leads out"),
        ("..\\w.bin", "not a relative POSIX path"),
        ("C:w.bin", "not a relative POSIX path"),
        ("C:\\w.bin", "not a relative POSIX path"),
        ("w.bin\0", "not a file name"),
        ("w\n.bin", "not a file name"),
        ("*/_ORT_MEM_ADDR_/*", "memory address"),
        ("missing.bin", "No such file"),
        ("folder", "not a regular file"),
        ("soft.bin", "soft.bin is a symlink"),
        ("softdir/w.bin", "softdir is a symlink"),
        ("hard.bin", "hard link"),
        ("pipe", "not a regular file"),
        ("w.bin/w.bin", "Not a directory"),
    ],
)
def test_locations_that_are_refused(tmp_path: Path, location: str, said: str) -> None:
    home = tmp_path / "home"
    path = save_with_data(home / "m.onnx", location=location)
    (tmp_path / "w.bin").write_bytes(bytes(16))
    for name in ("w.bin", "target.bin"):
        (home / name).write_bytes(bytes(16))
    (home / "folder").mkdir()
    (home / "folder" / "w.bin").write_bytes(bytes(16))
    (home / "*" / "_ORT_MEM_ADDR_").mkdir(parents=True)
    (home / "*" / "_ORT_MEM_ADDR_" / "*").write_bytes(bytes(16))
    (home / "soft.bin").symlink_to("target.bin")
    (home / "softdir").symlink_to("folder")
    os.link(home / "target.bin", home / "hard.bin")
    os.mkfifo(home / "pipe")
    with pytest.raises(runtimes.InvalidModel, match=said) as caught:
        check_model_file(path)
    assert "tensor 'w'" in str(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ({"offset": "1"}, "wants bytes 1 to 17, the file has 16"),
        ({"length": "17"}, "too short"),
        ({"offset": "18446744073709551615", "length": "1"}, "not a size"),
        ({"offset": "9223372036854775807"}, "too short"),
        ({"offset": "-1"}, "not a size"),
        ({"offset": "0x10"}, "not a size"),
        ({"length": ""}, "not a size"),
        ({"length": "\u0661"}, "not a size"),  # isdigit() alone says yes to other scripts
        ({"length": "9" * 5000}, "not a size"),
    ],
)
def test_sizes_that_are_refused(tmp_path: Path, entries: dict[str, str], said: str) -> None:
    path = save_with_data(tmp_path / "m.onnx", **entries)
    (tmp_path / "w.bin").write_bytes(bytes(16))
    with pytest.raises(runtimes.InvalidModel, match=said):
        check_model_file(path)


def _hidden_tensor() -> onnx.TensorProto:
    tensor = onnx.TensorProto(name="w", data_type=1, dims=[4], data_location=onnx.TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="/etc/passwd")
    return tensor


def _hide(where: str) -> onnx.ModelProto:
    """A model with an external tensor somewhere unusual."""
    model = onnx.parser.parse_model(f'<ir_version: 9, opset_import: ["": 19]> {TINY}')
    node, tensor = onnx.NodeProto(op_type="Constant", output=["c"]), _hidden_tensor()
    sparse = onnx.SparseTensorProto(values=tensor)
    if where == "sparse initializer":
        model.graph.sparse_initializer.append(sparse)
    elif where == "sparse indices":
        model.graph.sparse_initializer.append(onnx.SparseTensorProto(indices=tensor))
    elif where == "training":
        model.training_info.add().algorithm.initializer.append(tensor)
    elif where == "function":
        node.attribute.add(name="value", t=tensor)
        model.functions.add(name="f").node.append(node)
    elif where == "function default":
        model.functions.add(name="f").attribute_proto.add(name="value", t=tensor)
    elif where == "constant":
        node.attribute.add(name="value", t=tensor)
        model.graph.node.append(node)
    elif where == "tensors":
        node.attribute.add(name="value", tensors=[tensor])
        model.graph.node.append(node)
    elif where == "sparse attribute":
        node.attribute.add(name="value", sparse_tensor=sparse)
        model.graph.node.append(node)
    elif where == "subgraphs":
        inner = onnx.GraphProto(initializer=[tensor])
        for _ in range(10):
            outer = onnx.GraphProto()
            outer.node.add(op_type="If").attribute.add(name="then_branch", graphs=[inner])
            inner = outer
        model.graph.node.add(op_type="If").attribute.add(name="else_branch", g=inner)
    elif where == "behind a large payload":
        tensor.raw_data = bytes(1 << 20)
        model.graph.initializer.append(tensor)
    return model


@pytest.mark.parametrize(
    "where",
    [
        *("sparse initializer", "sparse indices", "training", "function", "function default", "constant"),
        *("tensors", "sparse attribute", "subgraphs", "behind a large payload"),
    ],
)
def test_hidden_tensors_are_found(tmp_path: Path, where: str) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(_hide(where).SerializeToString())
    with pytest.raises(runtimes.InvalidModel, match="/etc/passwd"):
        check_model_file(path)


def test_location_in_another_order_and_twice(tmp_path: Path) -> None:
    """Protobuf allows fields in any order; of two equal keys no reader is bound to take ours."""
    entry = field(2, b"w.bin") + field(1, b"location")
    other = field(2, b"/etc/passwd") + field(1, b"location")
    for entries, said in (((entry, other), "two external-data files"), ((other,), "/etc/passwd")):
        tensor = b"".join(field(13, e) for e in entries) + field(8, b"w")
        path = tmp_path / "m.onnx"
        (tmp_path / "w.bin").write_bytes(bytes(16))
        path.write_bytes(field(7, field(5, tensor)) + field(1, 9))
        with pytest.raises(runtimes.InvalidModel, match=said):
            check_model_file(path)


# --- files that are no model


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is empty.*byte 0"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer.*git lfs pull"),
        (b"PK\x03\x04aaaa", "zip archive"),
        (b"<html>", "HTML"),
        (b'{"a": 1}', "JSON"),
        (b"\x93NUMPY\x01\x00", "numpy array"),
        (b"\x18\0\0\0ORTM", r"\.ort format"),
        (b"\x89PNG\r\n\x1a\n" + bytes(64), "field number 0.*byte 10 of 72"),
        (b"\xff" * 64, "byte 0 of 64"),
        (field(1, 9), "no graph"),
        (field(7, b""), "no IR version"),
        (field(7, b"") + field(1, -1 & (1 << 64) - 1), "IR version 18446744073709551615"),
        (field(7, 5), "field 7 of ModelProto has wire type 0"),
        (varint(7 << 3 | 3), "wire type 3"),
        (varint(7 << 3 | 6), "wire type 6"),
        (varint(2), "field number 0"),
        (b"\x08" + b"\xff" * 10, "more than 64 bits"),
        (b"\x08" + b"\xff" * 9 + b"\x02", "more than 64 bits"),
        (b"\x08\x80", "ends in the middle of a number.*byte 1 of 2"),
        (varint(7 << 3 | 2) + varint(1 << 62), "4,611,686,018,427,387,904 bytes long where 0 are left"),
        (varint(9 << 3 | 1) + b"1234567", "ends in the middle"),
        (field(1, 9) + field(7, field(5, field(13, field(1, b"\xff\xfelocation")))), "not UTF-8"),
    ],
)
def test_no_model(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(content)
    with pytest.raises(runtimes.InvalidModel) as caught:
        check_model_file(path)
    assert re.search(said, str(caught.value), re.DOTALL), str(caught.value)


def test_not_a_file(tmp_path: Path) -> None:
    for path, said in (
        (tmp_path / "none.onnx", "no such file"),
        (tmp_path, "it is a folder" if sys.platform != "win32" else "cannot be read"),
        (Path("a\0b"), "cannot be read"),
    ):
        with pytest.raises(runtimes.InvalidModel, match=said):
            check_model_file(path)


def test_every_truncation_is_noticed(tmp_path: Path) -> None:
    """A model of one graph, cut anywhere before its last field, is no model."""
    content = save_model(tmp_path / "m.onnx", TINY).read_bytes()
    path = tmp_path / "cut.onnx"
    accepted = []
    for size in range(len(content)):
        path.write_bytes(content[:size])
        try:
            check_model_file(path)
            accepted.append(size)
        except runtimes.InvalidModel:
            continue
    # The graph is whole and only the opset behind it is missing: that is the runtime's to say.
    graph_ends = content.index(field(7, onnx.load(tmp_path / "m.onnx").graph.SerializeToString())) + len(
        field(7, onnx.load(tmp_path / "m.onnx").graph.SerializeToString())
    )
    assert accepted == [graph_ends]


def test_depth_is_bounded(tmp_path: Path) -> None:
    graph = field(5, field(13, field(1, b"location") + field(2, b"w.bin")))
    for _ in range(5000):
        graph = field(1, field(5, field(6, graph)))
    path = tmp_path / "m.onnx"
    path.write_bytes(field(1, 9) + field(7, graph))
    with pytest.raises(runtimes.InvalidModel, match="nested more than 100 deep"):
        check_model_file(path)


def test_number_of_fields_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runtimes.model_file._MAX_FIELDS", 1000)
    path = tmp_path / "m.onnx"
    path.write_bytes(field(1, 9) + field(7, field(2, b"") * 2000))
    with pytest.raises(runtimes.InvalidModel, match="more than 1,000 fields"):
        check_model_file(path)


def _locations(message: Message) -> Iterator[str]:
    """Every external-data location that onnx's own parser sees, wherever it hides."""
    if isinstance(message, onnx.TensorProto):
        yield from (entry.value for entry in message.external_data if entry.key == "location")
    for entry, value in message.ListFields():
        if entry.message_type:
            for child in [value] if isinstance(value, Message) else value:
                yield from _locations(child)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("seed", range(6))
def test_mutations(tmp_path: Path, seed: int) -> None:
    """Flipped, inserted, removed and copied bytes: InvalidModel or success, nothing else, and no hang.

    Where it succeeds and protobuf can parse the file, protobuf must find no location that we did not check.
    """
    rng = random.Random(seed)
    sources = [_hide(w) for w in ("subgraphs", "function", "sparse attribute", "training")]
    base = sources[seed % len(sources)].SerializeToString().replace(b"/etc/passwd", b"aaaaaaw.bin")
    (tmp_path / "aaaaaaw.bin").write_bytes(bytes(16))
    path = tmp_path / "m.onnx"
    outcomes = {"fine": 0, "refused": 0, "parsed": 0}
    for _ in range(500):
        content = bytearray(base)
        for _ in range(rng.choice((1, 1, 2, 5))):
            at = rng.randrange(len(content))
            kind = rng.randrange(4)
            if kind == 0:
                content[at] = rng.choice((0, 0x7F, 0x80, 0xFF, rng.randrange(256)))
            elif kind == 1:
                content[at:at] = rng.randbytes(rng.randrange(1, 12))
            elif kind == 2:
                del content[at : at + rng.randrange(1, 12)]
            else:
                to = rng.randrange(len(content))
                content[to:to] = content[at : at + rng.randrange(1, 40)]
        path.write_bytes(content)
        try:
            found = check_model_file(path)
        except runtimes.InvalidModel:
            outcomes["refused"] += 1
            continue
        outcomes["fine"] += 1
        try:
            parsed = onnx.ModelProto.FromString(bytes(content))
        except DecodeError:
            continue
        outcomes["parsed"] += 1
        seen = {tmp_path / location for location in _locations(parsed)}
        assert seen <= set(found.data_files), content
    assert min(outcomes.values()) > 10, outcomes  # the mutations do reach past the first check


def test_declared_shapes(tmp_path: Path) -> None:
    file = save_model(tmp_path / "m.onnx", "g (float[N, 3, ?] a, int64 s) => (float[N, 0, 2] y) { y = Foo(a, s) }")
    model = onnx.load(file)
    model.graph.output[0].type.tensor_type.shape.dim[0].dim_value = -1
    onnx.save(model, file)
    assert check_model_file(file).shapes == {"a": ("N", 3, None), "s": (), "y": (None, 0, 2)}
