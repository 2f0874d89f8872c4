"""When a session gives back what its largest runs took.

A runtime keeps the memory of its largest run so far for the next one: 400 MB after one batch of 32 images, where 27 do
for one. It does not tell how much that is, so the bytes that went into a run stand for it. What is kept is given back
where nothing ran for a while, and where all that ran for a while was much smaller; then the next large run takes it
anew, and is the slower for it.
"""

from __future__ import annotations

#: What is kept is given back after so long without a run, seconds.
IDLE_S = 10.0
#: The largest run within so long is compared with what is kept, seconds.
WINDOW_S = 30.0
#: And is much smaller if it is this share of it at most.
SMALLER = 0.5


class Kept:
    """What one session keeps, told by the bytes that went into its runs. Times are ``time.monotonic()``."""

    __slots__ = ("_before", "_began", "_last", "_most", "_ran", "_recent")

    def __init__(self) -> None:
        self._most = 0  # of one run, since it was given back
        self._recent = 0  # of one run, since the window began
        self._ran = False  # since it was last looked at
        self._began = self._last = float("-inf")

    def ran(self, size: int) -> None:
        """A run ended that was fed with so many bytes: what it took is kept from now on."""
        self._ran = True
        if size > self._recent:
            self._recent = size

    def due(self, now: float, *, running: bool) -> bool:
        """Whether what is kept is to be given back now. Asked a few times a second.

        Args:
            now: the time.
            running: a run goes on, which may take as long as it likes: that is not to be idle.
        """
        if self._ran or running:
            self._ran, self._last = False, now
        if self._recent > self._most:
            self._most = self._recent
        if not self._most:
            return False
        if now - self._last >= IDLE_S:
            return True
        if now - self._began < WINDOW_S:
            return False
        if self._recent <= SMALLER * self._most:
            return True
        self._turn(now)
        return False

    def given_back(self, now: float) -> None:
        """It is given back now, but what runs that go on use: that is told as they end."""
        self._most = 0
        self._turn(now)

    def _turn(self, now: float) -> None:
        """The next window begins."""
        self._began, self._recent = now, 0
