"""Installing, rolling back and what stands in the way, on a device that has ``runtimes`` alone.

Bundles are made here by hand, from the format as ``_unpack.py`` draws it, with Python's own tarfile.
"""

from __future__ import annotations

import hashlib
import io
import json
import multiprocessing
import os
import shutil
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from runtime_support import manifest_of, save_model, variant_body

import runtimes
from runtimes import _trust, _versions
from runtimes import install as installing
from runtimes._doctor import examine
from runtimes._selftest import output_error, read_vectors, selftest, selftest_apart, vectors_content
from runtimes.install import InstallFailed, Limits

DOUBLE = "g (float[N, 3] x) => (float[N, 3] y) { y = Add(x, x) }"
X = np.arange(6, dtype=np.float32).reshape(2, 3)


def write_artifact(
    root: Path, *, graph: str = DOUBLE, expected: np.ndarray | None = None, version: str = "1", **more: Any
) -> Path:
    save_model(root / "v" / "model.onnx", graph)
    vectors = {"inputs/0/x": X, "outputs/0/v/y": 2 * X if expected is None else expected}
    (root / "selftest.safetensors").write_bytes(vectors_content(vectors))
    tree = manifest_of(root, {"v": variant_body("v")})
    tree["package_version"] = version
    test = {"file": "selftest.safetensors", "cases": 1, "variants": {"v": {"outputs": "v", "max_error": 1e-6}}}
    tree["additional_metadata"]["toolchain"] |= {"selftest": test, **more}
    (root / "manifest.json").write_text(json.dumps(tree))
    return root


