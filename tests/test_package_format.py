"""What we write is a model package of ONNX Runtime's: by a validator of our own, and by its own reader."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from package_validator import Broken, directory_hash, validate

import runtimes
from runtimes import install as installing
from toolchain.build import build
from toolchain.bundle import bundle
from toolchain.cache import Cache
from toolchain.platforms import PLATFORMS
from toolchain.recipe import Recipe

READER = Path(__file__).with_name("ort_package_reader.py")
NET = """g (float[batch, 3, 8, 8] image) => (float[batch, 3] means, float[batch, 3, 8, 8] act)
{ act = Sigmoid(image)
  pooled = GlobalAveragePool(act)
  means = Flatten(pooled) }"""


def built(folder: Path, targets: list[str]) -> Path:
    folder.mkdir()
    onnx.save(onnx.parser.parse_model(f'<ir_version: 9, opset_import: ["": 19]> {NET}'), folder / "net.onnx")
    recipe = Recipe(model=str(folder / "net.onnx")).override(
        benchmark__count=3, benchmark__duration_s=0.0, output=str(folder / "art"), targets=targets
    )
    return build(recipe, cache=Cache(folder / "cache")).path


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With variants that ONNX Runtime can run and one that it cannot."""
    return built(tmp_path_factory.mktemp("format") / "net", ["reference", "ort-cpu"])


@pytest.fixture
def copy(artifact: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(artifact, tmp_path / "copy"))


