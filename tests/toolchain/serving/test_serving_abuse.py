"""Requests that are wrong in every way we could think of: each gets its 4xx or status, and the server goes on serving.

Some 1,500 of them by default; ``ABUSE_REQUESTS=20000`` sends so many, ``ABUSE_SEED`` others.
"""

from __future__ import annotations

import collections
import contextlib
import os
import random
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx.parser
import pytest

grpc = pytest.importorskip("grpc")
pb = pytest.importorskip("tritonclient.grpc.service_pb2")
pytest.importorskip("uvicorn")
from serving_grpc_mutants import grpc_mutants, http2_junk, right_grpc  # noqa: E402
from serving_http_mutants import http_mutants, right_http  # noqa: E402
from serving_mutants import REGION, K, Mutant, X  # noqa: E402

from toolchain.serving.shared_memory import MAX_REGIONS, MEMORY  # noqa: E402

ROOT = Path(__file__).resolve().parents[3]
COUNT = int(os.environ.get("ABUSE_REQUESTS", "1500"))
SEED = int(os.environ.get("ABUSE_SEED", "1"))
#: A client may take so long to send a request, and a body may be so large, in the server of these tests.
CLIENT_SECONDS, BODY_BYTES = 2, 1 << 20
TWO = """
<ir_version: 8, opset_import: ["": 17]>
two (float[N, 4] x, int64[N, 2] k) => (float[N, 4] y, int64[N, 2] z) { y = Relu(x) z = Neg(k) }
"""
_SERVE = "from toolchain.__main__ import main; main()"


class Server:
    """``toolchain serve`` in a process of its own."""

    def __init__(self, folder: Path) -> None:
        model = folder / "two.onnx"
        model.write_bytes(onnx.parser.parse_model(TWO).SerializeToString())
        with socket.socket() as a, socket.socket() as b:
            a.bind(("127.0.0.1", 0))
            b.bind(("127.0.0.1", 0))
            self.http, self.grpc = a.getsockname()[1], b.getsockname()[1]
        self.log = folder / "log"
        command = [sys.executable, "-c", _SERVE, "serve", str(model), "--metrics-port", "0"]
        command += ["--http-port", str(self.http), "--grpc-port", str(self.grpc)]
        if MEMORY.is_dir():
            command.append("--shared-memory")
        command += ["--client-timeout-seconds", str(CLIENT_SECONDS), "--max-request-size", str(BODY_BYTES)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        self.channel = grpc.insecure_channel(f"127.0.0.1:{self.grpc}")
        deadline = time.monotonic() + 60
        while True:
            try:
                if self.exchange(b"GET /v2/health/ready HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n") == 200:
                    return
            except OSError:
                pass
            if time.monotonic() > deadline or self.process.poll() is not None:
                raise AssertionError(f"the server does not start:\n{self.log.read_text()}")
            time.sleep(0.1)

    def exchange(self, data: bytes, *, cut: bool = False) -> int | None:
        """Sends bytes on a connection of its own; the status of the answer, None where it was closed without one.

        ``cut``: nothing more is sent, and the server is told so.
        """
        with socket.create_connection(("127.0.0.1", self.http), timeout=20) as connection:
            received = b""
            try:
                connection.sendall(data)
                if cut:
                    connection.shutdown(socket.SHUT_WR)
                while part := connection.recv(65536):
                    received += part
            except (ConnectionResetError, BrokenPipeError):
                # it was refused before all of it was read; what it was told may still be there
                while select.select([connection], [], [], 0.05)[0]:
                    try:
                        part = connection.recv(65536)
                    except ConnectionResetError:
                        break
                    if not part:
                        break
                    received += part
        return int(received[9:12]) if received.startswith(b"HTTP/1.") else None

    def call(self, method: str, message: bytes) -> str:
        """The status of a call."""
        try:
            self.channel.unary_unary(f"/inference.GRPCInferenceService/{method}")(message, timeout=20)
        except grpc.RpcError as error:
            return str(error.code().name)
        return "OK"

    def serves(self) -> None:
        """Both protocols answer a right request rightly."""
        assert self.process.poll() is None, self.log.read_text()[-4000:]
        assert self.exchange(right_http()) == 200
        answer = self.channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")(
            right_grpc().SerializeToString(), timeout=20
        )
        outputs = pb.ModelInferResponse.FromString(answer)
        np.testing.assert_array_equal(np.frombuffer(outputs.raw_output_contents[0], np.float32), X[0])
        np.testing.assert_array_equal(np.frombuffer(outputs.raw_output_contents[1], np.int64), -K[0])

    def resident_mb(self) -> float:
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS:")) / 1024

    def close(self) -> None:
        self.channel.close()
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(30)
        finally:
            self.process.kill()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    made = Server(tmp_path_factory.mktemp("abuse"))
    with contextlib.ExitStack() as stack:
        if MEMORY.is_dir():
            stack.enter_context(_registered(made))
        yield made
        made.close()
    assert made.process.returncode == 0
    assert "Traceback" not in made.log.read_text()


