"""Child processes that run our own modules, and nothing that lies in the user's folder."""

from __future__ import annotations

import sys
from pathlib import Path

_HOME = Path(__file__).resolve().parent.parent


def command(module: str, *arguments: str) -> list[str]:
    """The command line that runs one of our modules as ``__main__``.

    Not ``python -m``: that looks for modules in the current folder first, where a ``statistics.py`` or an
    ``onnx.py`` of the user's would be run in place of the real one.
    """
    start = (
        f"import sys; sys.path = [{str(_HOME)!r}] + [p for p in sys.path if p]; "
        f"import runpy; runpy.run_module({module!r}, run_name='__main__')"
    )
    return [sys.executable, "-c", start, *arguments]