def read_by_ort(package: Path) -> dict[str, Any]:
    """What ONNX Runtime's own reader says; skips where it has none."""
    if sys.platform != "linux":
        pytest.skip("onnxruntime: where its library lies is only known for Linux")
    done = subprocess.run([sys.executable, READER, package], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    if "absent" in found:
        pytest.skip(f"onnxruntime: {found['absent']}")
    return found


def test_an_artifact_keeps_every_rule(artifact: Path) -> None:
    validate(artifact)


@pytest.mark.parametrize("target", ["openvino-cpu", "tensorrt-rtx:sm86,sm89"])
def test_so_does_one_of_another_runtime(target: str, tmp_path: Path) -> None:
    parsed = runtimes.Target.parse(target)
    state = runtimes.backend(parsed.runtime).can_compile(parsed)
    if not state.available:
        pytest.skip(f"{target}: {state.reason}")
    validate(built(tmp_path / "net", [target, "ort-cpu"]))


def test_onnx_runtimes_own_reader_opens_it(artifact: Path) -> None:
    """As a program does that names no execution provider: it gets the variant for the CPU, and a session of it."""
    found = read_by_ort(artifact)
    assert found == {
        "schema": 1,
        "component": "model",
        "variants": {"ort-cpu-fp32": "CPUExecutionProvider", "reference-fp32": None},
        "selected": "ort-cpu-fp32",
        "folder": str(artifact / "ort-cpu-fp32"),
        "inputs": 1,
        "outputs": 2,
    }


def test_plain_onnx_runtime_opens_the_model_inside(artifact: Path) -> None:
    ort = pytest.importorskip("onnxruntime", reason="onnxruntime: not installed")
    manifest = json.loads((artifact / "manifest.json").read_text())
    x = np.random.default_rng(0).normal(size=(2, 3, 8, 8)).astype(np.float32)
    for name, body in manifest["components"]["model"]["variants"].items():
        if "ort" in body["executor_info"]:
            slot = body["executor_info"]["ort"]
            plain = ort.InferenceSession(artifact / body["variant_directory"] / slot["model_file"])
            expected = dict(
                zip([output.name for output in plain.get_outputs()], plain.run(None, {"image": x}), strict=True)
            )
            with runtimes.load(artifact, variant=name) as session:
                for key, value in session.run({"image": x}).items():
                    np.testing.assert_allclose(value, expected[key], rtol=1e-6)


@pytest.mark.parametrize("platform", PLATFORMS)
def test_what_a_bundle_unpacks_to_keeps_every_rule_too(artifact: Path, tmp_path: Path, platform: str) -> None:
    if PLATFORMS[platform].ort_format and not runtimes.backend("ort-cpu").probe().available:
        pytest.skip("onnxruntime: not installed")
    bundle(artifact, tmp_path / "net.tar", platform=platform)
    installing.install(tmp_path / "net.tar", tmp_path / "root")
    validate(tmp_path / "root" / "1")
    found = read_by_ort(tmp_path / "root" / "1")
    assert found["selected"] == "ort-cpu-fp32"
    assert ("ort-cpu-fp32-ort" in found["variants"]) == PLATFORMS[platform].ort_format


def test_and_what_compile_on_device_makes_of_it(artifact: Path, tmp_path: Path) -> None:
    installing.install(_with_a_recipe(artifact, tmp_path), tmp_path / "root")
    validate(tmp_path / "root" / "1")
    installing.compile_here(tmp_path / "root")
    validate(tmp_path / "root" / "2")
    with runtimes.load(tmp_path / "root") as session:
        assert session.info["variant"] == "later"


def _with_a_recipe(artifact: Path, folder: Path) -> Path:
    """A bundle whose best variant stands there as a graph that is to be built, on ort-cpu since that is here."""
    root = Path(shutil.copytree(artifact, folder / "to-compile"))
    shutil.copytree(root / "ort-cpu-fp32", root / "later", ignore=shutil.ignore_patterns("prepared"))

    def change(tree: dict[str, Any]) -> None:
        ours = tree["additional_metadata"]["toolchain"]
        files = ours["files"]
        files["later/model.onnx"] = files["ort-cpu-fp32/model.onnx"]
        ours["selftest"]["variants"]["later"] = ours["selftest"]["variants"]["ort-cpu-fp32"]
        ours["to_compile"] = [
            {"variant": "later", "target": "ort-cpu", "precision": "fp32", "model_file": "model.onnx",
             "options": {}, "session_options": {}}
        ]  # fmt: skip

    edited(change)(root)
    bundle(root, folder / "later.tar", platform="linux-x86_64")
    return folder / "later.tar"


def edited(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def apply(root: Path) -> None:
        path = root / "manifest.json"
        tree = json.loads(path.read_text())
        change(tree)
        path.write_text(json.dumps(tree))

    return apply


def replaced(old: str, new: bytes) -> Callable[[Path], None]:
    def apply(root: Path) -> None:
        path = root / "manifest.json"
        content = path.read_bytes()
        assert old.encode() in content
        path.write_bytes(content.replace(old.encode(), new, 1))

    return apply


def variants(tree: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = tree["components"]["model"]["variants"]
    return found


def variant(tree: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = variants(tree)["ort-cpu-fp32"]
    return found


def ort_slot(tree: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = variant(tree)["executor_info"]["ort"]
    return found


def link(root: Path) -> None:
    (root / "recipe.yaml").unlink()
    (root / "recipe.yaml").symlink_to("report.json")


def wrong_asset(root: Path) -> None:
    (root / "shared_assets" / f"sha256-{'0' * 64}").mkdir(parents=True)


#: What is broken, how, and whether ONNX Runtime's own reader refuses it too. It follows links, reads the last of two
#: equal keys, leaves the kind of a device to the selection, and compares no digest of a shared asset.
RULES: dict[str, tuple[Callable[[Path], object], bool]] = {
    "no manifest": (lambda root: (root / "manifest.json").unlink(), True),
    "a manifest cut off": (lambda root: os.truncate(root / "manifest.json", 200), True),
    "invalid utf-8": (replaced('"package_name": "', b'"package_name": "\xc0\xaf'), True),
    "nan": (replaced('"package_version": "1"', b'"package_version": "1", "description": NaN'), True),
    "a key twice": (replaced('"layout": "portable"', b'"layout": "portable", "layout": "portable"'), False),
    "a top-level key of our own": (edited(lambda tree: tree.update(toolchain={})), True),
    "no schema": (edited(lambda tree: tree.pop("schema_version")), True),
    "schema 2": (edited(lambda tree: tree.update(schema_version="2.0")), True),
    "a name that is a number": (edited(lambda tree: tree.update(package_name=1)), True),
    "an unknown layout": (edited(lambda tree: tree.update(layout="loose")), True),
    "the installed layout": (edited(lambda tree: tree.update(layout="installed")), False),
    "components in a list": (edited(lambda tree: tree.update(components=[])), True),
    "no components": (edited(lambda tree: tree.update(components={})), True),
    "a component that is not there": (edited(lambda tree: tree.update(components={"model": "model"})), True),
    "a key of a component": (edited(lambda tree: tree["components"]["model"].update(files={})), True),
    "no variants": (edited(lambda tree: variants(tree).clear()), True),
    "a key of a variant": (edited(lambda tree: variant(tree).update(precision="fp32")), True),
    "a folder that is not there": (edited(lambda tree: variant(tree).update(variant_directory="other")), True),
    "a folder that is a file": (edited(lambda tree: variant(tree).update(variant_directory="recipe.yaml")), True),
    "a way out": (edited(lambda tree: variant(tree).update(variant_directory="../copy/ort-cpu-fp32")), True),
    "an absolute path": (edited(lambda tree: ort_slot(tree).update(model_file="/model.onnx")), True),
    "a windows path": (edited(lambda tree: ort_slot(tree).update(model_file="prepared\\model.onnx")), True),
    "a model that is not there": (edited(lambda tree: ort_slot(tree).update(model_file="m.onnx")), True),
    "no model": (edited(lambda tree: ort_slot(tree).pop("model_file")), True),
    "an ep that is a list": (edited(lambda tree: variant(tree).update(ep=["CPUExecutionProvider"])), True),
    "an ep that is none": (edited(lambda tree: variant(tree).update(ep="cpu")), True),
    "no ep": (edited(lambda tree: variant(tree).pop("ep")), True),
    "no slot": (edited(lambda tree: variant(tree)["executor_info"].pop("ort")), True),
    "an unknown device": (edited(lambda tree: variant(tree).update(device="tpu")), True),
    "an executor in a list": (edited(lambda tree: variant(tree)["executor_info"].update(ort=[])), True),
    "an executor's file that is not there": (
        edited(lambda tree: variant(tree)["executor_info"].update(x="x.json")),
        True,
    ),
    "an option that is a number": (
        edited(lambda tree: ort_slot(tree).update(session_options={"session.intra_op_thread_count": 1})),
        True,
    ),
    "an option that writes": (
        edited(lambda tree: ort_slot(tree).update(session_options={"session.enable_profiling": "1"})),
        True,
    ),
    "an asset that is not there": (edited(lambda tree: ort_slot(tree).update(model_file=f"sha256:{'0' * 64}/m")), True),
    "an asset of another content": (wrong_asset, False),
    "a link": (link, False),
}


@pytest.mark.parametrize("rule", list(RULES))
def test_each_rule_is_held(copy: Path, rule: str) -> None:
    damage, by_ort = RULES[rule]
    damage(copy)
    with pytest.raises(Broken):
        validate(copy)
    if by_ort:
        assert "refused" in read_by_ort(copy)


def test_what_the_format_allows_is_allowed(copy: Path) -> None:
    """An external component, a slot in a file, and a shared asset: not what we write, but packages all the same."""
    path = copy / "manifest.json"
    manifest = json.loads(path.read_text())
    component = manifest["components"]["model"]
    (copy / "inner").mkdir()
    for name in variants(manifest):
        (copy / name).rename(copy / "inner" / name)
    body = component["variants"]["ort-cpu-fp32"]
    folder = copy / "inner" / body["variant_directory"]
    asset = copy / "shared_assets" / "asset"
    asset.mkdir(parents=True)
    (folder / "model.onnx").rename(asset / "model.onnx")
    uri = directory_hash(asset)
    asset.rename(asset.with_name(uri.replace(":", "-")))
    (folder / "ort.json").write_text(json.dumps({"model_file": f"{uri}/model.onnx"}))
    body["executor_info"]["ort"] = "ort.json"
    (copy / "inner" / "component.json").write_text(json.dumps(component))
    manifest["components"]["model"] = "inner"
    manifest["schema_version"] = "1.1"
    path.write_text(json.dumps(manifest))
    validate(copy)
    assert read_by_ort(copy)["selected"] == "ort-cpu-fp32"
    next(asset.parent.rglob("model.onnx")).write_bytes(b"")
    with pytest.raises(Broken, match="holds something else"):
        validate(copy)
