"""Runs a model (``run PATH --input x.npy``) or describes it (``info PATH``) with numpy and one runtime."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np

import runtimes
from runtimes.package import is_package, read_package


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line. Returns the exit code: 0, or 2 after an error, which is printed."""
    parser = argparse.ArgumentParser(prog="python -m runtimes", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="run a model once on arrays from .npy or .npz files")
    info = commands.add_parser("info", help="show what a model takes and gives, and what would be loaded")
    for command in (run, info):
        command.add_argument("path", type=Path, help="an artifact's directory or an .onnx file")
        command.add_argument("--target", help="such as ort-cpu")
        command.add_argument("--variant", help="of an artifact, by name")
    run.add_argument(
        "--input",
        action="append",
        required=True,
        metavar="[NAME=]FILE",
        help="an .npy for an input (NAME= may be left out where there is one), or an .npz with all of them",
    )
    run.add_argument("--output", type=Path, help=".npy for the only output, .npz for all; without it they are printed")
    parsed = parser.parse_args(arguments)
    try:
        with runtimes.load(parsed.path, target=parsed.target, variant=parsed.variant) as session:
            if parsed.command == "info":
                _print(_describe(parsed.path, session))
            else:
                outputs = session.run(_read(parsed.input, session))
                _write(parsed.output, outputs)
    except (runtimes.Error, OSError) as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        return 2
    return 0


def _describe(path: Path, session: runtimes.Session) -> list[str]:
    lines = [f"{key:16} {value}" for key, value in session.info.items()]
    lines += [f"{'input':16} {spec}" for spec in session.inputs]
    lines += [f"{'output':16} {spec}" for spec in session.outputs]
    if is_package(path):
        package = read_package(path)
        lines += [f"{'package':16} {package.name} {package.version}, sha256 {package.digest}"]
        lines += [f"{'has':16} {v.name}: {v.target} {v.precision}" for v in package.variants]
    return lines


def _read(given: list[str], session: runtimes.Session) -> dict[str, np.ndarray]:
    feeds: dict[str, np.ndarray] = {}
    for text in given:
        name, _, file = text.rpartition("=")
        try:
            content = np.load(file, allow_pickle=False)
        except (ValueError, EOFError) as error:
            raise runtimes.InvalidInput(f"not a .npy or .npz file: {error}", where=file) from error
        if isinstance(content, np.ndarray):
            if not name and len(session.inputs) != 1:
                raise runtimes.InvalidInput(
                    "the model has several inputs: say which one this is",
                    where=file,
                    hint=f"--input {session.inputs[0].name if session.inputs else 'NAME'}={file}",
                )
            feeds[name or session.inputs[0].name] = content
        else:
            with content:
                feeds.update({key: content[key] for key in content.files})
    return feeds


def _write(path: Path | None, outputs: dict[str, np.ndarray]) -> None:
    if path is None:
        _print([f"{name}: {array.dtype}{list(array.shape)}\n{array}" for name, array in outputs.items()])
    elif path.suffix == ".npz":
        np.savez(path, **outputs)  # type: ignore[arg-type]
    elif path.suffix != ".npy":
        raise runtimes.InvalidInput("outputs are written as .npy or .npz", where=str(path))
    elif len(outputs) != 1:
        raise runtimes.InvalidInput(
            f"the model has {len(outputs)} outputs, an .npy holds one", where=str(path), hint="write an .npz"
        )
    else:
        np.save(path, next(iter(outputs.values())))


def _print(lines: list[str]) -> None:
    print("\n".join(lines))  # noqa: T201


if __name__ == "__main__":
    sys.exit(main())
