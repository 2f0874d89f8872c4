"""Options of the TensorRT targets and profiles in terms of named sizes. Needs no TensorRT."""

from __future__ import annotations

import json
from typing import Any

import pytest

import runtimes
from runtimes._tensorrt_options import (
    DEFAULT_BATCH,
    DEFAULT_SIZE,
    NetworkInput,
    TensorRTOptions,
    build_options,
    resolve_profiles,
)

IDS = NetworkInput("ids", (-1, -1), ("batch", "sequence"))
MASK = NetworkInput("mask", (-1, -1), ("batch", "sequence"))
IMAGE = NetworkInput("x", (-1, 3, 224, 224), ("batch", "", "", ""))
FIXED = NetworkInput("f", (1, 8), ("", ""))
UNNAMED = NetworkInput("u", (-1, 4, -1), ("", "", ""))
SHAPE = NetworkInput("s", (2,), ("",), is_shape=True)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("profiles", {"batch": [1, 2, 4]}),
        ("profiles", "batch"),
        ("profiles", ["batch"]),
        ("profiles", [{"batch": [1, 2]}]),
        ("profiles", [{"batch": [4, 2, 1]}]),
        ("profiles", [{"batch": [0, 1, 2]}]),
        ("profiles", [{"batch": [1, 2.0, 4]}]),
        ("profiles", [{"batch": [True, 2, 4]}]),
        ("profiles", [{"batch": [1, 2, 2**31]}]),
        ("profiles", [{"batch": "124"}]),
        ("profiles", [{"x": [[1, 3], [2, 3], [4]]}]),
        ("profiles", [{"x": [[1, 3], [2, 3], [4, 2]]}]),
        ("profiles", [{"x": [[1, 3], 2, [4, 3]]}]),
        ("profiles", [{1: [1, 2, 3]}]),
        ("workspace_mib", 0),
        ("workspace_mib", "1G"),
        ("workspace_mib", True),
        ("optimization_level", 6),
        ("optimization_level", -1),
        ("optimization_level", "3"),
        ("sparsity", 1),
        ("tf32", None),
        ("hardware_compatibility", "any"),
        ("weight_streaming_budget", -1),
    ],
)
def test_nonsense_is_told_with_the_option(option: str, value: Any) -> None:
    with pytest.raises(runtimes.InvalidInput) as caught:
        TensorRTOptions(**{option: value})
    assert caught.value.where == f"option {option} of TensorRT"
    assert caught.value.hint


def test_what_json_makes_of_options_are_the_same_options() -> None:
    options = TensorRTOptions(
        profiles=({"batch": (1, 4, 8), "x": ((1, 3), (2, 3), (2, 4))},), refit=True, cuda_graph=True
    )
    again = TensorRTOptions(**json.loads(json.dumps(build_options(options))))
    assert (
        build_options(again)
        == build_options(options)
        == {
            "profiles": [{"batch": [1, 4, 8], "x": [[1, 3], [2, 3], [2, 4]]}],
            "refit": True,
        }
    )
    assert again.profiles == options.profiles


def test_only_what_is_in_the_engine_is_a_build_option() -> None:
    assert build_options(TensorRTOptions(cuda_graph=True, weight_streaming_budget=5, timing_cache=False)) == {}


def test_sizes_go_to_every_input_that_has_them() -> None:
    profiles, remarks = resolve_profiles([IDS, MASK, FIXED], [{"batch": (1, 2, 4), "sequence": (8, 16, 32)}])
    assert profiles == ({"ids": ((1, 8), (2, 16), (4, 32)), "mask": ((1, 8), (2, 16), (4, 32))},)
    assert remarks == ()


def test_several_profiles_stay_in_order() -> None:
    profiles, _ = resolve_profiles([IMAGE], [{"batch": (1, 1, 1)}, {"batch": (2, 8, 16)}])
    assert [profile["x"][2][0] for profile in profiles] == [1, 16]
    assert profiles[1]["x"][0] == (2, 3, 224, 224)


def test_what_nobody_gave_is_assumed_and_told() -> None:
    profiles, remarks = resolve_profiles([IDS, MASK], [])
    low, best, high = profiles[0]["ids"]
    assert (low[0], best[0], high[0]) == DEFAULT_BATCH
    assert (low[1], best[1], high[1]) == DEFAULT_SIZE
    assert profiles[0]["mask"] == profiles[0]["ids"]
    assert len(remarks) == 2
    assert "'batch'" in remarks[0]
    assert "'sequence'" in remarks[1]
    _, remarks = resolve_profiles([IDS, MASK], [{"batch": (1, 2, 4)}])
    assert [("'batch'" in text, "'sequence'" in text) for text in remarks] == [(False, True)]


def test_sizes_without_a_name() -> None:
    profiles, remarks = resolve_profiles([UNNAMED], [])
    assert profiles[0]["u"] == tuple(zip(DEFAULT_BATCH, (4, 4, 4), DEFAULT_SIZE, strict=True))
    assert "axis 0 of 'u'" in remarks[0]
    assert "axis 2 of 'u'" in remarks[1]
    shapes = ((1, 4, 1), (2, 4, 2), (3, 4, 3))
    profiles, remarks = resolve_profiles([UNNAMED], [{"u": shapes}])
    assert (profiles[0]["u"], remarks) == (shapes, ())


def test_a_model_of_fixed_sizes_has_no_profiles() -> None:
    assert resolve_profiles([FIXED], []) == ((), ())
    with pytest.raises(runtimes.InvalidInput, match="this model has none"):
        resolve_profiles([FIXED], [{"batch": (1, 1, 1)}])


def test_inputs_that_are_shapes_need_values() -> None:
    with pytest.raises(runtimes.InvalidInput, match="'s' is a shape"):
        resolve_profiles([SHAPE], [])
    values = ((1, 1), (2, 2), (3, 3))
    assert resolve_profiles([SHAPE], [{"s": values}]) == (({"s": values},), ())


@pytest.mark.parametrize(
    ("profile", "what", "hint"),
    [
        ({"bach": (1, 2, 4)}, "no size 'bach'", "did you mean batch?"),
        ({"zzz": (1, 2, 4)}, "no size 'zzz'", "it has: batch, sequence"),
        ({"idz": ((1, 1), (1, 1), (1, 1))}, "no input with sizes that vary 'idz'", "did you mean ids?"),
        ({"f": ((1, 8), (1, 8), (1, 8))}, "no input with sizes that vary 'f'", "it has: ids"),
        ({"ids": ((1,), (1,), (1,))}, r"\[1\] does not fit ids\[batch, sequence\]", "every size"),
    ],
)
def test_profiles_that_do_not_fit(profile: Any, what: str, hint: str) -> None:
    with pytest.raises(runtimes.InvalidInput, match=what) as caught:
        resolve_profiles([IDS, FIXED], [profile])
    assert hint in (caught.value.hint or "")


def test_a_fixed_size_cannot_be_given_otherwise() -> None:
    with pytest.raises(runtimes.InvalidInput, match="does not fit"):
        resolve_profiles([IMAGE], [{"x": ((1, 4, 224, 224),) * 3}])
