"""ORT format: a model as ONNX Runtime's reduced builds read it, and the operators that such a build has to have.

``model.ort`` is the graph as ONNX Runtime optimises it, in its own flatbuffer; builds without an ONNX parser open
nothing else. ``required_operators.config`` is what ``build.py --minimal_build --include_ops_by_config`` takes.
Both come from the converter inside the onnxruntime wheel.

The file is bound to the version of ONNX Runtime that wrote it: that version and later ones read it, and a reduced build
has to be of the same version, because a later one may want an operator in another version. So the variant says which.

ONNX Runtime writes the tables of its flatbuffer in the order of addresses in memory, so two runs give files that mean
the same and differ. The first is kept in the cache and used again: on one machine, the same model gives the same bytes.

ONNX Runtime holds the model in memory while it converts it; it does so in a process of its own. A flatbuffer ends at
2 GB, and so does the format.

See https://onnxruntime.ai/docs/performance/model-optimizations/ort-format-models.html.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import runtimes
from toolchain import child
from toolchain.cache import Cache, digest_of
from toolchain.errors import StorageError

MODEL = "model.ort"
CONFIG = "required_operators.config"
_STAGE = "ort-format"
_MOST = (2 << 30) - (1 << 20)


def write_ort_format(
    model: Path, directory: Path, *, digests: Mapping[str, str], arm: bool, cache: Cache | None = None
) -> str:
    """Writes MODEL and CONFIG into a folder that exists, from the cache where this was done before.

    Args:
        model: a sound ONNX file.
        directory: where to write.
        digests: the SHA-256 of it and of its external data, by name.
        arm: for ARM processors; else for any x86.
        cache: where results are kept; the user's where None.

    Returns:
        The version of ONNX Runtime that the result is bound to.

    Raises:
        TargetUnavailable: onnxruntime is not installed.
        CompileFailed: it does not convert the model.
    """
    state = runtimes.backend("ort-cpu").probe()
    if not state.available or state.version is None:
        raise runtimes.TargetUnavailable(
            f"ORT format needs onnxruntime: {state.reason}", hint=f"run: {state.remedy}; or leave it out"
        )
    cache = cache or Cache()
    key = digest_of({"digests": dict(digests), "onnxruntime": state.version, "arm": arm, "converter": 1})
    with cache.reading(_STAGE, key) as kept:
        if kept is None:
            with cache.writing(_STAGE, key) as empty:
                _convert(model, empty, arm=arm)
            cache.evict()
        else:
            _copy(kept, directory)
            return state.version
    with cache.reading(_STAGE, key) as kept:
        if kept is None:
            raise StorageError("the cache does not keep what is written to it", where=str(cache.root))
        _copy(kept, directory)
    return state.version


def _copy(kept: Path, directory: Path) -> None:
    for name in (MODEL, CONFIG):
        shutil.copyfile(kept / name, directory / name)


def _convert(model: Path, directory: Path, *, arm: bool) -> None:
    size = sum(file.stat().st_size for file in model.parent.glob("model.onnx*"))
    if size > _MOST:
        raise runtimes.CompileFailed(
            f"the model has {size / 1e9:.1f} GB, and ORT format ends at 2 GB", where=str(model), hint="leave it out"
        )
    done = subprocess.run(
        child.command("toolchain.ort_format", str(model), str(directory), *(["arm"] if arm else [])),
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    if done.returncode != 0:
        said = done.stderr.strip().splitlines()
        raise runtimes.CompileFailed(
            f"ONNX Runtime does not convert the model to ORT format: {said[-1][:300] if said else done.returncode}",
            where=str(model),
            hint="leave it out",
        )


def main(model: str, directory: str, platform: str | None = None) -> None:
    """The child: converts, and gives the files the names that we use.

    Without a platform the converter leaves out the layouts (NCHWc) that only some x86 processors have.
    """
    import tempfile

    from onnxruntime.tools.convert_onnx_models_to_ort import OptimizationStyle, convert_onnx_models_to_ort

    with tempfile.TemporaryDirectory(dir=directory) as folder:
        made = Path(folder)
        convert_onnx_models_to_ort(
            Path(model),
            output_dir=made,
            optimization_styles=[OptimizationStyle.Fixed],
            target_platform=platform,
        )
        (converted,) = made.glob("*.ort")
        (config,) = made.glob("*.config")
        converted.rename(Path(directory) / MODEL)
        # Its first lines name the folder that it was made in.
        lines = config.read_text(encoding="utf-8").splitlines(keepends=True)
        kept = "".join(line for line in lines if not line.startswith("#"))
        (Path(directory) / CONFIG).write_text(kept, encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
