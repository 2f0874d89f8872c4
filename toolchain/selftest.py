"""Self-test vectors: made when an artifact is built, run by every install (``runtimes/_selftest.py``).

For each variant that ran where it was built, what is stored are its own outputs: what a device is asked is whether the
variant computes there what it computed here. Other processors have other kernels, which round elsewhere, so the bounds
are those of arithmetic and not of a digest. A variant whose device was not here (a TensorRT engine) is held against the
exported graph, run node by node, within the bound of its precision.

Inputs are drawn from a seed, never taken from anybody's data. A model whose inputs cannot be made up (strings) gets no
cases, and a word on why; then a device only loads it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import runtimes
from runtimes._selftest import KEY, output_error, vectors_content
from toolchain.artifact import Variant
from toolchain.bounds import FLOAT_BOUNDS, INT8_BOUND
from toolchain.errors import DataError
from toolchain.evaluate import reference_session
from toolchain.seeded import seeded_inputs

__all__ = ["FILE", "KEY", "SelfTest", "make_selftest"]

#: Where the vectors lie in an artifact.
FILE = "selftest.safetensors"
#: One at batch 1 and one at batch 2, where the model takes that.
_CASES = 2
#: INT8 kernels of two processors round a sum of products alike and its scaling to a neighbour now and then.
_INT8_ELSEWHERE = 1e-2


@dataclasses.dataclass(frozen=True, slots=True)
class SelfTest:
    """What ``write_artifact`` is given.

    Attributes:
        contents: FILE to its bytes; empty where there are no cases.
        metadata: the value of ``KEY``.
    """

    contents: Mapping[str, bytes]
    metadata: Mapping[str, Any]


def make_selftest(
    exported: Path, variants: Sequence[Variant], *, seed: int = 0, dims: Mapping[str, int] | None = None
) -> SelfTest:
    """Makes the vectors of an artifact that is about to be written. Equal arguments give equal bytes on one machine.

    Args:
        exported: the exported graph, a sound ONNX file.
        variants: as they will be in the artifact.
        seed: of the inputs.
        dims: sizes of symbolic dimensions, as in ``seeded_inputs``.

    Raises:
        Error: a variant that should run here does not.
    """
    tensors: dict[str, np.ndarray] = {}
    entries: dict[str, Any] = {}
    with reference_session(exported) as reference:
        try:
            cases = [
                seeded_inputs(reference.inputs, batch=1 + case, seed=seed + case, dims=dims) for case in range(_CASES)
            ]
            wanted = [reference.run(feeds) for feeds in cases]
            tensors |= _named("inputs/{}/", cases)
            tensors |= _named("outputs/{}/reference/", wanted)
            vectors_content(tensors)
        except (DataError, runtimes.RunFailed, runtimes.InvalidArtifact) as error:
            return SelfTest({}, {"cases": 0, "why": error.what, "variants": {}})
    used = False
    for variant in variants:
        compiled = variant.compiled
        backend = runtimes.backend(compiled.target.runtime)
        precise = FLOAT_BOUNDS["float16"] if variant.precision == "fp32" else FLOAT_BOUNDS["bfloat16"]
        if variant.precision.startswith("int8"):
            precise = _INT8_ELSEWHERE
        if not backend.can_run(compiled.target).available:
            most = INT8_BOUND if variant.precision.startswith("int8") else precise
            entries[variant.name] = {"outputs": "reference", "max_error": most}
            used = True
            continue
        options = backend.options_type(**variant.session_options)
        with backend.load(compiled, options=options) as session:
            found = [session.run(feeds) for feeds in cases]
            again = [session.run(feeds) for feeds in cases]
        noise = max(output_error(a[name], b[name]) for a, b in zip(found, again, strict=True) for name in a)
        if not noise <= precise:
            # Random by design, such as RandomNormal or Dropout in training mode: nothing to compare.
            why = f"the outputs of {variant.name} differ from run to run"
            return SelfTest({}, {"cases": 0, "why": why, "variants": {}})
        tensors |= _named(f"outputs/{{}}/{variant.name}/", found)
        entries[variant.name] = {"outputs": variant.name, "max_error": precise}
    if not used:
        tensors = {name: array for name, array in tensors.items() if "/reference/" not in name}
    return SelfTest({FILE: vectors_content(tensors)}, {"file": FILE, "cases": _CASES, "variants": entries})


def _named(prefix: str, cases: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {f"{prefix.format(case)}{name}": array for case, one in enumerate(cases) for name, array in one.items()}
