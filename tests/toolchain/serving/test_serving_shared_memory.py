"""Tensors in shared memory: with Triton's own clients, with memory that is cut short or replaced, and with rubbish."""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import socket
import uuid
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

pytest.importorskip("tritonclient.grpc")
pytest.importorskip("uvicorn")
import tritonclient.grpc as triton_grpc
import tritonclient.http as triton_http
import tritonclient.utils.shared_memory as shm
from server_support import ADD, Server, save, served
from standin import Few, fetch, running
from tritonclient.utils import InferenceServerException

from toolchain.serving import shared_memory
from toolchain.serving.auth import Auth
from toolchain.serving.base import AlreadyExists, InvalidRequest, NotFound, Overloaded
from toolchain.serving.limits import Bytes
from toolchain.serving.listening import CannotServe
from toolchain.serving.options import ServerOptions
from toolchain.serving.server import check_options
from toolchain.serving.shared_memory import MEMORY, Regions, Span

pytestmark = pytest.mark.skipif(not MEMORY.is_dir(), reason="this system has no /dev/shm")
BOTH = pytest.mark.parametrize("module", [triton_http, triton_grpc], ids=["http", "grpc"])
LIMIT = 8 << 20
X = np.arange(8, dtype=np.float32).reshape(2, 4)


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Few:
    return Few(tmp_path_factory.mktemp("models"), ("double", "pair", "words", "copy_bool", "half"))


@pytest.fixture(scope="module")
def ports(few: Few, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[ModuleType, int]]:
    folder = tmp_path_factory.mktemp("regions")
    with running(few, ServerOptions(max_request_bytes=LIMIT), regions=folder) as (http, grpc):
        yield {triton_http: http, triton_grpc: grpc}


@pytest.fixture
def key() -> Iterator[str]:
    """A key that nobody has; what is there in the end goes."""
    made = f"/toolchain-test-{uuid.uuid4().hex}"
    yield made
    for path in MEMORY.glob(made[1:] + "*"):
        path.unlink()


@pytest.fixture
def regions(tmp_path: Path) -> Regions:
    return Regions(tmp_path / "regions", Bytes(1 << 30))


def memory(key: str, data: bytes) -> Path:
    path = MEMORY / key.removeprefix("/")
    path.write_bytes(data)
    return path


@contextlib.contextmanager
def client(module: ModuleType, ports: dict[ModuleType, int]) -> Iterator[Any]:
    made = module.InferenceServerClient(f"127.0.0.1:{ports[module]}")
    try:
        made.unregister_system_shared_memory()
        yield made
    finally:
        made.unregister_system_shared_memory()
        made.close()


def given(module: ModuleType, name: str, shape: list[int], datatype: str, *where: Any) -> Any:
    made = module.InferInput(name, shape, datatype)
    made.set_shared_memory(*where)
    return made


def wanted(module: ModuleType, name: str, *where: Any) -> Any:
    made = module.InferRequestedOutput(name)
    made.set_shared_memory(*where)
    return made


def shape_of(output: Any) -> list[int]:
    return list(output["shape"] if isinstance(output, dict) else output.shape)