def tar(artifact: Path, path: Path) -> Path:
    """A bundle by the book."""
    manifest = (artifact / "manifest.json").read_bytes()
    said = f"{hashlib.sha256(manifest).hexdigest()}  manifest.json\n".encode()
    contents = {"manifest.json": manifest, "manifest.sha256": said}
    files = sorted(p.relative_to(artifact).as_posix() for p in artifact.rglob("*") if p.is_file())
    contents |= {name: (artifact / name).read_bytes() for name in files if name != "manifest.json"}
    with open(path, "wb") as file:
        for name, content in contents.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            file.write(entry.tobuf(tarfile.USTAR_FORMAT) + content + bytes(-len(content) % 512))
        file.write(bytes(1024))
    return path


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return tar(write_artifact(tmp_path / "artifact"), tmp_path / "a.tar")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests of the folder alone: the self-test takes a process."""
    monkeypatch.setattr(installing, "selftest_apart", lambda folder, **_: ())


def test_install_load_rollback(tmp_path: Path, bundle: Path) -> None:
    root = tmp_path / "deep" / "root"
    first = installing.install(bundle, root)
    assert (first.version, first.tested[0].error) == (1, 0.0)
    second = tar(write_artifact(tmp_path / "second", version="2"), tmp_path / "b.tar")
    done = installing.install(second, root)
    assert done.version == 2
    with runtimes.load(root) as session:
        assert session.info["digest"] == done.digest
        np.testing.assert_array_equal(session.run({"x": X})["y"], 2 * X)
    assert installing.rollback(root).version == 1
    with runtimes.load(root) as session:
        assert session.info["digest"] == first.digest
    with pytest.raises(InstallFailed, match="no version before"):
        installing.rollback(root)
    assert installing.rollback(root, to=2).version == 2
    with pytest.raises(InstallFailed, match="no version 9") as caught:
        installing.rollback(root, to=9)
    assert "1, 2" in str(caught.value)


def test_how_it_is_served_may_lie_beside_the_versions(tmp_path: Path, bundle: Path, quick: None) -> None:
    root = tmp_path / "root"
    installing.install(bundle, root)
    for name in ("serving.yaml", "labels.txt"):
        (root / name).write_text("pin: true\n")
    for _ in range(3):
        installing.install(bundle, root, keep=2)
    assert sorted(path.name for path in root.iterdir()) == [".lock", "3", "4", "labels.txt", "latest", "serving.yaml"]


def test_a_session_survives_the_switch(tmp_path: Path, bundle: Path, quick: None) -> None:
    root = tmp_path / "root"
    installing.install(bundle, root)
    with runtimes.load(root) as session:
        for _ in range(6):
            installing.install(bundle, root, keep=2)
        np.testing.assert_array_equal(session.run({"x": X})["y"], 2 * X)
    assert _versions.installed(root) == [6, 7]


def test_what_was_rolled_back_from_is_not_what_rollback_returns_to(tmp_path: Path, bundle: Path, quick: None) -> None:
    root = tmp_path / "root"
    for _ in range(2):
        installing.install(bundle, root)
    installing.rollback(root)
    done = installing.install(bundle, root)
    assert (done.version, done.removed) == (3, (2,))
    assert installing.rollback(root).version == 1


def test_the_last_n_stay(tmp_path: Path, bundle: Path, quick: None) -> None:
    root = tmp_path / "root"
    removed = [installing.install(bundle, root, keep=3).removed for _ in range(5)]
    assert removed == [(), (), (), (1,), (2,)]
    assert sorted(os.listdir(root)) == [".lock", "3", "4", "5", "latest"]
    with pytest.raises(runtimes.InvalidInput, match="keep is 1"):
        installing.install(bundle, root, keep=1)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"expected": 2 * X + 1}, "self-test failed: 'y' of variant 'v' is off by"),
        ({"expected": np.full_like(X, np.nan)}, "is off by inf"),
        ({"expected": 2 * X[:1]}, "is off by inf"),
        ({"graph": "g (float[N, 3] x) => (float[N, 3] y) { y = Nonsense(x) }"}, "Nonsense"),
        ({"graph": "g (float[N, 3] x) => (float[N, 3] z) { z = Add(x, x) }"}, "is off by inf"),
    ],
)
def test_a_failed_self_test_leaves_the_old_version(
    tmp_path: Path, bundle: Path, change: dict[str, Any], said: str
) -> None:
    root = tmp_path / "root"
    old = installing.install(bundle, root)
    bad = tar(write_artifact(tmp_path / "bad", **change), tmp_path / "bad.tar")
    with pytest.raises(InstallFailed) as caught:
        installing.install(bad, root)
    assert said in str(caught.value)
    assert sorted(os.listdir(root)) == [".lock", "1", "latest"]
    with runtimes.load(root) as session:
        assert session.info["digest"] == old.digest


def test_without_a_self_test_nothing_is_installed(tmp_path: Path) -> None:
    bundle = tar(write_artifact(tmp_path / "a", selftest=None), tmp_path / "a.tar")
    with pytest.raises(runtimes.Error, match="no self-test"):
        installing.install(bundle, tmp_path / "root")
    assert _versions.current(tmp_path / "root") is None


def test_a_crash_of_the_runtime_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    artifact = write_artifact(tmp_path / "a")
    from runtimes import _probe

    monkeypatch.setattr(_probe, "child", lambda code: [sys.executable, "-c", "import os; os.kill(os.getpid(), 11)"])
    with pytest.raises(runtimes.RunFailed, match="a crash, signal 11"):
        selftest_apart(artifact, timeout_s=60)
    monkeypatch.setattr(_probe, "child", lambda code: [sys.executable, "-c", "import time; time.sleep(60)"])
    with pytest.raises(runtimes.RunFailed, match="did not end within"):
        selftest_apart(artifact, timeout_s=0.2)


def test_a_self_test_takes_the_options_of_sessions(tmp_path: Path) -> None:
    artifact = write_artifact(tmp_path / "a")
    for test in (selftest, lambda path, **more: selftest_apart(path, timeout_s=60, **more)):
        assert test(artifact, options={"intra_op_threads": 1})[0].error == 0
        with pytest.raises(runtimes.Error, match="threads_of_nobody"):
            test(artifact, options={"threads_of_nobody": 1})


def test_what_does_not_run_here_is_told_and_not_tested(tmp_path: Path) -> None:
    root = tmp_path / "a"
    save_model(root / "w" / "model.onnx", DOUBLE)
    write_artifact(root)
    tree = json.loads((root / "manifest.json").read_text())
    tree["components"]["model"]["variants"]["w"] = variant_body("w", target="ort-cpu:7")
    tree["components"]["model"]["variants"]["w"]["executor_info"]["toolchain"]["target"] = "no-such-runtime"
    (root / "manifest.json").write_text(json.dumps(tree))
    found = {one.variant: one for one in selftest(root)}
    assert found["v"].why_not is None
    assert "no-such-runtime" in (found["w"].why_not or "")
    del tree["components"]["model"]["variants"]["v"]
    (root / "manifest.json").write_text(json.dumps(tree))
    with pytest.raises(runtimes.InvalidArtifact, match="nothing in it runs here"):
        selftest(root)


def test_everything_is_on_the_disk_before_the_switch(
    tmp_path: Path, bundle: Path, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A power cut after any call finds what the calls before it named: files, then folders, then the pointer."""
    events: list[tuple[str, str]] = []
    fsync, rename, replace = os.fsync, Path.rename, os.replace

    def named(descriptor: int) -> str:
        return os.readlink(f"/proc/self/fd/{descriptor}")

    if not Path("/proc/self/fd").exists():
        pytest.skip("/proc: this system does not say what a descriptor names")
    monkeypatch.setattr(os, "fsync", lambda fd: (events.append(("sync", named(fd))), fsync(fd))[1])
    monkeypatch.setattr(Path, "rename", lambda self, to: (events.append(("rename", str(to))), rename(self, to))[1])
    monkeypatch.setattr(os, "replace", lambda a, b: (events.append(("replace", str(b))), replace(a, b))[1])
    root = tmp_path / "root"
    installing.install(bundle, root)
    put = events.index(("rename", str(root / "1")))
    switched = events.index(("replace", str(root / "latest")))
    assert put < switched
    early = {Path(name).name for what, name in events[:put] if what == "sync"}
    assert {"manifest.json", "model.onnx", "selftest.safetensors", "v"} <= early
    folder = next(Path(name).parent for what, name in events if name.endswith("manifest.json"))
    assert ("sync", str(folder)) in events[:put], "the names in the version's own folder"
    assert ("sync", str(root)) in events[put:switched], "its number is there before the pointer leads to it"
    assert ("sync", str(root)) in events[switched:]


