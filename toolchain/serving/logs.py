"""Log lines: JSON for machines, text for people, written by a thread of their own.

A terminal or pipe whose reader is slow must not hold up the event loop, so lines go through a bounded queue; where that
is full they are dropped, and the next line that is written says how many. Nothing that a client sends is written but
names, its request id and its address, each with control characters escaped; no bodies, no headers, no query strings.
"""

from __future__ import annotations

import datetime
import json
import logging
import logging.handlers
import queue
import sys
import time
import traceback
from typing import IO, Any, Literal

#: Lines that may wait for the writer.
QUEUE = 10_000
#: Lines a second about failed requests: a server that refuses thousands a second has better things to do.
FAILED_PER_SECOND = 50

#: The logger of requests; its records carry ``fields``.
requests = logging.getLogger("toolchain.serving.requests")


def _printable(text: str, limit: int = 2000) -> str:
    text = text if text.isprintable() else text.encode("unicode_escape").decode("ascii")
    return text if len(text) <= limit else text[:limit] + "…"


class JsonLines(logging.Formatter):
    """One JSON object a line: ts (RFC 3339, UTC), level, logger, message, and the fields of a request."""

    def format(self, record: logging.LogRecord) -> str:
        ts = datetime.datetime.fromtimestamp(record.created, datetime.UTC).isoformat(timespec="milliseconds")
        line: dict[str, Any] = {
            "ts": ts.replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        line.update(getattr(record, "fields", {}))
        if record.exc_info:
            line["traceback"] = "".join(traceback.format_exception(*record.exc_info))
        return json.dumps(line)


class TextLines(logging.Formatter):
    """``12:03:35.123 warning  what happened``; a request's fields behind it."""

    def format(self, record: logging.LogRecord) -> str:
        at = time.strftime("%H:%M:%S", time.localtime(record.created))
        text = f"{at}.{int(record.msecs):03d} {record.levelname.lower():<8} "
        text += "\n  ".join(_printable(line) for line in record.getMessage().splitlines())
        for name, value in getattr(record, "fields", {}).items():
            text += f" {name}={_printable(str(value))}"
        if record.exc_info:
            text += "\n" + "".join(traceback.format_exception(*record.exc_info)).rstrip()
        return text


class _Dropping(logging.Handler):
    """Hands records to the writer's queue; counts those for which there is no room."""

    def __init__(self, waiting: queue.Queue[logging.LogRecord]) -> None:
        super().__init__()
        self._waiting = waiting
        self._dropped = 0

    def emit(self, record: logging.LogRecord) -> None:
        try:
            if self._dropped:
                told = logging.makeLogRecord(
                    {"name": record.name, "levelno": logging.WARNING, "levelname": "WARNING",
                     "msg": f"{self._dropped} lines were dropped: whoever reads them is too slow"}
                )  # fmt: skip
                self._waiting.put_nowait(told)
                self._dropped = 0
            self._waiting.put_nowait(record)
        except queue.Full:
            self._dropped += 1


class Logs:
    """All logging of the process, from ``start`` to ``stop``.

    Args:
        form: of the lines.
        stream: where to; standard error where nothing is said.
    """

    def __init__(self, form: Literal["json", "text"], stream: IO[str] | None = None) -> None:
        writer = logging.StreamHandler(stream or sys.stderr)
        writer.setFormatter(JsonLines() if form == "json" else TextLines())
        waiting: queue.Queue[logging.LogRecord] = queue.Queue(QUEUE)
        self._handler = _Dropping(waiting)
        self._listener = logging.handlers.QueueListener(waiting, writer)
        self._root = logging.getLogger()
        self._level = self._root.level

    def start(self) -> None:
        """Takes the root logger."""
        self._root.addHandler(self._handler)
        self._root.setLevel(logging.INFO)
        # They tell each connection and each step of a shutdown as news.
        for name in ("uvicorn.error", "uvicorn.access", "asyncio", "grpc"):
            logging.getLogger(name).setLevel(logging.WARNING)
        self._listener.start()

    def stop(self) -> None:
        """Writes what is waiting."""
        self._root.removeHandler(self._handler)
        self._root.setLevel(self._level)
        self._listener.stop()


class RequestLog:
    """Lines about requests.

    Args:
        which: which requests get one.
    """

    def __init__(self, which: Literal["all", "failed", "none"]) -> None:
        self.which = which
        self._second = 0
        self._lines = 0
        self._left_out = 0

    def line(self, *, failed: bool, defect: bool, message: str, fields: dict[str, Any]) -> None:
        """Writes a line about a request, if it is to get one.

        Args:
            failed: it was not answered with a result; defect: and that is the server's fault.
            message: what happened, in a word or a sentence.
            fields: what else is known; None is left out.
        """
        if self.which == "none" or (self.which == "failed" and not failed):
            return
        if self.which == "failed" and not self._may():
            return
        level = logging.ERROR if defect else logging.WARNING if failed else logging.INFO
        kept = {name: value for name, value in fields.items() if value is not None}
        requests.log(level, "%s", message, extra={"fields": kept})

    def _may(self) -> bool:
        second = int(time.monotonic())
        if second != self._second:
            if self._left_out:
                requests.warning("%d more requests failed, and got no line", self._left_out)
            self._second, self._lines, self._left_out = second, 0, 0
        self._lines += 1
        if self._lines > FAILED_PER_SECOND:
            self._left_out += 1
            return False
        return True