@BOTH
def test_tritons_own_client(module: ModuleType, ports: dict[ModuleType, int], key: str) -> None:
    with client(module, ports) as triton:
        extensions = triton.get_server_metadata()
        assert "system_shared_memory" in (
            extensions["extensions"] if isinstance(extensions, dict) else extensions.extensions
        )
        into, out = (shm.create_shared_memory_region(name, key + name, 128) for name in ("in", "out"))
        try:
            triton.register_system_shared_memory("in", key + "in", 100, offset=20)
            triton.register_system_shared_memory("out", key + "out", 112, offset=16)
            for factor in (1, -3):  # what a client writes is read anew
                # 20 bytes into the memory the region begins, 4 bytes into it the tensor; of the output 16 and 8
                shm.set_shared_memory_region(into, [X * factor], offset=24)
                result = triton.infer(
                    "double",
                    [given(module, "x", [2, 4], "FP32", "in", 32, 4)],
                    outputs=[wanted(module, "y", "out", 60, 8)],
                )
                assert shape_of(result.get_output("y")) == [2, 4]
                found = shm.get_contents_as_numpy(out, np.float32, [2, 4], offset=24)
                np.testing.assert_array_equal(found, X * factor * 2)
            # only the input; both forms in one request
            result = triton.infer("double", [given(module, "x", [2, 4], "FP32", "in", 32, 4)])
            np.testing.assert_array_equal(result.as_numpy("y"), X * -6)
            shm.set_shared_memory_region(into, [np.array([[5, 6]], np.int32)], offset=20)
            here = module.InferInput("b", [1, 2], "INT32")
            here.set_data_from_numpy(np.array([[1, 2]], np.int32))
            for inputs in ([given(module, "a", [1, 2], "INT32", "in", 8), here],) * 2:
                asked = [wanted(module, "less", "out", 8, 64), module.InferRequestedOutput("total")]
                result = triton.infer("pair", inputs, outputs=asked)
                assert result.as_numpy("total").tolist() == [[6, 8]]
                assert shm.get_contents_as_numpy(out, np.int32, [1, 2], offset=80).tolist() == [[4, 4]]
                inputs.reverse()
        finally:
            shm.destroy_shared_memory_region(into)
            shm.destroy_shared_memory_region(out)


@BOTH
def test_answers_of_one_shape_and_different_places(module: ModuleType, ports: dict[ModuleType, int], key: str) -> None:
    """What is remembered of an answer is not taken for that of another."""
    path = memory(key, np.array([5, 3], np.int32).tobytes() + bytes(8))
    with client(module, ports) as triton:
        triton.register_system_shared_memory("m", key, 16)
        inputs = [given(module, "a", [1, 1], "INT32", "m", 4), given(module, "b", [1, 1], "INT32", "m", 4, 4)]
        for here, there in [("total", "less"), ("less", "total")] * 2:
            found = {"total": 8, "less": 2}
            outputs = [wanted(module, there, "m", 4, 8), module.InferRequestedOutput(here)]
            for asked in (outputs, outputs[::-1]):
                path.write_bytes(np.array([5, 3, 0, 0], np.int32).tobytes())
                result = triton.infer("pair", inputs, outputs=asked)
                assert result.as_numpy(here).tolist() == [[found[here]]]
                assert np.frombuffer(path.read_bytes(), np.int32).tolist() == [5, 3, found[there], 0]


def test_data_in_both_places_over_grpc(ports: dict[ModuleType, int], key: str) -> None:
    memory(key, bytes(64))
    with client(triton_grpc, ports) as triton:
        triton.register_system_shared_memory("m", key, 64)
        x = given(triton_grpc, "x", [1, 4], "FP32", "m", 16)
        x._input.contents.fp32_contents.extend([1.0] * 4)
        with pytest.raises(InferenceServerException, match="has contents"):
            triton.infer("double", [x])
        x = given(triton_grpc, "x", [1, 4], "FP32", "m", 16)
        x._raw_content = bytes(16)
        with pytest.raises(InferenceServerException, match="1 raw_input_contents, and 0 inputs"):
            triton.infer("double", [x])


@BOTH
def test_what_is_registered(module: ModuleType, ports: dict[ModuleType, int], key: str) -> None:
    memory(key, bytes(64))
    with client(module, ports) as triton:

        def known(name: str = "") -> dict[str, tuple[str, int, int]]:
            told = triton.get_system_shared_memory_status(name, **({"as_json": True} if module is triton_grpc else {}))
            rows = told if isinstance(told, list) else list(told.get("regions", {}).values())
            return {row["name"]: (row["key"], int(row.get("offset", 0)), int(row["byte_size"])) for row in rows}

        assert known() == {}
        triton.register_system_shared_memory("ü b.c", key, 10, 3)
        triton.register_system_shared_memory("d", key[1:], 64)  # tritonclient's own memory takes keys without a slash
        assert known() == {"ü b.c": (key, 3, 10), "d": (key[1:], 0, 64)}
        assert known("d") == {"d": (key[1:], 0, 64)}
        with pytest.raises(InferenceServerException, match="'d' is registered") as caught:
            triton.register_system_shared_memory("d", key, 64)
        assert caught.value.status() in ("409", "StatusCode.ALREADY_EXISTS")
        with pytest.raises(InferenceServerException, match="no region 'e'") as caught:
            known("e")
        assert caught.value.status() in ("404", "StatusCode.NOT_FOUND")
        triton.unregister_system_shared_memory("e")
        triton.unregister_system_shared_memory("d")
        assert list(known()) == ["ü b.c"]
        triton.unregister_system_shared_memory()
        assert known() == {}
        # perf_analyzer asks for this one before it begins, and takes no other answer than yes
        triton.unregister_cuda_shared_memory()
        for call in (triton.get_cuda_shared_memory_status, lambda: triton.register_cuda_shared_memory("a", b"", 0, 4)):
            with pytest.raises(InferenceServerException, match="CUDA shared memory is not served") as caught:
                call()
            assert caught.value.status() in ("501", "StatusCode.UNIMPLEMENTED")


