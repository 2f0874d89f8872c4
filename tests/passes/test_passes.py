"""The table of passes: complete, typed, and helpful when it is asked for something that it does not have."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

import passes
from passes import DEFAULT_PIPELINE, PASSES, InvalidOption, Pass, UnknownPass, make, options, summary


def test_all_is_sorted_and_there() -> None:
    # constants, then classes, then functions, each sorted: the order that the linter keeps
    assert list(passes.__all__) == sorted(passes.__all__, key=lambda n: (not n.isupper(), n.islower(), n))
    for name in passes.__all__:
        assert hasattr(passes, name)


def test_every_file_is_a_pass_with_a_test_of_its_name() -> None:
    folder = Path(passes.__file__).parent
    files = {path.stem for path in folder.glob("*.py") if not path.stem.startswith("_")} - {"base"}
    assert set(PASSES) == files
    assert list(PASSES) == sorted(PASSES)
    for name in PASSES:
        assert (Path(__file__).parent / f"test_{name}.py").is_file()


@pytest.mark.parametrize("name", list(PASSES))
def test_every_pass_is_a_frozen_dataclass_that_documents_its_options(name: str) -> None:
    made = make(name)
    assert isinstance(made, Pass)
    assert made.name == name
    assert made == make(name)
    assert type(made).__dataclass_params__.frozen  # type: ignore[attr-defined]
    assert summary(name).endswith(".")
    assert [option.name for option in options(name)] == [f.name for f in dataclasses.fields(made)]
    for option in options(name):
        assert option.doc, f"{name}.{option.name} has no line in Attributes"
        assert getattr(make(name, **{option.name: option.default}), option.name) == option.default


def test_default_pipeline_names_passes() -> None:
    for name in DEFAULT_PIPELINE:
        make(name)


def test_options_reach_the_pass() -> None:
    assert make("fold_constants", max_bytes=5).max_bytes == 5  # type: ignore[attr-defined]
    assert make("simplify", timeout=7).timeout == 7  # type: ignore[attr-defined]


def test_unknown_pass_names_the_nearest() -> None:
    with pytest.raises(UnknownPass, match="fuse_convbn") as caught:
        make("fuse_convbn")
    assert "fuse_conv_bn" in str(caught.value.hint)
    with pytest.raises(ValueError):
        make("")


def test_unknown_option_lists_the_options() -> None:
    with pytest.raises(InvalidOption, match="maxbytes") as caught:
        make("fold_constants", maxbytes=1)
    assert "max_bytes: int" in str(caught.value.hint)


@pytest.mark.parametrize("value", ["1", 1.5, True, None])
def test_wrong_type(value: object) -> None:
    with pytest.raises(InvalidOption, match="max_bytes"):
        make("fold_constants", max_bytes=value)
