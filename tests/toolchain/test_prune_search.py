"""The search for cuts: prices without cutting, what goes first, and what is said where an aim is out of reach."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
import onnx_ir as ir
import pytest
from prune_nets import images, residual_net

from passes._channel_blocks import find_blocks
from passes._channel_cut import masked
from passes._channel_groups import find_groups
from passes._channel_scores import importance
from passes.prune_channels import prepared_copy
from toolchain import prune_search
from toolchain.channel_prices import Prices
from toolchain.errors import FidelityError, GraphError
from toolchain.evaluate import run_reference
from toolchain.layer_latency import LayerTime, LayerTimes
from toolchain.model_cost import cost_of
from toolchain.prune_search import (
    Curve,
    Ground,
    Room,
    chosen,
    curves,
    cut_copy,
    room,
    spend,
    to_drop,
    to_latency,
    to_macs,
    to_ratio,
)


def ground(*, dead: int = 0, blocks: bool = False, unit: int = 1) -> Ground:
    model = prepared_copy(residual_net(dead=dead))
    groups = find_groups(model)
    return Ground(
        model,
        groups,
        importance(model, groups, kind="l1"),
        {g.name: Room(unit, g.count - unit) for g in groups},
        find_blocks(model) if blocks else (),
        [{"image": images(8)}],
        {},
    )


def macs_of(model: ir.Model) -> dict[str, float]:
    return {node.node: float(node.macs or 0) for node in cost_of(model).nodes}


def test_prices_are_what_the_cut_graph_costs() -> None:
    here = ground(blocks=True)
    prices = Prices(here.model, here.groups, macs_of(here.model), blocks=here.blocks)
    rng = np.random.default_rng(0)
    for _ in range(4):
        gone = {g.name: int(rng.integers(0, g.count)) for g in here.groups}
        assert prices.total(gone) == cost_of(cut_copy(here.model, chosen(here, gone))).macs
    gone = {"s": 3, "one_sum": 1}
    assert prices.total(gone) == cost_of(cut_copy(here.model, chosen(here, gone))).macs
    assert prices.saved({"s": 3}, "one_sum", 1) == prices.total({"s": 3}) - prices.total(gone)


def test_times_fall_by_whole_blocks_of_channels_only() -> None:
    here = ground()
    prices = Prices(here.model, here.groups, {"one_c": 1.0}, stepped=True)
    assert [prices.total({"one_c": n}) for n in (0, 15, 16)] == [1.0, 1.0, 0.5]


def test_a_curve_is_convex_and_rises() -> None:
    curve = Curve((0, 4, 8, 12), (0.0, 0.3, 0.1, 0.4))
    assert [curve.at(n) for n in (0, 8, 12)] == pytest.approx([0.0, 0.2, 0.4], abs=0.11)
    slopes = np.diff([curve.at(n) for n in range(17)])
    assert (slopes >= -1e-12).all()
    assert (np.diff(slopes) >= -1e-12).all()


@pytest.mark.parametrize(
    ("round_to", "expected"), [(None, Room(8, 24)), (1, Room(1, 28)), (16, Room(16, 16)), (64, Room(64, 0))]
)
def test_room(round_to: int | None, expected: Room) -> None:
    (group,) = (g for g in ground().groups if g.name == "one_c")
    assert room(group, round_to=round_to, min_channels=1, dense=group.count) == expected


def test_what_holds_a_group_back_is_said() -> None:
    (group,) = (g for g in ground().groups if g.name == "one_c")
    held = {
        options: room(group, round_to=options[0], min_channels=options[1], dense=32).held
        for options in ((64, 1), (1, 10), (8, 10), (1, 1))
    }
    multiple = "what is left is a multiple of {} (round_to)"
    assert held == {
        (64, 1): multiple.format(64),
        (1, 10): "10 are to stay (min_channels)",
        (8, 10): f"10 are to stay (min_channels) and {multiple.format(8)}",
        (1, 1): "of 32 no more than 90% go",
    }
    here = ground()
    found = to_ratio(here, 0.3, scope="layer", dense={g.name: g.count for g in here.groups})
    assert found.asked == {"s": 11, "one_c": 22, "two_c": 22}
    assert not found.held  # to the channel
    rooms = {g.name: room(g, round_to=12, min_channels=1, dense=g.count) for g in here.groups}
    found = to_ratio(dataclasses.replace(here, rooms=rooms), 0.3, scope="layer", dense={})
    assert found.gone == {"s": 4, "one_c": 8, "two_c": 8}
    assert found.held == dict.fromkeys(("s", "one_c", "two_c"), multiple.format(12))


def test_curves_are_those_of_the_masked_graph() -> None:
    here = ground()
    found = curves(here)
    (group,) = (g for g in here.groups if g.name == "two_c")
    gone = found["two_c"].gone[2]
    feeds = list(here.samples)
    whole = run_reference(here.model, feeds)[0]["logits"]
    cut = run_reference(masked(here.model, chosen(here, {group.name: gone})), feeds)[0]["logits"]
    assert found["two_c"].lost[2] == pytest.approx(((whole - cut) ** 2).sum() / (whole**2).sum(), rel=1e-3)


def test_what_does_nothing_goes_first() -> None:
    here = ground(dead=20)
    macs = macs_of(here.model)
    prices = Prices(here.model, here.groups, macs)
    # l1 alone does not see it: the filters that make these channels are as large as any
    gone = spend(here, curves(here), prices, 0.85 * prices.total({}))
    assert gone["one_c"] > 0
    assert gone["s"] == gone["two_c"] == 0


@pytest.mark.parametrize("share", [0.8, 0.5, 0.3])
def test_a_target_of_macs_is_met_and_hardly_more(share: float) -> None:
    here = ground(unit=4)
    whole = cost_of(here.model).macs
    left = cost_of(cut_copy(here.model, chosen(here, to_macs(here, share * whole).gone))).macs / whole
    assert share - 0.12 < left <= share


def test_a_target_out_of_reach_is_refused() -> None:
    here = ground(unit=16)
    with pytest.raises(GraphError, match="5% of the multiply-accumulates cannot be reached"):
        to_macs(here, 0.05 * cost_of(here.model).macs)


def test_a_block_goes_where_it_adds_nothing() -> None:
    model = residual_net()
    weight = model.graph.initializers["two_b"]
    assert weight.const_value is not None
    weight.const_value = ir.Tensor(weight.const_value.numpy() * np.float32(1e-3), name="two_b")
    copy = prepared_copy(model)
    groups = find_groups(copy)
    here = Ground(
        copy, groups, importance(copy, groups), {g.name: Room(1, 1) for g in groups}, find_blocks(copy),
        [{"image": images(8)}], {},
    )  # fmt: skip
    found = to_macs(here, 0.6 * cost_of(copy).macs)
    assert chosen(here, found.gone).blocks == ("two_sum",)
    assert "two_c" not in chosen(here, found.gone | {"two_c": 1}).channels  # it went with the block


def test_the_deepest_cut_within_a_loss_is_found() -> None:
    here = ground()
    prices = Prices(here.model, here.groups, macs_of(here.model))

    def lost(gone: Mapping[str, int]) -> float:
        return 1 - prices.total(gone) / prices.total({})

    found = to_drop(here, lost, 0.4)
    assert 0.34 < lost(found.gone) <= 0.4
    with pytest.raises(FidelityError, match="no cut that was tried"):
        to_drop(here, lambda gone: 1.0 if any(gone.values()) else 0.5, 0.1)


def test_latency_is_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fixed part of the time is in no layer: the profile promises more than there is, and the search goes on."""
    here = ground(unit=4)
    times = {name: macs / 1e6 for name, macs in macs_of(here.model).items()}
    layers = tuple(LayerTime(name, "Conv", time, ()) for name, time in times.items() if time)
    monkeypatch.setattr(prune_search, "layer_latency", lambda model, dims: LayerTimes(layers, 0.0, 1.0, 1))
    whole, seen = sum(times.values()), []

    def measure(model: ir.Model) -> float:
        seen.append(0.2 + 0.8 * sum(macs_of(model).values()) / 1e6 / whole)
        return seen[-1]

    found = to_latency(here, 0.6, measure)
    assert seen[0] > 0.6
    assert found.latency_ratio == seen[-1] <= 0.6
    with pytest.raises(GraphError, match="10% of the latency cannot be reached"):
        to_latency(here, 0.1, measure)
