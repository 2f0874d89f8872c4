"""What every pass is made of: ``Pass``, its ``Outcome``, and the walk over all graphs of a model.

A pass is a frozen dataclass; its fields are its only options. It changes the model in place and says
what it did and what it declined. It keeps three promises that the toolchain builds on:

* A value name that is still there afterwards stands for the same value. Layer-by-layer comparison
  matches by name, so whatever replaces a group of nodes takes over the name of the group's last output.
* Run twice, the second run changes nothing.
* New initializers are named after the output that they feed, so that a shared weight is never
  overwritten: the others that share it keep the old one.
"""

from __future__ import annotations

import collections
import dataclasses
import re
from collections.abc import Iterable, Iterator
from typing import ClassVar

import onnx_ir as ir

#: keys of the model's metadata under which passes record what they did, for the next run to know
RECORDS = "toolchain."


class PassFailed(Exception):
    """A pass cannot go on with this model. The pass loop adds its name and turns it into its typed error."""

    def __init__(self, what: str, *, node: str | None = None, hint: str | None = None) -> None:
        super().__init__(what)
        self.node = node
        self.hint = hint


class UnknownPass(PassFailed, ValueError):
    """No pass has that name."""


class InvalidOption(PassFailed, ValueError):
    """A pass has no such option, or the value is not of its type."""


@dataclasses.dataclass(frozen=True, slots=True)
class Declined:
    """A place where a pass could have fired and did not.

    Attributes:
        node: the node's name, or its first output's where it has none.
        reason: why, for a person.
    """

    node: str
    reason: str


@dataclasses.dataclass
class Outcome(ir.passes.PassResult):
    """What a pass did: the model, whether it was changed, how often the pass fired, what it declined, and what a
    person should know of it besides."""

    fired: int = 0
    declined: tuple[Declined, ...] = ()
    remarks: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Pass(ir.passes.InPlacePass):
    """Base of all passes. Subclasses are frozen dataclasses and implement ``call``."""

    #: the name in recipes and on the command line: the class's name in snake case
    name: ClassVar[str] = ""
    #: whether it changes what the model computes, on purpose: outputs are then compared, and no bound is held
    lossy: ClassVar[bool] = False

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        cls.name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", cls.__name__).lower()

    def call(self, model: ir.Model) -> Outcome:
        raise NotImplementedError


def label(node: ir.Node) -> str:
    """How a person finds the node: its name, or its first output's name and its op type."""
    if node.name:
        return node.name
    first = next((v.name for v in node.outputs if v.name), "?")
    return f"{node.op_type} -> {first}"


def labels(nodes: Iterable[ir.Node]) -> dict[ir.Node, str]:
    """``label`` of each, and where several have the same one, their first outputs besides: for tables by name."""
    found = {node: label(node) for node in nodes}
    counts = collections.Counter(found.values())
    return {
        node: text if counts[text] == 1 else f"{text} -> {next((v.name for v in node.outputs if v.name), '?')}"
        for node, text in found.items()
    }


def graphs(model: ir.Model) -> Iterator[ir.Graph | ir.Function]:
    """The main graph, every function body, and every subgraph inside them, outermost first."""
    tops: list[ir.Graph | ir.Function] = [model.graph, *model.functions.values()]
    for top in tops:
        yield top
        yield from top.subgraphs()


def in_standard_domain(node: ir.Node) -> bool:
    """Whether the op is ONNX's own: the default domain, written either way."""
    return node.domain in ("", "ai.onnx")