@BOTH
def test_other_kinds_of_tensors(module: ModuleType, ports: dict[ModuleType, int], key: str) -> None:
    words = [b"\x02\0\0\0ab", b"\x00\0\0\0", b"\x02\0\0\0\xc3\xbc"]
    path = memory(key, b"".join(words) + bytes(52) + b"\0\1\1")
    with client(module, ports) as triton:
        triton.register_system_shared_memory("m", key, 71)
        inputs = [given(module, "s", [3], "BYTES", "m", 16)]
        triton.infer("words", inputs, outputs=[wanted(module, "t", "m", 30, 30)])
        assert path.read_bytes()[30:50] == b"\x04\0\0\0abab" + b"\0\0\0\0" + b"\x04\0\0\0\xc3\xbc\xc3\xbc"
        triton.infer(
            "copy_bool", [given(module, "x", [1, 3], "BOOL", "m", 3, 68)], outputs=[wanted(module, "y", "m", 3)]
        )
        assert path.read_bytes()[:3] == b"\0\1\1"
        # FP16 has no form in JSON, and needs none here
        memory(key, np.array([1.5, -2.0], np.float32).tobytes() + bytes(63))
        outputs = [wanted(module, "y", "m", 4, 8)]
        triton.infer("half", [given(module, "x", [1, 2], "FP32", "m", 8)], outputs=outputs)
        assert np.frombuffer(path.read_bytes()[8:12], np.float16).tolist() == [1.5, -2.0]
        # an input of no elements has no bytes
        memory(key, bytes(71))
        result = triton.infer("words", [given(module, "s", [1], "BYTES", "m", 4)])
        assert result.as_numpy("t").tolist() == [b""]
        path.write_bytes(b"\x05" + bytes(70))
        for name, shape, datatype, where, why in (
            ("s", [1], "BYTES", ("m", 4), "longer than the data"),
            ("s", [2], "BYTES", ("m", 4), "too few"),
            ("x", [1, 3], "BOOL", ("m", 3, 0), "neither 0 nor 1"),
        ):
            with pytest.raises(InferenceServerException, match=why):
                triton.infer("words" if name == "s" else "copy_bool", [given(module, name, shape, datatype, *where)])


@BOTH
def test_large_tensors(module: ModuleType, ports: dict[ModuleType, int], few: Few, key: str) -> None:
    """Beyond a megabyte they are copied in a thread."""
    rows = 8 << 16
    x = np.arange(rows * 2, dtype=np.float32).reshape(8, -1)
    path = memory(key, x.tobytes() + bytes(x.nbytes))
    with client(module, ports) as triton:
        triton.register_system_shared_memory("m", key, 2 * x.nbytes)
        i = given(module, "a", [8, x.shape[1]], "INT32", "m", x.nbytes)
        j = given(module, "b", [8, x.shape[1]], "INT32", "m", x.nbytes)
        triton.infer("pair", [i, j], outputs=[wanted(module, "total", "m", x.nbytes, x.nbytes)])
        found = np.frombuffer(path.read_bytes()[x.nbytes :], np.int32)
        np.testing.assert_array_equal(found, x.ravel().view(np.int32) * 2)
        del few.seen[:]


