"""The whole server in a process of its own: ports, signals, draining, tokens, TLS, workers that die."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from server_support import ADD, ROOT, SLOW, Server, save, served

grpc_client = pytest.importorskip("tritonclient.grpc")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(ADD, tmp_path_factory.mktemp("model") / "add.onnx")


def test_all_of_it_starts_answers_and_ends_with_a_signal(model: Path) -> None:
    with served(model) as server:
        status, answer = server.infer(2.0)
        assert status == 200
        assert answer["outputs"] == [{"name": "y", "datatype": "FP32", "shape": [1, 3], "data": [3.0] * 3}]
        client = grpc_client.InferenceServerClient(f"127.0.0.1:{server.port('gRPC')}")
        given = grpc_client.InferInput("x", [2, 3], "FP32")
        given.set_data_from_numpy(np.ones((2, 3), np.float32))
        for _ in range(3):
            assert client.infer("add", [given]).as_numpy("y").tolist() == [[2.0] * 3] * 2
        client.close()
        assert server.metric("nv_inference_request_success") == 4
        assert server.metric("nv_inference_count") == 7
        assert server.metric("toolchain_request_seconds_count") == 4
        status, body = server.ask("GET", "/stats")
        assert status == 200
        assert json.loads(body)["models"][0]["success"] == 4
        assert server.ask("GET", "/nothing", port="metrics")[0] == 404
        assert server.ask("GET", "/v2/health/ready")[0] == 200
        assert server.ask("POST", "/v2/repository/models/add/unload")[0] in (404, 405, 501), "not on this port"
        assert server.end() == 0
        assert "Traceback" not in server.said()


def test_what_is_in_flight_is_answered_and_nothing_new_is_taken(tmp_path: Path) -> None:
    save(SLOW, tmp_path / "slow.onnx")
    with served(tmp_path / "slow.onnx", "--drain-seconds", "60") as server:
        inputs = [
            {"name": "x", "datatype": "INT64", "shape": [1], "data": [400]},
            {"name": "w", "datatype": "FP32", "shape": [600, 600], "data": [0.001] * 360_000},
        ]
        body = json.dumps({"inputs": inputs}).encode()
        answers: list[int] = []
        asking = threading.Thread(target=lambda: answers.append(server.ask("POST", "/v2/models/slow/infer", body)[0]))
        asking.start()
        time.sleep(1)  # a second of the five or so that it takes
        before = http.client.HTTPConnection("127.0.0.1", server.port("HTTP"), timeout=30)
        before.request("GET", "/v2/health/ready")
        assert before.getresponse().read() is not None
        server.process.send_signal(signal.SIGTERM)
        server.until(lambda: any("shutting down" in line for line in server.err))
        before.request("GET", "/v2/health/ready")
        answer = before.getresponse()
        assert answer.status != 200, "not ready, while it still answers"
        before.close()
        assert server.process.wait(90) == 0
        asking.join()
        assert answers == [200]
        with pytest.raises(OSError):
            socket.create_connection(("127.0.0.1", server.port("HTTP")), timeout=1)


def test_a_second_signal_stops_at_once(tmp_path: Path) -> None:
    save(SLOW, tmp_path / "slow.onnx")
    with served(tmp_path / "slow.onnx") as server:
        held = socket.create_connection(("127.0.0.1", server.port("HTTP")))
        held.sendall(b"POST /v2/models/slow/infer HTTP/1.1\r\nHost: a\r\nContent-Length: 100\r\n\r\n{")
        time.sleep(0.2)
        server.process.send_signal(signal.SIGINT)
        server.until(lambda: any("draining" in line for line in server.err))
        assert server.end(signal.SIGINT) == 128 + signal.SIGINT
        assert "stopped at once" in server.said()
        held.close()


@pytest.mark.parametrize("name", ["http", "grpc", "metrics"])
@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_busy_port_is_an_error_that_names_it(model: Path, name: str, workers: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        server = Server(model, f"--{name}-port", port, "--workers", workers, wait=False)
        assert server.process.wait(60) == 2
        for reader in server.readers:
            reader.join()
        assert "cannot listen" in server.said()
        assert port in server.said()
        assert f"--{name}-port" in server.said()


def test_less_memory_than_the_server_itself_takes_is_refused(model: Path) -> None:
    server = Server(model, "--max-memory", "1M", wait=False)
    assert server.process.wait(60) == 2
    for reader in server.readers:
        reader.join()
    assert "may have 1 MB" in server.said()
    assert "--max-memory" in server.said()


def test_tokens_are_asked_for_and_change_while_it_runs(model: Path, tmp_path: Path) -> None:
    tokens, admins = tmp_path / "tokens", tmp_path / "admins"
    tokens.write_text("first-token add\n")
    admins.write_text("admin-token\n")
    tokens.chmod(0o600)
    admins.chmod(0o600)
    options = ("--tokens", str(tokens), "--admin-tokens", str(admins), "--admin-port", "0")
    with served(model, *options) as server:

        def status(token: str, path: str = "/v2/models/add", port: str = "HTTP", method: str = "GET") -> int:
            return server.ask(method, path, port=port, authorization=f"Bearer {token}")[0]

        assert server.ask("GET", "/v2/models/add")[0] == 401
        assert server.ask("GET", "/stats")[0] == 401
        assert server.ask("GET", "/")[0] == 200
        assert status("first-token") == 200
        assert status("first-token", "/v2/models/other") == 403
        client = grpc_client.InferenceServerClient(f"127.0.0.1:{server.port('gRPC')}")
        with pytest.raises(grpc_client.InferenceServerException) as told:
            client.get_model_metadata("add")
        assert "UNAUTHENTICATED" in str(told.value.status())
        assert client.get_model_metadata("add", headers={"authorization": "Bearer first-token"}).name == "add"
        client.close()
        # The admin port has tokens of its own.
        unload = "/v2/repository/models/add/unload"
        assert status("first-token", unload, "admin", "POST") == 401
        assert status("admin-token", "/v2/models/add") == 401
        assert status("admin-token", unload, "admin", "POST") == 200
        assert server.ask("POST", "/v2/models/add/infer", b"{}", authorization="Bearer first-token")[0] in (404, 503)
        assert status("admin-token", unload.replace("unload", "load"), "admin", "POST") == 200
        assert status("admin-token", "/v2/repository/models/none/load", "admin", "POST") == 404
        switches = json.loads(server.ask("GET", "/switches", port="admin", authorization="Bearer admin-token")[1])
        assert [switch["model"] for switch in switches] == ["add"] * len(switches)
        assert len(switches) >= 2
        new = tmp_path / "new"
        new.write_text("second-token\n")
        new.chmod(0o600)
        os.replace(new, tokens)
        server.until(lambda: status("second-token") == 200)
        assert status("first-token") == 401
        assert status("admin-token", "/drain", "admin", "POST") == 200
        assert server.process.wait(60) == 0


def certificate(folder: Path, name: str) -> tuple[Path, Path]:
    cert, key = folder / f"{name}.crt", folder / f"{name}.key"
    done = subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes",
         "-days", "2", "-keyout", str(key), "-out", str(cert), "-subj", f"/CN={name}",
         "-addext", "subjectAltName=DNS:localhost"],
        capture_output=True, check=False,
    )  # fmt: skip
    if done.returncode:
        pytest.skip("openssl makes no certificate here")
    return cert, key


def test_tls_and_a_certificate_that_changes_while_it_runs(model: Path, tmp_path: Path) -> None:
    cert, key = certificate(tmp_path, "first")
    with served(model, "--tls-certificate", str(cert), "--tls-key", str(key)) as server:

        def presented() -> str:
            return ssl.get_server_certificate(("127.0.0.1", server.port("HTTP")))

        def rpc(root: Path) -> bool:
            client = grpc_client.InferenceServerClient(
                f"localhost:{server.port('gRPC')}", ssl=True, root_certificates=str(root)
            )
            try:
                return bool(client.is_server_live(client_timeout=5))
            except grpc_client.InferenceServerException:
                return False
            finally:
                client.close()

        assert presented() == cert.read_text()
        assert rpc(cert)
        with pytest.raises((ConnectionError, http.client.HTTPException)):
            server.ask("GET", "/v2/health/live")  # in the clear
        new_cert, new_key = certificate(tmp_path, "second")
        assert not rpc(new_cert)
        os.replace(new_key, key)
        new = new_cert.read_text()
        os.replace(new_cert, cert)
        server.until(lambda: presented() == new)
        assert rpc(cert)
        assert server.end() == 0


def test_serving_loads_nothing_that_builds(model: Path) -> None:
    code = """if True:
        import os, signal, sys
        from toolchain import cli_serve

        def show(ports):
            builds = {"onnx", "onnx_ir", "onnxscript", "torch", "transformers"} & set(sys.modules)
            print("loaded:", sorted(builds), flush=True)
            os.kill(os.getpid(), signal.SIGTERM)

        cli_serve._show = show
        none = [word for name in ("http", "grpc", "metrics") for word in (f"--{name}-port", "0")]
        sys.argv = ["toolchain", "serve", sys.argv[1], *none]
        from toolchain.__main__ import main
        main()
    """
    done = subprocess.run(
        [sys.executable, "-c", code, str(model)], capture_output=True, text=True, cwd=ROOT, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "loaded: []" in done.stdout.splitlines()


def test_a_folder_without_models_says_so(tmp_path: Path) -> None:
    with served(tmp_path, wait=False) as server:
        server.until(lambda: any(line.startswith("models") for line in server.out))
        assert "none yet" in server.out[-1]
        assert server.ask("GET", "/v2/health/ready")[0] == 503


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--drain-seconds", "inf"], "--drain-seconds"),
        (["--tokens", "absent.txt"], "a token a line"),
        (["--tls-certificate", "absent.pem", "--tls-key", "absent.pem"], "PEM files that this user may read"),
    ],
)
def test_an_option_that_cannot_be_says_which(model: Path, tmp_path: Path, words: list[str], told: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "toolchain", "serve", str(model), "--http-port", "0", *words], capture_output=True,
        text=True, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert told in done.stderr
    assert "Traceback" not in done.stderr


def test_traces_of_workers_go_to_the_console(model: Path) -> None:
    pytest.importorskip("opentelemetry.sdk", reason="traces need the trace extra")
    wanted = {"OTEL_SDK_DISABLED": "false", "OTEL_TRACES_EXPORTER": "console"}
    with served(model, "--workers", "2", environment=wanted) as server:
        server.infer()
        assert server.end() == 0, server.err
    printed = "".join(server.err)
    assert '"name": "compute"' in printed
    assert not any("trace_id" in line for line in server.out)


@pytest.mark.parametrize(("limits", "connections"), [((400, 400), 144), ((300, 1000), 744), ((100, 100), 16)])
def test_connections_leave_files_for_the_server_itself(limits: tuple[int, int], connections: int) -> None:
    pytest.importorskip("resource", reason="limits of open files are POSIX's")
    code = f"""if True:
        import resource
        resource.setrlimit(resource.RLIMIT_NOFILE, {limits})
        from toolchain.serving.options import ServerOptions
        from toolchain.serving.listening import connection_limit
        print(connection_limit(ServerOptions()), *resource.getrlimit(resource.RLIMIT_NOFILE))
    """
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60, check=False
    )
    assert done.stdout.split() == [str(connections), str(limits[1]), str(limits[1])], done.stderr
