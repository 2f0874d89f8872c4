"""INT8 of a real sentence encoder: its embeddings stay near those in float, with and without SmoothQuant."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from runtimes import Session, Target
from toolchain.calibration import calibrate
from toolchain.candidates import Tools
from toolchain.data import Batch
from toolchain.evaluate import Feeds, reference_session
from toolchain.judge import Judge, candidate_session
from toolchain.quantization import quantise_within_budget

CPU = Target("ort-cpu")
#: sentences to calibrate on, to judge by, and to score, none of them twice
CALIBRATION, SCORED, BATCH = 64, 96, 16


def sentences(assets: Path) -> list[Feeds]:
    """STS-B dev in batches of like length."""
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer.from_file(str(assets / "models" / "minilm-l6-v2-fp16" / "tokenizer.json"))
    tokenizer.enable_truncation(128)
    tokenizer.enable_padding()
    lines = (assets / "text" / "stsb" / "sts-dev.csv").read_text(encoding="utf-8").splitlines()
    texts = [line.split("\t")[5] for line in lines][:: len(lines) // (CALIBRATION + SCORED)][: CALIBRATION + SCORED]
    found = []
    for start in range(0, len(texts), BATCH):
        rows = tokenizer.encode_batch(texts[start : start + BATCH])
        columns = {"input_ids": "ids", "attention_mask": "attention_mask", "token_type_ids": "type_ids"}
        found.append({n: np.array([getattr(r, of) for r in rows], np.int64) for n, of in columns.items()})
    return found


def embedded(session: Session, batches: list[Feeds]) -> np.ndarray:
    """Mean over the tokens of each sentence, of length one: float32 [sentences, width]."""
    found = []
    for feeds in batches:
        states, mask = session.run(feeds)["last_hidden_state"], feeds["attention_mask"][..., None]
        mean = (states * mask).sum(1) / mask.sum(1)
        found.append(mean / np.linalg.norm(mean, axis=1, keepdims=True))
    return np.concatenate(found)


@pytest.mark.slow
def test_embeddings_keep_their_direction(assets: Path) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from toolchain import models
    from toolchain.export import export_source
    from toolchain.optimize import optimize
    from toolchain.recipe import Recipe

    source = f"hf:{assets / 'models' / 'minilm-l6-v2-fp16'}"
    model = export_source(models.resolve(source)).model
    optimize(model, Recipe(model=source).pipeline())
    batches = sentences(assets)
    count = CALIBRATION // BATCH
    known, unseen = [Batch(feeds, None) for feeds in batches[:count]], batches[count:]
    calibration = calibrate(model, known, method="minmax")
    with reference_session(model) as session:
        judge, expected = Judge(session, known[:1], metric="nmse"), embedded(session, unseen)
    cosine = {}
    for tools in (Tools(), Tools(smooth_quant=0.7)):
        made, report = quantise_within_budget(
            model, CPU, calibration, judge, [], data="STS-B", max_drop=None, tools=tools, calibration_data=known,
            method="minmax",
        )  # fmt: skip
        assert report.quantised >= 36, "every product of weights"
        with candidate_session(made, CPU) as session:
            cosine[report.smooth_quant] = float((embedded(session, unseen) * expected).sum(1).mean())
    assert cosine["none"] >= 0.99
    assert cosine["0.7"] >= 0.995