def test_where_links_are_not_possible_the_pointer_is_a_file(
    tmp_path: Path, bundle: Path, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object) -> None:
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(os, "symlink", refused)
    root = tmp_path / "root"
    for number in (1, 2):
        assert installing.install(bundle, root).version == number
        assert (root / "latest").read_text() == f"{number}\n"
    assert not (root / "latest").is_symlink()
    with runtimes.load(root) as session:
        assert session.info["artifact"] == str(root / "2")
    monkeypatch.undo()
    assert installing.rollback(root).version == 1  # a link may take the file's place
    assert (root / "latest").is_symlink()


@pytest.mark.parametrize("pointer", ["7", "../1", "", "x", "0", "01", "1/../1", "\xff", "9" * 5000])
def test_a_pointer_that_leads_nowhere_is_refused(tmp_path: Path, bundle: Path, quick: None, pointer: str) -> None:
    root = tmp_path / "root"
    installing.install(bundle, root)
    (root / "latest").unlink()
    (root / "latest").write_bytes(pointer.encode("latin-1"))
    with pytest.raises(runtimes.InvalidArtifact, match="pointer"):
        runtimes.load(root)


def test_two_at_once(tmp_path: Path, bundle: Path, quick: None) -> None:
    root = tmp_path / "root"
    with (
        _versions.locked(root),
        pytest.raises(InstallFailed, match="another process"),
    ):
        installing.install(bundle, root)
    assert installing.install(bundle, root).version == 1
    before = multiprocessing.get_context("fork")
    children = [before.Process(target=_try, args=(bundle, root)) for _ in range(6)]
    for child in children:
        child.start()
    for child in children:
        child.join()
    done = sum(child.exitcode == 0 for child in children)
    assert done >= 1
    assert {child.exitcode for child in children} <= {0, 3}
    assert _versions.current(root) == 1 + done