@contextlib.contextmanager
def _registered(server: Server) -> Iterator[None]:
    """The region that requests name, and what they try in place of its memory."""
    region = MEMORY / REGION
    others = {kind: MEMORY / f"{REGION}-{kind}" for kind in ("short", "link", "folder", "pipe")}
    try:
        region.write_bytes(bytes(64))
        others["short"].write_bytes(bytes(8))
        others["link"].symlink_to(region)
        others["folder"].mkdir()
        os.mkfifo(others["pipe"])
        message = pb.SystemSharedMemoryRegisterRequest(name=REGION, key=region.name, byte_size=64)
        assert server.call("SystemSharedMemoryRegister", message.SerializeToString()) == "OK"
        yield
    finally:
        others.pop("folder").rmdir()
        for path in (region, *others.values()):
            path.unlink(missing_ok=True)


def _each(server: Server, wrong: list[Mutant]) -> Iterator[tuple[int, Mutant]]:
    """The requests with their numbers; now and then, and in the end, the server is asked something right."""
    server.serves()
    before = 0.0
    for number, mutant in enumerate(wrong):
        if number == len(wrong) // 4:
            before = server.resident_mb()
        if number % 250 == 249:
            server.serves()
        yield number, mutant
    server.serves()
    assert server.resident_mb() < before + 64


