"""Malformed requests over HTTP from a seed, for the test of abuse: a function a kind."""

from __future__ import annotations

import gzip
import json
import random
import urllib.parse
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
from serving_mutants import DTYPES, MAX_ROWS, MODEL, SHAPES, SIZES, K, Mutant, X, misplaced, registration

_JUNK: list[Any] = [None, True, -1, 0, 1.5, 10**400, "x", "", "1", [], [[]], {}, {"a": 1}, [None], "\ud800", "x" * 5000]
_NAMES = [
    "",
    "..",
    ".",
    "../two",
    "..%2f..%2fetc",
    "%2e%2e",
    "two/",
    "a" * 3000,
    "%00",
    "two%00",
    "TWO",
    "%ff%fe",
    "two.",
    "~",
]


def header() -> dict[str, Any]:
    """The JSON of a right request with binary tensors."""
    return {
        "id": "7",
        "inputs": [
            {"name": "x", "datatype": "FP32", "shape": [1, 4], "parameters": {"binary_data_size": 16}},
            {"name": "k", "datatype": "INT64", "shape": [1, 2], "parameters": {"binary_data_size": 16}},
        ],
        "outputs": [{"name": "y", "parameters": {"binary_data": True}}, {"name": "z"}],
    }


def post(path: str, body: bytes, headers: dict[str, str] | None = None, *, length: int | str | None = None) -> bytes:
    """A request of HTTP/1.1 that asks for the connection to be closed."""
    lines = [f"POST {path} HTTP/1.1", "Host: x", f"Content-Length: {len(body) if length is None else length}"]
    lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
    return "\r\n".join([*lines, "Connection: close", "", ""]).encode("utf-8", "surrogateescape") + body


def binary(tree: Any, data: bytes = X.tobytes() + K.tobytes(), *, said: int | str | None = None, **more: Any) -> bytes:
    """A request with binary tensors; ``said`` is the size of its JSON where that is a lie."""
    text = tree if isinstance(tree, bytes) else json.dumps(tree).encode()
    headers = {"Inference-Header-Content-Length": str(len(text) if said is None else said), **more}
    return post(f"/v2/models/{MODEL}/infer", text + data, headers)


def right_http() -> bytes:
    return binary(header())


def _truncated(r: random.Random) -> Mutant:
    data = X.tobytes() + K.tobytes()
    return Mutant("truncated binary section", binary(header(), data[: r.randrange(32)]))


def _too_much(r: random.Random) -> Mutant:
    return Mutant(
        "bytes after the sections", binary(header(), X.tobytes() + K.tobytes() + r.randbytes(r.randint(1, 99)))
    )


def _lying_size(r: random.Random) -> Mutant:
    tree = header()
    tree["inputs"][r.randrange(2)]["parameters"]["binary_data_size"] = r.choice([*SIZES, *_JUNK[1:]])
    return Mutant("lying binary_data_size", binary(tree))


def _shifted_sizes(r: random.Random) -> Mutant:
    tree, by = header(), r.choice([-16, -8, -1, 1, 8, 16])
    tree["inputs"][0]["parameters"]["binary_data_size"] += by
    tree["inputs"][1]["parameters"]["binary_data_size"] -= by
    return Mutant("sizes that fit only together", binary(tree))


def _lying_header(r: random.Random) -> Mutant:
    right = len(json.dumps(header()))
    wrong = [
        -1,
        0,
        1,
        right - 1,
        right + 1,
        right + 16,
        right + 33,
        2**31,
        2**63,
        10**30,
        "",
        "x",
        "1e3",
        "0x10",
        "+5",
        "1_0",
        "\u0663",
    ]
    return Mutant("lying Inference-Header-Content-Length", binary(header(), said=r.choice(wrong)))


def _dtype(r: random.Random) -> Mutant:
    tree = header()
    spec = tree["inputs"][r.randrange(2)]
    spec["datatype"] = r.choice([d for d in DTYPES if d != spec["datatype"]] + _JUNK)
    return Mutant("wrong dtype", binary(tree))


