"""Kernels that TensorRT-RTX compiled for a GPU, kept on disk so that the next process need not.

An engine of TensorRT-RTX holds kernels as code that is compiled when they are first used. What was compiled is kept in
the user's cache, one file for each plan, GPU, driver and version of TensorRT-RTX; the runtime compares all of that
again and refuses what does not fit, and then starts from nothing. The file is native code: ``_trust.py`` reads only
what this user alone can have written.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

from runtimes._driver import Driver, Gpu
from runtimes._tensorrt_api import Api
from runtimes._trust import read_own, write_own


def kernel_file(root: Path, api: Api, gpu: Gpu, driver: Driver, plan_sha256: str) -> Path:
    """Where the kernels of a plan are kept.

    Args:
        root: the user's cache.
        api: the TensorRT that compiles them.
        gpu: that they are compiled for.
        driver: that runs them.
        plan_sha256: of the plan, in lower-case hex.
    """
    name = "".join(letter if letter.isalnum() else "-" for letter in gpu.name)
    cuda = "{}.{}".format(*driver.cuda) if driver.cuda else "unknown"
    where = f"{api.flavor.target}-{api.version}-{name}-{gpu.capability_text}-cuda-{cuda}"
    return root / "kernels" / f"{where}-{plan_sha256}"


class KernelStore:
    """The file of one session's kernels: read once, written when there are more than it holds.

    Args:
        file: where they are; other processes may read and replace it meanwhile.
        take: gives what was read to the runtime; says whether it took it.
        give: all kernels that the runtime has compiled or taken, serialised.
    """

    def __init__(self, file: Path, *, take: Callable[[bytes], bool], give: Callable[[], bytes]) -> None:
        self._file, self._give = file, give
        self._lock = threading.Lock()
        content = read_own(file)
        taken = content is not None and take(content)
        #: bytes that are on disk and that the runtime takes
        self._kept = len(content) if content is not None and taken else 0
        #: what happened, for a person
        self.remark = (
            f"{self._kept:,} bytes of compiled kernels from the cache"
            if taken
            else "no kernels in the cache yet: the first run compiles them"
            if content is None
            else "kernels in the cache are not for this machine: the first run compiles them again"
        )

    def save(self) -> bool:
        """Writes the kernels where there are more than on disk. Returns whether it wrote."""
        with self._lock:
            content = self._give()
            # What grows is what was compiled since; equal sizes are equal kernels.
            if len(content) <= self._kept or not write_own(self._file, content):
                return False
            self._kept = len(content)
            return True