@pytest.fixture
def http_client(ports: dict[ModuleType, int]) -> Iterator[Any]:
    with client(triton_http, ports) as made:
        yield made


#: What is wrong with a tensor's place in a region of 64 bytes, and what it is told; x takes 32 bytes, y gives 32.
MISPLACED = [
    (("nope", 32), "no region 'nope'"),
    (("nope", 33), "takes 32"),  # which is seen before anybody looks for it
    (("m", 32, 33), "ends at 65"),
    (("m", 32, 1 << 61), "ends at"),
    (("m", 31), "takes 32"),
    (("m", 33), "takes 32"),
    (("m", 0), "takes 32"),
    (("m", -32), "'-32'"),
    (("m", 32, -1), "'-1'"),
    (("m", 32, 1 << 62), "ends at"),
    (("m", 32, (1 << 63) - 1), "number of bytes"),
]


@BOTH
@pytest.mark.parametrize(("where", "why"), MISPLACED)
def test_tensors_outside_their_region(
    module: ModuleType, ports: dict[ModuleType, int], few: Few, key: str, where: tuple[Any, ...], why: str
) -> None:
    path = memory(key, bytes(64))
    with client(module, ports) as triton:
        triton.register_system_shared_memory("m", key, 64)
        before = few.all_statistics()["double", "1"].failed.count
        for inputs, outputs in (
            ([given(module, "x", [2, 4], "FP32", *where)], None),
            ([given(module, "x", [2, 4], "FP32", "m", 32)], [wanted(module, "y", *where)]),
        ):
            if outputs is not None and why == "takes 32":  # too much room is none too little
                if where[1] >= 32:
                    continue
                why = "are there for it"
            del few.seen[:]
            with pytest.raises(InferenceServerException, match=why) as caught:
                triton.infer("double", inputs, outputs=outputs)
            assert caught.value.status() in ("400", "404", "StatusCode.INVALID_ARGUMENT", "StatusCode.NOT_FOUND")
            assert not few.seen or why == "are there for it", "it was told before the model ran"
        assert few.all_statistics()["double", "1"].failed.count > before
        assert path.read_bytes() == bytes(64)


@pytest.mark.parametrize(
    ("of_input", "of_output", "why"),
    [
        ({"shared_memory_region": "m"}, {}, "in part"),
        ({"shared_memory_byte_size": 32}, {}, "in part"),
        ({"shared_memory_offset": 32}, {}, "in part"),
        ({"shared_memory_region": 7, "shared_memory_byte_size": 32}, {}, "in part"),
        ({"shared_memory_region": "m", "shared_memory_byte_size": True}, {}, "'True'"),
        ({"shared_memory_region": "m", "shared_memory_byte_size": "32"}, {}, "number of bytes"),
        ({"shared_memory_region": "m", "shared_memory_byte_size": 32.0}, {}, "number of bytes"),
        ({"shared_memory_region": "m", "shared_memory_byte_size": 10**40}, {}, "number of bytes"),
        ({"shared_memory_region": "m", "shared_memory_byte_size": 32, "binary_data_size": 32}, {}, "has data in the"),
        ({}, {"shared_memory_region": "m"}, "in part"),
        ({}, {"shared_memory_region": "m", "shared_memory_byte_size": -1}, "'-1'"),
        ({}, {"shared_memory_region": "m" * 5000, "shared_memory_byte_size": 32}, "no region"),
        ({}, {"shared_memory_region": "../m", "shared_memory_byte_size": 32}, "no region"),
        ({}, {"shared_memory_region": "", "shared_memory_byte_size": 32}, "no region"),
    ],
)
def test_parameters_that_make_no_sense(
    ports: dict[ModuleType, int], http_client: Any, key: str, of_input: Any, of_output: Any, why: str
) -> None:
    memory(key, bytes(64))
    http_client.register_system_shared_memory("m", key, 64)
    data = {} if of_input else {"data": X.ravel().tolist()}
    x = {"name": "x", "shape": [2, 4], "datatype": "FP32", "parameters": of_input, **data}
    body = json.dumps({"inputs": [x], "outputs": [{"name": "y", "parameters": of_output}]}).encode()
    status, _, said = fetch(ports[triton_http], "/v2/models/double/infer", body)
    assert status in (400, 404)
    assert why in json.loads(said)["error"]


