"""Real models in memory: what a batch answers is what each request would be answered alone."""

from __future__ import annotations

import asyncio
import concurrent.futures
from pathlib import Path

import numpy as np
import pytest
from serving_support import FLAT, Scripted, make, request

import runtimes
from toolchain.seeded import seeded_inputs
from toolchain.serving.adaptive import Controller
from toolchain.serving.base import ModelInfo, Request
from toolchain.serving.loaded import Loaded
from toolchain.serving.options import Batching, ModelOptions
from toolchain.serving.statistics import Statistics

#: Kernels of ONNX Runtime for one row and for many add up in another order: a few units of the last place of the
#: largest number (1.2e-7 each). What they compute in integers is the same to the bit.
ORDER = 4e-6
MODELS = {
    "cifar10-resnets/cifar_resnet20.onnx": ORDER,
    "cifar10-resnets/cifar_resnet56.onnx": ORDER,
    "mlperf-resnet8/mlperf_resnet8_float.onnx": ORDER,
    "mlperf-resnet8/mlperf_resnet8_int8_qdq.onnx": 0.0,
    "onnx-graphs/rapidocr_cls.onnx": ORDER,
    "onnx-graphs/chars2vec_loop.onnx": ORDER,
}


def serve(session: runtimes.Session, batching: Batching) -> Loaded:
    """A version that takes as large batches as there are."""
    info = ModelInfo("m", "1", session.inputs, session.outputs, max_batch_size=16)
    controller = Controller(batching, max_batch_size=16)
    for size in FLAT:
        for _ in range(3):
            controller.ran(size, 1_000_000)
    return Loaded(
        info,
        session,
        ModelOptions(batching=batching),
        statistics=Statistics(),
        executor=concurrent.futures.ThreadPoolExecutor(1),
        controller=controller,
    )


async def alone_and_together(
    loaded: Loaded, asked: list[dict[str, np.ndarray]]
) -> list[tuple[dict[str, np.ndarray], dict[str, np.ndarray]]]:
    """What each request is answered by the session alone, and at the same time as all the others."""
    alone = [loaded.session.run(feeds) for feeds in asked]
    answers = await asyncio.gather(*(loaded.infer(Request("m", "", feeds)) for feeds in asked))
    return [(one, dict(answer.outputs)) for one, answer in zip(alone, answers, strict=True)]


def worst(pairs: list[tuple[dict[str, np.ndarray], dict[str, np.ndarray]]]) -> float:
    """The largest difference, as a share of the largest number of the output."""
    found = 0.0
    for alone, together in pairs:
        assert alone.keys() == together.keys()
        for name, wanted in alone.items():
            given = together[name]
            assert given.dtype == wanted.dtype
            assert given.shape == wanted.shape
            difference = np.abs(given.astype(np.float64) - wanted).max(initial=0.0)
            found = max(found, float(difference / max(np.abs(wanted.astype(np.float64)).max(initial=0.0), 1e-30)))
    return found


@pytest.mark.parametrize("name", MODELS)
def test_a_batch_answers_what_each_request_is_answered_alone(name: str, assets: Path) -> None:
    async def scene() -> None:
        loaded = serve(runtimes.load(assets / "models" / name), Batching())
        inputs = loaded.session.inputs
        asked = [seeded_inputs(inputs, batch=rows, seed=seed) for seed, rows in enumerate((1, 3, 2, 1, 1, 4))]
        pairs = await alone_and_together(loaded, asked)
        assert loaded.statistics.batches.keys() == {12}
        assert worst(pairs) <= MODELS[name]

    asyncio.run(scene())


@pytest.mark.slow
def test_sentences_of_different_lengths_are_padded_and_answered_as_if_alone(assets: Path, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    import onnx_ir

    from toolchain import models
    from toolchain.export import export_source

    model = export_source(models.resolve(f"hf:{assets / 'models' / 'minilm-l6-v2-fp16'}")).model
    onnx_ir.save(model, tmp_path / "minilm.onnx")
    session = runtimes.load(tmp_path / "minilm.onnx")
    rng = np.random.default_rng(3)

    def sentence(rows: int, length: int) -> dict[str, np.ndarray]:
        return {
            "input_ids": rng.integers(1000, 20000, (rows, length)),
            "attention_mask": np.ones((rows, length), np.int64),
            "token_type_ids": np.zeros((rows, length), np.int64),
        }

    async def scene() -> None:
        fill = dict.fromkeys(("input_ids", "attention_mask", "token_type_ids"), 0.0)
        loaded = serve(session, Batching(padding=fill))
        asked = [sentence(rows, length) for rows, length in ((1, 5), (2, 9), (1, 16), (1, 3))]
        pairs = await alone_and_together(loaded, asked)
        assert loaded.statistics.batches.keys() == {5}
        # A masked token adds exactly nothing; a longer axis is added up in another order.
        assert worst(pairs) <= 1e-5
        assert [together["last_hidden_state"].shape[1] for _, together in pairs] == [5, 9, 16, 3]
        # Without padding they are run apart.
        apart = serve(session, Batching())
        assert worst(await alone_and_together(apart, asked)) <= ORDER
        assert apart.statistics.execution_count == 4

    asyncio.run(scene())


def test_shrinking_cuts_batches_and_growing_gives_them_back() -> None:
    async def scene() -> None:
        session = Scripted()
        loaded = make(session, known=FLAT)
        assert loaded.batch_limit == 64
        loaded.shrink(0.05)
        assert loaded.batch_limit == 3
        await asyncio.gather(*(loaded.infer(request(float(n))) for n in range(7)))
        assert session.rows == [3, 3, 1]
        for _ in range(5):
            loaded.grow()
        assert loaded.batch_limit == 64
        await asyncio.gather(*(loaded.infer(request(float(n))) for n in range(7)))
        assert session.rows[3:] == [7]

    asyncio.run(scene())


def test_a_shrunken_batch_still_runs_a_larger_request_whole() -> None:
    async def scene() -> None:
        session = Scripted()
        loaded = make(session, known=FLAT)
        loaded.shrink(0.001)
        answer = await loaded.infer(request(2.0, rows=9))
        assert answer.outputs["y"].shape == (9, 4)

    asyncio.run(scene())
