"""ORT format: a model as ONNX Runtime's reduced builds read it, and the operators that such a build has to have.

``model.ort`` is the graph as ONNX Runtime optimises it, in its own flatbuffer; builds without an ONNX parser open
nothing else. ``required_operators.config`` is what ``build.py --minimal_build --include_ops_by_config`` takes.
Both come from the converter inside the onnxruntime wheel.

The file is bound to the version of ONNX Runtime that wrote it: that version and later ones read it, and a reduced build
has to be of the same version, because a later one may want an operator in another version. So the variant says which.

ONNX Runtime holds the model in memory while it converts it; it does so in a process of its own. A flatbuffer ends at
2 GB, and so does the format.

See https://onnxruntime.ai/docs/performance/model-optimizations/ort-format-models.html.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import runtimes
from toolchain import child

MODEL = "model.ort"
CONFIG = "required_operators.config"
_MOST = (2 << 30) - (1 << 20)


def write_ort_format(model: Path, directory: Path, *, arm: bool) -> str:
    """Writes MODEL and CONFIG into a folder that exists.

    Args:
        model: a sound ONNX file.
        directory: where to write.
        arm: for ARM processors; else for x86.

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
    size = sum(file.stat().st_size for file in model.parent.glob("model.onnx*"))
    if size > _MOST:
        raise runtimes.CompileFailed(
            f"the model has {size / 1e9:.1f} GB, and ORT format ends at 2 GB", where=str(model), hint="leave it out"
        )
    done = subprocess.run(
        child.command("toolchain.ort_format", str(model), str(directory), "arm" if arm else "amd64"),
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
    return state.version


def main(model: str, directory: str, platform: str) -> None:
    """The child: converts, and gives the files the names that we use."""
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
