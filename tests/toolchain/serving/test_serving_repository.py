"""What is found on disk, and what is refused: names, links, versions that are not whole, serving.yaml."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from versions_support import model_bytes, scaled, write_artifact

from runtimes import InvalidArtifact, _versions
from toolchain.serving.options import Batching, ModelOptions, VersionPolicy
from toolchain.serving.repository import open_source, read_options, selected

DEFAULTS = ModelOptions()


def test_a_repository(tmp_path: Path) -> None:
    root = tmp_path / "models"
    for version in ("1", "2", "10"):
        write_artifact(root / "a" / version)
    write_artifact(root / "b.c-d_E")  # an artifact is version 1 of itself
    (root / "a" / "01").mkdir()
    (root / "a" / "x").mkdir()
    (root / "a" / ".incoming-3").mkdir()
    (root / ".hidden").mkdir()
    (root / "with space").mkdir()
    (root / "file.txt").write_text("no model")
    found = open_source(root).scan(DEFAULTS)
    assert sorted(found.models) == ["a", "b.c-d_E"]
    assert [version.number for version in found.models["a"].versions] == [1, 2, 10]
    assert [version.number for version in found.models["b.c-d_E"].versions] == [1]
    assert found.models["a"].problems == {}
    assert len(found.remarks) == 1
    assert "'with space'" in found.remarks[0]


def test_what_one_path_can_be(tmp_path: Path) -> None:
    artifact = write_artifact(tmp_path / "resnet50")
    file = tmp_path / "net.v2.onnx"
    file.write_bytes(model_bytes(scaled(2)))
    versions = tmp_path / "installed"
    write_artifact(versions / "3")
    for path, name, number in ((artifact, "resnet50", 1), (file, "net.v2", 1), (versions, "installed", 3)):
        source = open_source(path)
        models = source.scan(DEFAULTS).models
        assert list(models) == [name]
        assert [version.number for version in models[name].versions] == [number]
    assert models["installed"].versions[0].bytes == (versions / "3" / "v" / "model.onnx").stat().st_size


def test_a_number_is_a_version_or_the_name_of_a_model(tmp_path: Path) -> None:
    """What lies in it decides; where it could be both, the user is asked."""

    def kind(*artifacts: str, folders: tuple[str, ...] = (), files: tuple[str, ...] = ()) -> str:
        root = tmp_path / "r"
        shutil.rmtree(root, ignore_errors=True)
        for name in artifacts:
            write_artifact(root / name)
        for name in folders:
            (root / name).mkdir(parents=True)
        for name in files:
            (root / name).write_text("")
        return open_source(root).kind

    assert kind("1", "2") == "model"
    assert kind("3", folders=("2", "4", "notes")) == "model"  # 4 has not arrived
    assert kind(folders=("1",)) == "model"
    assert kind("7/1") == "repository"
    assert open_source(tmp_path / "r").scan(DEFAULTS).models["7"].versions[0].number == 1
    assert kind("7/1", folders=("8",)) == "repository"
    assert kind("7/1", "resnet50/1") == "repository"
    assert kind("resnet50/1", folders=("2024",)) == "repository"
    assert kind("7/1", ".arriving/1") == "repository"
    assert kind("1", "resnet50") == "model"  # an artifact beside, which is no version
    assert kind("7/1", files=("serving.yaml",)) == "model"
    assert kind("7/x", files=("7/serving.yaml",)) == "repository"
    for both in (("1", "resnet50/1"), ("1", "2/1")):
        with pytest.raises(InvalidArtifact, match="'1' is an artifact") as caught:
            kind(*both)
        assert caught.value.hint is not None
        assert "1/1" in caught.value.hint


@pytest.mark.parametrize(
    ("name", "match"),
    [("nothing", "no such file"), ("a.tar", "cannot be served"), ("a model.onnx", "cannot be the name")],
)
def test_what_cannot_be_served(tmp_path: Path, name: str, match: str) -> None:
    if name != "nothing":
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(InvalidArtifact, match=match):
        open_source(tmp_path / name)


def test_a_version_without_a_manifest_is_told_and_not_taken(tmp_path: Path) -> None:
    root = tmp_path / "models"
    write_artifact(root / "a" / "1")
    (root / "a" / "2").mkdir()
    found = open_source(root).scan(DEFAULTS).models["a"]
    assert [version.number for version in found.versions] == [1]
    assert "no manifest.json" in found.problems[2]
    (root / "a" / "2" / "manifest.json").write_text("{")
    found = open_source(root).scan(DEFAULTS).models["a"]
    assert "manifest" in found.problems[2]


def test_links_out_of_the_repository_are_refused(tmp_path: Path) -> None:
    root = tmp_path / "models"
    outside = write_artifact(tmp_path / "outside" / "1")
    inside = write_artifact(root / "a" / "1")
    (root / "b").symlink_to(outside.parent)
    (root / "a" / "2").symlink_to(outside)
    (root / "a" / "3").symlink_to(inside)
    (root / "a" / "4").symlink_to(tmp_path / "nothing")
    found = open_source(root).scan(DEFAULTS)
    assert list(found.models) == ["a"]
    assert "leads out" in found.remarks[0]
    assert [version.number for version in found.models["a"].versions] == [1, 3]
    assert "leads out" in found.models["a"].problems[2]
    (tmp_path / "evil.yaml").write_text("pin: true")
    (root / "a" / "serving.yaml").symlink_to(tmp_path / "evil.yaml")
    found = open_source(root).scan(DEFAULTS)
    assert "leads out" in found.models["a"].problem
    assert not found.models["a"].options.pin


def test_a_replaced_version_is_another_one_and_a_touched_one_is_not(tmp_path: Path) -> None:
    root = tmp_path / "models"
    artifact = write_artifact(root / "a" / "1")
    source = open_source(root)
    first = source.scan(DEFAULTS).models["a"].versions
    os.utime(artifact / "manifest.json")
    assert source.scan(DEFAULTS).models["a"].versions == first
    artifact.rename(tmp_path / "old")
    write_artifact(root / "a" / "1", 3.0)
    second = source.scan(DEFAULTS).models["a"].versions
    assert [version.digest for version in second] != [version.digest for version in first]
    shutil.rmtree(root / "a" / "1")
    assert source.scan(DEFAULTS).models["a"].versions == ()


def test_a_folder_that_cannot_be_read_says_nothing_of_its_models(tmp_path: Path) -> None:
    root = tmp_path / "models"
    write_artifact(root / "a" / "1")
    source = open_source(root)
    root.rename(tmp_path / "away")
    with pytest.raises(OSError, match="models"):
        source.scan(DEFAULTS)


@pytest.mark.parametrize(
    ("policy", "pointer", "wanted"),
    [
        ({"latest": 1}, None, (7,)),
        ({"latest": 2}, None, (3, 7)),
        ({"latest": 9}, None, (1, 3, 7)),
        ({"latest": 1}, 3, (3,)),
        ({"latest": 2}, 3, (1, 3)),
        ({"all": True}, 3, (1, 3, 7)),
        ({"specific": (7, 1, 5)}, 3, (1, 7)),
    ],
)
def test_policies(policy: dict[str, object], pointer: int | None, wanted: tuple[int, ...]) -> None:
    assert selected(VersionPolicy.model_validate(policy), [7, 1, 3], pointer) == wanted


def test_the_pointer_of_installed_versions(tmp_path: Path) -> None:
    root = tmp_path / "models"
    for version in ("1", "2"):
        write_artifact(root / "a" / version)
    _versions.switch(root / "a", 1)
    source = open_source(root)
    assert source.scan(DEFAULTS).models["a"].in_service == 1
    _versions.switch(root / "a", 2)
    assert source.scan(DEFAULTS).models["a"].in_service == 2
    for target in ("9", "../../elsewhere/1", "x"):
        (root / "a" / "latest").unlink()
        (root / "a" / "latest").symlink_to(target)
        assert "pointer" in source.scan(DEFAULTS).models["a"].problem


def test_serving_yaml_keeps_the_defaults_of_what_it_does_not_say(tmp_path: Path) -> None:
    path = tmp_path / "serving.yaml"
    defaults = ModelOptions(batching=Batching(queue_size=7, instances=2), pin=True)
    path.write_text("batching: {max_batch_size: 8}\nversion_policy: {all: true}\nrollout:\n  canary: 0.1\n")
    options = read_options(path, defaults)
    assert (options.batching.max_batch_size, options.batching.queue_size, options.batching.instances) == (8, 7, 2)
    assert options.version_policy == VersionPolicy(all=True)
    assert (options.rollout.canary, options.rollout.trial_requests) == (0.1, 100)
    assert options.pin
    path.write_text("# nothing\n")
    assert read_options(path, defaults) == defaults


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("batching: {max_batch_size: -1}", "key 'batching.max_batch_size'"),
        ("batching: {max_batch: 1}", "key 'batching.max_batch'"),
        ("pinn: true", "key 'pinn'"),
        ("version_policy: {latest: 1, all: true}", "key 'version_policy'"),
        ("batching: 3", "key 'batching'"),
        ("rollout: {canary: 1.5}", "key 'rollout.canary'"),
        ("1: 2", "key '1'"),
        ("- pin", "serving.yaml"),
        ("pin: [", "serving.yaml:"),
        ("pin: !!python/object/apply:os.getcwd []", "serving.yaml:1"),
        ("\x00", "serving.yaml"),
        ("#" * 70_000, "serving.yaml"),
    ],
)
def test_what_is_wrong_in_serving_yaml_is_told_with_file_and_key(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "serving.yaml"
    path.write_text(text)
    with pytest.raises(InvalidArtifact) as caught:
        read_options(path, DEFAULTS)
    assert said in str(caught.value.where)


def test_a_broken_serving_yaml_leaves_the_options_of_before(tmp_path: Path) -> None:
    root = tmp_path / "models"
    write_artifact(root / "a" / "1")
    (root / "a" / "serving.yaml").write_text("pin: true")
    source = open_source(root)
    assert source.scan(DEFAULTS).models["a"].options.pin
    (root / "a" / "serving.yaml").write_text("pin: maybe")
    found = source.scan(DEFAULTS).models["a"]
    assert "pin" in found.problem
    assert found.options.pin
    (root / "a" / "serving.yaml").unlink()
    assert source.scan(DEFAULTS).models["a"].options == DEFAULTS


def test_an_option_that_is_none_is_told_with_those_that_are(tmp_path: Path) -> None:
    path = tmp_path / "serving.yaml"
    path.write_text("batchig: {max_batch_size: 3}")
    with pytest.raises(InvalidArtifact, match="batchig: there is no such option") as caught:
        read_options(path, ModelOptions())
    assert "batching" in str(caught.value.hint)
