"""A recipe is read whole or refused with the line that is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

import passes
from toolchain import recipe_file as recipes
from toolchain.errors import RecipeError
from toolchain.recipe import Recipe, from_dict


def test_the_commented_recipe_is_the_default(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(recipes.commented("file with: colon.py:make"))
    assert recipes.read(path) == Recipe(model="file with: colon.py:make")


def test_every_key_is_in_the_commented_recipe() -> None:
    text = recipes.commented("resnet50")
    for name in Recipe.model_fields:
        assert f"{name}:" in text, f"{name} is missing from toolchain init"


def test_dump_reads_back_with_pass_options(tmp_path: Path) -> None:
    recipe = from_dict({"model": "resnet18", "passes": ["fuse_conv_bn", {"simplify": {"timeout": 5.0}}]}, origin="test")
    path = tmp_path / "recipe.yaml"
    recipes.write(recipe, path)
    assert recipes.read(path) == recipe
    assert [step.options for step in recipe.pipeline()] == [{}, {"timeout": 5.0}]


def test_default_pipeline_is_spelled_out() -> None:
    assert tuple(step.name for step in Recipe(model="x").pipeline()) == passes.DEFAULT_PIPELINE


@pytest.mark.parametrize(
    ("text", "line", "said"),
    [
        ("model: x\nbenchmrk:\n  count: 3\n", 2, "did you mean benchmark?"),
        ("model: x\nbenchmark:\n  cuont: 3\n", 3, "did you mean count?"),
        ("model: x\nbenchmark:\n  count: yes\n", 3, "True is not allowed here"),
        ("model: x\nbenchmark:\n  count: '8'\n", 3, "'8' is not allowed here"),
        ("model: x\nbenchmark:\n  batch_sizes: [1, 0]\n", 3, "0 is not allowed here"),
        ("version: 2\nmodel: x\n", 1, "it should be 1"),
        ("model: x\nprecision: int9\n", 2, "it should be 'default', 'fp32'"),
        ("model: x\npasses: [fuse_conv_bm]\n", 2, "did you mean fuse_conv_bn"),
        ("model: x\npasses:\n - simplify: {tmeout: 3}\n", 3, "its options: timeout"),
        ("model: x\npasses: defualt\n", 2, "'default' or a valid list"),
        ("model: x\nmodel: y\n", 2, "written twice"),
        ("model: x\ntargets: [ORT cpu]\n", 2, "not a target: 'ORT cpu'"),
        ("model: x\ntargets: [ort-cpu, ort-cpu]\n", 2, "listed twice"),
        ("model: x\ntargets: ['tensorrt-rtx:sm86,sm86']\n", 2, "names a device twice"),
        ("model: x\ntargets: [auto, ort-cpu]\n", 2, "auto stands alone"),
        ("model: x\noptions: {ort-cpu: 3}\n", 2, "3 is not allowed here"),
        ("model: [\n", 2, "not YAML"),
    ],
)
def test_what_is_wrong_is_named_with_its_line(tmp_path: Path, text: str, line: int, said: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError) as caught:
        recipes.read(path)
    assert f"{path}:{line}" in str(caught.value)
    assert said in str(caught.value)


@pytest.mark.parametrize("text", ["- a\n", "", "version: 1\n", "\x00"])
def test_no_recipe_at_all(tmp_path: Path, text: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=str(path)):
        recipes.read(path)


def test_a_missing_file_and_binary_rubbish(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="cannot read"):
        recipes.read(tmp_path / "absent.yaml")
    (tmp_path / "b.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match="cannot read"):
        recipes.read(tmp_path / "b.yaml")


def test_override_reaches_into_sections_and_is_checked() -> None:
    recipe = Recipe(model="x").override(benchmark__batch_sizes=[1, 8], weights=None, seed=3)
    assert recipe.benchmark.batch_sizes == [1, 8]
    assert (recipe.weights, recipe.seed) == ("auto", 3)
    with pytest.raises(RecipeError, match=r"command line, key benchmark\.batch_sizes"):
        recipe.override(benchmark__batch_sizes=[0])


def test_the_portable_recipe_names_no_folder() -> None:
    recipe = Recipe(model="/home/me/m.onnx", weights="/w/x.safetensors", output="/somewhere").override(
        data__evaluation="/data/images/"
    )
    shown = recipes.dump(recipe.portable())
    assert "/" not in shown
    assert "m.onnx" in shown
    assert "images" in shown
    assert Recipe(model="hf:a/b").portable().model == "hf:a/b"
