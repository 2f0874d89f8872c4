"""Removes what exporters write beside the graph: metadata, stack traces, doc strings.

An exported graph carries, in the metadata of every node, the stack trace with the paths of the machine
that exported it. An artifact must hold no local path and be the same wherever it was built.
Names of nodes and values stay: layer-by-layer comparison and error messages need them. So does what passes
recorded of their own doing in the model's metadata.
"""

from __future__ import annotations

import dataclasses

import onnx_ir as ir

from passes.base import RECORDS, Outcome, Pass, graphs


@dataclasses.dataclass(frozen=True)
class StripMetadata(Pass):
    """Clears metadata and doc strings of the model, its graphs, functions, nodes, values and tensors.

    Attributes:
        keep_model_metadata: leave the model's own metadata and doc string, which people write by hand.
    """

    keep_model_metadata: bool = False

    def call(self, model: ir.Model) -> Outcome:
        fired = 0
        if not self.keep_model_metadata:
            records = {key: text for key, text in model.metadata_props.items() if key.startswith(RECORDS)}
            fired += bool(model.doc_string) or len(model.metadata_props) > len(records)
            _clear(model)
            model.metadata_props.update(records)
        for top in graphs(model):
            # A function and its body are two objects that share one set of metadata.
            fired += _clear(top)
            values = [*top.inputs, *top.outputs]
            if isinstance(top, ir.Graph):
                values.extend(top.initializers.values())
            for node in top:
                fired += _clear(node)
                values.extend(node.outputs)
                for attribute in node.attributes.values():
                    fired += bool(attribute.doc_string)
                    attribute.doc_string = None
                    if attribute.is_ref():
                        continue
                    if attribute.type == ir.AttributeType.TENSOR:
                        fired += _clear(attribute.as_tensor())
                    elif attribute.type == ir.AttributeType.TENSORS:
                        fired += sum(_clear(tensor) for tensor in attribute.as_tensors())
            for value in values:
                fired += _clear(value)
                if value.const_value is not None:
                    fired += _clear(value.const_value)
        return Outcome(model, modified=fired > 0, fired=fired)


def _clear(
    thing: ir.Model | ir.Graph | ir.Function | ir.Node | ir.Value | ir.TensorProtocol,
) -> bool:
    dirty = bool(thing.metadata_props) or bool(thing.doc_string)
    if dirty and isinstance(thing, ir.TensorProtoTensor):
        # Such a tensor is written as the proto that it was read from, word for word.
        thing.raw.ClearField("doc_string")
        thing.raw.ClearField("metadata_props")
        thing.metadata_props.clear()
    elif dirty:
        thing.metadata_props.clear()
        thing.doc_string = None
    return dirty
