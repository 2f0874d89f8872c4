"""The least that a server can do: grpc.aio on tritonclient's stubs, or one ASGI route on uvicorn, and a session.

    python benchmarks/_serving_bare.py grpc|http MODEL.onnx PORT [THREADS]

No batching, no queue, no checks, no statistics, one model with one float32 input and one output: what is left is the
transport and the runtime, so it is the ceiling that ``toolchain serve`` is measured against.
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

import numpy as np
import onnxruntime


def open_session(path: str, threads: int = 1) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


async def serve_grpc(path: str, port: int, threads: int) -> None:
    import grpc
    from tritonclient.grpc import service_pb2 as pb
    from tritonclient.grpc import service_pb2_grpc

    session = open_session(path, threads)
    name, output = session.get_inputs()[0].name, session.get_outputs()[0].name

    class Servicer(service_pb2_grpc.GRPCInferenceServiceServicer):
        async def ServerReady(self, request: Any, context: Any) -> Any:
            return pb.ServerReadyResponse(ready=True)

        async def ModelInfer(self, request: Any, context: Any) -> Any:
            tensor = request.inputs[0]
            array = np.frombuffer(request.raw_input_contents[0], np.float32).reshape(tensor.shape)
            (result,) = session.run(None, {name: array})
            reply = pb.ModelInferResponse(model_name=request.model_name, model_version="1", id=request.id)
            reply.outputs.add(name=output, datatype="FP32", shape=result.shape)
            reply.raw_output_contents.append(result.tobytes())
            return reply

    server = grpc.aio.server(options=[("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)])
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(Servicer(), server)
    server.add_insecure_port(f"127.0.0.1:{port}")
    await server.start()
    await server.wait_for_termination()


def serve_http(path: str, port: int, threads: int) -> None:
    import uvicorn

    session = open_session(path, threads)
    name, output = session.get_inputs()[0].name, session.get_outputs()[0].name

    async def app(scope: Any, receive: Any, send: Any) -> None:
        body = b""
        more = True
        while more:
            message = await receive()
            body += message.get("body", b"")
            more = message.get("more_body", False)
        if scope["method"] == "GET":
            await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
            await send({"type": "http.response.body"})
            return
        split = int(dict(scope["headers"])[b"inference-header-content-length"])
        header = json.loads(body[:split])
        array = np.frombuffer(body, np.float32, offset=split).reshape(header["inputs"][0]["shape"])
        (result,) = session.run(None, {name: array})
        raw = result.tobytes()
        spec = {"name": output, "datatype": "FP32", "shape": result.shape, "parameters": {"binary_data_size": len(raw)}}
        head = json.dumps({"model_name": "m", "model_version": "1", "outputs": [spec]}).encode()
        headers = [
            (b"content-type", b"application/octet-stream"),
            (b"inference-header-content-length", str(len(head)).encode()),
            (b"content-length", str(len(head) + len(raw)).encode()),
        ]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": head + raw})

    uvicorn.run(app, host="127.0.0.1", port=port, log_level="error", access_log=False, http="httptools", loop="uvloop")


def main() -> None:
    protocol, path, port = sys.argv[1], sys.argv[2], int(sys.argv[3])
    threads = int(sys.argv[4]) if len(sys.argv) > 4 else 1
    if protocol == "grpc":
        asyncio.run(serve_grpc(path, port, threads))
    else:
        serve_http(path, port, threads)


if __name__ == "__main__":
    main()
