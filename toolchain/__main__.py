"""The ``toolchain`` command, also as ``python -m toolchain``. Imports nothing before it can answer a Ctrl-C."""

from __future__ import annotations

import os
import signal
import sys

#: Commands that move files about: without what builds them they take a third of the memory.
_LIGHT = ("bundle", "install", "rollback", "compile-on-device")


def main() -> None:
    """Runs the command and exits: 0, or 2 for a mistake, 130 after Ctrl-C, 1 for a defect."""
    arguments = sys.argv[1:]
    ours = signal.getsignal(signal.SIGINT) is signal.default_int_handler  # else Ctrl-C is not to be heard, as in `&`
    if ours:
        signal.signal(signal.SIGINT, _end_at_once)
    try:
        from toolchain import console

        if arguments[:1] and arguments[0] in _LIGHT:
            from toolchain.cli_bundle import bundling as app
        elif arguments[:1] == ["serve"]:
            from toolchain.cli_serve import serving as app
        else:
            from toolchain.cli import app
    except ModuleNotFoundError as error:
        missing = (error.name or "toolchain").partition(".")[0]
        if missing in ("toolchain", "passes", "runtimes"):
            raise
        sys.stderr.write(
            f"error: {missing} is not installed: what runs artifacts is here, what builds them is not\n"
            "  next: pip install 'onnx-toolchain[build]'\n"
        )
        sys.exit(2)
    if ours:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    code = console.run_app(app, arguments)
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:  # its reader may have gone, as in `| head`
            stream.flush()
    # Everything is written and closed. Taking a process with torch in it down in order takes a second or two more.
    os._exit(code)


def _end_at_once(*_: object) -> None:
    """While modules are imported: an exception would end in native code, which aborts the process, or be swallowed."""
    os.write(2, b"interrupted before anything was begun\n")
    os._exit(130)


if __name__ == "__main__":
    main()
