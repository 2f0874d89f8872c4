"""A headless Chromium, driven by its DevTools protocol over a plain WebSocket: as much of both as the tests need."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import itertools
import json
import os
import re
import shutil
import struct
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

#: Names that distributions give it.
NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome-headless-shell")


def find() -> str | None:
    """The browser's path; None where there is none."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Page:
    """One page. ``problems`` are what the browser complained of: errors of scripts, and what a policy blocked."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._numbers = itertools.count(1)
        self._answers: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self.problems: list[str] = []
        self.requests: list[str] = []
        self._reading = asyncio.create_task(self._read())

    async def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """One command of the DevTools protocol."""
        number = next(self._numbers)
        self._answers[number] = asyncio.get_running_loop().create_future()
        self._write(json.dumps({"id": number, "method": method, "params": parameters}).encode())
        async with asyncio.timeout(30):
            answer = await self._answers[number]
        assert "error" not in answer, answer
        result: dict[str, Any] = answer["result"]
        return result

    async def value(self, expression: str) -> Any:
        """What an expression is, in the page."""
        told = await self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in told, told
        return told["result"].get("value")

    async def until(self, expression: str, seconds: float = 20) -> None:
        """Waits until an expression is true."""
        async with asyncio.timeout(seconds):
            while not await self.value(f"!!({expression})"):
                await asyncio.sleep(0.05)

    async def open(self, url: str, *, width: int = 1200, height: int = 900, dark: bool = False) -> None:
        """Goes to a page."""
        for domain in ("Page", "Runtime", "Log", "Network", "DOM"):
            await self.call(f"{domain}.enable")
        await self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False
        )
        await self.colours(dark=dark)
        await self.call("Page.navigate", url=url)

    async def colours(self, *, dark: bool) -> None:
        """What the user prefers."""
        feature = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        await self.call("Emulation.setEmulatedMedia", features=[feature])

    async def choose_file(self, selector: str, path: Path) -> None:
        """Puts a file into an ``<input type=file>``, as a user does."""
        root = (await self.call("DOM.getDocument"))["root"]["nodeId"]
        node = (await self.call("DOM.querySelector", nodeId=root, selector=selector))["nodeId"]
        await self.call("DOM.setFileInputFiles", nodeId=node, files=[str(path)])

    async def screenshot(self) -> bytes:
        """The whole page as PNG."""
        taken = await self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        return base64.b64decode(taken["data"])

    async def close(self) -> None:
        self._reading.cancel()
        self._writer.close()

    def _write(self, data: bytes) -> None:
        """A text frame (RFC 6455, 5.2), masked with zeros."""
        size = len(data)
        head = b"\x81" + (bytes([128 | size]) if size < 126 else b"\xfe" + struct.pack(">H", size))
        assert size < 65536
        self._writer.write(head + bytes(4) + data)

    async def _read(self) -> None:
        message = b""
        while True:
            first, second = await self._reader.readexactly(2)
            size = second & 127
            if size > 125:
                size = int.from_bytes(await self._reader.readexactly(2 if size == 126 else 8), "big")
            data = await self._reader.readexactly(size)
            if first & 15 > 2:  # ping, pong, close
                continue
            message += data
            if first & 128:
                self._take(json.loads(message))
                message = b""

    def _take(self, told: dict[str, Any]) -> None:
        if "id" in told:
            self._answers.pop(told["id"]).set_result(told)
            return
        parameters = told["params"]
        match told["method"]:
            case "Runtime.exceptionThrown":
                self.problems.append(json.dumps(parameters["exceptionDetails"]))
            case "Log.entryAdded":
                self.problems.append(f"{parameters['entry']['source']}: {parameters['entry']['text']}")
            case "Network.requestWillBeSent":
                self.requests.append(parameters["request"]["url"])


@contextlib.asynccontextmanager
async def browse(executable: str) -> AsyncIterator[Page]:
    """A browser of its own, with an empty profile."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        process = await asyncio.create_subprocess_exec(
            executable, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
            "--disable-background-networking", "--remote-debugging-port=0", f"--user-data-dir={profile}", "about:blank",
            stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE,
            env={**os.environ, "HOME": profile},
        )  # fmt: skip
        assert process.stderr is not None
        try:
            async with asyncio.timeout(60):
                while not (match := re.search(rb"ws://127\.0\.0\.1:(\d+)/", await process.stderr.readline())):
                    assert process.returncode is None, "the browser ended"
            draining = asyncio.create_task(process.stderr.read())
            port = int(match[1])
            targets = json.loads(await _get(port, "/json"))
            path = next(t["webSocketDebuggerUrl"] for t in targets if t["type"] == "page").partition(f":{port}")[2]
            reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 27)
            key = base64.b64encode(os.urandom(16)).decode()
            writer.write(
                f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
                f"Sec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\n\r\n".encode()
            )
            assert b" 101 " in await reader.readuntil(b"\r\n\r\n")
            page = Page(reader, writer)
            try:
                yield page
            finally:
                await page.close()
                draining.cancel()
        finally:
            process.kill()
            await process.wait()


async def _get(port: int, path: str) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nConnection: close\r\n\r\n".encode())
    head = await reader.readuntil(b"\r\n\r\n")
    size = int(re.search(rb"(?i)content-length: *(\d+)", head)[1])  # type: ignore[index]
    body = await reader.readexactly(size)
    writer.close()
    return body
