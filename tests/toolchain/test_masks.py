"""Masks in files: what is written comes back, torch's state dicts are read, and nothing is unpickled."""

from __future__ import annotations

import importlib.util
import pickle
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from toolchain_support import conv_net

from passes.prune_weights import Masks, PruneWeights, masks_of
from toolchain.errors import SourceError
from toolchain.masks import read_masks, write_masks


def test_there_and_back(tmp_path: Path) -> None:
    model = ir.from_proto(conv_net())
    PruneWeights(sparsity=0.6)(model)
    masks = masks_of(model)
    write_masks(masks, tmp_path / "masks.npz")
    back = read_masks(tmp_path / "masks.npz")
    assert list(back.masks) == sorted(masks.masks) == ["fc_w", "w"]
    for name, mask in masks.masks.items():
        np.testing.assert_array_equal(back.masks[name], mask)
    fresh = ir.from_proto(conv_net())
    PruneWeights(masks=back)(fresh)
    for name in ("w", "fc_w"):
        np.testing.assert_array_equal(
            fresh.graph.initializers[name].const_value.numpy(), model.graph.initializers[name].const_value.numpy()
        )
    content = (tmp_path / "masks.npz").read_bytes()
    write_masks(masks, tmp_path / "again.npz")
    assert (tmp_path / "again.npz").read_bytes() == content, "no date, no order of chance"


def test_names_with_slashes_and_of_keywords(tmp_path: Path) -> None:
    masks = Masks({"/layer/Conv/w": np.array([True, False]), "file": np.array([True])})
    write_masks(masks, tmp_path / "m.npz")
    assert set(read_masks(tmp_path / "m.npz").masks) == {"/layer/Conv/w", "file"}


@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="torch is not installed")
def test_a_state_dict_of_torchs_prune(tmp_path: Path) -> None:
    import torch
    from torch.nn.utils import prune

    net = torch.nn.ModuleDict({"w": torch.nn.Conv2d(3, 8, 3), "fc": torch.nn.Linear(8, 10)})
    prune.l1_unstructured(net["w"], "weight", amount=0.5)
    torch.save({"state_dict": net.state_dict()}, tmp_path / "net.pt")
    found = read_masks(tmp_path / "net.pt").masks
    assert list(found) == ["w.weight_mask"]
    assert (found["w.weight_mask"] == 0).sum() == 8 * 27 // 2
    prune.remove(net["w"], "weight")
    torch.save(net.state_dict(), tmp_path / "gone.pt")
    with pytest.raises(SourceError, match="holds no mask among 4 tensors"):
        read_masks(tmp_path / "gone.pt")


def test_rubbish(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="no such file"):
        read_masks(tmp_path / "absent.npz")
    for content in (b"", b"rubbish", pickle.dumps({"w": 1})):
        (tmp_path / "m.npz").write_bytes(content)
        with pytest.raises(SourceError):
            read_masks(tmp_path / "m.npz")
    np.savez(tmp_path / "object.npz", w=np.array([{}], dtype=object))
    with pytest.raises(SourceError, match="not readable"):
        read_masks(tmp_path / "object.npz")