def _try(bundle: Path, root: Path) -> None:
    try:
        installing.install(bundle, root)
    except InstallFailed:
        sys.exit(3)


def test_what_killed_installs_left_is_cleared_away(tmp_path: Path, bundle: Path, quick: None) -> None:
    root = tmp_path / "root"
    installing.install(bundle, root)
    for name in (".incoming-0123456789ab", ".removing-0123456789ab"):
        (root / name / "v").mkdir(parents=True)
        (root / name / "v" / "model.onnx").write_bytes(b"half")
    (root / ".latest-0123456789ab").symlink_to("9")
    (root / "9.sig").write_bytes(b"of a version that never came")
    shutil.copytree(root / "1", root / "5")  # put in its place, and killed before the switch
    assert installing.install(bundle, root).version == 6
    assert sorted(os.listdir(root)) == [".lock", "1", "6", "latest"]


def test_a_folder_that_holds_something_else_is_left_alone(tmp_path: Path, bundle: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter.txt").write_text("dear")
    with pytest.raises(InstallFailed, match=r"letter\.txt"):
        installing.install(bundle, tmp_path / "home")
    assert os.listdir(tmp_path / "home") == ["letter.txt"]
    with pytest.raises(InstallFailed):
        installing.install(bundle, bundle)  # a file


def test_a_full_disk_leaves_the_old_version(
    tmp_path: Path, bundle: Path, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "root"
    installing.install(bundle, root)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(InstallFailed, match="No space left"):
            installing.install(bundle, root)
    assert sorted(os.listdir(root)) == [".lock", "1", "latest"]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 0))
    with pytest.raises(InstallFailed, match="0 MB are free"):
        installing.install(bundle, root)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("nothere.tar", "there is no such file"),
        ("artifact", "that is a folder, and a bundle is a file"),
        ("empty.tar", "the file is empty"),
        ("key.pem", "this is no bundle"),
        ("by-hand.tar", "this is no bundle"),
    ],
)
def test_what_is_no_bundle_is_told_with_the_next_step(tmp_path: Path, bundle: Path, name: str, said: str) -> None:
    (tmp_path / "empty.tar").touch()
    (tmp_path / "key.pem").write_text("-----BEGIN PUBLIC KEY-----\n")
    with tarfile.open(tmp_path / "by-hand.tar", "w") as archive:
        archive.add(tmp_path / "artifact", "artifact")
    for read in (lambda path: installing.install(path, tmp_path / "root"), installing.verify, examine):
        if (name, read) in [("artifact", installing.verify), ("artifact", examine)]:
            continue  # they take an artifact too
        with pytest.raises(runtimes.InvalidArtifact, match=said) as caught:
            read(tmp_path / name)
        assert caught.value.where == str(tmp_path / name)
        assert caught.value.hint
    assert not (tmp_path / "root").exists()


def test_a_file_where_a_folder_of_versions_is_wanted(tmp_path: Path, bundle: Path) -> None:
    for root in (bundle, bundle / "below"):
        with pytest.raises(InstallFailed, match="cannot write there") as caught:
            installing.install(bundle, root)
        assert "name another folder" in str(caught.value)
        for change in (installing.rollback, installing.compile_here):
            with pytest.raises(runtimes.InvalidArtifact, match="nothing is installed there"):
                change(root)


