"""Serves one artifact over HTTP: python service.py ARTIFACT [--port 8080]

POST /run takes the bytes of one sample of the model's only input and answers its first output as JSON.
GET /model says what the model takes and gives.
"""

from __future__ import annotations

import argparse
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np

import runtimes


class Model:
    """One session for all threads, and a binding for each: a binding's buffers are one thread's own."""

    def __init__(self, path: str) -> None:
        self.session = runtimes.load(path)
        (self.input,) = self.session.inputs
        assert self.input.shape is not None
        self.shape = tuple(d if isinstance(d, int) else 1 for d in self.input.shape)
        self.size = int(np.prod(self.shape)) * np.dtype(self.input.dtype).itemsize
        self._local = threading.local()

    def run(self, body: bytes) -> list[float]:
        if len(body) != self.size:
            raise runtimes.InvalidInput(f"got {len(body)} bytes, {self.input} takes {self.size} for one sample")
        if not hasattr(self._local, "binding"):
            self._local.binding = self.session.bind({self.input.name: self.shape})
        binding = self._local.binding
        binding.inputs[self.input.name][...] = np.frombuffer(body, self.input.dtype).reshape(self.shape)
        binding.run()
        return binding.outputs[self.session.outputs[0].name][0].tolist()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    model: Model

    def do_GET(self) -> None:
        if self.path != "/model":
            self.answer(404, {"error": "GET /model or POST /run"})
            return
        session = self.model.session
        described = {"inputs": [str(s) for s in session.inputs], "outputs": [str(s) for s in session.outputs]}
        self.answer(200, {**described, "loaded": dict(session.info)})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.path != "/run":
            self.answer(404, {"error": "GET /model or POST /run"})
            return
        try:
            self.answer(200, {"output": self.model.run(body)})
        except runtimes.InvalidInput as error:
            self.answer(400, {"error": str(error)})

    def answer(self, status: int, value: object) -> None:
        content = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args: object) -> None:
        """Quiet: a line a request would be most of the work."""


def serve(path: str, port: int) -> ThreadingHTTPServer:
    """A server that is bound and not yet running; port 0 takes a free one."""
    handler = type("BoundHandler", (Handler,), {"model": Model(path)})
    return ThreadingHTTPServer(("127.0.0.1", port), handler)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact")
    parser.add_argument("--port", type=int, default=8080)
    options = parser.parse_args()
    server = serve(options.artifact, options.port)
    print(f"listening on http://127.0.0.1:{server.server_address[1]}", flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        server.server_close()