def _shape(r: random.Random) -> Mutant:
    tree = header()
    spec = tree["inputs"][r.randrange(2)]
    wrong = [s for s in SHAPES if s != spec["shape"]]
    spec["shape"] = r.choice([*wrong, *_JUNK, [1.0, 4.0], [True, 4], ["1", "4"], [[1, 4]], [1, 4, None], [10**400, 4]])
    return Mutant("wrong shape", binary(tree))


def _matching_shape(r: random.Random) -> Mutant:
    tree, rows = header(), r.choice([0, MAX_ROWS + 1, 3000])
    data = np.zeros((rows, 4), np.float32).tobytes() + np.zeros((rows, 2), np.int64).tobytes()
    for spec in tree["inputs"]:
        spec["shape"][0] = rows
        spec["parameters"]["binary_data_size"] = rows * 16
    return Mutant("no rows or too many", binary(tree, data))


def _rows_differ(r: random.Random) -> Mutant:
    tree = header()
    tree["inputs"][1].update(shape=[2, 2], parameters={"binary_data_size": 32})
    return Mutant("inputs differ in rows", binary(tree, X.tobytes() + K.tobytes() * 2))


def _utf8(r: random.Random) -> Mutant:
    text = bytearray(json.dumps(header()).encode())
    at = text.index(b'"7"') + 1
    text[at : at + 1] = r.choice(
        [b"\xff", b"\xc3\x28", b"\xed\xa0\x80", b"\xf5\x80\x80\x80", b"\x80", b"\xc0\xaf", b"\x00"]
    )
    return Mutant("invalid UTF-8", binary(bytes(text)))


def _cut_json(r: random.Random) -> Mutant:
    text = json.dumps(header()).encode()
    return Mutant("JSON cut short", binary(text[: r.randrange(1, len(text))]))


def _byte(r: random.Random) -> Mutant:
    text = bytearray(json.dumps(header()).encode())
    for _ in range(r.randint(1, 4)):
        text[r.randrange(len(text))] = r.randrange(256)
    return Mutant("random bytes in the JSON", binary(bytes(text)), harmless=True)


def _places(node: Any) -> list[tuple[Any, Any]]:
    """Every container in a tree with every key of it."""
    keys = list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ()
    return [place for key in keys for place in ((node, key), *_places(node[key]))]


def _structure(r: random.Random) -> Mutant:
    tree = header()
    node, key = r.choice(_places(tree))
    if r.random() < 0.3:
        del node[key]
    else:
        node[key] = r.choice(_JUNK)
    return Mutant("a part of the wrong type, or missing", binary(tree), harmless=True)


def _again(r: random.Random) -> Mutant:
    tree = header()
    which = r.choice(["inputs", "outputs"])
    tree[which].append(tree[which][r.randrange(2)])
    data = X.tobytes() + K.tobytes() + (X.tobytes() if which == "inputs" else b"")
    return Mutant("given twice", binary(tree, data))


def _unknown(r: random.Random) -> Mutant:
    tree = header()
    tree[r.choice(["inputs", "outputs"])][r.randrange(2)]["name"] = r.choice(["w", "X", "", "x ", "x\0", "y" * 9999])
    return Mutant("unknown input or output", binary(tree))


def _state(r: random.Random) -> Mutant:
    tree = header()
    where = r.choice([tree, tree["inputs"][0], tree["outputs"][0]])
    name = r.choice(["shared_memory_region", "classification", "sequence_id", "priority", "timeout"])
    wrong: list[Any] = ["x", -1, 1.5, [], {}, 10**400, "\ud800"]
    where.setdefault("parameters", {})[name] = r.choice(wrong)
    return Mutant("parameters of another kind", binary(tree), harmless=True)


def _memory(r: random.Random) -> Mutant:
    tree = header()
    which = r.choice(["inputs", "outputs"])
    place = misplaced(r)
    if r.random() < 0.2:
        place[r.choice(list(place))] = r.choice([True, 1.5, [], {}, 10**400, "\ud800", b"1".hex() * 99, -(2**63)])
    if which == "inputs":
        tree["inputs"][0]["parameters"] = place
        return Mutant("shared memory that is not there", binary(tree, K.tobytes()))
    tree["outputs"][0]["parameters"] = place
    return Mutant("shared memory that is not there", binary(tree))


