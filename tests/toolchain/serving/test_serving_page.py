"""The page in a real browser: what it shows of a server under load, and that it loads nothing from elsewhere."""

from __future__ import annotations

import asyncio
import io
import os
import threading
import time
import urllib.parse
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
pytest.importorskip("tritonclient.grpc")
pytest.importorskip("PIL")

import browser
import onnx
import onnx.parser
from PIL import Image
from server_support import served

from toolchain.serving.page_routes import POLICY

CHROMIUM = browser.find()
ADD = """<ir_version: 9, opset_import: ["": 17]>
g (float[n, 3] x) => (float[n, 3] y) { one = Constant <value = float {1.0}> () y = Add (x, one) }"""


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "add.onnx"
    onnx.save(onnx.parser.parse_model(ADD), path)
    return path


def test_its_files_name_nothing_of_the_network() -> None:
    folder = Path(__file__).resolve().parents[3] / "toolchain" / "serving" / "page"
    names = {path.name for path in folder.iterdir()}
    assert names == {"index.html", "page.js", "page.css", "docs.html", "docs.js"}
    for path in folder.iterdir():
        text = path.read_text()
        assert "http:" not in text
        assert "https:" not in text
        assert "//" not in text.replace("// ", "")
        assert "style=" not in text
        assert "onclick=" not in text
    for part in ("default-src 'none'", "script-src 'self'", "frame-ancestors 'none'"):
        assert part in POLICY
    assert "unsafe" not in POLICY


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: apt install chromium")
def test_the_page_shows_what_happens(model: Path, tmp_path: Path) -> None:
    assert CHROMIUM is not None
    picture = tmp_path / "red.png"
    Image.fromarray(np.full((8, 8, 3), 255, np.uint8)).save(picture)
    with served(model) as server:
        over = threading.Event()

        def load() -> None:
            while not over.is_set():
                server.infer()
                time.sleep(0.02)

        loading = threading.Thread(target=load)
        loading.start()
        try:
            shots = asyncio.run(look(CHROMIUM, f"http://127.0.0.1:{server.port('HTTP')}/", picture))
        finally:
            over.set()
            loading.join()
    if folder := os.environ.get("SCREENSHOTS"):
        for name, shot in shots.items():
            (Path(folder) / f"page-{name}.png").write_bytes(shot)
    light, dark = (np.asarray(Image.open(io.BytesIO(shots[name])).convert("L")) for name in ("light", "dark"))
    assert light.mean() > 200
    assert dark.mean() < 70


async def look(executable: str, url: str, picture: Path) -> dict[str, bytes]:
    """Opens the page, reads it, drops a picture, and takes a screenshot in light and in dark."""
    async with browser.browse(executable) as page:
        await page.open(url)
        await page.until("document.querySelector('#models td')", 60)
        row = "document.querySelector('#models tr')"
        assert (await page.value(f"[...{row}.cells].slice(0, 3).map(c => c.textContent)")) == ["add", "1", "ready"]
        assert await page.value("document.getElementById('dot').className") == "dot ready"
        # The load shows within seconds: a rate, and latencies.
        await page.until(
            f"parseFloat({row}.cells[3].textContent) > 0 && /(ms|µs)/.test({row}.cells[5].textContent)", 60
        )
        await page.until("/a second/.test(document.getElementById('rate-now').textContent)")
        await page.until("looks.length > 4", 60)
        # Something is drawn in the colour of the line.
        for name, colour in (("latency", "--orange"), ("rate", "--blue")):
            drawn = await page.value(
                f"""(() => {{
                  const canvas = document.getElementById({name!r});
                  const wanted = getComputedStyle(document.documentElement).getPropertyValue({colour!r}).trim();
                  const [r, g, b] = [1, 3, 5].map(i => parseInt(wanted.slice(i, i + 2), 16));
                  const data = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
                  let count = 0;
                  for (let i = 0; i < data.length; i += 4)
                    if (Math.abs(data[i] - r) + Math.abs(data[i + 1] - g) + Math.abs(data[i + 2] - b) < 30) count++;
                  return count;
                }})()"""
            )
            assert drawn > 5, name
        # This model takes no pictures, and the page says what the server says of that.
        await page.choose_file("#file", picture)
        await page.until("document.querySelector('#answer.error')")
        assert "preprocessing" in (await page.value("document.getElementById('answer').textContent")).lower()
        assert await page.value("!document.getElementById('picture').hidden")
        blocked = [p for p in page.problems if "Content Security" in p or "Error:" in p]
        assert not blocked, blocked
        host = urllib.parse.urlsplit(url).netloc
        outside = {r for r in page.requests if urllib.parse.urlsplit(r).netloc not in (host, "")}
        assert not outside
        light = await page.screenshot()
        await page.colours(dark=True)
        await asyncio.sleep(0.3)
        return {"light": light, "dark": await page.screenshot()}


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: apt install chromium")
def test_the_api_can_be_read_and_tried(model: Path) -> None:
    assert CHROMIUM is not None
    with served(model) as server:
        shot = asyncio.run(try_it(CHROMIUM, f"http://127.0.0.1:{server.port('HTTP')}/docs"))
    if folder := os.environ.get("SCREENSHOTS"):
        (Path(folder) / "page-docs.png").write_bytes(shot)


async def try_it(executable: str, url: str) -> bytes:
    """Opens the description, sends its first example to the model, and takes a screenshot."""
    async with browser.browse(executable) as page:
        await page.open(url)
        await page.until(
            "document.querySelectorAll('details').length > 10 && document.getElementById('model').value", 60
        )
        box = "[...document.querySelectorAll('details')].find(d => d.textContent.includes('/predict/{model}'))"
        await page.value(f"{box}.open = true")
        await page.until(f"/predict.add'/.test({box}.querySelector('.curl').textContent)")
        told = await page.value(f"{box}.querySelector('.curl').textContent")
        assert told.startswith("""curl -d '{"inputs": {"x": [[1,2],[3,4]]}}' """)
        await page.value(
            f"""(() => {{
              const text = {box}.querySelector('textarea');
              text.value = '[[1, 2, 3]]';
              text.oninput();
              {box}.querySelector('button').click();
            }})()"""
        )
        await page.until(f"/200 OK/.test({box}.querySelector('.answer').textContent)")
        assert '"y": [[2,3,4]]' in await page.value(f"{box}.querySelector('.answer').textContent")
        blocked = [p for p in page.problems if "Content Security" in p or "Error:" in p]
        assert not blocked, blocked
        host = urllib.parse.urlsplit(url).netloc
        assert {urllib.parse.urlsplit(r).netloc for r in page.requests} <= {host, ""}
        return await page.screenshot()