def test_a_folder_that_may_not_be_written_to(
    tmp_path: Path, bundle: Path, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "root"
    for _ in range(2):
        installing.install(bundle, root)

    def refuse(path: Path, *_: Any) -> None:
        raise OSError(30, "Read-only file system", str(path))

    monkeypatch.setattr(_versions, "open", refuse, raising=False)
    monkeypatch.setattr(_versions, "current", lambda root: 2)
    for change in (lambda: installing.install(bundle, root), lambda: installing.rollback(root)):
        with pytest.raises(InstallFailed, match="Read-only file system; what was in service still is") as caught:
            change()
        assert "may write to" in str(caught.value)


def test_limits(tmp_path: Path, bundle: Path) -> None:
    for limits in (Limits(total=100), Limits(files=1), Limits(depth=1), Limits(manifest=100)):
        with pytest.raises(runtimes.InvalidArtifact):
            installing.install(bundle, tmp_path / "root", limits=limits)


def test_a_damaged_version_is_not_gone_back_to(tmp_path: Path, bundle: Path, quick: None) -> None:
    root = tmp_path / "root"
    for _ in range(2):
        installing.install(bundle, root)
    file = root / "1" / "v" / "model.onnx"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(runtimes.InvalidArtifact, match="not the file that was built"):
        installing.rollback(root)
    assert _versions.current(root) == 2
    with pytest.raises(runtimes.InvalidArtifact):
        installing.verify(root / "1")


@pytest.mark.parametrize("pointer", ["../other/1", "./1", "1/", "1/../1", "", "..", "01", "latest"])
def test_a_pointer_is_a_number_and_nothing_else(tmp_path: Path, bundle: Path, quick: None, pointer: str) -> None:
    for name in ("root", "other"):
        installing.install(bundle, tmp_path / name)
    latest = tmp_path / "root" / "latest"
    latest.unlink()
    latest.write_text(pointer)
    kinds = [False]
    if pointer and os.name != "nt":
        kinds.append(True)
    for link in kinds:
        if link:
            latest.unlink()
            latest.symlink_to(pointer)
        with pytest.raises(runtimes.InvalidArtifact, match="no version here") as told:
            _versions.current(tmp_path / "root")
        assert told.value.hint == "rollback --to N puts one of these into service: 1"
        assert _versions.in_service(tmp_path / "root") is None


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """``runtimes.compile`` that notes what it was asked, and compiles for ort-cpu instead of for a GPU."""
    asked: list[dict[str, Any]] = []
    real = runtimes.compile

    def compiled(model: Path, target: str, directory: Path, *, options: Any = None) -> runtimes.Compiled:
        asked.append({"target": target, "options": options})
        return real(model, "ort-cpu", directory)

    monkeypatch.setattr(runtimes, "compile", compiled)
    return asked


def recipe(**change: Any) -> dict[str, Any]:
    return {
        "variant": "trt", "target": "tensorrt", "precision": "fp16", "model_file": "model.onnx",
        "options": {"workspace_mb": 64}, "session_options": {}, **change,
    }  # fmt: skip


def test_compile_on_device_makes_a_new_version(tmp_path: Path, compiler: list[dict[str, Any]], quick: None) -> None:
    artifact = tmp_path / "a"
    save_model(artifact / "trt" / "model.onnx", DOUBLE)
    root = tmp_path / "root"
    first = installing.install(tar(write_artifact(artifact, to_compile=[recipe()]), tmp_path / "a.tar"), root)
    done = installing.compile_here(root)
    assert compiler == [{"target": "tensorrt", "options": {"workspace_mb": 64}}]
    assert done.version == 2
    found = runtimes.package.read_package(root)
    found.verify(receipts=False)
    assert [v.name for v in found.variants] == ["trt", "v"], "what was built for this device is tried first"
    assert found.variants[0].prepared_file == "prepared/model.onnx"
    assert "to_compile" not in found.metadata
    # What was built here has no signature, and opens no way round that of the version it was made of.
    (root / "1.sig").write_bytes(b"x")
    with pytest.raises(InstallFailed, match=r"version 1, .* is signed, and this bundle is not"):
        installing.install(tmp_path / "a.tar", root)
    assert found.metadata["compiled_from"] == first.digest
    with pytest.raises(runtimes.InvalidArtifact, match="nothing in it is to be built"):
        installing.compile_here(root)
    assert installing.rollback(root).digest == first.digest


def test_doctor_says_what_is_to_be_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quick: None) -> None:
    artifact = tmp_path / "a"
    save_model(artifact / "trt" / "model.onnx", DOUBLE)
    more = {"to_compile": [recipe(target="ort-cpu"), recipe(target="tensorrt:99")], "bundle": {"platform": "jetson"}}
    path = tar(write_artifact(artifact, **more), tmp_path / "a.tar")
    title, found = examine(path)
    assert "a bundle for jetson" in title
    assert [one.runs for one in found] == [True, False, False]
    assert "to be built on this device, with ort-cpu version" in found[1].why
    assert "compile-on-device ROOT" in (found[1].remedy or "")
    assert "to be built" not in found[2].why, "there is no such GPU here"
    installing.install(path, tmp_path / "root")
    _, found = examine(tmp_path / "root")
    assert found[1].remedy == f"python -m runtimes compile-on-device {tmp_path / 'root'}"