def _register(r: random.Random) -> Mutant:
    name, said = registration(r)
    body = json.dumps(said).encode()
    if r.random() < 0.4:
        said[r.choice(list(said))] = r.choice([None, True, -1, 1.5, 10**400, [], {}, "\ud800", "-5"])
        body = json.dumps(said).encode()
    elif r.random() < 0.2:
        body = r.choice([b"", b"[]", b"{", b"null", b"7", body[:-1], r.randbytes(40)])
    return Mutant(
        "shared memory that cannot be registered",
        post(f"/v2/systemsharedmemory/region/{urllib.parse.quote(name)}/register", body),
    )


def _compression(r: random.Random) -> Mutant:
    text = json.dumps(header()).encode() + X.tobytes() + K.tobytes()
    packed = gzip.compress(text) if r.random() < 0.5 else zlib.compress(text)
    broken = bytearray(packed)
    match r.randrange(4):
        case 0:
            broken = broken[: r.randrange(len(broken) - 1)]
        case 1:
            broken[r.randrange(len(broken) - 8)] ^= 1 << r.randrange(8)
        case 2:
            broken = bytearray(r.randbytes(60))
        case _:
            broken = bytearray(gzip.compress(bytes(8 << 20)))
    encoding = r.choice(["gzip", "deflate", "br", "gzip, gzip", "x" * 100, "\udcff"])
    headers = {"Inference-Header-Content-Length": str(len(text) - 32), "Content-Encoding": encoding}
    # a flipped bit in the header of gzip (its time, its system) changes nothing
    return Mutant("broken compression", post(f"/v2/models/{MODEL}/infer", bytes(broken), headers), harmless=True)


def _random_body(r: random.Random) -> Mutant:
    size = r.choice([0, 1, 3, 100, 5000])
    headers = {} if r.random() < 0.5 else {"Inference-Header-Content-Length": str(r.randint(1, 200))}
    return Mutant("random bytes", post(f"/v2/models/{MODEL}/infer", r.randbytes(size), headers))


def _nested(r: random.Random) -> Mutant:
    depth = r.choice([10, 500, 100_000])
    tree = header()
    tree["inputs"][0] = {"name": "x", "datatype": "FP32", "shape": [1, 4], "data": "@"}
    text = json.dumps(tree).encode().replace(b'"@"', b"[" * depth + b"1" + b"]" * depth)
    return Mutant("nested deeply", binary(text, K.tobytes()))


def _numbers(r: random.Random) -> Mutant:
    wrong = [b"[1,2,3]", b"[1,2,3,4,5]", b"[]", b'["1",2,3,4]', b"[NaN,1,2,3]", b"[Infinity,1,2,3]", b"[[1],[2,3],[4]]"]
    wrong += [
        b"[null,1,2,3]",
        b"[{},1,2,3]",
        b"1",
        b'"abcd"',
        b"{}",
        b"null",
        b"[1,2,3,4",
        b"[1e999,1,2,3]",
        b"[[1,2],[3]]",
    ]
    integers = [b"[1.5,2]", b"[99999999999999999999,1]", b"[-9223372036854775809,1]", b"[1e30,1]", b"[true,2]"]
    x, k = b"[1,2,3,4]", b"[1,2]"
    if r.random() < 0.6:
        x = r.choice(wrong)
    else:
        k = r.choice(integers)
    body = b'{"inputs":[{"name":"x","datatype":"FP32","shape":[1,4],"data":%s},' % x
    body += b'{"name":"k","datatype":"INT64","shape":[1,2],"data":%s}]}' % k
    return Mutant("numbers that do not fit", post(f"/v2/models/{MODEL}/infer", body))


def _path(r: random.Random) -> Mutant:
    name = r.choice(_NAMES)
    path = r.choice(["/v2/models/{}/infer", "/v2/models/two/versions/{}/infer", "/predict/{}", "/result/{}"]).format(
        name
    )
    text = json.dumps(header()).encode()
    headers = {"Inference-Header-Content-Length": str(len(text))}
    return Mutant("names that lead elsewhere", post(path, text + X.tobytes() + K.tobytes(), headers))


