"""The one-node model in LitServe, as its documents show, with one worker and its faster queue.

    LITSERVE_ENVIRONMENT/bin/python benchmarks/_serving_litserve.py MODEL.onnx HTTP_PORT

It answers on ``/predict``, and takes JSON.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import litserve
import numpy as np
from _serving_bare import open_session


class Api(litserve.LitAPI):
    """ONNX Runtime behind LitServe's interface."""

    def setup(self, device: str) -> None:
        self.session = open_session(os.environ["SERVED_MODEL"])

    def decode_request(self, request) -> np.ndarray:  # type: ignore[no-untyped-def]  # it reads the annotation
        spec = request["inputs"][0]
        return np.array(spec["data"], np.float32).reshape(spec["shape"])

    def predict(self, x: np.ndarray) -> np.ndarray:
        result: np.ndarray = self.session.run(None, {"x": x})[0]
        return result

    def encode_response(self, output: np.ndarray) -> dict[str, Any]:
        data = output.ravel().tolist()
        return {"outputs": [{"name": "y", "datatype": "FP32", "shape": output.shape, "data": data}]}


def main() -> None:
    os.environ["SERVED_MODEL"] = sys.argv[1]
    server = litserve.LitServer(Api(), accelerator="cpu", workers_per_device=1, fast_queue=True)
    server.run(host="127.0.0.1", port=int(sys.argv[2]), log_level="error", access_log=False, generate_client_file=False)


if __name__ == "__main__":
    main()
