"""Reading artifacts: what is chosen, what is checked, and every way in which one can be wrong."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from runtime_support import manifest_of, save_model, save_with_data, variant_body, write_package

import runtimes
from runtimes import _digests
from runtimes.package import is_package, read_package, write_receipt

RELU = "g (float[N, 3] x) => (float[N, 3] y) { y = Relu(x) }"
NEG = "g (float[N, 3] x) => (float[N, 3] y) { y = Neg(x) }"
X = np.array([[1, -2, 3]], "float32")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """An artifact with two variants that tell themselves apart: "first" is Relu, "second" is Neg."""
    root = tmp_path / "artifact"
    save_model(root / "first" / "model.onnx", RELU)
    save_model(root / "second" / "model.onnx", NEG)
    (root / "recipe.yaml").write_text("precision: fp32\n")
    write_package(root, {"first": variant_body("first"), "second": variant_body("second", target="reference")})
    return root


def change(root: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    """Edits the manifest in place."""
    path = root / "manifest.json"
    manifest = json.loads(path.read_text())
    edit(manifest)
    path.write_text(json.dumps(manifest))


def ours(manifest: dict[str, Any], variant: str = "first") -> dict[str, Any]:
    found: dict[str, Any] = body(manifest, variant)["executor_info"]["toolchain"]
    return found


def body(manifest: dict[str, Any], variant: str = "first") -> dict[str, Any]:
    found: dict[str, Any] = manifest["components"]["model"]["variants"][variant]
    return found


def files(manifest: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = manifest["additional_metadata"]["toolchain"]["files"]
    return found


def output(session: runtimes.Session) -> list[float]:
    flat: list[float] = session.run({"x": X})["y"].ravel().tolist()
    return flat


# --- what is chosen


def test_read(root: Path) -> None:
    package = read_package(root)
    assert is_package(root)
    assert (package.name, package.version, package.root) == ("tiny", "1", root)
    assert [v.name for v in package.variants] == ["first", "second"]
    assert package.variants[1].target == runtimes.Target("reference")
    assert set(package.files) == {"first/model.onnx", "second/model.onnx", "recipe.yaml"}
    assert package.metadata == {"recipe": {"precision": "fp32"}}
    assert len(package.digest) == 64


@pytest.mark.parametrize(
    ("asked", "name", "values", "why"),
    [
        ({}, "first", [1, 0, 3], "the first that runs here"),
        ({"variant": "second"}, "second", [-1, 2, -3], "asked for variant 'second'"),
        ({"target": "reference"}, "second", [-1, 2, -3], "asked for target 'reference'"),
        ({"target": "ort-cpu", "variant": "first"}, "first", [1, 0, 3], "asked for variant 'first' and target"),
    ],
)
def test_choice(root: Path, asked: dict[str, str], name: str, values: list[float], why: str) -> None:
    with runtimes.load(root, **asked) as session:  # type: ignore[arg-type]
        assert output(session) == values
        assert session.info["variant"] == name
        assert session.info["why"].startswith(why)
        assert session.info["artifact"] == str(root)


def test_first_that_runs_here(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = runtimes.Availability(False, reason="not today", remedy="wait")
    monkeypatch.setattr("runtimes.ort_cpu.OrtCpu.probe", lambda self: gone)
    with runtimes.load(root) as session:
        assert session.info["variant"] == "second"
        assert session.info["why"] == "the first that runs here; not first: not today"
    with pytest.raises(runtimes.TargetUnavailable, match=r"first: not today.*run: wait"):
        raise_flat(lambda: runtimes.load(root, target="ort-cpu"))


def raise_flat(call: Callable[[], object]) -> None:
    """Raises what a call raises, with its text on one line."""
    try:
        call()
    except runtimes.Error as error:
        raise type(error)(" ".join(str(error).split())) from None


@pytest.mark.parametrize(
    ("asked", "error", "said"),
    [
        ({"variant": "third"}, runtimes.InvalidArtifact, "nothing for variant 'third'.*has: first .ort-cpu., second"),
        ({"variant": "second", "target": "ort-cpu"}, runtimes.InvalidArtifact, "nothing for variant 'second' and"),
        ({"target": "ort-cpux"}, runtimes.InvalidInput, "no target 'ort-cpux'.*did you mean ort-cpu"),
        ({"target": "Nonsense!"}, runtimes.InvalidInput, "not a target"),
        ({"target": "ort-cpu:1"}, runtimes.InvalidArtifact, "nothing for target 'ort-cpu:1'"),
        (
            {"target": "tensorrt"},
            runtimes.InvalidArtifact,
            r"toolchain build \S+/recipe.yaml --target tensorrt -o FOLDER",
        ),
        ({"options": {"spin": True}}, runtimes.InvalidInput, "no option 'spin'.*it has: graph_level"),
        ({"options": {"arena": 1}}, runtimes.InvalidInput, "arena is 1.*true or false"),
        ({"options": 3}, runtimes.InvalidInput, "or a mapping, not a int"),
    ],
)
def test_impossible_requests(root: Path, asked: dict[str, Any], error: type[runtimes.Error], said: str) -> None:
    with pytest.raises(error, match=said):
        raise_flat(lambda: runtimes.load(root, **asked))


def test_options_of_the_manifest_and_of_the_caller(root: Path) -> None:
    change(root, lambda m: ours(m).update(session_options={"intra_op_threads": 1, "graph_level": "basic"}))
    with runtimes.load(root) as session:
        assert (session.info["intra_op_threads"], session.info["graph_level"]) == ("1", "basic")
    with runtimes.load(root, options={"intra_op_threads": 2}) as session:
        assert (session.info["intra_op_threads"], session.info["graph_level"]) == ("2", "all")
    change(root, lambda m: ours(m).update(session_options={"optimized_model_filepath": "/tmp/x"}))
    with pytest.raises(runtimes.InvalidInput, match="no option 'optimized_model_filepath'"):
        runtimes.load(root)


def test_the_root_may_be_a_symlink(root: Path, tmp_path: Path) -> None:
    (tmp_path / "latest").symlink_to(root)
    with runtimes.load(tmp_path / "latest") as session:
        assert session.info["artifact"] == str(root)


# --- tampering


def _swap(root: Path) -> None:
    save_model(root / "first" / "model.onnx", NEG)


def _flip(root: Path) -> None:
    content = bytearray((root / "first" / "model.onnx").read_bytes())
    content[-1] ^= 1
    (root / "first" / "model.onnx").write_bytes(content)


def _flip_keeping_times(root: Path) -> None:
    path = root / "first" / "model.onnx"
    before = path.stat()
    _flip(root)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def _symlinked_file(root: Path) -> None:
    (root / "first" / "model.onnx").rename(root.parent / "elsewhere.onnx")
    (root / "first" / "model.onnx").symlink_to(root.parent / "elsewhere.onnx")


def _symlinked_folder(root: Path) -> None:
    (root / "first").rename(root.parent / "elsewhere")
    (root / "first").symlink_to(root.parent / "elsewhere")


def _symlinked_manifest(root: Path) -> None:
    (root / "manifest.json").rename(root.parent / "m.json")
    (root / "manifest.json").symlink_to(root.parent / "m.json")


def _pipe(root: Path) -> None:
    os.mkfifo(root / "first" / "pipe")


def _manifest_is_a_pipe(root: Path) -> None:
    (root / "manifest.json").unlink()
    os.mkfifo(root / "manifest.json")


TAMPERING: list[tuple[Callable[[Path], object], str]] = [
    (_swap, "not the file that was built"),
    (_flip, "SHA-256"),
    (_flip_keeping_times, "SHA-256"),
    (lambda r: (r / "first/model.onnx").unlink(), "in the manifest but not there"),
    (lambda r: (r / "second/model.onnx").unlink(), "in the manifest but not there"),
    (lambda r: shutil.rmtree(r / "first"), "in the manifest but not there"),
    (lambda r: (r / "first/extra.bin").write_bytes(b""), "'first/extra.bin' is not in the manifest"),
    (lambda r: (r / ".hidden").write_bytes(b""), "'.hidden' is not in the manifest"),
    (_symlinked_file, "'first/model.onnx' is a symlink"),
    (_symlinked_folder, "'first' is a symlink"),
    (_symlinked_manifest, "manifest cannot be opened"),
    (_pipe, "no plain file"),
    (_manifest_is_a_pipe, "not a plain file"),
    (lambda r: (r / "manifest.json").unlink(), "not an artifact"),
    (lambda r: (r / "manifest.json").write_bytes(b" " * ((16 << 20) + 1)), "larger than 16 MiB"),
    (lambda r: (r / "manifest.json").write_bytes(b""), "not JSON"),
    (lambda r: (r / "manifest.json").write_bytes(b"\xff{}"), "not JSON"),
    (lambda r: (r / "manifest.json").write_bytes(b"[" * 100_000), "not JSON"),
    (lambda r: (r / "manifest.json").write_bytes(b'{"a": ' + b"9" * 10_000 + b"}"), "not JSON"),
    (lambda r: (r / "manifest.json").write_bytes(b'{"a": NaN}'), "has NaN, which JSON does not"),
    (lambda r: (r / "manifest.json").write_bytes(b'{"layout": 1, "layout": 2}'), "'layout' twice"),
    (lambda r: (r / "manifest.json").write_bytes(b"[]"), "must be an object, is a list"),
]


@pytest.mark.parametrize("receipt", [False, True], ids=["first", "after-a-receipt"])
@pytest.mark.parametrize(("tamper", "said"), TAMPERING, ids=[said for _, said in TAMPERING])
def test_tampering(root: Path, tamper: Callable[[Path], object], said: str, receipt: bool) -> None:
    if receipt:
        write_receipt(root)
    tamper(root)
    with pytest.raises(runtimes.InvalidArtifact) as caught:
        runtimes.load(root)
    assert said in str(caught.value)
    assert str(root) in str(caught.value)


EDITS: list[tuple[Callable[[dict[str, Any]], object], str]] = [
    (lambda m: m.update(extra=1), "the manifest: has the unknown key 'extra'"),
    (lambda m: m.pop("layout"), "has no 'layout'"),
    (lambda m: m.update(layout="installed"), "layout: must be 'portable'"),
    (lambda m: m.pop("schema_version"), "schema_version: must be a text"),
    (lambda m: m.update(schema_version=1), "schema_version: must be a text"),
    (lambda m: m.update(schema_version="2.0"), "another schema: package schema 2.0"),
    (lambda m: m.update(shared_assets={}), "unknown key 'shared_assets'"),
    (lambda m: m.update(package_name=7), "package_name: must be a text, is a number"),
    (lambda m: m.update(components={}), "components: must hold 'model' and nothing else"),
    (lambda m: m["components"].update(model="model"), "components.model: must be an object"),
    (lambda m: m["components"]["model"].update(extra=1), "components.model: has the unknown key"),
    (lambda m: m["components"]["model"].update(variants=[]), "must be an object, is a list"),
    (lambda m: m["components"]["model"]["variants"].update({"../x": body(m)}), "the name must be"),
    (lambda m: m["additional_metadata"].pop("toolchain"), "no digests"),
    (lambda m: m["additional_metadata"]["toolchain"].update(schema=2), "another schema: 2"),
    (lambda m: m["additional_metadata"]["toolchain"].update(schema=True), "must be a whole number"),
    (lambda m: m["additional_metadata"]["toolchain"].pop("files"), "files: must be an object, is missing"),
    (lambda m: files(m)["recipe.yaml"].update(sha256="A" * 64), "64 lower-case hex"),
    (lambda m: files(m)["recipe.yaml"].update(size=-1), "number of bytes"),
    (lambda m: files(m)["recipe.yaml"].update(size=True), "number of bytes"),
    (lambda m: files(m)["recipe.yaml"].update(mode=1), "unknown key 'mode'"),
    (lambda m: files(m).update({"manifest.json": files(m)["recipe.yaml"]}), "cannot list itself"),
    *(
        (lambda m, p=path: files(m).update({p: files(m)["recipe.yaml"]}), "not a plain relative POSIX path")
        for path in ("../x", "/etc/passwd", "a/../b", "./a", "a//b", "a/", "a\\b", "C:x", "a\nb", "", "a\0")
    ),
    (lambda m: files(m).update({"\ud800": files(m)["recipe.yaml"]}), "half of a surrogate pair"),
    (lambda m: m.update(package_name="a\udfff"), "package_name: has half of a surrogate pair"),
    (lambda m: body(m).update(variant_directory="/etc"), "not a plain relative POSIX path"),
    (lambda m: body(m).update(variant_directory=".."), "not a plain relative POSIX path"),
    (lambda m: body(m).update(extra=1), "variant 'first': has the unknown key 'extra'"),
    (lambda m: body(m).update(ep=1), "variant 'first', ep: must be a text"),
    (lambda m: body(m)["executor_info"].pop("toolchain"), "executor_info.toolchain: must be an object, is missing"),
    (lambda m: body(m)["executor_info"]["ort"].update(model_file="../second/model.onnx"), "plain relative"),
    (lambda m: body(m)["executor_info"]["ort"].update(model_file="none.onnx"), "not in the list of files"),
    (
        lambda m: body(m)["executor_info"]["ort"].update(session_options={"session.optimized_model_filepath": "x"}),
        "makes ONNX Runtime write files",
    ),
    (lambda m: body(m)["executor_info"]["ort"].update(session_options={"a": 1}), "must be a text"),
    (lambda m: ours(m).update(model_file="../second/model.onnx"), "not a plain relative POSIX path"),
    (lambda m: ours(m).update(model_file="none.onnx"), "'first/none.onnx' is not in the list of files"),
    (lambda m: ours(m).update(prepared_file=["model.onnx"]), "must be a text, is a list"),
    (lambda m: ours(m).pop("model_file"), "neither model_file nor prepared_file"),
    (lambda m: ours(m).update(target="ORT CPU"), "not a target"),
    (lambda m: ours(m).pop("precision"), "has no 'precision'"),
    (lambda m: ours(m).update(fingerprint={"cpu": 1}), "fingerprint.cpu: must be a text"),
    (lambda m: ours(m).update(session_options=[]), "must be an object"),
    (lambda m: ours(m).update(remarks="text"), "must be a list"),
    (lambda m: ours(m).update(plugin="x.so"), "unknown key 'plugin'"),
]


@pytest.mark.parametrize(("edit", "said"), EDITS, ids=[f"{i}-{said}" for i, (_, said) in enumerate(EDITS)])
def test_wrong_manifest(root: Path, edit: Callable[[dict[str, Any]], object], said: str) -> None:
    change(root, edit)
    with pytest.raises(runtimes.InvalidArtifact) as caught:
        runtimes.load(root)
    assert said in str(caught.value)
    assert "manifest.json" in str(caught.value)


def test_only_the_chosen_variant_is_read(root: Path) -> None:
    """A file of another variant that was changed in place does not stop this one, and stops its own."""
    path = root / "second" / "model.onnx"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with runtimes.load(root) as session:
        assert output(session) == [1, 0, 3]
    with pytest.raises(runtimes.InvalidArtifact, match="SHA-256"):
        runtimes.load(root, variant="second")
    with pytest.raises(runtimes.InvalidArtifact, match="SHA-256"):
        read_package(root).verify()


def test_verify_false_skips_the_digests(root: Path) -> None:
    save_model(root / "first" / "model.onnx", NEG)
    with runtimes.load(root, verify=False) as session:
        assert session.info["verified"] == "no"
        assert output(session) == [-1, 2, -3]


def test_hard_linked_external_data_is_refused(tmp_path: Path) -> None:
    root = tmp_path / "artifact"
    save_with_data(root / "first" / "model.onnx")
    (tmp_path / "secret").write_bytes(bytes(16))
    os.link(tmp_path / "secret", root / "first" / "w.bin")
    write_package(root, {"first": variant_body("first")})
    with pytest.raises(runtimes.InvalidModel, match="hard link"):
        runtimes.load(root)


def test_no_artifact(tmp_path: Path) -> None:
    with pytest.raises(runtimes.InvalidModel, match="no such file"):
        runtimes.load(tmp_path / "none")
    with pytest.raises(runtimes.InvalidArtifact, match="not an artifact"):
        runtimes.load(tmp_path)
    assert not is_package(tmp_path)


# --- receipts


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files whose digests were computed."""
    names: list[str] = []
    real = _digests._sha256
    monkeypatch.setattr(_digests, "_sha256", lambda path: (names.append(path.name), real(path))[1])
    return names


