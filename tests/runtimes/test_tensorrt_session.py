"""Sessions on TensorRT engines: what decides, as far as that goes without a GPU; the rest is in tests/gpu."""

from __future__ import annotations

import threading

import pytest

import runtimes
from runtimes import _cuda
from runtimes._driver import driver
from runtimes._tensorrt_api import Api, find_api
from runtimes._tensorrt_options import TensorRTOptions
from runtimes._tensorrt_profiles import Profile, Shape, choose_profile, describe, substitutes
from runtimes._tensorrt_session import Pool, _named, make_session

SMALL = Profile({"x": ((1, 3), (1, 3), (4, 3))})
LARGE = Profile({"x": ((1, 3), (32, 3), (64, 3))})
PAIR = Profile({"a": ((1, 8), (2, 8), (4, 8)), "b": ((1, 8), (2, 8), (4, 8))})


@pytest.mark.parametrize(("batch", "chosen"), [(1, 0), (2, 0), (4, 0), (5, 1), (32, 1), (64, 1), (65, None), (0, None)])
def test_the_profile_that_is_fastest_nearest_is_chosen(batch: int, chosen: int | None) -> None:
    assert choose_profile([SMALL, LARGE], {"x": (batch, 3)}, {}) == chosen


def test_the_order_of_profiles_does_not_decide() -> None:
    assert choose_profile([LARGE, SMALL], {"x": (2, 3)}, {}) == 1
    assert choose_profile([SMALL, SMALL], {"x": (2, 3)}, {}) == 0


@pytest.mark.parametrize("shape", [(1, 4), (1,), (1, 3, 1), ()])
def test_no_profile_takes_other_ranks_and_fixed_sizes(shape: Shape) -> None:
    assert choose_profile([SMALL, LARGE], {"x": shape}, {}) is None


def test_the_contents_of_a_shape_input_count() -> None:
    profile = Profile({"s": ((2,), (2,), (2,))}, {"s": ((1, 1), (8, 8), (16, 16))})
    assert choose_profile([profile], {"s": (2,)}, {"s": (4, 16)}) == 0
    assert choose_profile([profile], {"s": (2,)}, {"s": (4, 17)}) is None


def test_profiles_are_printed_whole() -> None:
    assert describe([SMALL, Profile({"x": ((2, 3), (2, 3), (2, 3))})]) == (
        "profile 0: x [1, 3] to [4, 3], fastest at [1, 3]; profile 1: x [2, 3]"
    )


def test_an_empty_batch_is_answered_from_two_that_the_engine_takes() -> None:
    stand = substitutes(SMALL, {"x": (0, 3)})
    assert stand is not None
    assert (stand.small, stand.large) == ({"x": (1, 3)}, {"x": (4, 3)})
    assert stand.at_zero([(1, 10), (2, 5)], [(4, 10), (8, 5)]) == [(0, 10), (0, 5)]
    # A size that grows, but not with the batch, and an output that is not empty: nobody knows what they would be.
    assert stand.at_zero([(1, 10), (2, 5)], [(4, 10), (5, 5)]) is None
    assert stand.at_zero([(1, 10), (1,)], [(4, 10), (1,)]) is None


def test_two_inputs_share_the_size_that_is_zero() -> None:
    stand = substitutes(PAIR, {"a": (0, 8), "b": (0, 8)})
    assert stand is not None
    assert stand.sizes == {(1, 4)}


@pytest.mark.parametrize(
    ("profile", "shape"),
    [(SMALL, (0, 4)), (SMALL, (0,)), (SMALL, (2, 3)), (Profile({"x": ((2, 3), (2, 3), (2, 3))}), (0, 3))],
)
def test_what_cannot_be_answered_is_not(profile: Profile, shape: Shape) -> None:
    assert substitutes(profile, {"x": shape}) is None


def test_one_thread_makes_one_and_takes_it_again() -> None:
    made: list[object] = []
    pool: Pool[object] = Pool(lambda: made.append(object()) or made[-1])
    for _ in range(5):
        one = pool.take()
        pool.give(one)
    assert len(made) == 1
    first, second = pool.take(), pool.take()
    assert first is not second
    pool.give(first)
    pool.give(second)
    assert pool.take() is second  # the one whose memory is warm
    assert len(made) == 2


def test_no_two_threads_have_the_same_one() -> None:
    holders: dict[int, int] = {}
    made: list[list[int]] = []
    wrong: list[str] = []

    def make() -> list[int]:
        made.append([])
        return made[-1]

    pool: Pool[list[int]] = Pool(make)

    def work(index: int) -> None:
        for _ in range(500):
            one = pool.take()
            if holders.setdefault(id(one), index) != index:
                wrong.append("taken twice")
            one.append(index)
            del holders[id(one)]
            pool.give(one)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert wrong == []
    assert len(made) <= 8
    assert sum(map(len, made)) == 8 * 500


def test_a_closed_pool_gives_nothing_and_keeps_nothing() -> None:
    class Thing:
        pass

    import weakref

    pool: Pool[Thing] = Pool(Thing)
    held, idle = pool.take(), pool.take()
    gone = weakref.ref(idle)
    pool.give(idle)
    del idle
    pool.close()
    pool.close()
    assert gone() is None
    gone = weakref.ref(held)
    pool.give(held)
    del held
    assert gone() is None
    for use in (pool.take, pool.make, pool.require_open):
        with pytest.raises(runtimes.SessionClosed):
            use()


def test_engines_forget_the_names_of_sizes_and_the_graph_knows_them() -> None:
    spec = runtimes.TensorSpec("x", "float32", (None, 3, None))
    assert _named(spec, ("batch", 3, None)).shape == ("batch", 3, None)
    assert _named(spec, ("batch", "channels", 7)).shape == ("batch", 3, None)
    assert _named(spec, ("batch", 3)) == spec
    assert _named(spec, None) == spec


def _api() -> Api:
    for target in ("tensorrt-rtx", "tensorrt"):
        found = find_api(target)
        if isinstance(found, Api):
            return found
    pytest.skip(f"tensorrt-rtx: {found.reason}")


def test_no_driver_is_told_before_the_plan_is_touched() -> None:
    if driver().reason is None:
        pytest.skip("there is a GPU here")
    api = _api()
    with pytest.raises(_cuda.NoDriver, match=api.flavor.title):
        target = runtimes.Target(api.flavor.target)
        make_session(api, b"no plan", target, options=TensorRTOptions(), info={}, plan_sha256="0" * 64)
