"""Predictions for people: arrays as JSON, images, classes, tasks."""

from __future__ import annotations

import io
import json
import struct
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from standin import LABELS, Few, fetch, running

from toolchain.preprocessing import ImagePreprocessing, preprocess
from toolchain.serving import predict
from toolchain.serving.auth import Auth
from toolchain.serving.options import ServerOptions

TWO_ROWS = {"total": [[6], [5]], "less": [[4], [-1]]}


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Few:
    return Few(tmp_path_factory.mktemp("models"), ("double", "pair", "scalar", "words", "half", "divide", "image"))


@pytest.fixture(scope="module")
def port(few: Few) -> Iterator[int]:
    with running(few, ServerOptions(max_request_bytes=1 << 20)) as (http, _):
        yield http


def ask(port: int, path: str, tree: object, **headers: str) -> tuple[int, Any]:
    body = tree if isinstance(tree, bytes) else json.dumps(tree).encode()
    status, _, answer = fetch(port, path, body, **({"Content_Type": "application/json"} | headers))
    return status, json.loads(answer)


def picture(color: tuple[int, int, int] = (10, 200, 30), size: tuple[int, int] = (8, 8), kind: str = "PNG") -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", size, color).save(stream, kind)
    return stream.getvalue()


def form(*files: bytes, field: str = "image") -> tuple[bytes, str]:
    parts = [
        b'--b\r\nContent-Disposition: form-data; name="%s"; filename="p"\r\n\r\n%s\r\n' % (field.encode(), data)
        for data in files
    ]
    return b"".join(parts) + b"--b--\r\n", "multipart/form-data; boundary=b"


@pytest.mark.parametrize(
    ("model", "tree", "outputs"),
    [
        ("double", {"inputs": {"x": [[1, 2, 3, 4]]}}, {"y": [[2, 4, 6, 8]]}),
        ("double", {"inputs": [[1, 2, 3, 4]]}, {"y": [[2, 4, 6, 8]]}),
        ("double", [[1, 2, 3, 4], [0, 0, 0, 1]], {"y": [[2, 4, 6, 8], [0, 0, 0, 2]]}),
        ("double", [1, 2, 3, 4], {"y": [[2, 4, 6, 8]]}),
        ("double", {"instances": [[1, 2, 3, 4], [5, 6, 7, 8]]}, {"y": [[2, 4, 6, 8], [10, 12, 14, 16]]}),
        ("pair", {"inputs": {"a": [5, 7], "b": [[1, 2]]}}, {"total": [[6, 9]], "less": [[4, 5]]}),
        ("pair", {"instances": [{"a": [5], "b": [1]}, {"a": [2], "b": [3]}]}, TWO_ROWS),
        ("scalar", 3, {"y": -3}),
        ("words", ["a", "ü"], {"t": ["aa", "üü"]}),
        ("half", [[0.5, 0.25]], {"y": [[0.5, 0.25]]}),
        ("divide", {"inputs": {"x": [1, 0], "y": [0, 0]}}, {"z": ["Infinity", "NaN"]}),
    ],
)  # fmt: skip
def test_arrays(port: int, model: str, tree: object, outputs: dict[str, Any]) -> None:
    status, answer = ask(port, f"/predict/{model}", tree)
    assert status == 200, answer
    assert answer == {"model": model, "version": "1", "outputs": outputs} | (
        {"classes": answer["classes"]} if "classes" in answer else {}
    )


