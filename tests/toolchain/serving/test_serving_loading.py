"""What a version is told to be by its files, what it is once loaded, and what is refused on the way."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import onnx
import pytest
from versions_support import X, model_bytes, scaled, write_artifact

from runtimes import Error, InvalidArtifact, RunFailed
from toolchain.serving.loading import describe, make
from toolchain.serving.options import Batching, ModelOptions, ServerOptions
from toolchain.serving.repository import Version, open_source

OPTIONS = ModelOptions()
SERVER = ServerOptions()


def version_of(path: Path) -> Version:
    (found,) = open_source(path).scan(OPTIONS).models.values()
    return found.versions[0]


@pytest.mark.parametrize(
    "graph",
    [
        scaled(2),
        "g (float16[n, 3, h] a, int64[n] b, bool[1] c, double s) => (float16[n, 3, h] y, uint8[2] z) "
        "<uint8[2] k = {1, 2}> { y = Identity(a) z = Identity(k) }",
    ],
)
def test_the_files_say_what_the_session_says(tmp_path: Path, graph: str) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(model_bytes(graph))
    version = version_of(path)
    made = make(version, OPTIONS, None, server=SERVER)
    made.session.close()
    assert describe(version, OPTIONS, None) == made.info


def test_an_artifact_is_described_as_it_is_loaded(tmp_path: Path) -> None:
    version = version_of(write_artifact(tmp_path / "m", labels=["a"], preprocessing={"size": [1, 1]}, note="x"))
    made = make(version, OPTIONS, None, server=SERVER, apart=True)
    made.session.close()
    assert made.selftest == 0
    assert made.remarks == ()
    assert describe(version, OPTIONS, None) == made.info
    assert made.info.digest == version.digest


def test_a_file_that_does_not_tell_its_inputs_from_its_weights(tmp_path: Path) -> None:
    model = onnx.load_from_string(model_bytes(scaled(2)))
    model.ir_version = 3
    model.graph.initializer.add(name="w", data_type=1, dims=[1], float_data=[1.0])
    model.graph.input.append(onnx.helper.make_tensor_value_info("w", 1, [1]))
    path = tmp_path / "m.onnx"
    path.write_bytes(model.SerializeToString())
    assert describe(version_of(path), OPTIONS, None) is None


def test_threads_are_the_servers_where_the_model_says_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    load = make.__globals__["runtimes"].load
    monkeypatch.setattr("runtimes.load", lambda path, **more: (asked.append(more["options"]), load(path, **more))[1])
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(8)), raising=False)
    version = version_of(write_artifact(tmp_path / "m"))
    own = OPTIONS.model_copy(update={"session_options": {"intra_op_threads": 5}})
    unsaid = OPTIONS.model_copy(update={"session_options": {"intra_op_threads": 0, "spinning": False}})
    for options, server in (
        (OPTIONS, SERVER),
        (OPTIONS, ServerOptions(threads=3)),
        (OPTIONS, ServerOptions(workers=4)),
        (OPTIONS, ServerOptions(workers=32)),
        (own, ServerOptions(threads=3)),
        (unsaid, ServerOptions(threads=3)),
    ):
        make(version, options, None, server=server).session.close()
    assert [options.get("intra_op_threads") for options in asked] == [None, 3, 2, 1, 5, 3]
    assert asked[-1]["spinning"] is False


def test_a_byte_that_changed_is_found_in_any_file_of_the_artifact(tmp_path: Path) -> None:
    """Also in one that this machine does not open, and after the files were compared once."""
    folder = write_artifact(tmp_path / "m", more={"export/model.onnx": b"of no use here" * 100})
    version = version_of(folder)
    make(version, OPTIONS, None, server=SERVER).session.close()
    unused = folder / "export" / "model.onnx"
    content = bytearray(unused.read_bytes())
    content[700] ^= 1
    unused.write_bytes(content)
    with pytest.raises(InvalidArtifact, match=r"'export/model\.onnx' is not the file that was built"):
        make(version, OPTIONS, None, server=SERVER)


def test_a_target_that_is_not_in_the_artifact_is_told_with_the_way_to_it(tmp_path: Path) -> None:
    version = version_of(write_artifact(tmp_path / "m", more={"recipe.yaml": b"model: x\n"}))
    for function in (describe, lambda *args: make(*args, server=SERVER)):
        with pytest.raises(InvalidArtifact, match="nothing for target 'tensorrt'") as caught:
            function(version, OPTIONS.model_copy(update={"target": "tensorrt"}), None)
        assert "m/recipe.yaml --target tensorrt" in str(caught.value.hint)
        with pytest.raises(Error, match="no target 'tensort'"):
            function(version, OPTIONS.model_copy(update={"target": "tensort"}), None)


def test_what_fails_its_self_test_or_was_replaced_is_refused(tmp_path: Path) -> None:
    version = version_of(write_artifact(tmp_path / "m", expected=X))
    for apart in (False, True):
        with pytest.raises(RunFailed, match="off by"):
            make(version, OPTIONS, None, server=SERVER, apart=apart)
    with pytest.raises(InvalidArtifact, match="replaced while"):
        make(dataclasses.replace(version, digest="0" * 64), OPTIONS, None, server=SERVER)


def test_a_process_of_its_own_tests_what_will_be_served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr("runtimes._selftest.selftest_apart", lambda root, **more: asked.append(more["options"]))
    version = version_of(write_artifact(tmp_path / "m"))
    own = OPTIONS.model_copy(update={"session_options": {"spinning": False}})
    make(version, own, None, server=ServerOptions(threads=3), apart=True).session.close()
    assert asked == [{"spinning": False, "intra_op_threads": 3}]


@pytest.mark.parametrize("name", ["../names.txt", "link.txt", "nothing.txt", "binary.txt", "/etc/hostname"])
def test_labels_lie_beside_the_options(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "m"
    version = version_of(write_artifact(folder / "1"))
    (tmp_path / "names.txt").write_text("a\n")
    (folder / "link.txt").symlink_to(tmp_path / "names.txt")
    (folder / "binary.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(InvalidArtifact) as caught:
        describe(version, ModelOptions(labels=name), folder)
    assert "labels" in str(caught.value.where)


def test_a_batch_size_that_was_set_is_somebodys_word(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(model_bytes("g (float[n, 2] x) => (float[n, 2] y) { y = Softmax <axis = 0> (x) }"))
    version = version_of(path)
    for most, rows, said in ((None, 0, "not put together"), (8, 8, "because max_batch_size is set"), (0, 0, "")):
        made = make(version, ModelOptions(batching=Batching(max_batch_size=most)), None, server=SERVER)
        made.session.close()
        assert made.info.max_batch_size == rows
        assert said in "".join(made.remarks)
    path.write_bytes(model_bytes("g (float[1, 2] x) => (float[1, 2] y) { y = Neg(x) }"))
    made = make(version_of(path), ModelOptions(batching=Batching(max_batch_size=8)), None, server=SERVER)
    assert (made.info.max_batch_size, "no batch axis" in made.remarks[0]) == (0, True)
    np.testing.assert_array_equal(made.session.run({"x": X[:1]})["y"], -X[:1])
    made.session.close()
