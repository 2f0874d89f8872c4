"""Runs a graph piece by piece over all samples, so that weights of a later piece may still change.

What is alive between two pieces is kept for every batch: in memory as far as that goes, on disk beyond. Every node runs
once for each batch, however many pieces there are.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir

import runtimes
from passes._graph import constant, default_opset
from toolchain.errors import DataError
from toolchain.evaluate import Feeds, input_specs
from toolchain.storage import reported


class Store:
    """Keeps arrays, in memory up to a number of bytes, then in files of a folder."""

    def __init__(self, folder: Path, memory: int) -> None:
        self.folder = folder
        self._left = memory
        self._count = 0

    def put(self, array: np.ndarray) -> Held:
        """Keeps an array until ``Held.drop``. Raises StorageError where the disk is full."""
        if array.nbytes <= self._left:
            self._left -= array.nbytes
            return Held(self, array)
        self._count += 1
        path = self.folder / f"{self._count}.npy"
        with reported(path, "activations", hint="free some space, or set TMPDIR to another disk"):
            np.save(path, array, allow_pickle=False)
        return Held(self, path)

    def give_back(self, size: int) -> None:
        """Memory that is free again."""
        self._left += size


class Held:
    """An array that a ``Store`` keeps."""

    def __init__(self, store: Store, content: np.ndarray | Path) -> None:
        self._store = store
        self._content: np.ndarray | Path | None = content

    def get(self) -> np.ndarray:
        """The array."""
        assert self._content is not None
        found: np.ndarray = np.load(self._content) if isinstance(self._content, Path) else self._content
        return found

    def drop(self) -> None:
        """Lets it go."""
        if isinstance(self._content, Path):
            self._content.unlink(missing_ok=True)
        elif self._content is not None:
            self._store.give_back(self._content.nbytes)
        self._content = None


class Pieces:
    """A run of the main graph over all samples that is ahead as far as ``advance`` was told.

    Args:
        model: is read when a piece runs: weights, and inputs added to nodes, count from then on.
        store: for what is alive; shared by several runs if wanted.
        wanted: values that are kept until ``release``, by name.
    """

    def __init__(self, model: ir.Model, store: Store, wanted: Iterable[str]) -> None:
        self._model = model
        self._nodes = [node for node in model.graph if constant(node.outputs[0] if node.outputs else None) is None]
        self._store = store
        self._wanted = set(wanted)
        self._at = 0
        self._last: dict[str, int] = {}
        for index, node in enumerate(self._nodes):
            for name in _read(node):
                self._last[name] = index
        #: where a value comes to be: the position behind its node, 0 for an input
        self.made = {str(spec.name): 0 for spec in input_specs(model)}
        for index, node in enumerate(self._nodes):
            self.made.update({str(value.name): index + 1 for value in node.outputs if value.name})
        self._values: list[dict[str, Held]] = []

    @property
    def count(self) -> int:
        """How many batches there are."""
        return len(self._values)

    def feed(self, feeds: Feeds) -> None:
        """Takes a batch of inputs in, before anything runs. Raises DataError where they are not those of the graph."""
        inputs = {name for name, at in self.made.items() if at == 0}
        if inputs != set(feeds):
            raise DataError(
                f"the samples have the inputs {', '.join(sorted(feeds)) or 'none'}, the graph takes "
                f"{', '.join(sorted(inputs))}",
                where=f"batch {self.count}",
            )
        kept = {name: array for name, array in feeds.items() if self._alive(name, 0)}
        self._values.append({name: self._store.put(np.asarray(array)) for name, array in kept.items()})

    def advance(self, name: str) -> None:
        """Runs as far as the node that makes a value. Raises RunFailed, InvalidInput, CompileFailed."""
        end = self.made[name]
        if end <= self._at:
            return
        piece, start, self._at = self._nodes[self._at : end], self._at, end
        made = [str(v.name) for n in piece for v in n.outputs if v.name]
        kept = [name for name in made if self._alive(name, end)]
        if kept:
            self._run(piece, kept, start)
        for values in self._values:
            for name in [name for name in values if not self._alive(name, end)]:
                values.pop(name).drop()

    def batches(self, names: Sequence[str]) -> Iterator[dict[str, np.ndarray]]:
        """Values that are alive, batch by batch."""
        for values in self._values:
            yield {name: values[name].get() for name in names}

    def release(self, names: Iterable[str]) -> None:
        """These need no longer be kept."""
        self._wanted.difference_update(names)

    def _alive(self, name: str, end: int) -> bool:
        return self._last.get(name, -1) >= end or name in self._wanted

    def _run(self, piece: Sequence[ir.Node], kept: Sequence[str], start: int) -> None:
        path = self._store.folder / f"piece{start}.onnx"
        inputs: list[str] = []
        for index, values in enumerate(self._values):
            if index == 0:
                graph, inputs = _graph(self._model, piece, kept, {n: held.get() for n, held in values.items()})
                with reported(path, "a temporary model", hint="free some space, or set TMPDIR to another disk"):
                    onnx.save(graph, path)
                session = runtimes.load(path, target="ort-cpu")
            found = session.run({name: values[name].get() for name in inputs})
            for name in kept:
                if found[name].dtype.kind == "f" and not np.isfinite(found[name]).all():
                    raise DataError(f"tensor {name!r} is not finite", where=f"batch {index}", hint="leave it out")
                values[name] = self._store.put(found[name])
        session.close()
        path.unlink()


def _graph(
    model: ir.Model, piece: Sequence[ir.Node], kept: Sequence[str], values: Mapping[str, np.ndarray]
) -> tuple[onnx.ModelProto, list[str]]:
    """The nodes as a model, and the names of its inputs."""
    made = {str(v.name) for node in piece for v in node.outputs}
    read = [name for name in dict.fromkeys(name for node in piece for name in _read(node)) if name not in made]
    inputs = [name for name in read if name in values]
    constants = {str(v.name): v for v in model.graph.initializers.values()}
    constants |= {str(v.name): v for node in model.graph for v in node.outputs if constant(v) is not None}
    weights = []
    for name in read:
        tensor = None if name in values or name not in constants else constant(constants[name])
        if tensor is not None:
            proto = ir.serde.serialize_tensor(ir.Tensor(tensor.numpy(), dtype=tensor.dtype, name=name))
            weights.append(proto)
    graph = onnx.helper.make_graph(
        [ir.serde.serialize_node(node) for node in piece],
        "piece",
        [
            onnx.helper.make_tensor_value_info(name, onnx.helper.np_dtype_to_tensor_dtype(values[name].dtype), None)
            for name in inputs
        ],
        [onnx.ValueInfoProto(name=name) for name in kept],
        weights,
    )
    opsets = [onnx.helper.make_opsetid(domain, version) for domain, version in model.opset_imports.items()]
    functions = [ir.serde.serialize_function(function) for function in model.functions.values()]
    # the version of the file format that the opset came with, or later: runtimes refuse one that is too new
    ir_version = max(model.ir_version or 8, 8) if default_opset(model.opset_imports) else 8
    proto = onnx.helper.make_model(graph, opset_imports=opsets, functions=functions, ir_version=ir_version)
    return proto, inputs


def _read(node: ir.Node) -> list[str]:
    """The names of all values that a node reads, those of its subgraphs too."""
    names = [str(value.name) for value in node.inputs if value is not None]
    for attribute in node.attributes.values():
        if attribute.is_ref() or attribute.type not in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS):
            continue
        bodies = [attribute.as_graph()] if attribute.type == ir.AttributeType.GRAPH else attribute.as_graphs()
        for body in bodies:
            own = {str(v.name) for v in body.inputs} | set(body.initializers)
            own |= {str(v.name) for inner in body for v in inner.outputs}
            names += [str(value.name) for value in body.outputs if str(value.name) not in own]
            names += [name for inner in body for name in _read(inner) if name not in own]
    return names
