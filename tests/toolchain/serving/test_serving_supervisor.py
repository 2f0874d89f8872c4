"""Several workers: what they share, and what becomes of one that dies, hangs or never begins."""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from server_support import ADD, ROOT, SLOW, Server, save, served

from toolchain.serving import supervisor
from toolchain.serving.listening import CannotServe
from toolchain.serving.options import ServerOptions
from toolchain.serving.server import Ports


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(ADD, tmp_path_factory.mktemp("model") / "add.onnx")


def test_workers_share_the_work_and_a_dead_one_comes_back(model: Path) -> None:
    with served(model, "--workers", "2") as server:
        for _ in range(40):
            assert server.infer()[0] == 200
        assert server.metric("nv_inference_request_success") == 40
        assert server.metric("toolchain_workers") == 2
        # on both of them, by the kernel's choice: 40 connections on one alone are one chance in 2^39
        stats = json.loads(server.ask("GET", "/stats")[1])
        assert stats["workers"] == 2
        assert stats["models"][0]["success"] == 40
        assert counted(server) == [40] * 16, "whichever worker is asked"
        time.sleep(2.5)  # the supervisor looks at their counts each two seconds
        children = Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children")
        workers = [int(word) for word in children.read_text().split()]
        assert len(workers) == 2
        os.kill(workers[0], signal.SIGKILL)
        server.until(lambda: any("SIGKILL" in line for line in server.err))
        server.until(lambda: server.metric("toolchain_workers") == 2)
        assert server.metric("toolchain_worker_restarts") == 1
        assert server.metric("nv_inference_request_success") == 40, "what a dead worker counted stays"
        assert counted(server) == [40] * 16
        for _ in range(10):
            assert server.infer()[0] == 200
        assert counted(server) == [50] * 16
        assert server.end() == 0
        time.sleep(0.2)
        assert not any(Path(f"/proc/{pid}").exists() for pid in workers)


def counted(server: Server) -> list[int]:
    """What clients are told that was inferred, asked on 16 connections: all of them to one worker are 1 in 2^7."""
    grpcclient = pytest.importorskip("tritonclient.grpc")
    found = []
    for _ in range(8):
        found += json.loads(server.ask("GET", "/v2/models/add/stats")[1])["model_stats"]
        options = [("grpc.use_local_subchannel_pool", 1)]
        with grpcclient.InferenceServerClient(f"127.0.0.1:{server.port('gRPC')}", channel_args=options) as client:
            found += client.get_inference_statistics("add", "1", as_json=True)["model_stats"]
    assert all(sum(int(batch["compute_infer"]["count"]) for batch in one["batch_stats"]) for one in found)
    return [int(one["inference_stats"]["success"]["count"]) for one in found]


