"""The one-node model in Triton, through its Python backend (nvidia-pytriton), as its documents show.

    PYTRITON_ENVIRONMENT/bin/python benchmarks/_serving_pytriton.py MODEL.onnx HTTP_PORT GRPC_PORT

No batcher: a delay would only cost latency here. Its stub for Python 3.11 is linked with an early one: with the library
of 3.11.7 it fails (``'_thread.RLock' object has no attribute '_recursion_count'``), with that of 3.11.2 it runs.
"""

from __future__ import annotations

import sys

import numpy as np
from _serving_bare import open_session
from pytriton.decorators import batch
from pytriton.model_config import ModelConfig, Tensor
from pytriton.triton import Triton, TritonConfig


def main() -> None:
    session = open_session(sys.argv[1])

    @batch
    def infer(x: np.ndarray) -> list[np.ndarray]:
        result: list[np.ndarray] = session.run(None, {"x": x})
        return result

    config = TritonConfig(
        http_address="127.0.0.1",
        grpc_address="127.0.0.1",
        http_port=int(sys.argv[2]),
        grpc_port=int(sys.argv[3]),
        allow_metrics=False,
    )
    with Triton(config=config) as triton:
        triton.bind(
            "one",
            infer,
            inputs=[Tensor(name="x", dtype=np.float32, shape=(16,))],
            outputs=[Tensor(name="y", dtype=np.float32, shape=(16,))],
            config=ModelConfig(max_batch_size=64, batcher=None),
        )
        triton.serve()


if __name__ == "__main__":
    main()
