"""Child process of ``supervisor.py``: one server, on ports that it shares with others.

Standard input brings a line of JSON with what to serve, and ends when the supervisor does: a worker whose supervisor
was killed drains and goes too. Standard output takes one line: the models when they are ready, or why they cannot be.
What libraries print, such as traces to the console, goes to standard error instead.
"""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import sys
import threading
from pathlib import Path
from typing import TextIO

from runtimes import Error
from toolchain.serving.control import Place
from toolchain.serving.loop import run
from toolchain.serving.options import ServerOptions
from toolchain.serving.server import Ports, serve


def _leave_with_supervisor() -> None:
    sys.stdin.buffer.read()
    os.kill(os.getpid(), signal.SIGTERM)


def _take_output() -> TextIO:
    """Standard output, for us alone: what anybody else writes there goes to standard error from now on."""
    ours = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return ours


def _tell(output: TextIO, **what: object) -> None:
    output.write(json.dumps(what) + "\n")
    output.flush()


def main() -> int:
    """Serves until SIGTERM. Returns the exit code: 0, or 2 where it cannot serve."""
    output = _take_output()
    start = json.loads(sys.stdin.buffer.readline())
    threading.Thread(target=_leave_with_supervisor, daemon=True).start()
    # Where the supervisor finds that it hangs, its log says where.
    faulthandler.register(signal.SIGUSR1, all_threads=True)

    def ready(ports: Ports) -> None:
        _tell(output, index=ports.index)

    try:
        run(
            serve(
                Path(start["path"]),
                ServerOptions.model_validate(start["options"]),
                ready=ready,
                place=Place(start["number"], Path(start["folder"])),
            )
        )
    except Error as error:
        _tell(output, error=str(error))
        return 2
    return 0


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # the thread that waits for standard input would hold up the interpreter