@pytest.mark.parametrize(
    "bad",
    [recipe(variant="../v"), recipe(variant=".."), recipe(variant=1), recipe(model_file="../v/model.onnx"),
     recipe(more=1), {}, [], "x", recipe(variant="absent"), None],
)  # fmt: skip
def test_a_recipe_that_leads_elsewhere_is_refused(
    tmp_path: Path, compiler: list[dict[str, Any]], quick: None, bad: Any
) -> None:
    artifact = tmp_path / "a"
    save_model(artifact / "trt" / "model.onnx", DOUBLE)
    root = tmp_path / "root"
    installing.install(tar(write_artifact(artifact, to_compile=[bad]), tmp_path / "a.tar"), root)
    with pytest.raises(runtimes.InvalidArtifact):
        installing.compile_here(root)
    assert not compiler
    assert sorted(os.listdir(root)) == [".lock", "1", "latest"]


def test_a_plan_that_came_signed_may_be_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOOLCHAIN_CACHE", str(tmp_path / "cache"))
    sha = "ab" * 32
    assert _trust.refusal(sha, trusted=False) is not None
    _trust.note_signed(sha, "CN=Builds")
    assert _trust.refusal(sha, trusted=False) is None
    assert _trust.refusal("cd" * 32, trusted=False) is not None


def test_vectors_are_safetensors(tmp_path: Path) -> None:
    arrays = {
        "a": np.arange(3, dtype=np.float32), "b": np.ones((2, 0), np.int64), "c": np.full((), 3.0),
        "d": np.array([True, False]), "e": np.arange(5, dtype=np.uint8),
    }  # fmt: skip
    (tmp_path / "x").write_bytes(vectors_content(arrays))
    for name, array in read_vectors(tmp_path / "x").items():
        assert array.dtype == arrays[name].dtype
        np.testing.assert_array_equal(array, arrays[name])
    safetensors = pytest.importorskip("safetensors.numpy", reason="safetensors: not installed")
    loaded = safetensors.load_file(tmp_path / "x")
    assert set(loaded) == set(arrays)
    np.testing.assert_array_equal(loaded["a"], arrays["a"])
    (tmp_path / "y").write_bytes(safetensors.save(arrays))
    assert set(read_vectors(tmp_path / "y")) == set(arrays)


