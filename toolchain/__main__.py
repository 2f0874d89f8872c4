"""The ``toolchain`` command, also as ``python -m toolchain``. Imports nothing before it can answer a Ctrl-C."""

from __future__ import annotations

import sys


def main() -> None:
    """Runs the command and exits: 0, or 2 for a mistake, 130 after Ctrl-C, 1 for a defect."""
    try:
        from toolchain import cli
    except KeyboardInterrupt:
        sys.stderr.write("interrupted before anything was begun\n")
        sys.exit(130)
    cli.main()


if __name__ == "__main__":
    main()