@pytest.mark.parametrize(
    ("model", "tree"),
    [
        ("double", b""),
        ("double", b"{"),
        ("double", b"[NaN, 1, 2, 3]"),
        ("double", {"inputs": {"nope": [1]}}),
        ("double", {"inputs": {}}),
        ("double", {"inputs": {"x": [1]}, "more": 1}),
        ("double", {"data": [1]}),
        ("double", {"instances": []}),
        ("double", {"instances": {}}),
        ("double", [[1, 2], [3]]),
        ("double", [1, 2, 3]),
        ("double", [[[1, 2, 3, 4]]]),
        ("double", ["a", "b", "c", "d"]),
        ("double", None),
        ("double", [[0, 0, 0, 0]] * 9),
        ("pair", [[1]]),
        ("pair", {"instances": [{"a": [1], "b": [1]}, {"a": [1]}]}),
        ("pair", {"instances": [{"a": [1], "c": [1]}]}),
        ("pair", {"instances": [{"a": [1]}]}),
        ("pair", {"inputs": {"a": [[1.5]], "b": [[1]]}}),
        ("words", [1]),
    ],
)
def test_arrays_that_do_not_fit(port: int, model: str, tree: object) -> None:
    status, answer = ask(port, f"/predict/{model}", tree)
    assert status == 400, answer
    assert answer["error"]


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_an_image_as_body_and_as_form(port: int, kind: str) -> None:
    data = picture(kind=kind)
    spec = ImagePreprocessing(size=(8, 8), resize=(8, 8), interpolation="nearest")
    logits = preprocess(Image.open(io.BytesIO(data)), spec).mean(axis=(1, 2))
    body, kind_of_form = form(data)
    for sent, content in ((data, f"image/{kind.lower()}"), (data, "application/octet-stream"), (body, kind_of_form)):
        status, answer = ask(port, "/predict/image?top=2", sent, Content_Type=content)
        assert status == 200, answer
        np.testing.assert_allclose(answer["outputs"]["logits"], [logits], rtol=1e-5)
        (row,) = answer["classes"]
        assert [entry["label"] for entry in row] == ["green", LABELS[int(np.argsort(logits)[-2])]]
        np.testing.assert_allclose(row[0]["probability"], np.exp(logits[1]) / np.exp(logits).sum(), rtol=1e-5)
        assert answer["probabilities"] == "softmax of the model's logits"


def test_several_images_are_rows_in_their_order(port: int) -> None:
    body, kind = form(picture((255, 0, 0)), picture((0, 0, 255)), picture((0, 255, 0), size=(30, 20)))
    status, answer = ask(port, "/predict/image?top=1&outputs=false", body, Content_Type=kind)
    assert status == 200, answer
    assert [row[0]["label"] for row in answer["classes"]] == ["red", "blue", "green"]
    assert "outputs" not in answer


