"""What a bundle holds for which platform, its bytes, and the way from an artifact to a device and back."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import json
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundle_support import endings, make_artifact, parts
from toolchain_support import ROOT, toolchain, toolchain_json

import runtimes
from runtimes import install as installing
from runtimes._manifest import read_manifest
from toolchain import bundle as bundling
from toolchain.artifact import EXPORTED
from toolchain.bundle import Bundled, bundle
from toolchain.errors import StorageError
from toolchain.platforms import PLATFORMS


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_artifact(tmp_path_factory.mktemp("artifact") / "tiny")


def made(artifact: Path, output: Path, **options: Any) -> Bundled:
    options = {"platform": "linux-x86_64", "with_ort_format": False, **options}
    return bundle(artifact, output, **options)


def manifest(path: Path) -> dict[str, Any]:
    return json.loads(parts(path)[0][1])


def names(path: Path) -> list[str]:
    with tarfile.open(path) as archive:
        return archive.getnames()


def rewritten(artifact: Path, root: Path, change: Any) -> Path:
    """A copy of an artifact whose manifest was changed, with digests that are right."""
    shutil.copytree(artifact, root)
    tree = json.loads((root / "manifest.json").read_text())
    change(tree["components"]["model"]["variants"], root)
    files = {
        path.relative_to(root).as_posix(): {
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            "size": path.stat().st_size,
        }
        for path in root.rglob("*")
        if path.is_file() and path.name != "manifest.json"
    }
    tree["additional_metadata"]["toolchain"]["files"] = files
    (root / "manifest.json").write_text(json.dumps(tree))
    return root


def add_engine(variants: dict[str, Any], root: Path) -> None:
    """A TensorRT variant, as far as a manifest goes: no plan is read here."""
    (root / "tensorrt-fp16" / "prepared").mkdir(parents=True)
    shutil.copy(root / "ort-cpu-fp32" / "model.onnx", root / "tensorrt-fp16" / "model.onnx")
    (root / "tensorrt-fp16" / "prepared" / "model.plan").write_bytes(b"plan")
    bound = {"machine": "x86_64", "os": "linux", "plan_sha256": "0" * 64, "options": '{"workspace_mb": 64}'}
    entry = {
        "target": "tensorrt",
        "precision": "fp16",
        "model_file": "model.onnx",
        "prepared_file": "prepared/model.plan",
        "fingerprint": bound,
    }
    variants["tensorrt-fp16"] = {"variant_directory": "tensorrt-fp16", "executor_info": {"toolchain": entry}}


@pytest.mark.parametrize("ending", endings())
def test_the_same_artifact_gives_the_same_bytes(artifact: Path, tmp_path: Path, ending: str) -> None:
    elsewhere = shutil.copytree(artifact, tmp_path / "another" / "place")
    first, second = tmp_path / f"a{ending}", tmp_path / f"b{ending}"
    done = made(artifact, first)
    made(elsewhere, second)
    assert first.read_bytes() == second.read_bytes()
    assert done.size == first.stat().st_size
    assert str(tmp_path).encode() not in first.read_bytes()


@pytest.mark.parametrize("ending", [e for e in endings() if e != ".tar.zst"])
def test_pythons_own_reader_opens_it_and_finds_nothing_but_plain_files(
    artifact: Path, tmp_path: Path, ending: str
) -> None:
    made(artifact, tmp_path / f"a{ending}")
    with tarfile.open(tmp_path / f"a{ending}") as archive:
        members = archive.getmembers()
        assert [m.name for m in members[:2]] == ["manifest.json", "manifest.sha256"]
        assert [m.name for m in members[2:]] == sorted(m.name for m in members[2:])
        for member in members:
            assert member.isreg()
            assert (member.mtime, member.uid, member.gid, member.mode, member.uname) == (0, 0, 0, 0o644, "")


def test_zstd_opens_it(artifact: Path, tmp_path: Path) -> None:
    if ".tar.zst" not in endings() or shutil.which("zstd") is None:
        pytest.skip("zstd: neither the module nor the command")
    for ending in (".tar", ".tar.zst"):
        made(artifact, tmp_path / f"a{ending}")
    raw = subprocess.run(["zstd", "-dc", tmp_path / "a.tar.zst"], capture_output=True, check=True).stdout
    assert raw == (tmp_path / "a.tar").read_bytes()


def test_what_is_left_is_said(artifact: Path, tmp_path: Path) -> None:
    """On ARM the prepared form of an x86 machine is dead weight; the exported model nowhere runs."""
    done = made(artifact, tmp_path / "a.tar", platform="linux-aarch64")
    (choice,) = done.choices
    assert (choice.fate, choice.why) == ("portable", "it was made on x86_64")
    tree = manifest(tmp_path / "a.tar")
    ours = tree["additional_metadata"]["toolchain"]
    assert ours["bundle"] == {
        "platform": "linux-aarch64",
        "made_of": hashlib.sha256((artifact / "manifest.json").read_bytes()).hexdigest(),
        "left_out": {"ort-cpu-fp32": "it was made on x86_64"},
        "command": "toolchain bundle tiny --for linux-aarch64",
    }
    entry = tree["components"]["model"]["variants"]["ort-cpu-fp32"]["executor_info"]["toolchain"]
    assert entry["prepared_file"] is None
    assert not entry["fingerprint"]
    assert set(names(tmp_path / "a.tar")) == {
        "manifest.json", "manifest.sha256", "ort-cpu-fp32/model.onnx", "recipe.yaml", "sbom.cdx.json",
        "selftest.safetensors",
    }  # fmt: skip
    for kept in ("source", "recipe", "machine"):
        assert ours[kept] == read_manifest(artifact).metadata[kept]


def test_on_its_own_platform_the_prepared_form_goes_along(artifact: Path, tmp_path: Path) -> None:
    made(artifact, tmp_path / "a.tar")
    assert "ort-cpu-fp32/prepared/model.onnx" in names(tmp_path / "a.tar")


@pytest.mark.parametrize(
    ("platform", "fate"),
    [("linux-x86_64", "whole"), ("linux-aarch64", "to compile"), ("jetson", "to compile"), ("android", "left out"),
     ("windows-x86_64", "to compile")],
)  # fmt: skip
def test_an_engine_goes_along_where_it_fits_else_as_a_recipe(
    artifact: Path, tmp_path: Path, platform: str, fate: str
) -> None:
    root = rewritten(artifact, tmp_path / "a", add_engine)
    done = made(root, tmp_path / "a.tar", platform=platform)
    assert {c.variant.name: c.fate for c in done.choices}["tensorrt-fp16"] == fate
    found = set(names(tmp_path / "a.tar"))
    assert ("tensorrt-fp16/prepared/model.plan" in found) == (fate == "whole")
    assert ("tensorrt-fp16/model.onnx" in found) == (fate != "left out")
    tree = manifest(tmp_path / "a.tar")
    assert ("tensorrt-fp16" in tree["components"]["model"]["variants"]) == (fate == "whole")
    recipes = tree["additional_metadata"]["toolchain"].get("to_compile", [])
    assert len(recipes) == (fate == "to compile")
    for recipe in recipes:
        assert recipe == {
            "variant": "tensorrt-fp16", "target": "tensorrt", "precision": "fp16", "model_file": "model.onnx",
            "options": {"workspace_mb": 64}, "session_options": {},
        }  # fmt: skip


@pytest.mark.parametrize(
    ("machine", "fate"), [("x86_64", "whole"), ("AMD64", "whole"), ("aarch64", "to compile"), ("arm64", "to compile")]
)
def test_an_rtx_engine_travels_to_windows(artifact: Path, tmp_path: Path, machine: str, fate: str) -> None:
    """What Linux calls x86_64 is AMD64 there."""

    def change(variants: dict[str, Any], root: Path) -> None:
        add_engine(variants, root)
        entry = variants["tensorrt-fp16"]["executor_info"]["toolchain"]
        entry["target"] = "tensorrt-rtx"
        entry["fingerprint"]["machine"] = machine

    done = made(rewritten(artifact, tmp_path / "a", change), tmp_path / "a.tar", platform="windows-x86_64")
    assert {c.variant.name: c.fate for c in done.choices} == {"tensorrt-fp16": fate, "ort-cpu-fp32": "portable"}


def test_nothing_that_runs_there_is_no_bundle(artifact: Path, tmp_path: Path) -> None:
    def only_engine(variants: dict[str, Any], root: Path) -> None:
        add_engine(variants, root)
        del variants["ort-cpu-fp32"]

    root = rewritten(artifact, tmp_path / "a", only_engine)
    with pytest.raises(runtimes.InvalidArtifact, match="there is no tensorrt on android"):
        made(root, tmp_path / "a.tar", platform="android")
    assert not (tmp_path / "a.tar").exists()


def test_ort_format_is_a_variant_that_loads_and_says_its_version(artifact: Path, tmp_path: Path) -> None:
    import onnxruntime

    done = made(artifact, tmp_path / "a.tar", platform="android", with_ort_format=None)
    assert done.ort_format == onnxruntime.__version__
    made(artifact, tmp_path / "b.tar", platform="android", with_ort_format=None)
    assert (tmp_path / "a.tar").read_bytes() == (tmp_path / "b.tar").read_bytes()
    installed = installing.install(tmp_path / "a.tar", tmp_path / "root")
    assert [t.variant for t in installed.tested] == ["ort-cpu-fp32", "ort-cpu-fp32-ort"]
    version = tmp_path / "root" / "1"
    config = (version / "ort-cpu-fp32-ort" / "required_operators.config").read_text()
    assert "Gemm" in config
    assert "#" not in config
    feeds = {"image": np.ones((2, 3, 16, 16), np.float32)}
    results = []
    for variant in ("ort-cpu-fp32", "ort-cpu-fp32-ort"):
        with runtimes.load(tmp_path / "root", variant=variant) as session:
            results.append(session.run(feeds)["logits"])
            assert session.inputs[0].shape == ("batch", 3, 16, 16)
    np.testing.assert_allclose(*results, rtol=1e-4, atol=1e-5)
    # It is what any ONNX Runtime opens, and the manifest says which one at least.
    onnxruntime.InferenceSession(str(version / "ort-cpu-fp32-ort" / "model.ort"))
    (remark,) = read_manifest(version).variants[-1].remarks
    assert onnxruntime.__version__ in remark


def test_a_damaged_artifact_is_not_packed(artifact: Path, tmp_path: Path) -> None:
    root = shutil.copytree(artifact, tmp_path / "a")
    file = root / "ort-cpu-fp32" / "model.onnx"
    content = bytearray(file.read_bytes())
    content[100] ^= 1
    file.write_bytes(content)
    with pytest.raises(runtimes.InvalidArtifact, match=r"ort-cpu-fp32/model\.onnx"):
        made(root, tmp_path / "a.tar")
    assert [p.name for p in tmp_path.iterdir()] == ["a"], "nothing half-written is left"


def test_an_artifact_without_self_test_is_refused(artifact: Path, tmp_path: Path) -> None:
    root = shutil.copytree(artifact, tmp_path / "a")
    tree = json.loads((root / "manifest.json").read_text())
    del tree["additional_metadata"]["toolchain"]["selftest"]
    (root / "manifest.json").write_text(json.dumps(tree))
    with pytest.raises(runtimes.InvalidArtifact, match="no self-test"):
        made(root, tmp_path / "a.tar")


def test_what_came_out_of_a_bundle_is_not_bundled_again(artifact: Path, tmp_path: Path) -> None:
    made(artifact, tmp_path / "a.tar")
    installing.install(tmp_path / "a.tar", tmp_path / "root")
    with pytest.raises(runtimes.InvalidArtifact, match="came out of a bundle"):
        made(tmp_path / "root", tmp_path / "b.tar", platform="android")
    with pytest.raises(runtimes.InvalidArtifact, match="that is a file, and an artifact is a folder"):
        made(tmp_path / "a.tar", tmp_path / "b.tar")
    with pytest.raises(runtimes.InvalidArtifact, match="no such folder"):
        made(tmp_path / "nothere", tmp_path / "b.tar")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.tar", "root"]


def test_toolchain_verify_takes_what_is_installed_as_far_as_it_goes(artifact: Path, tmp_path: Path) -> None:
    made(artifact, tmp_path / "a.tar")
    installing.install(tmp_path / "a.tar", tmp_path / "root")
    said = toolchain("verify", tmp_path / "root", check=2).stderr
    assert "every digest is right" in said
    assert f"python -m runtimes verify {tmp_path / 'root'}" in said
    assert "python -m runtimes verify" in toolchain("verify", tmp_path / "a.tar", check=2).stderr
    against = ("--against", artifact / EXPORTED, "--layers")
    assert "output" in toolchain("verify", tmp_path / "root", *against).stdout
    model = tmp_path / "root" / "1" / "ort-cpu-fp32" / "model.onnx"
    model.write_bytes(model.read_bytes()[:-1] + b"x")
    assert "not the file that was built" in toolchain("verify", tmp_path / "root", check=2).stderr


def test_wrong_usage(artifact: Path, tmp_path: Path) -> None:
    with pytest.raises(runtimes.InvalidInput, match="no platform 'mars'"):
        made(artifact, tmp_path / "a.tar", platform="mars")
    with pytest.raises(runtimes.InvalidInput, match=r"\.tar\.zst"):
        made(artifact, tmp_path / "a.zip")
    (tmp_path / "b.tar").mkdir()
    with pytest.raises(StorageError, match="a folder"):
        made(artifact, tmp_path / "b.tar")


def test_without_zstandard_the_error_says_what_to_do(
    artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("compression", "backports", "backports.zstd"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(runtimes.InvalidArtifact) as caught:
        made(artifact, tmp_path / "a.tar.zst")
    assert "pip install backports.zstd" in str(caught.value)
    assert ".tar.gz" in str(caught.value)
    (tmp_path / "b.tar.zst").write_bytes(bytes.fromhex("28b52ffd0458") + bytes(20))
    with pytest.raises(runtimes.InvalidArtifact, match="no Zstandard"):
        installing.install(tmp_path / "b.tar.zst", tmp_path / "root")


def test_a_sparse_model_cannot_be_bundled_into_a_bomb(
    artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is larger than an install would take is refused when it is made, and not on a thousand devices."""
    small = dataclasses.replace(bundling.Limits(), total=1000)
    monkeypatch.setattr(bundling, "Limits", lambda: small)
    with pytest.raises(runtimes.InvalidArtifact, match="unpacks to more"):
        made(artifact, tmp_path / "a.tar")


