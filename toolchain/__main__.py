"""The ``toolchain`` command, also as ``python -m toolchain``. Imports nothing before it can answer a Ctrl-C."""

from __future__ import annotations

import os
import sys

#: Commands that move files about: without what builds them they take a third of the memory.
_LIGHT = ("bundle", "install", "rollback", "compile-on-device")


def main() -> None:
    """Runs the command and exits: 0, or 2 for a mistake, 130 after Ctrl-C, 1 for a defect."""
    arguments = sys.argv[1:]
    try:
        from toolchain import console

        if arguments[:1] and arguments[0] in _LIGHT:
            from toolchain.cli_bundle import bundling as app
        elif arguments[:1] == ["serve"]:
            from toolchain.cli_serve import serving as app
        else:
            from toolchain.cli import app
    except KeyboardInterrupt:
        sys.stderr.write("interrupted before anything was begun\n")
        sys.exit(130)
    except ModuleNotFoundError as error:
        missing = (error.name or "toolchain").partition(".")[0]
        if missing in ("toolchain", "passes", "runtimes"):
            raise
        sys.stderr.write(
            f"error: {missing} is not installed: what runs artifacts is here, what builds them is not\n"
            "  next: pip install 'onnx-toolchain[build]'\n"
        )
        sys.exit(2)
    code = console.run_app(app, arguments)
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:  # its reader may have gone, as in `| head`
            stream.flush()
    # Everything is written and closed. Taking a process with torch in it down in order takes a second or two more.
    os._exit(code)


if __name__ == "__main__":
    main()