def test_strings_beyond_the_limit(http_client: Any, key: str) -> None:
    os.truncate(memory(key, b""), 2 * LIMIT)
    http_client.register_system_shared_memory("m", key, 2 * LIMIT)
    with pytest.raises(InferenceServerException, match="at most") as caught:
        http_client.infer("words", [given(triton_http, "s", [1], "BYTES", "m", LIMIT + 1)])
    assert caught.value.status() == "413"


def test_what_may_be_held_at_once(few: Few, tmp_path: Path, key: str) -> None:
    """Requests are small; what they have read for them is bounded like bodies."""
    memory(key, bytes(4096))
    with running(few, ServerOptions(max_in_flight_bytes=1000), regions=tmp_path / "r") as (http, grpc):
        for module, port in ((triton_http, http), (triton_grpc, grpc)):
            with client(module, {module: port}) as triton:
                triton.register_system_shared_memory("m", key, 4096)
                for _ in range(3):  # what was refused, or answered, is not held any more
                    with pytest.raises(InferenceServerException, match="being handled") as caught:
                        triton.infer("pair", [given(module, name, [8, 16], "INT32", "m", 512) for name in "ab"])
                    assert caught.value.status() in ("429", "StatusCode.RESOURCE_EXHAUSTED")
                    for _ in range(3):
                        triton.infer("pair", [given(module, name, [4, 16], "INT32", "m", 256) for name in "ab"])


# Memory that changes under the server


@BOTH
def test_memory_that_was_cut_short(module: ModuleType, ports: dict[ModuleType, int], key: str) -> None:
    """A server that has it mapped would be ended by SIGBUS."""
    path = memory(key, X.tobytes() * 2)
    with client(module, ports) as triton:
        triton.register_system_shared_memory("m", key, 64)
        inputs, outputs = [given(module, "x", [2, 4], "FP32", "m", 32)], [wanted(module, "y", "m", 32, 32)]
        triton.infer("double", inputs, outputs=outputs)
        for size in (40, 31, 0):
            os.truncate(path, size)
            with pytest.raises(InferenceServerException, match="shorter than it was registered"):
                triton.infer("double", inputs, outputs=outputs)
            assert path.stat().st_size == size, "writing does not make it longer"
        path.write_bytes(X.tobytes() * 2)
        triton.infer("double", inputs, outputs=outputs)
        np.testing.assert_array_equal(np.frombuffer(path.read_bytes()[32:], np.float32), X.ravel() * 2)


@BOTH
def test_memory_that_is_gone_or_another(module: ModuleType, ports: dict[ModuleType, int], key: str) -> None:
    path = memory(key, X.tobytes() * 2)
    other = memory(key + "other", bytes(64))
    with client(module, ports) as triton:
        triton.register_system_shared_memory("m", key, 64)
        inputs, outputs = [given(module, "x", [2, 4], "FP32", "m", 32)], [wanted(module, "y", "m", 32, 32)]
        path.unlink()
        with pytest.raises(InferenceServerException, match="cannot be opened"):
            triton.infer("double", inputs, outputs=outputs)
        other.rename(path)
        with pytest.raises(InferenceServerException, match="other memory"):
            triton.infer("double", inputs, outputs=outputs)
        path.unlink()
        target = memory(key + "target", bytes(64))
        path.symlink_to(target)
        with pytest.raises(InferenceServerException, match="cannot be opened"):
            triton.infer("double", inputs, outputs=outputs)
        assert target.read_bytes() == bytes(64)


def test_a_client_that_writes_all_the_time(http_client: Any, key: str) -> None:
    """Whatever it writes, an answer is that of what was read: y is twice x, bit by bit."""
    memory(key, bytes(8192))
    http_client.register_system_shared_memory("m", key, 8192)
    with (MEMORY / key[1:]).open("r+b") as file, mmap.mmap(file.fileno(), 8192) as seen:
        for value in range(50):
            seen[:16] = np.full(4, value, np.float32).tobytes()
            inputs = [given(triton_http, "x", [1, 4], "FP32", "m", 16)]
            http_client.infer("double", inputs, outputs=[wanted(triton_http, "y", "m", 16, 4096)])
            assert np.frombuffer(seen[4096:4112], np.float32).tolist() == [2.0 * value] * 4


