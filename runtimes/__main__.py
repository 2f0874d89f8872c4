"""Runs, describes, diagnoses, installs, rolls back and verifies models with numpy and one runtime."""

from __future__ import annotations

import argparse
import os
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

import runtimes
from runtimes import _doctor
from runtimes import install as installing
from runtimes.package import is_package, read_package

#: Elements of an output beyond which only its beginning and end are printed.
_SHOWN = 100


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line. Returns the exit code: 0; 2 after an error, which is printed; 1 where doctor says no;
    130 after Ctrl-C."""
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
    doctor = commands.add_parser("doctor", help="what this machine can run, or what of an artifact, and why not")
    doctor.add_argument("path", type=Path, nargs="?", help="an artifact, a folder of installed versions, or a bundle")
    _add_installing(commands)
    parsed = parser.parse_args(arguments)
    try:
        if parsed.command in _INSTALLING:
            _print(_INSTALLING[parsed.command](parsed))
            return 0
        if parsed.command == "doctor":
            lines, code = _doctor.report(parsed.path)
            _print(lines)
            return code
        if parsed.command == "run" and parsed.output is not None:
            _require_other(parsed.output, parsed.input)
        with runtimes.load(parsed.path, target=parsed.target, variant=parsed.variant) as session:
            if parsed.command == "info":
                _print(_describe(parsed.path, session))
            else:
                if parsed.output is not None:
                    _check_output(parsed.output, len(session.outputs))
                outputs = session.run(_read(parsed.input, session))
                _write(parsed.output, outputs)
    except BrokenPipeError:  # the reader of our output has gone, as in `| head`
        sys.stdout = None  # or the interpreter complains at exit
    except (runtimes.Error, OSError) as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        return 2
    except KeyboardInterrupt:
        print("interrupted; nothing half-written was left", file=sys.stderr)  # noqa: T201
        return 130
    return 0


def _add_installing(commands: Any) -> None:
    install = commands.add_parser("install", help="unpack a bundle, test it here, and put it into service")
    install.add_argument("path", type=Path, help="a bundle: .tar.zst, .tar.gz or .tar")
    install.add_argument("--to", type=Path, required=True, metavar="ROOT", help="the folder of its versions")
    install.add_argument("--keep", type=int, default=installing.KEEP, help="versions that stay (default: %(default)s)")
    rollback = commands.add_parser("rollback", help="put the version before back into service")
    rollback.add_argument("path", type=Path, metavar="ROOT", help="the folder of versions")
    rollback.add_argument("--to", type=int, metavar="VERSION", help="this version instead; also forward again")
    verify = commands.add_parser("verify", help="compare every digest of a bundle, an artifact or what is installed")
    verify.add_argument("path", type=Path)
    for command, option in ((install, "--verify"), (verify, "--key")):
        command.add_argument(option, dest="key", type=Path, metavar="KEY.pub", help="whose signature there has to be")
        command.add_argument(
            "--root-certificate",
            action="append",
            type=Path,
            default=[],
            metavar="ROOT.pem",
            help="or: who vouches for the certificate that signed",
        )
    compiling = commands.add_parser("compile-on-device", help="build here what a bundle brought as a graph")
    compiling.add_argument("path", type=Path, metavar="ROOT", help="the folder of versions")


def _signer(parsed: argparse.Namespace) -> installing.Signer | None:
    if parsed.key is None and not parsed.root_certificate:
        return None
    return installing.Signer(key=parsed.key, roots=tuple(parsed.root_certificate))


def _install(parsed: argparse.Namespace) -> list[str]:
    return _installed(installing.install(parsed.path, parsed.to, signer=_signer(parsed), keep=parsed.keep))


def _rollback(parsed: argparse.Namespace) -> list[str]:
    return _installed(installing.rollback(parsed.path, to=parsed.to))


def _compile(parsed: argparse.Namespace) -> list[str]:
    return _installed(installing.compile_here(parsed.path))


def _verify(parsed: argparse.Namespace) -> list[str]:
    found = installing.verify(parsed.path, signer=_signer(parsed))
    lines = [f"{found.name}, sha256 {found.digest}: {found.files} files, {found.size:,} bytes, all as they were built"]
    return lines + [f"signed by {found.signed_by}" if found.signed_by else "the signature was not checked"]


def _installed(done: installing.Installed) -> list[str]:
    lines = [f"version {done.version} of {done.name} is in service in {done.root}, sha256 {done.digest}"]
    if done.signed_by:
        lines.append(f"signed by {done.signed_by}")
    for one in done.tested:
        error = "nothing to compare" if one.error is None else f"error {one.error:.1e}"
        lines.append(f"{one.variant}: {'not run here: ' + one.why_not if one.why_not else 'tested, ' + error}")
    return lines


_INSTALLING = {"install": _install, "rollback": _rollback, "verify": _verify, "compile-on-device": _compile}


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
        except OSError as error:
            raise runtimes.InvalidInput(
                f"the input cannot be read: {error.strerror or error}", where=file, hint="check the path"
            ) from error
        except (ValueError, EOFError, zipfile.BadZipFile) as error:
            # Not numpy's own words: of whatever it does not know it says that pickle might read it.
            raise runtimes.InvalidInput(
                "not a .npy or .npz file, a damaged one, or one with Python objects",
                where=file,
                hint="write it with numpy.save or numpy.savez",
            ) from error
        if isinstance(content, np.ndarray):
            if not name and len(session.inputs) != 1:
                raise runtimes.InvalidInput(
                    "the model has several inputs: say which one this is",
                    where=file,
                    hint=f"--input {session.inputs[0].name if session.inputs else 'NAME'}={file}",
                )
            found = {name or session.inputs[0].name: content}
        else:
            with content:
                found = {key: content[key] for key in content.files}
        if twice := sorted(feeds.keys() & found.keys()):
            raise runtimes.InvalidInput(f"input {twice[0]!r} is given twice", where=file, hint="give it once")
        feeds |= found
    return feeds


def _require_other(output: Path, inputs: list[str]) -> None:
    """Refuses to write the outputs over an input."""
    for text in inputs:
        for name in (text, text.partition("=")[2]):
            if name and os.path.exists(name) and output.exists() and os.path.samefile(name, output):
                raise runtimes.InvalidInput(
                    "the output would replace an input", where=str(output), hint="give another --output"
                )


def _check_output(path: Path, count: int) -> None:
    """Says before the model runs that its outputs cannot be written so."""
    if path.suffix not in (".npy", ".npz"):
        raise runtimes.InvalidInput(
            "outputs are written as .npy or .npz", where=str(path), hint="give a name that ends so"
        )
    if path.suffix == ".npy" and count != 1:
        raise runtimes.InvalidInput(
            f"the model has {count} outputs, an .npy holds one", where=str(path), hint="write an .npz"
        )
    if not path.parent.is_dir():
        raise runtimes.InvalidInput("there is no such folder", where=str(path.parent), hint="make it first")


def _write(path: Path | None, outputs: dict[str, np.ndarray]) -> None:
    if path is None:
        texts = {name: np.array2string(array, threshold=_SHOWN) for name, array in outputs.items()}
        _print([f"{name}: {array.dtype}{list(array.shape)}\n{texts[name]}" for name, array in outputs.items()])
        return
    # Beside it and then in its place: a full disk or Ctrl-C leaves what was there.
    working = path.with_name(f".{path.stem}-{os.urandom(6).hex()}{path.suffix}")
    try:
        if path.suffix == ".npz":
            np.savez(working, **outputs)  # type: ignore[arg-type]
        else:
            np.save(working, next(iter(outputs.values())))
        os.replace(working, path)
    except OSError as error:
        raise runtimes.InvalidInput(
            f"the output cannot be written: {error.strerror or error}", where=str(path), hint="give another --output"
        ) from error
    finally:
        working.unlink(missing_ok=True)


def _print(lines: list[str]) -> None:
    print("\n".join(lines))  # noqa: T201


if __name__ == "__main__":
    sys.exit(main())
