"""The one-node model in MLServer, as its documents show for a runtime of one's own.

    MLSERVER_ENVIRONMENT/bin/python benchmarks/_serving_mlserver.py MODEL.onnx HTTP_PORT GRPC_PORT

Without its pool of processes, its metrics, compression and a log line a request, which cost time. The model takes ``x``
and answers ``y``.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys

from _serving_bare import open_session
from mlserver import MLModel, MLServer, ModelSettings, Settings
from mlserver.codecs import NumpyCodec
from mlserver.types import InferenceRequest, InferenceResponse


class Model(MLModel):
    """ONNX Runtime behind MLServer's interface."""

    async def load(self) -> bool:
        self.session = open_session(os.environ["SERVED_MODEL"])
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        (result,) = self.session.run(None, {"x": NumpyCodec.decode_input(payload.inputs[0])})
        outputs = [NumpyCodec.encode_output("y", result)]
        return InferenceResponse(model_name=self.name, model_version="1", outputs=outputs)


def main() -> None:
    os.environ["SERVED_MODEL"] = sys.argv[1]
    logging.getLogger("mlserver.grpc").setLevel(logging.WARNING)  # else it writes a line for each request
    settings = Settings(
        host="127.0.0.1",
        http_port=int(sys.argv[2]),
        grpc_port=int(sys.argv[3]),
        parallel_workers=0,
        metrics_endpoint=None,
        gzip_enabled=False,
    )
    # MLServer finds the class by its import path, and this file run as a script is no module
    model = ModelSettings(name="one", implementation="_serving_mlserver.Model")
    asyncio.run(MLServer(settings).start([model]))


if __name__ == "__main__":
    main()
