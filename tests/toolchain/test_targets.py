"""Which targets a build is for, and the order in which they are shipped."""

from __future__ import annotations

import pytest

import runtimes
from toolchain import targets


def test_named_targets_stay_in_order() -> None:
    found = targets.resolve(["reference", "tensorrt-rtx:sm86,sm89"])
    assert [str(target) for target in found] == ["reference", "tensorrt-rtx:sm86,sm89"]


def test_auto_is_what_works_here_without_the_oracle(monkeypatch: pytest.MonkeyPatch) -> None:
    yes, no = runtimes.Availability(True, "1"), runtimes.Availability(False, reason="no driver")
    states = {"ort-cpu": yes, "tensorrt": no, "openvino-cpu": yes, "reference": yes}
    monkeypatch.setattr(runtimes, "available", lambda: states)
    assert [str(target) for target in targets.resolve(["auto"])] == ["ort-cpu", "openvino-cpu"]
    monkeypatch.setattr(runtimes, "available", lambda: {"tensorrt": no, "reference": yes})
    with pytest.raises(runtimes.TargetUnavailable, match="tensorrt: no driver"):
        targets.resolve(["auto"])


@pytest.mark.parametrize(
    ("target", "wanted"), [("tensorrt", "fp16"), ("tensorrt-rtx:sm89", "fp16"), ("ort-cpu", "fp32")]
)
def test_float_precision(target: str, wanted: str) -> None:
    assert targets.float_precision(runtimes.Target.parse(target)) == wanted


@pytest.mark.parametrize(
    ("found", "wanted"),
    [
        ("c3 c1 c2", "c1 c2 c3"),
        ("c3 g- c1 n-", "g- c1 c3 n-"),  # a GPU that is not here first, what else is not here last
        ("c2 d2 c1", "c1 c2 d2"),  # equals keep their order
        ("g2 c1", "c1 g2"),  # a GPU that is here is one of those that were timed
        ("", ""),
    ],
)
def test_ranked(found: str, wanted: str) -> None:
    """A letter for the device, g for a GPU; a digit for the time, - where it does not run here."""
    order = targets.ranked(
        found.split(), timed=lambda x: x[1] != "-", faster=lambda a, b: a[1] < b[1], on_gpu=lambda x: x[0] == "g"
    )
    assert order == wanted.split()


def test_few_comparisons() -> None:
    asked: list[tuple[int, int]] = []

    def faster(a: int, b: int) -> bool:
        asked.append((a, b))
        return a < b

    assert targets.ranked([1, 2, 3, 4], timed=bool, faster=faster, on_gpu=lambda x: False) == [1, 2, 3, 4]
    assert len(asked) == 3