def test_http(server: Server) -> None:
    seen: collections.Counter[tuple[str, int | None]] = collections.Counter()
    wrong = []
    for number, mutant in _each(server, http_mutants(COUNT * 2 // 3, SEED)):
        status = server.exchange(mutant.data, cut=mutant.cut)
        seen[mutant.kind, status] += 1
        right = (status is not None and 400 <= status < 500) or (status == 200 and mutant.harmless)
        # there is a status for what is not served at all; and nobody is there to be told that a request ended early
        if not (right or (status is None and mutant.cut) or (status == 501 and mutant.harmless)):
            wrong.append((number, mutant.kind, status, mutant.data[:600]))
    assert not wrong, f"seed {SEED}, {len(wrong)} wrong, the first: {wrong[:5]}"
    assert sum(count for (_, status), count in seen.items() if status == 200) < 0.02 * COUNT, seen


#: What a malformed message may be told. INTERNAL is gRPC's own word for one that is no protobuf.
_TOLD = {"INVALID_ARGUMENT", "NOT_FOUND", "UNIMPLEMENTED", "RESOURCE_EXHAUSTED", "ALREADY_EXISTS"}


def test_grpc(server: Server) -> None:
    wrong = []
    for number, mutant in _each(server, grpc_mutants(COUNT // 3, SEED)):
        status = server.call(mutant.method, mutant.data)
        bytes_only = mutant.kind in ("random bytes", "invalid UTF-8") and status == "INTERNAL"
        # a timeout of some microseconds is a right one, and is over
        harmless = mutant.harmless and status in ("OK", "DEADLINE_EXCEEDED")
        if not (status in _TOLD or bytes_only or harmless):
            wrong.append((number, mutant.kind, status, mutant.data[:600]))
    assert not wrong, f"seed {SEED}, {len(wrong)} wrong, the first: {wrong[:5]}"


@pytest.mark.skipif(not MEMORY.is_dir(), reason="this system has no /dev/shm")
def test_shared_memory_that_is_cut_short_all_the_time(server: Server) -> None:
    region, ended = MEMORY / REGION, threading.Event()

    def cut() -> None:
        r = random.Random(SEED)
        while not ended.is_set():
            os.truncate(region, r.choice([0, 1, 16, 40, 64, 64, 64]))

    request = right_grpc()
    del request.raw_input_contents[0]
    y = request.outputs.add(name="y")
    for where, offset in ((request.inputs[0], 0), (y, 48)):
        where.parameters["shared_memory_region"].string_param = REGION
        where.parameters["shared_memory_byte_size"].int64_param = 16
        where.parameters["shared_memory_offset"].int64_param = offset
    cutting = threading.Thread(target=cut)
    cutting.start()
    try:
        told = {server.call("ModelInfer", request.SerializeToString()) for _ in range(300)}
    finally:
        ended.set()
        cutting.join()
        os.truncate(region, 64)
    assert told == {"OK", "INVALID_ARGUMENT"}
    server.serves()


@pytest.mark.skipif(not MEMORY.is_dir(), reason="this system has no /dev/shm")
def test_a_flood_of_registrations(server: Server) -> None:
    names = [f"flood-{number}" for number in range(1500)]
    told: collections.Counter[str] = collections.Counter()
    try:
        for name in names:
            message = pb.SystemSharedMemoryRegisterRequest(name=name, key=REGION, byte_size=64)
            told[server.call("SystemSharedMemoryRegister", message.SerializeToString())] += 1
        assert told == {"OK": MAX_REGIONS - 1, "RESOURCE_EXHAUSTED": len(names) - MAX_REGIONS + 1}
        server.serves()
    finally:
        for name in names[:MAX_REGIONS]:
            message = pb.SystemSharedMemoryUnregisterRequest(name=name)
            server.call("SystemSharedMemoryUnregister", message.SerializeToString())


def test_what_is_no_http2(server: Server) -> None:
    r = random.Random(SEED)
    for _ in range(100):
        with socket.create_connection(("127.0.0.1", server.grpc), timeout=5) as connection:
            try:
                connection.sendall(http2_junk(r))
                connection.recv(100)
            except ConnectionResetError:
                continue
    server.serves()


@pytest.mark.parametrize("sent", ["headers", "body", "nothing"])
def test_slow_clients_are_cut_while_others_are_served(server: Server, sent: str) -> None:
    """Slow loris (R. Hansen, 2009): many connections that each send a byte now and then."""
    right = right_http()
    end = right.index(b"\r\n\r\n")
    begin = {"headers": right[: end // 2], "body": right[: end + 20], "nothing": b""}[sent]
    slow = [socket.create_connection(("127.0.0.1", server.http), timeout=10) for _ in range(100)]
    try:
        start = time.monotonic()
        for connection in slow:
            connection.sendall(begin)
        rest = iter(right[len(begin) :])
        open_ones = set(slow)
        while open_ones and time.monotonic() - start < CLIENT_SECONDS + 8:
            server.serves()
            drip = bytes([next(rest)])
            for connection in list(open_ones):
                if select.select([connection], [], [], 0)[0]:
                    open_ones.discard(connection)
                    answer = connection.recv(1000)
                    assert answer == b"" or answer.startswith(b"HTTP/1.1 408 "), answer
                elif sent != "nothing":
                    connection.sendall(drip)
            time.sleep(0.3)
        assert not open_ones, f"{len(open_ones)} of 100 are still open after {CLIENT_SECONDS + 8} s"
    finally:
        for connection in slow:
            connection.close()
    server.serves()
