"""How long work says how far it is. Who shows it (``console.py``) is another matter."""

from __future__ import annotations

from typing import Protocol


class Status(Protocol):
    """Is called with what is going on and, where it is known, the share of it that is done, 0..1."""

    def __call__(self, text: str, share: float | None = None) -> None: ...


def silent(text: str, share: float | None = None) -> None:
    """Shows nothing."""