def test_the_bill_of_materials_is_valid_cyclonedx(artifact: Path, tmp_path: Path) -> None:
    made(artifact, tmp_path / "a.tar")
    content = {head[:100].split(b"\0")[0].decode(): content for head, content in parts(tmp_path / "a.tar")}
    tree = json.loads(content["sbom.cdx.json"])
    assert tree["metadata"]["component"]["type"] == "machine-learning-model"
    files = {c["name"]: c["hashes"][0]["content"] for c in tree["components"] if c["type"] == "file"}
    assert files == {
        name: hashlib.sha256(data).hexdigest()
        for name, data in content.items()
        if name not in ("manifest.json", "manifest.sha256", "sbom.cdx.json")
    }
    assert "pkg:pypi/numpy@2.0.0" in [c["bom-ref"] for c in tree["components"]]
    if importlib.util.find_spec("cyclonedx") is None:
        pytest.skip("cyclonedx: not installed (cyclonedx-python-lib[json-validation] has the schema)")
    from cyclonedx.schema import SchemaVersion
    from cyclonedx.validation.json import JsonStrictValidator

    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(content["sbom.cdx.json"].decode()) is None


def test_from_the_command_line_to_the_device_and_back(artifact: Path, tmp_path: Path) -> None:
    said = toolchain_json("bundle", artifact, "--for", "linux-x86_64", "-o", tmp_path / "a.tar.gz")
    assert said["variants"] == [{"variant": "ort-cpu-fp32", "fate": "whole", "why": None}]
    root = tmp_path / "models" / "tiny"
    assert toolchain_json("install", tmp_path / "a.tar.gz", "--to", root)["version"] == 1
    done = toolchain("install", tmp_path / "a.tar.gz", "--to", root)
    assert "version 2 of tiny is in service" in done.stdout
    assert "passed" in done.stdout
    np.save(tmp_path / "x.npy", np.ones((1, 3, 16, 16), np.float32))

    lines = [
        ["run", root, "--input", tmp_path / "x.npy"],
        ["rollback", root],
        ["verify", root],
        ["rollback", root, "--to", "2"],
        ["install", tmp_path / "a.tar.gz", "--to", root],
        ["rollback", tmp_path],
    ]
    # What a device has: no toolchain.
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); sys.modules['toolchain'] = None\n"
    code += (
        f"from runtimes.__main__ import main\nfor line in {[[str(a) for a in x] for x in lines]!r}: print(main(line))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=True)
    for said in ("logits", "version 1 of tiny", "all as they were built", "version 2 of tiny", "version 3 of tiny"):
        assert said in ran.stdout
    assert ran.stdout.split()[-1] == "2"
    assert "nothing is installed there" in ran.stderr


def test_it_is_the_exported_model_that_stays_behind() -> None:
    assert EXPORTED.startswith(bundling.STAYS_BEHIND)


def test_packing_imports_nothing_large() -> None:
    """Peak memory is to stay below 100 MB, and the graph libraries alone take that."""
    code = "import sys, toolchain.bundle; print({'onnx', 'onnx_ir', 'onnxruntime', 'torch'} & set(sys.modules))"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert ran.stdout.strip() == "set()"


def test_every_platform_has_runtimes_that_there_are() -> None:
    for platform in PLATFORMS.values():
        for name in platform.runtimes:
            assert runtimes.backend(name).name == name
