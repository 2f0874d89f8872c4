"""ONNX files in and out: reading what strangers made, and writing so that any size fits.

Reading goes in steps, each of which refuses what the next could not bear: the wire format and every
external-data location (``runtimes.check_model_file``, no protobuf library involved), versions, then
onnx's own checker with type inference in a child process, since native code has crashed on hostile files.
"""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

import google.protobuf.message
import numpy as np
import onnx
import onnx_ir as ir

from passes.base import graphs
from runtimes import InvalidModel
from runtimes.model_file import check_model_file
from toolchain import child
from toolchain.errors import GraphError, StorageError
from toolchain.storage import reported, require_outside_artifacts

#: Protobuf ends at 2 GiB; from here on the weights go beside the file.
EXTERNAL_DATA_FROM = 1_800_000_000
_CHECK_SECONDS = 300
_NEWEST_OPSET = onnx.defs.onnx_opset_version()


def read_onnx(path: Path) -> ir.Model:
    """Reads and checks an ONNX file that may come from anyone. Weights stay on disk until they are used.

    Raises:
        InvalidModel: no such file, not ONNX, cut short, or external data that may not be opened.
        GraphError: too new an opset, a graph that onnx's checker refuses, or NaN weights.
    """
    file = check_model_file(path)
    newest = file.opset_imports.get("", file.opset_imports.get("ai.onnx", 0))
    if newest > _NEWEST_OPSET:
        raise GraphError(
            f"the model uses opset {newest}; onnx {onnx.__version__} knows opsets up to {_NEWEST_OPSET}",
            where=str(path),
            hint="update onnx and the runtime, or export the model with an older opset",
        )
    if file.ir_version > onnx.IR_VERSION:
        raise GraphError(
            f"the model has IR version {file.ir_version}; onnx {onnx.__version__} knows up to {onnx.IR_VERSION}",
            where=str(path),
            hint="update onnx, or save the model with an older onnx",
        )
    proto = _parse(path)
    sparse = next(_sparse_initializers(proto.graph), None)
    if sparse is not None:
        # onnx_ir leaves them out without a word, and the graph would be another one
        raise GraphError(
            f"weight {sparse!r} is a sparse initializer, which this toolchain does not read",
            where=str(path),
            hint="export the model with dense weights",
        )
    _check_in_child(path)
    try:
        model = ir.from_proto(proto)
        ir.external_data.set_base_dir(model.graph, path.parent)
    except Exception as error:  # what a malformed tensor raises is not documented; nothing has been built on it yet
        raise InvalidModel(f"cannot read the model: {error}", where=str(path)) from error
    check_weights(model, where=str(path))
    return model


def _parse(path: Path) -> onnx.ModelProto:
    try:
        return onnx.load(path, load_external_data=False)
    except google.protobuf.message.DecodeError as error:
        raise InvalidModel(f"not an ONNX file: {error}", where=str(path), hint="export or download it again") from error


def _sparse_initializers(graph: onnx.GraphProto) -> Iterator[str]:
    for tensor in graph.sparse_initializer:
        yield tensor.values.name
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                yield from _sparse_initializers(inner)


def _check_in_child(path: Path) -> None:
    """Runs ``onnx.checker`` with type inference in a process of its own."""
    command = child.command("toolchain._check_onnx", str(path))
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=_CHECK_SECONDS, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise GraphError(
            f"onnx's checker did not end within {_CHECK_SECONDS} s", where=str(path), hint=_reproduce(path)
        ) from error
    if done.returncode < 0:
        raise GraphError(
            f"onnx's checker crashed on this model (signal {-done.returncode})",
            where=str(path),
            hint=_reproduce(path),
        )
    if done.returncode != 0:
        lines = [line for line in done.stdout.strip().splitlines() if line.strip()]
        raise GraphError(
            "the graph is not valid: " + (" ".join(lines[:4]) or done.stderr.strip()[-300:]),
            where=str(path),
            hint=_reproduce(path),
        )


def _reproduce(path: Path) -> str:
    return f'python -c "import onnx; onnx.checker.check_model({str(path)!r}, full_check=True)" shows the same'


def check_weights(model: ir.Model, *, where: str) -> None:
    """Refuses NaN weights: every result they touch is NaN. Raises GraphError naming the first."""
    for graph in graphs(model):
        if not isinstance(graph, ir.Graph):
            continue
        for name, value in graph.initializers.items():
            tensor = value.const_value
            if tensor is None or not tensor.dtype.is_floating_point():
                continue
            # The sum is NaN wherever an entry is (or where infinities cancel): one pass, no mask in memory.
            array = tensor.numpy()
            with np.errstate(all="ignore"):
                suspicious = np.isnan(array.sum(dtype=np.float64 if array.dtype == np.float64 else np.float32))
            if suspicious and bool(np.isnan(array).any()):
                user = next((node.name or node.op_type for node, _ in value.uses()), "no node")
                raise GraphError(
                    f"weight {name!r} holds NaN",
                    where=f"{where}, used by node {user}",
                    hint="the training run or the conversion that made it went wrong; take an earlier checkpoint",
                )


def weights_size(model: ir.Model) -> int:
    """Bytes of all initializers, those of subgraphs too."""
    return sum(
        value.const_value.nbytes
        for graph in graphs(model)
        if isinstance(graph, ir.Graph)
        for value in graph.initializers.values()
        if value.const_value is not None
    )


def write_onnx(model: ir.Model, path: Path) -> None:
    """Writes the model; from 1.8 GB of weights on, they go into ``<name>.data`` beside it.

    Raises:
        StorageError: the disk is full or not writable.
    """
    size = weights_size(model)
    if path.exists() and not path.is_file():
        raise StorageError(
            f"cannot write {path.name}: what is there is no plain file", where=str(path), hint="write elsewhere"
        )
    require_outside_artifacts(path)
    # Written beside and renamed: a full disk leaves what was there, not half a model.
    working = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}")
    with reported(path, path.name):
        try:
            working.mkdir()
            if size >= EXTERNAL_DATA_FROM:
                ir.save(model, working / path.name, external_data=f"{path.name}.data")
            else:
                (working / path.name).write_bytes(ir.to_proto(_loaded(model)).SerializeToString())
            for file in sorted(working.iterdir(), reverse=True):  # the data first: the model must find it
                file.replace(path.parent / file.name)
        finally:
            shutil.rmtree(working, ignore_errors=True)


def _loaded(model: ir.Model) -> ir.Model:
    """The same model with external weights brought into memory, so that one file holds them."""
    return ir.external_data.load_to_model(model)


@contextlib.contextmanager
def temporary_onnx(model: ir.Model) -> Iterator[Path]:
    """The model as a file for a runtime that reads files, gone after the block.

    Weights go beside it: written straight from where they are, they cost a tenth of packing them into the proto.
    """
    with tempfile.TemporaryDirectory(prefix="toolchain-") as folder:
        path = Path(folder) / "model.onnx"
        with reported(path, "a temporary model", hint="free some space, or set TMPDIR to another disk"):
            ir.save(model, path, external_data="model.onnx.data")
        yield path
