"""For people without a client: arrays as plain JSON, or a photograph, and an answer that can be read.

``POST /predict/<model>`` takes one of

* ``{"inputs": {"x": [[1, 2], [3, 4]]}}``, an array for each input; for a model of one input the array alone will do;
* ``{"instances": [[1, 2], [3, 4]]}``, one entry a row; for a model of several inputs each an object;
* the array alone, ``[[1, 2], [3, 4]]``;
* JPEG or PNG files as a form (``curl -F image=@cat.jpg``) or one as the body, prepared as the manifest says.

Where a model has a batch axis it may be left out, for a single row.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import io
import json
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Annotated, Any, Literal

import fastapi
import numpy as np
from fastapi import Response
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.types import Message

from runtimes import TensorSpec
from toolchain.errors import DataError
from toolchain.preprocessing import ImagePreprocessing, open_image, preprocess
from toolchain.serving import http_body, oip_json, tensors, wire
from toolchain.serving.base import Hosted, InvalidRequest, ModelInfo, Request, Unauthenticated, Unsupported
from toolchain.serving.base import Response as Answer
from toolchain.serving.options import ServerOptions
from toolchain.serving.tasks import Tasks

if TYPE_CHECKING:
    from toolchain.serving.auth import Auth

#: What is decoded: the two that cameras and screens write. Every further decoder is one more to attack.
_FORMATS = ("JPEG", "PNG")
#: Width times height: an image of 50 megapixels takes 150 MB while it is decoded.
_MAX_PIXELS = 50_000_000
#: The longer side by the shorter: where the shorter is scaled to a size, a line one pixel high would grow to gigabytes.
_MAX_ASPECT = 50
_MAX_IMAGES = 64
_FLOATS = ("float16", "bfloat16", "float32", "float64")
#: How far a row of probabilities may sum from 1.
_SUM_TOLERANCE = 1e-3

_HINT = 'send {"inputs": {...}}, {"instances": [...]}, an array for a model of one input, or an image'


@dataclasses.dataclass(frozen=True, slots=True)
class Classes:
    """The best classes of each row, and how their probabilities were come by."""

    scores: Literal["as the model gave them", "softmax of the model's logits"]
    top: list[list[dict[str, Any]]]


def router(served: Hosted, *, options: ServerOptions, auth: Auth | None, tasks: Tasks) -> fastapi.APIRouter:
    """The routes for people: predict, result, health, cache and resource statistics."""
    router = fastapi.APIRouter(tags=["For people"])
    # Decoding takes the time of many inferences; more at once than cores would only wait for each other in memory.
    decoders = ThreadPoolExecutor(2, thread_name_prefix="decode")
    max_bytes = options.max_request_bytes

    def allow(request: fastapi.Request, model: str | None) -> None:
        if auth is not None:
            auth.check(model, request.headers.get("authorization"))

    def known(request: fastapi.Request) -> bool:
        # Whoever watches the server has no token, and needs no names.
        try:
            allow(request, None)
        except Unauthenticated:
            return False
        return True

    @router.post("/predict/{model}", summary="Runs a model on arrays or images", openapi_extra=_PREDICT_DOCUMENTATION)
    async def predict(
        request: fastapi.Request,
        model: str,
        version: Annotated[str, fastapi.Query(description="of the model; the server chooses where none is given")] = "",
        mode: Annotated[
            Literal["sync", "async"],
            fastapi.Query(description="async answers at once, with a task for /result"),
        ] = "sync",
        top: Annotated[int, fastapi.Query(ge=1, le=1000, description="classes to name, of a classifier")] = 5,
        outputs: Annotated[bool, fastapi.Query(description="whether to write the outputs whole")] = True,
    ) -> Response:
        received_ns = time.monotonic_ns()
        allow(request, model)
        info = served.info(model, version)
        body = await http_body.read(request.receive, dict(request.scope["headers"]), max_bytes=max_bytes)
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()

        async def work() -> bytes:
            loop = asyncio.get_running_loop()
            image = _is_image(body) or kind == "multipart/form-data"
            if image:
                files = [body] if _is_image(body) else await _files(request.scope, body)
                arrays = await loop.run_in_executor(decoders, _from_images, info, files)
            else:
                arrays = _from_json(info, oip_json.load_json(body))
            said = {
                spec.name: (wire.datatype(spec), arrays[spec.name].shape) for spec in info.inputs if spec.name in arrays
            }
            tensors.check(info, said, max_bytes=max_bytes)
            answer = await served.infer(Request(info.name, version, arrays, received_ns=received_ns))
            # While a new version is on trial, another may have answered than the one that was asked about.
            asked = info if answer.version == info.version else served.info(model, answer.version)
            tree = _readable(asked, answer, image=image, top=top, outputs=outputs)
            return oip_json.dump_json(tree, numbers="strings")

        if mode == "async":
            name = tasks.start(model, work(), size=len(body))
            text = oip_json.dump_json({"task": name, "state": "pending", "result": f"/result/{name}"})
            return Response(text, 202, {"location": f"/result/{name}"}, "application/json")
        return Response(await work(), media_type="application/json")

    @router.get("/result/{task}", summary="What became of a prediction with mode=async")
    async def result(request: fastapi.Request, task: str) -> Response:
        model, text = await tasks.find(task)
        allow(request, model)
        return Response(text, media_type="application/json")

    @router.get("/health", summary="Whether the server can answer; with a token, where one is asked for, each model")
    async def health(request: fastapi.Request) -> Response:
        ready = served.is_ready()
        tree: dict[str, Any] = {"status": "ready" if ready else "not ready"}
        if known(request):
            tree["models"] = {name: "ready" if served.is_ready(name) else "not ready" for name in served.names()}
        text = oip_json.dump_json(tree)
        return Response(text, 200 if ready else 503, media_type="application/json")

    @router.get("/cache/stats", summary="What the result cache holds and saved")
    async def cache_statistics(request: fastapi.Request) -> Response:
        allow(request, None)
        return Response(oip_json.dump_json(served.cache_statistics()), media_type="application/json")

    @router.get("/resource/stats", summary="Memory: resident, its bound and trend, by model")
    async def resources(request: fastapi.Request) -> Response:
        allow(request, None)
        return Response(oip_json.dump_json(served.resources()), media_type="application/json")

    return router


def classes(outputs: Mapping[str, np.ndarray], labels: Sequence[str], *, top: int) -> Classes | None:
    """The best ``top`` classes of each row, where the first output is that of a classifier: float, [rows, classes].

    Rows that lie in 0..1 and sum to 1 are taken as probabilities; others as logits, of which the softmax is taken.

    Args:
        outputs: of the model.
        labels: the names of its classes; with none of them, classes are numbers.
        top: how many to name.

    Returns:
        None where it is no classifier, or has another number of classes than there are labels.
    """
    scores = next(iter(outputs.values()))
    if (
        scores.ndim != 2
        or scores.shape[1] < 2
        or scores.dtype.name not in ("float16", "bfloat16", "float32", "float64")
    ):
        return None
    if labels and scores.shape[1] != len(labels):
        return None
    scores = scores.astype(np.float64)
    sums = scores.sum(axis=1)
    if bool((scores >= 0).all() and (abs(sums - 1) < _SUM_TOLERANCE).all()):
        how: Literal["as the model gave them", "softmax of the model's logits"] = "as the model gave them"
    else:
        how = "softmax of the model's logits"
        # Logits that are not finite give probabilities that are not numbers, and the answer shows them.
        with np.errstate(invalid="ignore"):
            powers = np.exp(scores - scores.max(axis=1, keepdims=True))
            scores = powers / powers.sum(axis=1, keepdims=True)
    best = np.argsort(-scores, axis=1, kind="stable")[:, :top]
    rows = [
        [
            {"index": index, **({"label": labels[index]} if labels else {}), "probability": float(row[index])}
            for index in order
        ]
        for row, order in zip(scores, best.tolist(), strict=True)
    ]
    return Classes(how, rows)


def _readable(info: ModelInfo, answer: Answer, *, image: bool, top: int, outputs: bool) -> dict[str, Any]:
    tree: dict[str, Any] = {"model": answer.model, "version": answer.version}
    found = classes(answer.outputs, info.labels, top=top) if info.labels or image else None
    if found is not None:
        tree |= {"classes": found.top, "probabilities": found.scores}
    if outputs:
        tree["outputs"] = {name: array.tolist() for name, array in answer.outputs.items()}
    return tree


def _from_json(info: ModelInfo, tree: object) -> dict[str, np.ndarray]:
    if isinstance(tree, dict):
        if len(tree) != 1 or not tree.keys() & {"inputs", "instances"}:
            raise InvalidRequest("the JSON has neither inputs nor instances alone", hint=_HINT)
        if "instances" in tree:
            return _from_instances(info, tree["instances"])
        tree = tree["inputs"]
    if isinstance(tree, dict):
        unknown = sorted(tree.keys() - {spec.name for spec in info.inputs})
        if unknown:
            raise InvalidRequest(
                f"model {info.name!r} has no input {unknown[0]!r}", hint=f"it takes: {'; '.join(map(str, info.inputs))}"
            )
        values = tree
    else:
        values = {_only_input(info).name: tree}
    return {spec.name: _array(info, spec, values[spec.name]) for spec in info.inputs if spec.name in values}


def _from_instances(info: ModelInfo, rows: object) -> dict[str, np.ndarray]:
    if not isinstance(rows, list) or not rows:
        raise InvalidRequest("instances is no list of rows", hint=_HINT)
    if not all(isinstance(row, dict) for row in rows):
        spec = _only_input(info)
        return {spec.name: wire.from_numbers(spec.name, wire.datatype(spec), None, rows)}
    names = rows[0].keys()
    if any(row.keys() != names for row in rows):
        raise InvalidRequest("instances differ in their inputs")
    unknown = sorted(names - {spec.name for spec in info.inputs})
    if unknown:
        raise InvalidRequest(f"model {info.name!r} has no input {unknown[0]!r}")
    return {
        spec.name: wire.from_numbers(spec.name, wire.datatype(spec), None, [row[spec.name] for row in rows])
        for spec in info.inputs
        if spec.name in names
    }


def _array(info: ModelInfo, spec: TensorSpec, data: object) -> np.ndarray:
    array = wire.from_numbers(spec.name, wire.datatype(spec), None, data)
    if info.max_batch_size and spec.shape is not None and array.ndim == len(spec.shape) - 1:
        array = array[np.newaxis]
    return array


def _only_input(info: ModelInfo) -> TensorSpec:
    if len(info.inputs) != 1:
        raise InvalidRequest(
            f"model {info.name!r} has {len(info.inputs)} inputs",
            hint='name them: {"inputs": {"' + '": ..., "'.join(spec.name for spec in info.inputs) + '": ...}}',
        )
    return info.inputs[0]


def _is_image(body: bytes) -> bool:
    return body.startswith((b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n"))


def _from_images(info: ModelInfo, files: Sequence[bytes]) -> dict[str, np.ndarray]:
    """Decodes and prepares images, one a row. Runs in a thread."""
    if info.preprocessing is None:
        raise InvalidRequest(
            f"the artifact of model {info.name!r} does not say how an image becomes its input",
            hint="send arrays, or build the artifact with preprocessing",
        )
    if len(files) > max(1, info.max_batch_size):
        raise InvalidRequest(
            f"{len(files)} images, and model {info.name!r} takes {max(1, info.max_batch_size)} at once"
        )
    spec = _only_input(info)
    rows = []
    for number, data in enumerate(files, 1):
        try:
            image = open_image(io.BytesIO(data), formats=_FORMATS, max_pixels=_MAX_PIXELS)
            if max(image.size) > _MAX_ASPECT * min(image.size):
                raise DataError(f"image refused: {image.width}x{image.height} pixels", hint="crop it")
            rows.append(preprocess(image, _preprocessing(info)))
        except DataError as error:
            raise InvalidRequest(error.what, where=f"image {number}", hint=error.hint) from None
    batch = np.stack(rows)
    name = wire.datatype(spec)
    if name not in ("FP32", "FP16", "BF16", "FP64"):
        raise Unsupported(f"model {info.name!r} takes {name}, and images are prepared as FP32")
    return {spec.name: batch.astype(wire.numpy_dtype(name), copy=False)}


def _preprocessing(info: ModelInfo) -> ImagePreprocessing:
    return _read_preprocessing(json.dumps(info.preprocessing, sort_keys=True))


@functools.lru_cache(maxsize=64)
def _read_preprocessing(text: str) -> ImagePreprocessing:
    return ImagePreprocessing.from_json(json.loads(text))


async def _files(scope: Any, body: bytes) -> list[bytes]:
    """The files of a form."""

    async def replay() -> Message:
        return {"type": "http.request", "body": body, "more_body": False}

    try:
        async with fastapi.Request(scope, replay).form(max_files=_MAX_IMAGES, max_fields=_MAX_IMAGES) as form:
            files = [await item.read() for _, item in form.multi_items() if isinstance(item, UploadFile)]
    except HTTPException as error:
        raise InvalidRequest(f"the form is broken: {error.detail}") from None
    if not files:
        raise InvalidRequest("the form has no file", hint="curl -F image=@photo.jpg")
    return files


_PREDICT_DOCUMENTATION: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {
                "schema": {},
                "examples": {
                    "inputs": {"value": {"inputs": {"x": [[1.0, 2.0], [3.0, 4.0]]}}},
                    "instances": {"value": {"instances": [[1.0, 2.0], [3.0, 4.0]]}},
                    "array": {"value": [[1.0, 2.0], [3.0, 4.0]]},
                },
            },
            "multipart/form-data": {
                "schema": {"type": "object", "properties": {"image": {"type": "string", "format": "binary"}}}
            },
            "image/jpeg": {"schema": {"type": "string", "format": "binary"}},
            "image/png": {"schema": {"type": "string", "format": "binary"}},
        },
    },
    "responses": {
        "200": {
            "description": "The outputs, and for a classifier the best classes of each row.",
            "content": {
                "application/json": {
                    "example": {
                        "model": "resnet50",
                        "version": "1",
                        "classes": [[{"index": 281, "label": "tabby, tabby cat", "probability": 0.83}]],
                        "probabilities": "softmax of the model's logits",
                        "outputs": {"logits": [[0.1, 7.9]]},
                    }
                }
            },
        },
        "202": {
            "description": "With mode=async: the task, to be asked for at /result/{task}.",
            "content": {
                "application/json": {
                    "example": {"task": "Zk3…", "state": "pending", "result": "/result/Zk3…"},
                }
            },
        },
    },
}