def test_damaged_vectors_are_refused(tmp_path: Path) -> None:
    good = vectors_content({"a": np.arange(30, dtype=np.float32)})
    rng = np.random.default_rng(0)
    for number in range(300):
        raw = bytearray(good)
        if number % 3 == 0:
            raw = raw[: rng.integers(len(raw))]
        elif number % 3 == 1:
            raw[rng.integers(60)] ^= 1 << int(rng.integers(8))
        else:
            raw[:8] = rng.bytes(8)
        (tmp_path / "x").write_bytes(raw)
        try:
            read_vectors(tmp_path / "x")
        except runtimes.InvalidArtifact:
            continue


def test_the_error_of_an_output() -> None:
    one = np.array([1.0, 2.0, np.nan, np.inf], np.float32)
    assert output_error(one, one) == 0
    assert output_error(one, np.array([1.0, 2.0, np.inf, np.nan], np.float32)) == np.inf
    assert output_error(one, one.astype(np.float64)) == np.inf
    assert output_error(np.ones(4, np.float32), np.array([1, 1, 1, 3], np.float32)) == 1.0
    assert output_error(np.zeros(3), np.array([0, 0, 1e-9])) == np.inf
    assert output_error(np.array([1, 2, 3, 4]), np.array([1, 2, 3, 5])) == 0.25


def test_the_reader_of_bundles_needs_no_zstandard(bundle: Path, tmp_path: Path, quick: None) -> None:
    import gzip

    raw = io.BytesIO()
    with gzip.GzipFile("", "wb", fileobj=raw, mtime=0) as file:
        file.write(bundle.read_bytes())
    content = bytearray(raw.getvalue())
    content[8:10] = b"\0\xff"  # what gzip says of the level and the system
    (tmp_path / "a.tar.gz").write_bytes(content)
    assert installing.install(tmp_path / "a.tar.gz", tmp_path / "root").version == 1


def test_numbered_folders_of_somebody_elses_stay(tmp_path: Path, bundle: Path, quick: None) -> None:
    root = tmp_path / "photos"
    (root / "2023").mkdir(parents=True)
    (root / "2023" / "cat.jpg").write_text("a cat")
    with pytest.raises(InstallFailed, match="something else: '2023'"):
        installing.install(bundle, root)
    assert (root / "2023" / "cat.jpg").read_text() == "a cat"


@pytest.mark.parametrize("pointer", [None, "", "77"])
def test_a_lost_pointer_loses_no_version_and_can_be_mended(
    tmp_path: Path, bundle: Path, quick: None, pointer: str | None
) -> None:
    root = tmp_path / "root"
    for _ in range(2):
        installing.install(bundle, root)
    (root / "latest").unlink()
    if pointer is not None:
        (root / "latest").write_text(pointer)
    with pytest.raises(runtimes.Error) as caught:
        installing.rollback(root)
    assert "1, 2" in str(caught.value)
    assert installing.rollback(root, to=1).version == 1
    (root / "latest").unlink()
    done = installing.install(bundle, root)
    assert (done.version, done.removed) == (3, ())
    assert _versions.installed(root) == [1, 2, 3]


def test_what_cannot_follow_is_refused(tmp_path: Path, bundle: Path, quick: None) -> None:
    root = tmp_path / "root"
    installing.install(bundle, root)
    (root / "1.sig").write_bytes(b"x")
    with pytest.raises(InstallFailed, match="is signed, and this bundle is not"):
        installing.install(bundle, root)
    (root / "1.sig").unlink()
    manifest = json.loads((root / "1" / "manifest.json").read_text())
    (root / "1" / "manifest.json").write_text(json.dumps({**manifest, "package_name": "another"}))
    with pytest.raises(InstallFailed, match="versions of 'another'"):
        installing.install(bundle, root)
    assert _versions.installed(root) == [1]


def test_numbers_end(tmp_path: Path, bundle: Path, quick: None) -> None:
    root = tmp_path / "root"
    installing.install(bundle, root)
    (root / "1").rename(root / "999999999")
    _versions.switch(root, 999999999)
    with pytest.raises(InstallFailed, match="no number left"):
        installing.install(bundle, root)
