"""What workers tell each other of versions: which is in service, and which were rolled back.

A worker that was started again has seen nothing: by itself it would take the newest version for its first one, which
may be on trial in the others, or have failed there. So each writes what it finds out into a folder of theirs, a file
for each fact, and all read it when they look at the repository. The folder is the supervisor's and goes with it: a
server that is started anew tries everything anew.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import hashlib
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path

from toolchain.serving.repository import Version
from toolchain.serving.residency import Key

_log = logging.getLogger(__name__)

_IN_SERVICE, _BARRED = "in-service", "barred"


@dataclasses.dataclass(frozen=True, slots=True)
class Known:
    """What is known of one model.

    Attributes:
        in_service: number and digest of the version that came into service last; None where none did.
        barred: ``fingerprint`` → why it was rolled back. Other files or other options are another version.
    """

    in_service: tuple[int, str] | None = None
    barred: Mapping[str, str] = dataclasses.field(default_factory=dict)


def fingerprint(key: Key) -> str:
    """What would be loaded, as a name of files."""
    return hashlib.sha256(repr(key).encode()).hexdigest()[:32]


class Standing:
    """Facts of all models. Written in a thread, in the order of the calls.

    Args:
        folder: of the workers; made where it is not there. None: there is one process, and nothing is written or known.
        disk: a pool of one thread, which also calls ``read``.
    """

    def __init__(self, folder: Path | None, disk: concurrent.futures.Executor) -> None:
        self._folder = folder
        self._disk = disk
        if folder is not None:
            folder.mkdir(mode=0o700, exist_ok=True)

    def serves(self, version: Version) -> None:
        """A version is in service."""
        self._write(version.model, _IN_SERVICE, [version.number, version.digest])

    def bars(self, model: str, key: Key, why: str) -> None:
        """A version was rolled back."""
        self._write(model, f"{_BARRED}@{fingerprint(key)}", why)

    def forgives(self, model: str) -> None:
        """What was rolled back of a model may be tried again."""
        if self._folder is not None:
            with contextlib.suppress(RuntimeError):  # as in _write
                self._disk.submit(self._remove, self._folder, model)

    def read(self) -> dict[str, Known]:
        """What is known now, by model. Blocks."""
        found: dict[str, Known] = {}
        if self._folder is None:
            return found
        for path in sorted(self._folder.iterdir()):
            model, _, what = path.name.partition("@")
            if not what:  # it is being written
                continue
            with contextlib.suppress(FileNotFoundError):  # forgiven meanwhile
                told = json.loads(path.read_text())
                known = found.setdefault(model, Known())
                if what == _IN_SERVICE:
                    found[model] = dataclasses.replace(known, in_service=(told[0], told[1]))
                else:
                    found[model] = dataclasses.replace(known, barred={**known.barred, what.partition("@")[2]: told})
        return found

    def _write(self, model: str, what: str, told: str | list[int | str]) -> None:
        if self._folder is not None:
            with contextlib.suppress(RuntimeError):  # the pool has ended, and so does this worker
                self._disk.submit(_replace, self._folder / f"{model}@{what}", json.dumps(told))

    @staticmethod
    def _remove(folder: Path, model: str) -> None:
        for path in folder.glob(f"{model}@{_BARRED}@*"):
            path.unlink(missing_ok=True)


def _replace(path: Path, text: str) -> None:
    """Names of models hold no ``@``, so what is being written is none of them."""
    arriving = path.with_name(f"{os.getpid()}.arriving")
    try:
        arriving.write_text(text)
        arriving.rename(path)
    except OSError as error:
        _log.error("other workers are not told of %s, and may serve another version: %s", path.name, error)
