"""The whole way: Triton's clients, both transports, the models as they are served."""

from __future__ import annotations

import concurrent.futures
import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import tritonclient.grpc as triton_grpc
import tritonclient.http as triton_http
from standin import GRAPHS, fetch, running
from tritonclient.utils import InferenceServerException

from toolchain.serving.models import Models
from toolchain.serving.options import Batching, ModelOptions, ResultCache, ServerOptions
from toolchain.serving.repository import open_source

OPTIONS = ServerOptions(
    poll_seconds=0,
    result_cache=ResultCache(max_bytes=1 << 20),
    defaults=ModelOptions(batching=Batching(max_queue_delay_us=2000, max_batch_size=4)),
)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "double.onnx"
    onnx.save(onnx.parser.parse_model(GRAPHS["double"]), path)
    return path


def test_both_transports_share_batches_cache_and_counts(model: Path) -> None:
    with running(Models(OPTIONS, open_source(model)), OPTIONS) as (http_port, grpc_port):
        http = triton_http.InferenceServerClient(f"127.0.0.1:{http_port}", concurrency=8)
        rpc = triton_grpc.InferenceServerClient(f"127.0.0.1:{grpc_port}")

        def by_http(number: int) -> np.ndarray:
            array = np.full((1, 4), number, np.float32)
            one = triton_http.InferInput("x", [1, 4], "FP32").set_data_from_numpy(array)
            return http.async_infer("double", [one]).get_result().as_numpy("y")

        def by_grpc(number: int) -> np.ndarray:
            one = triton_grpc.InferInput("x", [1, 4], "FP32").set_data_from_numpy(np.full((1, 4), number, np.float32))
            return rpc.infer("double", [one]).as_numpy("y")

        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            results = list(pool.map(by_grpc, range(64)))
        for number, result in enumerate(results):
            assert result.tolist() == [[2.0 * number] * 4]
        # The same again, over the other transport: out of the cache.
        for number in range(64):
            assert by_http(number).tolist() == [[2.0 * number] * 4]

        (counts,) = http.get_inference_statistics("double")["model_stats"]
        assert counts["inference_count"] == 64
        assert counts["inference_stats"]["success"]["count"] == 128
        assert counts["inference_stats"]["cache_hit"]["count"] == 64
        assert sum(batch["compute_infer"]["count"] for batch in counts["batch_stats"]) == counts["execution_count"]
        config = rpc.get_model_config("double").config
        assert (config.max_batch_size, config.dynamic_batching.max_queue_delay_microseconds) == (4, 2000)
        assert config.response_cache.enable
        assert http.get_model_config("double")["response_cache"] == {"enable": True}
        assert http.get_model_repository_index() == [{"name": "double", "version": "1", "state": "READY", "reason": ""}]
        for path in ("/cache/stats", "/resource/stats", "/health"):
            status, _, body = fetch(http_port, path)
            assert status == 200
            json.loads(body)
        with pytest.raises(InferenceServerException, match="at most 4"):
            five = triton_grpc.InferInput("x", [5, 4], "FP32").set_data_from_numpy(np.zeros((5, 4), np.float32))
            rpc.infer("double", [five])
        http.close()
        rpc.close()