# What may be registered


def test_keys_that_are_none(regions: Regions, key: str) -> None:
    name = key[1:]
    memory(key, bytes(64))
    (MEMORY / f"{name}-link").symlink_to(MEMORY / name)
    (MEMORY / f"{name}-folder").mkdir()
    os.mkfifo(MEMORY / f"{name}-pipe")
    semaphore = memory(f"sem.{name}", bytes(32))
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(str(MEMORY / f"{name}-socket"))
    try:
        for wrong in (
            "", "/", ".", "..", "/..", "//" + name, f"/{name}/", f"/../shm/{name}", f"{name}-folder/x", "/etc/passwd",
            f"{name}\0", "\n", "\ud800", "x" * 256, "/sem." + name, "sem." + name, name + "-none", f"{name}-link",
            f"{name}-folder", f"{name}-pipe", f"{name}-socket", None, 5, b"x",
        ):  # fmt: skip
            with pytest.raises(InvalidRequest):
                regions.register("m", wrong, offset=0, byte_size=1)  # type: ignore[arg-type]
        assert regions.status() == []
    finally:
        listening.close()
        semaphore.unlink()
        (MEMORY / f"{name}-folder").rmdir()


@pytest.mark.parametrize(
    ("offset", "size"),
    [(0, 0), (0, 65), (1, 64), (64, 1), (-1, 10), (0, -1), (1 << 63, 1), (10**30, 1), (True, 1), (0, 1.0), ("0", 1)]
    + [(0, None), ((1 << 62), (1 << 62))],
)
def test_parts_that_are_none(regions: Regions, key: str, offset: Any, size: Any) -> None:
    memory(key, bytes(64))
    with pytest.raises(InvalidRequest):
        regions.register("m", key, offset=offset, byte_size=size)
    assert regions.status() == []


@pytest.mark.parametrize("name", ["", "a\nb", "\0", "\ud800", "x" * 201, "ü" * 101, None, 7])
def test_names_that_are_none(regions: Regions, key: str, name: Any) -> None:
    memory(key, bytes(64))
    with pytest.raises(InvalidRequest, match="no name"):
        regions.register(name, key, offset=0, byte_size=64)


@pytest.mark.parametrize("name", ["..", "a/b", "../../x", ".", "x" * 200, "ü" * 100, "input:0", '"', "%2f"])
def test_names_that_lead_nowhere(regions: Regions, tmp_path: Path, key: str, name: str) -> None:
    memory(key, bytes(64))
    regions.register(name, key, offset=4, byte_size=8)
    assert [(each.name, each.offset, each.byte_size) for each in regions.status(name)] == [(name, 4, 8)]
    assert len(list((tmp_path / "regions").iterdir())) == 1
    assert [each.name for each in tmp_path.iterdir()] == ["regions"]
    regions.unregister(name)
    with pytest.raises(NotFound):
        regions.status(name)


def test_a_flood_of_registrations(regions: Regions, key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_memory, "MAX_REGIONS", 20)
    memory(key, bytes(64))
    refused = 0
    for number in range(100):
        try:
            regions.register(str(number), key, offset=0, byte_size=64)
        except Overloaded:
            refused += 1
    assert refused == 80
    assert len(regions.status()) == 20
    regions.unregister("3")
    regions.register("new", key, offset=0, byte_size=64)


def test_workers_know_of_each_other(regions: Regions, tmp_path: Path, key: str) -> None:
    memory(key, bytes(64))
    other = Regions(tmp_path / "regions", Bytes(1 << 30))
    regions.register("m", key, offset=0, byte_size=64)
    assert [each.name for each in other.status()] == ["m"]
    with pytest.raises(AlreadyExists):
        other.register("m", key, offset=0, byte_size=32)
    for size in (8, 16, 32):  # registered anew, it is another one for all at once
        other.unregister("m")
        other.register("m", key, offset=0, byte_size=size)
        assert [each.byte_size for each in regions.status("m")] == [size]