def _version(r: random.Random) -> Mutant:
    version = r.choice(["0", "2", "-1", "01", "1.0", "99999999999999999999", "latest", "%D9%A1"])
    text = json.dumps(header()).encode()
    headers = {"Inference-Header-Content-Length": str(len(text))}
    path = f"/v2/models/two/versions/{version}/infer"
    return Mutant("no such version", post(path, text + X.tobytes() + K.tobytes(), headers))


def _method(r: random.Random) -> Mutant:
    right = right_http()
    return Mutant("another method", r.choice([b"PUT", b"DELETE", b"PATCH", b"GET"]) + right[4:])


def _predict(r: random.Random) -> Mutant:
    kinds = [
        "image/jpeg",
        "image/png",
        "application/json",
        "multipart/form-data; boundary=b",
        "multipart/form-data",
        "",
    ]
    bodies = [
        b"{",
        b"[[1,2,3]]",
        b'{"inputs":{"x":[[1,2]]}}',
        b'{"inputs":5}',
        b'{"instances":[{"x":"a"}]}',
        b"{}",
        b"",
    ]
    bodies += [r.randbytes(200), b"\xff\xd8\xff\xe0" + r.randbytes(99), b"\x89PNG\r\n\x1a\n" + r.randbytes(99), b"null"]
    bodies += [b'--b\r\nContent-Disposition: form-data; name="image"\r\n\r\nabc\r\n--b--\r\n', b"--b\r\n\r\n"]
    body = r.choice(bodies)
    return Mutant("predict without sense", post(f"/predict/{MODEL}", body, {"Content-Type": r.choice(kinds)}))


def _http(r: random.Random) -> Mutant:
    """What is no HTTP/1.1, or lies about its own length."""
    right = right_http()
    wrong = [
        b"\0" * 50 + b"\r\n\r\n",
        r.randbytes(60) + b"\r\n\r\n",
        b"POST\r\n\r\n",
        b"POST / HTTP/9.9\r\n\r\n",
        b"GET /v2 HTTP/1.1\r\nHost: x\r\nno colon here\r\n\r\n",
        right.replace(b"Content-Length: ", b"Content-Length: -", 1),
        right.replace(b"Content-Length: ", b"Content-Length: x", 1),
        right.replace(b"Content-Length: ", b"Content-Length: 99999999999999999999", 1),
        right.replace(b"Host: x", b"Content-Length: 3\r\nHost: x", 1),
        right.replace(b"Host: x", b"Transfer-Encoding: chunked\r\nHost: x", 1),
        b"POST /v2/models/two/infer HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\nabc\r\n0\r\n\r\n",
        b"POST /v2/models/two/infer HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n-1\r\nabc\r\n0\r\n\r\n",
        right.replace(b"Host: x", b"Long: " + b"a" * 100_000, 1),
        right.replace(b"Host: x", b"\r\n".join(b"H%d: %s" % (i, b"a" * 50) for i in range(2000)), 1),
        post("/v2/models/" + "a" * 200_000 + "/infer", b"{}"),
        post(f"/v2/models/{MODEL}/infer", b"abc", length=10 << 30),
        right.replace(b"\r\nHost", b"\r\nHost\0", 1),
    ]
    return Mutant("no HTTP", r.choice(wrong))


def _cut(r: random.Random) -> Mutant:
    right = right_http()
    return Mutant("cut short", right[: r.randrange(1, len(right) - 1)], cut=True)


_HTTP: tuple[Callable[[random.Random], Mutant], ...] = (
    _truncated, _too_much, _lying_size, _shifted_sizes, _lying_header, _dtype, _shape, _matching_shape, _rows_differ,
    _utf8, _cut_json, _byte, _structure, _again, _unknown, _state, _memory, _register, _compression, _random_body,
    _nested, _numbers, _path, _version, _method, _predict, _http, _cut,
)  # fmt: skip


def http_mutants(count: int, seed: int) -> list[Mutant]:
    """``count`` wrong requests, every kind as often as any other."""
    return [_HTTP[i % len(_HTTP)](random.Random(seed * 1_000_003 + i)) for i in range(count)]
