"""Takes initializers out of the list of graph inputs, where they are nothing but constants in fact.

Before IR version 4 every initializer had to be listed as an input; no runtime lets a caller set those
(ONNX Runtime refuses the name). From IR version 4 on, an initializer that is listed as an input is a
default which the caller may override, so it stays, unless ``overridable`` says that nobody will.
"""

from __future__ import annotations

import dataclasses

import onnx_ir as ir

from passes.base import Declined, Outcome, Pass

#: the first IR version in which an initializer need not be an input (ONNX 1.4)
_FREE_INITIALIZERS = 4


@dataclasses.dataclass(frozen=True)
class FreezeInitializers(Pass):
    """Makes constants of initializers that are listed as inputs: all of them below IR version 4.

    Attributes:
        overridable: freeze those of newer models too. Changes what a caller may feed.
    """

    overridable: bool = False

    def call(self, model: ir.Model) -> Outcome:
        listed = [value for value in model.graph.inputs if value.is_initializer()]
        old = model.ir_version < _FREE_INITIALIZERS
        if not (old or self.overridable):
            reason = "the caller may override it: it is a graph input with a default"
            return Outcome(model, False, declined=tuple(Declined(v.name or "?", reason) for v in listed))
        for value in listed:
            model.graph.inputs.remove(value)
        if old:
            model.ir_version = _FREE_INITIALIZERS
        return Outcome(model, modified=old or bool(listed), fired=len(listed))