def test_no_descriptor_is_left(regions: Regions, key: str) -> None:
    memory(key, bytes(64))
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        with contextlib.suppress(InvalidRequest):
            regions.register("m", key, offset=0, byte_size=640)
        regions.register("m", key, offset=0, byte_size=64)
        (region,) = regions.status("m")
        shared_memory._read(region, Span("m", 0, 64))
        shared_memory._write(region, Span("m", 0, 64), memoryview(bytes(64)))
        os.truncate(MEMORY / key[1:], 0)
        with pytest.raises(InvalidRequest):
            shared_memory._read(region, Span("m", 0, 64))
        memory(key, bytes(64))
        regions.unregister()
    assert len(os.listdir("/proc/self/fd")) == before


# Who may


def test_off_unless_asked_for(few: Few, key: str) -> None:
    memory(key, bytes(64))
    with running(few) as (http, grpc):
        for module, port in ((triton_http, http), (triton_grpc, grpc)):
            triton = module.InferenceServerClient(f"127.0.0.1:{port}")
            said = triton.get_server_metadata()
            assert "shared_memory" not in str(said)
            for call in (
                triton.get_system_shared_memory_status,
                triton.unregister_system_shared_memory,
                triton.unregister_cuda_shared_memory,
                lambda triton=triton: triton.register_system_shared_memory("m", key, 64),
                lambda triton=triton, module=module: triton.infer(
                    "double", [given(module, "x", [2, 4], "FP32", "m", 32)]
                ),
            ):
                with pytest.raises(InferenceServerException, match="not served") as caught:
                    call()
                assert caught.value.status() in ("501", "StatusCode.UNIMPLEMENTED")
            triton.close()


def test_a_token_is_asked_for(few: Few, tmp_path: Path, key: str) -> None:
    memory(key, bytes(64))
    tokens = tmp_path / "tokens"
    tokens.write_text("a-good-token pair\n")
    tokens.chmod(0o600)
    with running(few, auth=Auth(tokens), regions=tmp_path / "r") as (http, grpc):
        for module, port in ((triton_http, http), (triton_grpc, grpc)):
            triton = module.InferenceServerClient(f"127.0.0.1:{port}")
            for number, headers in enumerate(({}, {"authorization": "Bearer wrong-token"})):
                for call in (
                    lambda h, t=triton: t.get_system_shared_memory_status(headers=h),
                    lambda h, t=triton: t.unregister_system_shared_memory(headers=h),
                    lambda h, t=triton: t.unregister_cuda_shared_memory(headers=h),
                    lambda h, t=triton: t.register_system_shared_memory("m", key, 64, headers=h),
                ):
                    with pytest.raises(InferenceServerException, match="token") as caught:
                        call(headers)
                    assert caught.value.status() in ("401", "StatusCode.UNAUTHENTICATED"), number
            good = {"authorization": "Bearer a-good-token"}
            triton.register_system_shared_memory("m", key, 64, headers=good)
            triton.unregister_system_shared_memory("m", headers=good)
            triton.close()


def test_pages_in_a_browser_may_not(ports: dict[ModuleType, int], key: str) -> None:
    """Any of them can send this to the loopback address, as text/plain and without looking at the answer."""
    memory(key, bytes(64))
    body = json.dumps({"key": key, "offset": 0, "byte_size": 64}).encode()
    base = "/v2/systemsharedmemory/region/m"
    for origin in ("https://example.com", "null", f"http://127.0.0.1:{ports[triton_http]}"):
        for path in (base + "/register", base + "/unregister", "/v2/systemsharedmemory/unregister"):
            status, _, said = fetch(ports[triton_http], path, body, Origin=origin)
            assert (status, b"browser" in said) == (403, True)
    assert fetch(ports[triton_http], "/v2/systemsharedmemory/status")[2] == b"[]"
    assert fetch(ports[triton_http], base + "/register", body)[0] == 200
    x = {"name": "x", "shape": [2, 4], "datatype": "FP32"}
    here, there = {"data": [0.0] * 8}, {"shared_memory_region": "m", "shared_memory_byte_size": 32}
    for wanted_there in ({"inputs": [{**x, "parameters": there}]}, {"outputs": [{"name": "y", "parameters": there}]}):
        asked = json.dumps({"inputs": [{**x, **here}], **wanted_there}).encode()
        status, _, said = fetch(ports[triton_http], "/v2/models/double/infer", asked, Origin="https://example.com")
        assert (status, b"browser" in said) == (403, True)
        assert fetch(ports[triton_http], "/v2/models/double/infer", asked)[0] == 200
    asked = json.dumps({"inputs": [{**x, **here}]}).encode()
    assert fetch(ports[triton_http], "/v2/models/double/infer", asked, Origin="https://example.com")[0] == 200


