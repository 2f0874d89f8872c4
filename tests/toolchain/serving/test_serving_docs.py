"""What docs/serving.md says of ``serving.yaml``: its example is read, its tables have every option and its default."""

from __future__ import annotations

import re
from pathlib import Path

import pydantic
import pytest
import yaml
from versions_support import write_artifact

from toolchain.serving.options import Batching, ModelOptions, ResultCache, Rollout, ServerOptions
from toolchain.serving.repository import open_source

TEXT = (Path(__file__).resolve().parents[3] / "docs" / "serving.md").read_text(encoding="utf-8")
#: What has a section of its own and no row.
_SECTIONS = {"batching", "version_policy", "rollout"}


def test_the_example_is_read(tmp_path: Path) -> None:
    (example,) = re.findall(r"```yaml\n(.*?)```", TEXT, re.DOTALL)
    write_artifact(tmp_path / "m" / "a" / "1")
    (tmp_path / "m" / "a" / "labels.txt").write_text("one\ntwo\n")
    (tmp_path / "m" / "a" / "serving.yaml").write_text(example)
    found = open_source(tmp_path / "m").scan(ModelOptions()).models["a"]
    assert found.problem == ""
    assert found.options == ModelOptions.model_validate(yaml.safe_load(example))
    assert (found.options.batching.max_batch_size, found.options.rollout.canary) == (32, 0.1)


@pytest.mark.parametrize("options", [ModelOptions, Batching, Rollout])
def test_every_option_and_its_default(options: type[pydantic.BaseModel]) -> None:
    said: dict[str, object] = {}
    for names, values in re.findall(r"^\| (`\w+`(?:, `\w+`)*) \| ([^|]*) \|", TEXT, re.MULTILINE):
        keys = re.findall(r"\w+", names)
        told = [yaml.safe_load(values)] if len(keys) == 1 else [yaml.safe_load(one) for one in values.split(",")]
        said |= dict(zip(keys, told * (len(keys) if len(told) == 1 else 1), strict=True))
    for name, field in options.model_fields.items():
        if name in _SECTIONS:
            continue
        default = list(field.default) if isinstance(field.default, tuple) else field.default
        assert (None if said[name] == "none" else said[name]) == default, name


def test_what_else_is_said_of_numbers() -> None:
    assert "Off by default" in TEXT
    assert ResultCache().max_bytes == 0
    assert "`--poll-seconds` (2)" in TEXT
    assert ServerOptions().poll_seconds == 2
    assert "for five minutes (`--cache-seconds`)" in TEXT
    assert ResultCache().max_age_seconds == 300
    assert "(default 1)" in TEXT
    assert ModelOptions().version_policy.latest == 1