def bomb(width: int, height: int) -> bytes:
    """A PNG that says it is that large, and has no pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    "data",
    [
        b"\xff\xd8\xff",
        picture(kind="JPEG")[:300],
        picture()[:-30],
        bomb(60_000, 60_000),
        bomb(8000, 8000),
        picture(size=(60_000, 1)),
    ],
    ids=["no jpeg", "cut jpeg", "cut png", "absurd", "large", "a line"],
)
def test_images_that_are_refused(port: int, data: bytes) -> None:
    status, answer = ask(port, "/predict/image", data)
    assert status == 400
    assert "image 1" in answer["error"]


def test_other_formats_are_not_decoded(port: int) -> None:
    for kind in ("GIF", "TIFF", "WEBP", "BMP"):
        body, content = form(picture(kind=kind))
        assert ask(port, "/predict/image", body, Content_Type=content)[0] == 400


def test_forms_that_are_broken(port: int) -> None:
    body, kind = form(picture())
    for sent, content in (
        (body[:40], kind),
        (b"rubbish", kind),
        (b"", kind),
        (body, "multipart/form-data"),
        (form()[0], kind),
        (form(*[picture()] * 9)[0], kind),
        (form(*[b"x"] * 100)[0], kind),
    ):
        status, answer = ask(port, "/predict/image", sent, Content_Type=content)
        assert status == 400, (sent[:40], answer)


def test_an_image_for_a_model_of_numbers(port: int) -> None:
    status, answer = ask(port, "/predict/double", picture())
    assert status == 400
    assert "does not say how an image" in answer["error"]


def test_unknown_model_and_bad_query(port: int) -> None:
    assert ask(port, "/predict/nope", [1])[0] == 404
    assert ask(port, "/predict/double?version=9", [1])[0] == 404
    for query in ("top=0", "top=x", "mode=later", "outputs=perhaps"):
        status, answer = ask(port, f"/predict/double?{query}", [1, 2, 3, 4])
        assert status == 400
        assert query.partition("=")[0] in answer["error"]


def test_a_task(port: int, few: Few) -> None:
    few.delay = 0.3
    try:
        status, headers, body = fetch(port, "/predict/double?mode=async", b"[1, 2, 3, 4]")
        assert status == 202
        task = json.loads(body)
        assert headers["location"] == task["result"] == f"/result/{task['task']}"
        states = [json.loads(fetch(port, task["result"])[2])]
        until = time.monotonic() + 20
        while states[-1]["state"] == "pending" and time.monotonic() < until:
            time.sleep(0.02)
            states.append(json.loads(fetch(port, task["result"])[2]))
    finally:
        few.delay = 0.0
    assert states[0] == {"task": task["task"], "state": "pending"}
    assert states[-1]["state"] == "done"
    assert states[-1]["result"]["outputs"] == {"y": [[2, 4, 6, 8]]}


def test_a_task_that_fails_and_one_that_never_was(port: int) -> None:
    task = json.loads(fetch(port, "/predict/double?mode=async", b"[1, 2]")[2])
    time.sleep(0.1)
    state = json.loads(fetch(port, task["result"])[2])
    assert (state["state"], state["status"]) == ("failed", 400)
    assert "shape" in state["error"]
    body, kind = form(picture())
    _, _, answer = fetch(port, "/predict/image?mode=async", body[:40], Content_Type=kind)
    time.sleep(0.1)
    assert json.loads(fetch(port, json.loads(answer)["result"])[2])["status"] == 400
    assert fetch(port, "/result/nope")[0] == 404
    assert fetch(port, "/predict/nope?mode=async", b"[1]")[0] == 404


def test_health_and_statistics(port: int) -> None:
    status, _, body = fetch(port, "/health")
    assert (status, json.loads(body)["status"]) == (200, "ready")
    assert json.loads(body)["models"]["double"] == "ready"
    assert json.loads(fetch(port, "/cache/stats")[2])["hits"] == 0
    assert json.loads(fetch(port, "/resource/stats")[2])["resident_bytes"] == 1


def test_health_names_models_to_those_with_a_token(few: Few, tmp_path: Path) -> None:
    tokens = tmp_path / "tokens"
    tokens.write_text("a-good-token")
    tokens.chmod(0o600)
    with running(few, auth=Auth(tokens)) as (port, _):
        assert json.loads(fetch(port, "/health")[2]) == {"status": "ready"}
        status, _, body = fetch(port, "/health", authorization="Bearer a-good-token")
        assert (status, json.loads(body)["models"]["double"]) == (200, "ready")


def test_probabilities_are_left_as_they_are() -> None:
    found = predict.classes({"p": np.array([[0.2, 0.7, 0.1]], np.float32)}, LABELS, top=5)
    assert found is not None
    assert found.scores == "as the model gave them"
    assert [(entry["label"], entry["index"]) for entry in found.top[0]] == [("green", 1), ("red", 0), ("blue", 2)]
    assert found.top[0][0]["probability"] == pytest.approx(0.7)


def test_logits_become_probabilities_whatever_their_size() -> None:
    found = predict.classes({"p": np.array([[1e4, 0, -1e4], [0, 0, 0]], np.float32)}, (), top=3)
    assert found is not None
    assert found.scores == "softmax of the model's logits"
    assert [entry["probability"] for entry in found.top[0]] == [1, 0, 0]
    assert [entry["probability"] for entry in found.top[1]] == pytest.approx([1 / 3] * 3)
    assert "label" not in found.top[0][0]


def test_what_is_no_classifier() -> None:
    for scores in (np.zeros((1, 3, 2)), np.zeros((1, 3), np.int64), np.zeros((1, 4)), np.zeros((1, 1))):
        assert predict.classes({"y": scores}, LABELS, top=5) is None