def test_clients_that_keep_connections_come_to_a_worker_that_was_started_again(model: Path) -> None:
    """Connections are renewed, and not one request of thousands fails of it."""
    grpcclient = pytest.importorskip("tritonclient.grpc")
    body = json.dumps({"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 3], "data": [1.0] * 3}]}).encode()
    opened: list[int] = []
    wrong: list[object] = []

    with served(model, "--workers", "2", "--connection-seconds", "0.2") as server:

        def over_http(connection: http.client.HTTPConnection) -> None:
            opened.append(connection.sock is None)
            connection.request("POST", "/v2/models/add/infer", body)
            answer = connection.getresponse()
            content = answer.read()
            if answer.status != 200 or json.loads(content)["outputs"][0]["data"] != [2.0] * 3:
                wrong.append(content)

        def http_client() -> None:
            connection = http.client.HTTPConnection("127.0.0.1", server.port("HTTP"), timeout=60)
            try:
                for _ in range(1000):
                    over_http(connection)
            except Exception as error:  # noqa: BLE001 - the test looks at it
                wrong.append(error)

        def grpc_client() -> None:
            given = grpcclient.InferInput("x", [1, 3], "FP32")
            given.set_data_from_numpy(np.ones((1, 3), np.float32))
            options = [("grpc.use_local_subchannel_pool", 1)]
            client = grpcclient.InferenceServerClient(f"127.0.0.1:{server.port('gRPC')}", channel_args=options)
            try:
                for _ in range(1000):
                    if client.infer("add", [given]).as_numpy("y").tolist() != [[2.0] * 3]:
                        wrong.append("grpc")
            except Exception as error:  # noqa: BLE001 - likewise
                wrong.append(error)

        threads = [threading.Thread(target=target) for target in (http_client, grpc_client) * 2]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert wrong == []
        assert sum(opened) >= 4, "no connection was renewed"

        children = Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children")
        os.kill(int(children.read_text().split()[0]), signal.SIGKILL)
        server.until(lambda: any("SIGKILL" in line for line in server.err))
        server.until(lambda: server.metric("toolchain_workers") == 2)
        kept = http.client.HTTPConnection("127.0.0.1", server.port("HTTP"), timeout=60)
        seen: set[str] = set()

        def both() -> bool:
            """Whether the one that has answered all the time was seen, and the one that is new."""
            over_http(kept)
            kept.request("POST", "/predict/add?mode=async", b"[1, 1, 1]")
            seen.add(json.loads(kept.getresponse().read())["task"].partition(".")[0])
            return len(seen) == 2

        server.until(both)
        assert wrong == []


def test_workers_go_when_their_supervisor_is_killed(model: Path) -> None:
    with served(model, "--workers", "2") as server:
        children = Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children")
        workers = [int(word) for word in children.read_text().split()]
        assert len(workers) == 2
        server.process.kill()
        server.process.wait()
        end = time.monotonic() + 30
        while any(_runs(pid) for pid in workers):
            assert time.monotonic() < end
            time.sleep(0.1)


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_workers_that_cannot_serve_end_the_server_with_why(tmp_path: Path) -> None:
    (tmp_path / "broken.onnx").write_bytes(b"this is no model")
    server = Server(tmp_path / "broken.onnx", "--tokens", str(tmp_path / "none"), "--workers", "2", wait=False)
    assert server.process.wait(60) == 2
    for reader in server.readers:
        reader.join()
    assert "tokens cannot be read" in server.said()


def children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_a_result_is_fetched_from_whichever_worker_has_it(model: Path) -> None:
    with served(model, "--workers", "2") as server:
        tasks = []
        for number in range(12):  # by the kernel's choice on both: all on one is one chance in 2^11
            status, body = server.ask("POST", "/predict/add?mode=async", f"[{number}, 1, 1]".encode())
            assert status == 202, body
            tasks.append(json.loads(body)["task"])
        assert {task.partition(".")[0] for task in tasks} == {"1", "2"}
        for number, task in enumerate(tasks):
            for _ in range(4):

                def done(task: str = task) -> bool:
                    return bool(json.loads(server.ask("GET", f"/result/{task}")[1])["state"] == "done")

                server.until(done)
                status, body = server.ask("GET", f"/result/{task}")
                assert (status, json.loads(body)["task"]) == (200, task)
                assert json.loads(body)["result"]["outputs"] == {"y": [[number + 1, 2, 2]]}
        for wrong in ("3.abc", "0.abc", "x.abc", tasks[0] + "x", "1.%0d%0aGET", "2/../../drain", "1." + "a" * 100):
            assert server.ask("GET", f"/result/{wrong}")[0] == 404, wrong
        # What a worker had died with it, and is not found with the one that took its place.
        first = next(task for task in tasks if task.startswith("1."))
        second = next(task for task in tasks if task.startswith("2."))
        os.kill(children(server.process.pid)[0], signal.SIGKILL)
        server.until(lambda: server.metric("toolchain_worker_restarts") == 1)
        server.until(lambda: server.metric("toolchain_workers") == 2)
        found = sorted(server.ask("GET", f"/result/{task}")[0] for task in (first, second))
        assert found == [200, 404]
        assert server.end() == 0


def test_a_shutdown_waits_for_tasks_that_are_pending_and_until_they_are_fetched(tmp_path: Path) -> None:
    save(SLOW, tmp_path / "slow.onnx")
    with served(tmp_path / "slow.onnx", "--workers", "2", "--drain-seconds", "60") as server:
        rounds, w = [150], [[0.0] * 600] * 600
        body = json.dumps({"inputs": {"x": rounds, "w": w}}).encode()
        status, answer = server.ask("POST", "/predict/slow?mode=async&outputs=false", body)
        assert status == 202, answer
        path = json.loads(answer)["result"]
        assert json.loads(server.ask("GET", path)[1])["state"] == "pending"
        server.process.send_signal(signal.SIGTERM)

        def state() -> Any:
            return json.loads(server.ask("GET", path)[1])["state"]

        server.until(lambda: any("draining" in line for line in server.err))
        server.until(lambda: state() == "done")
        assert server.process.wait(60) == 0


def in_process(path: Path, during: Callable[[Ports], None] = lambda ports: None, **options: Any) -> None:
    """``supervise`` in this process, until ``during``, in a thread, is done."""
    failures: list[BaseException] = []

    def ready(ports: Ports) -> None:
        def work() -> None:
            try:
                during(ports)
            except BaseException as error:  # noqa: BLE001 - told below
                failures.append(error)
            finally:
                os.kill(os.getpid(), signal.SIGTERM)

        threading.Thread(target=work).start()

    some = ServerOptions(http_port=0, grpc_port=None, metrics_port=None, workers=2, **options)
    asyncio.run(supervisor.supervise(path, some, ready=ready))
    if failures:
        raise failures[0]


#: A worker whose loop is stuck in a call as soon as it is asked for its numbers, if it is the one that gets the file.
HANGS = """if True:
    import os, runpy, sys, time
    sys.path.insert(0, {root!r})
    from toolchain.serving import metrics_page
    render = metrics_page.render

    def stuck_in_here(models):
        try:
            os.unlink({flag!r})
        except FileNotFoundError:
            return render(models)
        time.sleep(600)

    metrics_page.render = stuck_in_here
    runpy.run_module("toolchain.serving.worker", run_name="__main__")
"""


def test_a_worker_that_lives_and_does_not_answer_says_where_and_is_replaced(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    flag = tmp_path / "flag"
    code = HANGS.format(root=str(ROOT), flag=str(flag))
    monkeypatch.setattr(supervisor.child, "command", lambda module: [sys.executable, "-c", code])
    for name, value in (("BEAT_SECONDS", 0.1), ("BEAT_TIMEOUT", 1.0), ("_LOOK_SECONDS", 0.2), ("FIRST_WAIT", 0.1)):
        monkeypatch.setattr(supervisor, name, value)
    seen: list[set[int]] = []
    others = set(children(os.getpid()))

    def during(ports: Ports) -> None:
        seen.append(set(children(os.getpid())) - others)
        flag.touch()
        end = time.monotonic() + 60
        while time.monotonic() < end:
            now = set(children(os.getpid())) - others
            if len(now) == 2 and now != seen[0]:
                break
            time.sleep(0.05)
        seen.append(now)

    in_process(model, during)
    before, after = seen
    assert len(before & after) == 1, "the one that answers is left alone"
    assert len(after) == 2
    said = capfd.readouterr().err
    assert "it hangs" in said
    assert "in stuck_in_here" in said
    assert "was ended by SIGKILL; it is started again" in said


def test_workers_that_die_as_they_begin_end_the_server_with_their_last_words(
    model: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    code = "import sys; sys.stdin.readline(); sys.exit('no such instruction')"
    others = set(children(os.getpid()))
    started: list[str] = []

    def command(module: str) -> list[str]:
        started.append(module)
        return [sys.executable, "-c", code]

    monkeypatch.setattr(supervisor.child, "command", command)
    monkeypatch.setattr(supervisor, "FIRST_WAIT", 0.01)
    with pytest.raises(CannotServe, match=r"(?s)5 workers died as they began.*ended with 1.*no such instruction"):
        in_process(model)
    assert 5 <= len(started) <= 6, "each of the two may be on its way again"
    assert not set(children(os.getpid())) - others
    assert "SIGKILL" not in capfd.readouterr().err


def test_one_that_settled_begins_the_count_of_early_deaths_anew(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker that dies now and then, after it was ready for a while, goes on being started."""
    code = (
        "import json, sys, time; sys.stdin.readline(); print(json.dumps({'index': []}), flush=True);"
        "time.sleep(0.2); sys.exit('again')"
    )
    monkeypatch.setattr(supervisor.child, "command", lambda module: [sys.executable, "-c", code])
    monkeypatch.setattr(supervisor, "FIRST_WAIT", 0.01)
    monkeypatch.setattr(supervisor, "SETTLED_SECONDS", 0.1)

    async def run() -> int:
        watcher = supervisor.Supervisor(model, ServerOptions(workers=1), tmp_path)
        (worker,) = watcher.workers
        keeping = asyncio.create_task(watcher.keep(worker))
        while worker.restarts < 7 and not keeping.done():
            await asyncio.sleep(0.02)
        watcher.stop.set()
        await keeping
        assert watcher.failed is None
        return worker.restarts

    assert asyncio.run(run()) == 7
