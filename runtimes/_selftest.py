"""Self-test of an artifact: runs the vectors that its build stored, and compares.

The vectors lie in a safetensors file (8 bytes of length, a JSON header, raw little-endian data), and the manifest says
which and how near is near enough::

    additional_metadata.toolchain.selftest = {
        "file": "selftest.safetensors", "cases": 2,
        "variants": {"ort-cpu-int8": {"outputs": "ort-cpu-int8", "max_error": 1e-3}, …}}

Tensors are named ``inputs/CASE/NAME`` and ``outputs/CASE/OUTPUTS/NAME``. The error of an output of floats is its
normalised mean squared error, sum((a-b)^2) / sum(b^2); of any other output, the share of elements that differ.

An artifact whose inputs nobody can make up has no cases: then loading it is the test.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from runtimes._inputs import numpy_dtype
from runtimes.base import Error, InvalidArtifact, RunFailed

#: The metadata of an artifact that says all this.
KEY = "selftest"
_MAX_HEADER = 1 << 20
_DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32",
    "I16": "int16", "I8": "int8", "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8", "BOOL": "bool",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
}  # fmt: skip


@dataclasses.dataclass(frozen=True, slots=True)
class Tested:
    """What a self-test found of one variant.

    Attributes:
        variant: its name.
        error: the largest error of an output; None where it does not run here, or there was nothing to compare.
        why_not: why it was not run.
    """

    variant: str
    error: float | None
    why_not: str | None = None


def selftest(root: Path, *, variant: str | None = None, options: Mapping[str, Any] | None = None) -> tuple[Tested, ...]:
    """Loads every variant that runs here, or one, and compares its outputs with those that were stored.

    Args:
        root: the artifact.
        variant: its name; None takes all.
        options: of sessions, as ``runtimes.load`` takes them; None takes those of the artifact.

    Raises:
        InvalidArtifact: the artifact or its vectors are damaged, or nothing of it runs here; or it has no such variant.
        RunFailed: an output is further from what was stored than its bound.
        Error: whatever else loading or running raises.
    """
    import runtimes
    from runtimes.package import read_package

    package = read_package(root)
    where = str(package.root)
    vectors = read_vectors_of(package)
    found = []
    for one in package.variants:
        if variant not in (None, one.name):
            continue
        try:
            state = runtimes.backend(one.target.runtime).can_run(one.target)
        except Error as error:
            found.append(Tested(one.name, None, error.what))
            continue
        if not state.available:
            found.append(Tested(one.name, None, state.reason))
            continue
        with runtimes.load(package.root, variant=one.name, options=options) as session:
            found.append(Tested(one.name, compare(session, one.name, vectors)))
    if all(one.why_not for one in found):
        raise InvalidArtifact(
            "nothing in it runs here: " + "; ".join(f"{one.variant}: {one.why_not}" for one in found),
            where=where,
            hint="install one of the runtimes, or bundle it for this platform",
        )
    return tuple(found)


@dataclasses.dataclass(frozen=True, slots=True)
class Vectors:
    """The self-test vectors of an artifact.

    Attributes:
        expected: the manifest's word on them, as this module's docstring has it.
        tensors: the file's.
        where: the artifact, for messages.
    """

    expected: Mapping[str, Any]
    tensors: Mapping[str, np.ndarray]
    where: str

    def inputs(self) -> list[dict[str, np.ndarray]]:
        """The inputs of each case."""
        cases = range(min(self.expected["cases"], len(self.tensors)))
        return [_under(self.tensors, f"inputs/{case}/") for case in cases]


def read_vectors_of(package: Any) -> Vectors:
    """The vectors of a ``runtimes.package.Package``, their digest compared.

    Raises:
        InvalidArtifact: there are none, or they are damaged.
    """
    expected = package.metadata.get(KEY)
    where = str(package.root)
    if not isinstance(expected, dict) or type(expected.get("cases")) is not int:
        raise InvalidArtifact("the artifact has no self-test vectors", where=where, hint="build it again")
    tensors: dict[str, np.ndarray] = {}
    if expected["cases"]:
        name = expected.get("file")
        if not isinstance(name, str) or name not in package.files:
            raise InvalidArtifact("the file of the self-test vectors is not in the manifest", where=where)
        package.verify([name])
        tensors = read_vectors(package.root / name)
    return Vectors(expected, tensors, where)


def compare(session: Any, variant: str, vectors: Vectors) -> float | None:
    """Runs the cases on a session of a variant. Returns the largest error; None where there is nothing to compare.

    Raises:
        RunFailed: an output is further from what was stored than its bound.
        InvalidArtifact: the vectors do not know the variant.
    """
    expected, tensors, where = vectors.expected, vectors.tensors, vectors.where
    worst: float | None = None
    if not expected["cases"]:
        return worst
    try:
        entry = expected["variants"][variant]
        stored, most = str(entry["outputs"]), float(entry["max_error"])
    except (KeyError, TypeError, ValueError):
        raise InvalidArtifact(f"the self-test says nothing of variant {variant!r}", where=where) from None
    for case, feeds in enumerate(vectors.inputs()):
        wanted = _under(tensors, f"outputs/{case}/{stored}/")
        if not wanted:
            raise InvalidArtifact(f"the self-test has no outputs of variant {variant!r}", where=where)
        outputs = session.run(feeds)
        for name, reference in wanted.items():
            error = output_error(reference, outputs[name]) if name in outputs else math.inf
            worst = max(error, worst or 0.0)
            if not error <= most:
                raise RunFailed(
                    f"the self-test failed: {name!r} of variant {variant!r} is off by {error:.2g}, "
                    f"and {most:.2g} is allowed",
                    where=where,
                    hint="the model does not compute here what it computed where it was built",
                )
    return worst


def output_error(reference: np.ndarray, found: np.ndarray) -> float:
    """The error of an output, as this module's docstring has it; infinite where shapes or special values differ."""
    if reference.shape != found.shape or reference.dtype != found.dtype:
        return math.inf
    if reference.dtype.kind in "iub":
        return float(np.mean(reference != found)) if reference.size else 0.0
    a, b = found.astype(np.float64), reference.astype(np.float64)
    finite = np.isfinite(b)
    if not np.array_equal(a[~finite], b[~finite], equal_nan=True) or not np.isfinite(a[finite]).all():
        return math.inf
    difference, signal = float(np.sum((a[finite] - b[finite]) ** 2)), float(np.sum(b[finite] ** 2))
    return difference / signal if signal else (0.0 if difference == 0 else math.inf)


