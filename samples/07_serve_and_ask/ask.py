"""Serves an artifact, asks it in two ways, and puts a second version into service: python ask.py ARTIFACT [SECOND]"""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import tritonclient.grpc as triton


def arrive(artifact: str | Path, repository: Path, model: str, version: int) -> None:
    """A version has to be whole when it is seen: it is copied under a hidden name, and then renamed."""
    hidden = repository / model / f".{version}"
    shutil.copytree(artifact, hidden)
    hidden.rename(repository / model / str(version))


@contextlib.contextmanager
def server(repository: Path) -> Iterator[dict[str, str]]:
    """`toolchain serve` on free ports; gives what it prints of them: "HTTP", "gRPC", "metrics"."""
    ports = ["--http-port", "0", "--grpc-port", "0", "--metrics-port", "0", "--poll-seconds", "0.5"]
    command = [sys.executable, "-m", "toolchain", "serve", str(repository), *ports]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            printed: dict[str, str] = {}
            for line in process.stdout or ():
                kind, where, *_ = line.split()
                printed[kind] = where
                if kind == "model":  # they come last, when the server is ready
                    break
            yield printed
        finally:
            process.terminate()  # SIGTERM: it answers what is in flight, and ends


def ask_with_a_client(address: str, model: str) -> tuple[str, dict[str, np.ndarray]]:
    """Open Inference Protocol over gRPC: zeros in, the version that answered and its outputs out."""
    client = triton.InferenceServerClient(address)
    inputs = []
    for tensor in client.get_model_metadata(model).inputs:
        shape = [1 if size < 0 else size for size in tensor.shape]
        given = triton.InferInput(tensor.name, shape, tensor.datatype)
        given.set_data_from_numpy(np.zeros(shape, triton_to_numpy(tensor.datatype)))
        inputs.append(given)
    answer = client.infer(model, inputs)
    told = answer.get_response()
    client.close()
    return told.model_version, {output.name: answer.as_numpy(output.name) for output in told.outputs}


def triton_to_numpy(datatype: str) -> str:
    """The numpy dtype of the protocol's FP32, INT64, UINT8, BOOL …"""
    return datatype.lower().replace("fp", "float")


def ask_plainly(url: str, model: str, inputs: dict[str, list]) -> dict:
    """JSON to /predict, for whoever has no client."""
    body = json.dumps({"inputs": inputs}).encode()
    with urllib.request.urlopen(f"{url}/predict/{model}?top=3", body) as reply:
        answer: dict = json.load(reply)
        return answer


def main(artifact: str, second: str | None = None) -> None:
    model = Path(artifact).resolve().name
    with tempfile.TemporaryDirectory() as folder:
        repository = Path(folder)
        (repository / model).mkdir()
        arrive(artifact, repository, model, 1)
        with server(repository) as at:
            version, outputs = ask_with_a_client(at["gRPC"], model)
            print(f"gRPC: version {version} of {model}:", {name: list(array.shape) for name, array in outputs.items()})

            with urllib.request.urlopen(f"{at['HTTP']}/v2/models/{model}") as reply:
                tensors = json.load(reply)["inputs"]
            zeros = {t["name"]: np.zeros([max(1, size) for size in t["shape"]]).tolist() for t in tensors}
            answer = ask_plainly(at["HTTP"], model, zeros)
            print(f"HTTP: version {answer['version']}:", answer.get("classes") or list(answer["outputs"]))

            arrive(second or artifact, repository, model, 2)
            asked = 0
            while ask_plainly(at["HTTP"], model, zeros)["version"] != "2":
                asked += 1
                time.sleep(0.05)
            print(f"version 2 answers; not one of the {asked} requests on the way to it failed")

            with urllib.request.urlopen(at["metrics"]) as reply:
                lines = reply.read().decode().splitlines()
            print(*(line for line in lines if line.startswith("nv_inference_request_success{")), sep="\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