def test_no_name_is_not_all_of_them(ports: dict[ModuleType, int], http_client: Any, key: str) -> None:
    memory(key, bytes(64))
    http_client.register_system_shared_memory("m", key, 64)
    for what, body in (("status", None), ("register", b"{}"), ("unregister", b"")):
        assert fetch(ports[triton_http], f"/v2/systemsharedmemory/region//{what}", body)[0] == 400
    assert [each["name"] for each in http_client.get_system_shared_memory_status()] == ["m"]


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1"])
def test_only_on_the_loopback_address(host: str) -> None:
    with pytest.raises(CannotServe, match=host):
        check_options(ServerOptions(host=host, shared_memory=True))
    check_options(ServerOptions(shared_memory=True))
    check_options(ServerOptions(host=host))


@pytest.mark.parametrize("body", [b"", b"[]", b"5", b"{", b"{}", b'{"key": null}', b'{"key": ["x"]}', b"\xff" * 9])
def test_bodies_that_register_nothing(ports: dict[ModuleType, int], body: bytes) -> None:
    status, _, said = fetch(ports[triton_http], "/v2/systemsharedmemory/region/m/register", body)
    assert status == 400, said


# The whole server


def test_two_workers(tmp_path: Path, key: str) -> None:
    path = memory(key, bytes(64))
    with served(
        save(ADD, tmp_path / "add.onnx"), "--shared-memory", "--workers", "2", environment={"TMPDIR": str(tmp_path)}
    ) as server:
        _through_each_worker(server, path, key)
        assert list(tmp_path.glob("toolchain-serve-*/regions"))
        assert server.end() == 0
        assert list(tmp_path.glob("toolchain-serve-*")) == []
        assert "Traceback" not in server.said()


def _through_each_worker(server: Server, path: Path, key: str) -> None:
    """Each request is a connection of its own, to whichever worker the kernel takes."""
    register = json.dumps({"key": key, "offset": 0, "byte_size": 64}).encode()
    assert server.ask("POST", "/v2/systemsharedmemory/region/m/register", register)[0] == 200
    where = {"shared_memory_region": "m", "shared_memory_byte_size": 12}
    x = {"name": "x", "datatype": "FP32", "shape": [1, 3], "parameters": where}
    y = {"name": "y", "parameters": {**where, "shared_memory_offset": 32}}
    asked = json.dumps({"inputs": [x], "outputs": [y]}).encode()
    for value in range(20):
        path.write_bytes(np.full(3, value, np.float32).tobytes() + bytes(52))
        status, said = server.ask("POST", "/v2/models/add/infer", asked)
        assert (status, json.loads(said)["outputs"]) == (200, [{"name": "y", "datatype": "FP32", "shape": [1, 3]}])
        assert np.frombuffer(path.read_bytes()[32:44], np.float32).tolist() == [value + 1.0] * 3
        assert server.ask("POST", "/v2/systemsharedmemory/region/m/register", register)[0] == 409
    assert json.loads(server.ask("GET", "/stats")[1])["models"][0]["success"] == 20
    assert server.ask("POST", "/v2/systemsharedmemory/region/m/unregister", b"")[0] == 200
    for _ in range(10):
        assert server.ask("POST", "/v2/models/add/infer", asked)[0] == 404