def _under(tensors: Mapping[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    return {name.removeprefix(prefix): array for name, array in tensors.items() if name.startswith(prefix)}


def read_vectors(path: Path) -> dict[str, np.ndarray]:
    """Reads a safetensors file. Raises InvalidArtifact."""
    content = path.read_bytes()
    try:
        length = int.from_bytes(content[:8], "little")
        if length > _MAX_HEADER:
            raise ValueError(f"a header of {length:,} bytes")
        header = json.loads(content[8 : 8 + length].decode("utf-8"))
        data = memoryview(content)[8 + length :]
        found = {}
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            begin, end = entry["data_offsets"]
            dtype = numpy_dtype(_DTYPES[entry["dtype"]])
            if not 0 <= begin <= end <= len(data) or end - begin != math.prod(entry["shape"]) * dtype.itemsize:
                raise ValueError(f"{name!r} lies outside the file")
            found[name] = np.frombuffer(data[begin:end], dtype).reshape(entry["shape"])
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise InvalidArtifact(f"the self-test vectors cannot be read: {error}", where=str(path)) from None
    return found


def write_vectors(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes a safetensors file that ``read_vectors`` and the package safetensors read; equal arrays, equal bytes."""
    path.write_bytes(vectors_content(tensors))


def vectors_content(tensors: Mapping[str, np.ndarray]) -> bytes:
    """The bytes of a safetensors file.

    Raises:
        InvalidArtifact: a dtype that the format does not have, such as strings.
    """
    names = {value: key for key, value in _DTYPES.items()}
    header: dict[str, Any] = {}
    pieces = []
    end = 0
    # The largest element size first: every tensor then begins on a multiple of its own.
    for name, array in sorted(tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[0])):
        if array.dtype.name not in names:
            raise InvalidArtifact(f"self-test vectors cannot hold {array.dtype.name}", where=name)
        raw = np.ascontiguousarray(array).astype(array.dtype.newbyteorder("<"), copy=False).tobytes()
        header[name] = {
            "dtype": names[array.dtype.name], "shape": list(array.shape), "data_offsets": [end, end + len(raw)]
        }  # fmt: skip
        end += len(raw)
        pieces.append(raw)
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return b"".join([len(text).to_bytes(8, "little"), text, *pieces])


def selftest_apart(
    root: Path, *, timeout_s: float, variant: str | None = None, options: Mapping[str, Any] | None = None
) -> tuple[Tested, ...]:
    """``selftest`` in a process of its own: a runtime that crashes or hangs there takes nobody along.

    Raises:
        Error: what the child raised, or that it crashed or did not end in time.
    """
    from runtimes._probe import child

    text = json.dumps(None if options is None else dict(options))
    command = child(f"from runtimes._selftest import main; main({os.fspath(root)!r}, {variant!r}, {text!r})")
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=timeout_s, check=False)
    except subprocess.TimeoutExpired:
        raise RunFailed(f"the self-test did not end within {timeout_s:g} s", where=str(root)) from None
    lines = done.stdout.decode("utf-8", "replace").splitlines()
    try:
        answer = json.loads(lines[-1])
        if "tested" in answer:
            return tuple(Tested(**one) for one in answer["tested"])
    except (IndexError, ValueError, TypeError):
        said = done.stderr.decode("utf-8", "replace").strip().splitlines()
        end = f"a crash, signal {-done.returncode}" if done.returncode < 0 else f"exit code {done.returncode}"
        raise RunFailed(
            f"the self-test ended with {end}" + (f": {said[-1][:300]}" if said else ""), where=str(root)
        ) from None
    raise RunFailed(answer["what"], where=answer.get("where"), hint=answer.get("hint"))


def main(root: str, variant: str | None, options: str) -> None:
    """The child, with session options as JSON: prints one line of it, after whatever native libraries print."""
    try:
        tested = selftest(Path(root), variant=variant, options=json.loads(options))
        answer: dict[str, Any] = {"tested": [dataclasses.asdict(one) for one in tested]}
    except Error as error:
        answer = {"what": error.what, "where": error.where, "hint": error.hint}
    sys.stdout.write("\n" + json.dumps(answer) + "\n")
