"""Cuts channels out of a graph: structured pruning, after which tensors are smaller and every runtime is faster.

A channel goes with everything that depends on it: the filter that makes it, its bias and normalisation, the same
channel of all layers that are added to it, and the slices of weights that read it::

    a = Conv(x, w1 [64, 3, 3, 3])  r = Relu(a)  y = Conv(r, w2 [10, 64, 1, 1])
    a = Conv(x, w1 [45, 3, 3, 3])  r = Relu(a)  y = Conv(r, w2 [10, 45, 1, 1])

What belongs together is found in the graph (``_channel_groups.py``), channel by channel, through Concat, Split, Slice,
Pad, Reshape, Transpose, grouped convolutions and attention, where whole heads go. The result is what the whole graph
computes with zeros in the weights that read the channels (``_channel_cut.masked``); accuracy has to be recovered by
training or reconstruction. Kept whole, each with its reason in the report: the graph's own outputs, channels that a
LayerNormalization or Softmax takes statistics over, everything behind an op that is not understood, what is in
subgraphs and functions, and integer weights: prune before quantising.

Ratios are of the channels that the model had before it was pruned for the first time; the model's metadata remember
those, so that a second run changes nothing, and one with a larger ratio goes on from there.

Constants are folded first: exporters compute shapes, and even biases, in the graph. Values keep their names, though
what they hold has fewer channels and, after a cut, other numbers.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

import onnx_ir as ir

from passes._channel_cut import Cut, apply
from passes._channel_groups import Analysis, Group, analyze
from passes._channel_scores import KINDS, SCOPES, ChannelScores, importance, plan
from passes._graph import FLOATS, Names, Scope, constant, default_opset, is_op, new_constant, scopes
from passes.base import RECORDS, Declined, InvalidOption, Outcome, Pass, PassFailed, label
from passes.eliminate_dead_code import EliminateDeadCode
from passes.fold_constants import FoldConstants
from passes.unpack_sequences import UnpackSequences

#: the key of the model's metadata that says how it was pruned, so that ratios stay those of the dense model
RECORD = f"{RECORDS}prune_channels"


@dataclasses.dataclass(frozen=True)
class PruneChannels(Pass):
    """Cuts the channels, attention heads and residual blocks that matter least, with all that depends on them.

    Attributes:
        ratio: how much of its channels a layer loses, from 0 up to, not including, 1.
        scope: layer takes the ratio of every layer, global of all together, where they matter least.
        importance: l1 or l2 norm of weights, batch-norm scale, activation or taylor from scores, or random.
        scores: numbers for activation and taylor, one for each channel of values of the graph.
        per_layer: ratios of single layers, by name.
        round_to: what is left is the nearest multiple of this, such as 8, 16 or 32 for the target's kernels.
        min_channels: a layer keeps so many.
        exclude: layers that keep all their channels, by name.
        heads: whether whole attention heads may go.
        blocks: residual blocks that are taken out as a whole, by the name of the Add that ends them.
        seed: for random.
    """

    ratio: float = 0.3
    scope: str = "layer"
    importance: str = "l1"
    scores: ChannelScores | None = dataclasses.field(default=None, repr=False)
    per_layer: dict[str, float] | None = None
    round_to: int = 1
    min_channels: int = 1
    exclude: tuple[str, ...] = ()
    heads: bool = True
    blocks: tuple[str, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        for option, allowed in (("scope", SCOPES), ("importance", KINDS)):
            if getattr(self, option) not in allowed:
                raise InvalidOption(
                    f"option {option} of pass prune_channels is {getattr(self, option)!r}",
                    hint="wanted: " + ", ".join(allowed),
                )
        for name, each in {"ratio": self.ratio, **(self.per_layer or {})}.items():
            if not 0 <= each < 1:
                raise InvalidOption(
                    f"option {'ratio' if name == 'ratio' else 'per_layer'} of pass prune_channels: {name} is {each}",
                    hint="0 cuts nothing, 0.3 three channels of ten; 1 would leave none",
                )
        for option in ("round_to", "min_channels"):
            if getattr(self, option) < 1:
                raise InvalidOption(
                    f"option {option} of pass prune_channels is {getattr(self, option)}", hint="1 or more"
                )

    def call(self, model: ir.Model) -> Outcome:
        record = read_record(model)
        if record.get("asked") == self._asked():
            return Outcome(model, False, declined=(Declined("model", "it is pruned like this already"),))
        draft = prepared_copy(model)
        analysis = analyze(draft)
        groups, declined = self._eligible(draft, analysis)
        if not groups and not self.blocks:
            raise _nothing(declined)
        scores = importance(
            draft,
            groups,
            kind=self.importance,
            scores=None if self.scores is None else self.scores.scores,
            seed=self.seed,
        )
        dense = {group.name: group.count for group in groups} | record.get("dense", {})
        cut = plan(
            groups,
            scores,
            ratio=self.ratio,
            scope=self.scope,
            per_layer=self.per_layer,
            round_to=self.round_to,
            min_channels=self.min_channels,
            exclude=self._known_excludes(groups, analysis),
            dense=dense,
        )
        gone = set(record.get("blocks", ()))
        cut = Cut(cut.channels, tuple(name for name in self.blocks if name not in gone))
        declined += tuple(
            Declined(group.name, f"importance {self.importance} knows nothing of it")
            for group in groups
            if group.name not in scores
        )
        if not cut.count:
            return Outcome(model, False, declined=declined)
        apply(draft, cut)  # the rehearsal: what raises here leaves the model as it was
        prepare(model)
        apply(model, cut)
        EliminateDeadCode()(model)
        remember(model, cut, asked=self._asked(), dense=dense)
        return Outcome(model, True, fired=cut.count, declined=declined)

    def _asked(self) -> dict[str, Any]:
        """What decides how much goes; which channels go is then decided already."""
        left_out = ("importance", "scores", "seed")
        asked = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in left_out}
        loaded: dict[str, Any] = json.loads(json.dumps(asked))
        return loaded

    def _eligible(self, model: ir.Model, analysis: Analysis) -> tuple[list[Group], tuple[Declined, ...]]:
        """The groups that may be cut, and what may not be, with the reason."""
        groups, declined = [], list(analysis.declined)
        for group in analysis.groups:
            if group.kind == "heads" and not self.heads:
                declined.append(Declined(group.name, "attention heads are to be kept"))
            elif group.count == 1:
                declined.append(Declined(group.name, "it has one channel alone that could go"))
            else:
                groups.append(group)
        return groups, tuple(declined)

    def _known_excludes(self, groups: Sequence[Group], analysis: Analysis) -> tuple[str, ...]:
        """The excluded layers that would be cut: one that is kept anyway may be named all the same."""
        kept = {label(layer.node) for layer in analysis.graph.layers} - {n for g in groups for n in g.layers}
        return tuple(name for name in self.exclude if name not in kept)


def remember(model: ir.Model, cut: Cut, *, asked: Mapping[str, Any], dense: Mapping[str, int]) -> None:
    """Notes in a model what was taken from it, for ``read_record``, ``cut_of`` and the next run.

    Args:
        cut: in channels of the model as it was before this cut.
        asked: what decided how much goes.
        dense: for each group how many channels it had before any cut.
    """
    record = read_record(model)
    written = {
        "asked": asked,
        "dense": dense,
        "blocks": sorted({*record.get("blocks", ()), *cut.blocks}),
        "cut": record.get("cut", {}) | _in_dense(cut, record, dense),
    }
    model.metadata_props[RECORD] = json.dumps(written, sort_keys=True)


def cut_of(model: ir.Model) -> Cut:
    """What all runs together took from a model, in channels of the model as it was before the first of them."""
    record = read_record(model)
    cut = {name: tuple(channels) for name, channels in record.get("cut", {}).items()}
    return Cut(cut, tuple(record.get("blocks", ())))


def _in_dense(cut: Cut, record: Mapping[str, Any], dense: Mapping[str, int]) -> dict[str, list[int]]:
    """The channels of a cut, and those that went before, counted as before any cut."""
    result = {}
    for name, channels in cut.channels.items():
        before = set(record.get("cut", {}).get(name, ()))
        left = [channel for channel in range(dense[name]) if channel not in before]
        result[name] = sorted(before | {left[channel] for channel in channels})
    return result


def prepare(model: ir.Model) -> bool:
    """Makes a graph ready for ``find_groups``, in place: it sees further then. What is computed stays the same.

    Constants are folded, sequences that are read by number taken apart, and a vector that several nodes read becomes
    one for each: exporters store equal biases once, and what is equal by chance would be cut together.

    Returns:
        Whether anything was changed.
    """
    outcomes = [each(model) for each in (FoldConstants(), UnpackSequences(), EliminateDeadCode())]
    return _unshare(model) or any(outcome.modified for outcome in outcomes)


def _unshare(model: ir.Model) -> bool:
    """Gives each reader of a shared vector of floats its own; a matrix that is shared is meant to be."""
    names = Names(model)
    scope = Scope(model.graph, default_opset(model.opset_imports), False)
    changed = False
    for value in list(model.graph.initializers.values()):
        tensor = constant(value)
        if tensor is None or tensor.dtype not in FLOATS or not 1 < tensor.size == max(tensor.shape.numpy(), default=0):
            continue
        uses = [use for use in value.uses() if use.node.graph is model.graph]
        for use in uses[1:]:
            name = names.fresh(f"{use.node.outputs[0].name}_{value.name}")
            use.node.replace_input_with(use.idx, new_constant(scope, tensor.numpy(), name, before=use.node))
            changed = True
    return changed


def prepared_copy(model: ir.Model) -> ir.Model:
    """A prepared copy, on which everything that can fail happens first. It shares the weights."""
    draft = model.clone()
    for scope in scopes(draft):
        for node in scope.graph:
            if is_op(node, "Constant") and "value" in node.attributes and not node.attributes["value"].is_ref():
                # Folding names the tensors of Constants, and the copy's are those of the model.
                tensor = node.attributes["value"].as_tensor()
                copy = ir.Tensor(tensor.numpy(), dtype=tensor.dtype, name=tensor.name)
                node.attributes.add(ir.AttrTensor("value", copy))
    prepare(draft)
    return draft


def _nothing(declined: Sequence[Declined]) -> PassFailed:
    first = "; ".join(f"{each.node}: {each.reason}" for each in declined[:3])
    what = (
        "no layer of the main graph can be cut" if declined else "the model has no layer with a constant float weight"
    )
    return PassFailed(
        f"{what}{': ' + first if first else ''}", hint="prune before quantising, and leave the model as it is"
    )


def read_record(model: ir.Model) -> dict[str, Any]:
    """What an earlier run noted, see ``remember``; empty where there was none, or somebody wrote something else."""
    try:
        record = json.loads(model.metadata_props.get(RECORD, "{}"))
    except ValueError:
        return {}
    return record if isinstance(record, dict) else {}