def _settle(root: Path) -> None:
    """Waits until no file is too young for a receipt."""
    time.sleep(_digests.TICK_NS / 1e9 + 0.01)


def test_a_receipt_saves_the_second_read(root: Path, reads: list[str]) -> None:
    _settle(root)
    runtimes.load(root).close()
    assert reads == ["model.onnx"]
    runtimes.load(root).close()
    assert reads == ["model.onnx"]
    assert read_package(root).verify() == sum(
        read_package(root).files[name].size for name in ("second/model.onnx", "recipe.yaml")
    )
    assert read_package(root).verify() == 0
    assert read_package(root).verify(receipts=False) > 0


def test_write_receipt(root: Path, reads: list[str]) -> None:
    write_receipt(root)
    assert sorted(reads) == ["model.onnx", "model.onnx", "recipe.yaml"]
    runtimes.load(root).close()
    runtimes.load(root, variant="second").close()
    assert len(reads) == 3
    root.rename(root.with_name("moved"))
    runtimes.load(root.with_name("moved")).close()
    assert len(reads) == 3  # it is the same folder under another name


def test_files_too_young_get_no_receipt(root: Path, reads: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """What was written a moment ago can be written again within the same tick of the clock."""
    monkeypatch.setattr(_digests, "TICK_NS", 10**15)
    for _ in range(2):
        runtimes.load(root).close()
    assert reads == ["model.onnx"] * 2


def test_a_file_that_changes_while_it_is_read(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The digest is of what was there, not of what is: nothing may be concluded from it."""
    real = _digests._sha256

    def read_then_touched(path: Path) -> Any:
        digest, _ = real(path)
        os.utime(path, ns=(1, 1))
        return digest, _digests._identity(path.stat())

    monkeypatch.setattr(_digests, "_sha256", read_then_touched)
    with pytest.raises(runtimes.InvalidArtifact, match="changed while it was read"):
        runtimes.load(root)


def test_a_copy_has_no_receipt(root: Path, reads: list[str], tmp_path: Path) -> None:
    write_receipt(root)
    reads.clear()
    shutil.copytree(root, tmp_path / "copy")
    runtimes.load(tmp_path / "copy").close()
    assert reads == ["model.onnx"]


def _receipts() -> Path:
    return Path(os.environ["TOOLCHAIN_CACHE"]) / "receipts"


def _of(root: Path) -> Path:
    status = root.stat()
    return _receipts() / f"{status.st_dev:x}-{status.st_ino:x}.json"


@pytest.mark.parametrize(
    "spoil",
    [
        lambda path: path.write_text("{"),
        lambda path: path.write_text("[]"),
        lambda path: path.write_text('{"first/model.onnx": 3}'),
        lambda path: path.write_text("[" * 100_000),
        lambda path: path.chmod(0o666),
        lambda path: path.parent.chmod(0o777),
        lambda path: path.unlink(),
        lambda path: (path.rename(path.with_suffix(".x")), path.symlink_to(path.with_suffix(".x"))),
        lambda path: (path.unlink(), path.mkdir()),
        lambda path: (path.unlink(), os.mkfifo(path)),
    ],
    ids=["cut", "list", "number", "deep", "world-writable", "folder-writable", "gone", "symlink", "dir", "pipe"],
)
def test_a_receipt_that_cannot_be_trusted(root: Path, reads: list[str], spoil: Callable[[Path], object]) -> None:
    write_receipt(root)
    reads.clear()
    try:
        spoil(_of(root))
        runtimes.load(root).close()
        assert reads == ["model.onnx"]
    finally:
        _receipts().chmod(0o700)


def test_somebody_elses_receipt(root: Path, reads: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    write_receipt(root)
    reads.clear()
    me = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: me + 1)
    runtimes.load(root).close()
    assert reads == ["model.onnx"]


def test_no_place_for_receipts(root: Path, reads: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOOLCHAIN_CACHE", "/dev/null/nowhere")
    _settle(root)
    for _ in range(2):
        runtimes.load(root).close()
    assert reads == ["model.onnx"] * 2


@pytest.mark.parametrize(
    ("environment", "place"),
    [
        ({"TOOLCHAIN_CACHE": "{}/own", "XDG_CACHE_HOME": "{}/xdg"}, "own/receipts"),
        ({"XDG_CACHE_HOME": "{}/xdg", "HOME": "{}"}, "xdg/onnx-toolchain/receipts"),
        ({"HOME": "{}/home"}, "home/.cache/onnx-toolchain/receipts"),
    ],
)
def test_where_receipts_are(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], place: str
) -> None:
    for name in ("TOOLCHAIN_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value.format(tmp_path))
    write_receipt(root)
    (receipt,) = (tmp_path / place).iterdir()
    assert receipt.stat().st_mode & 0o777 == 0o600
    assert receipt.parent.stat().st_mode & 0o777 == 0o700


def test_the_writer_of_these_tests_lists_everything(root: Path) -> None:
    assert json.loads((root / "manifest.json").read_text()) == manifest_of(
        root, {"first": variant_body("first"), "second": variant_body("second", target="reference")}
    )


def test_a_manifest_that_is_a_folder(root: Path) -> None:
    (root / "manifest.json").unlink()
    (root / "manifest.json").mkdir()
    with pytest.raises(runtimes.InvalidArtifact, match="not a plain file"):
        read_package(root)
