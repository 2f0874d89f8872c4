"""Storage codecs: what comes back is what the codec promises, and a damaged file is a sentence."""

from __future__ import annotations

import hashlib
import json
import lzma
import struct
import zlib
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from toolchain_support import conv_net

from runtimes import InvalidInput, InvalidModel
from toolchain.codecs import MAGIC, decode, encode, quantise


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def best_by_dynamic_programming(numbers: np.ndarray, k: int) -> float:
    """The least squared error of k clusters, exactly: Wang and Song 2011, in O(k n^2)."""
    x = np.sort(numbers.astype(np.float64))
    n = len(x)
    s, q = np.concatenate([[0], np.cumsum(x)]), np.concatenate([[0], np.cumsum(x * x)])
    i, j = np.meshgrid(np.arange(n + 1), np.arange(n + 1), indexing="ij")
    cost = np.where(j > i, q[j] - q[i] - (s[j] - s[i]) ** 2 / np.maximum(j - i, 1), 0.0)
    best = cost[0]
    for _ in range(k - 1):
        best = np.min(best[:, None] + np.where(j >= i, cost, np.inf), axis=0)
    return float(best[n])


@pytest.mark.parametrize("k", [2, 3, 8, 16])
@pytest.mark.parametrize("kind", ["normal", "laplace", "two heaps"])
def test_kmeans_is_the_best_there_is(k: int, kind: str) -> None:
    rng = np.random.default_rng(1)
    x = {
        "normal": rng.standard_normal(400),
        "laplace": rng.laplace(size=400),
        "two heaps": np.concatenate([rng.normal(-3, 0.1, 200), rng.normal(2, 0.5, 200)]),
    }[kind].astype(np.float32)
    shared = quantise(x.reshape(1, -1), levels=k)
    values, codes = shared.values * shared.scales[0], shared.codes[0]
    assert len(values) <= k
    assert (np.diff(values) > 0).all()
    error = float(np.square(x.astype(np.float64) - values[codes]).sum())
    assert error <= (1 + 1e-6) * best_by_dynamic_programming(x, k)
    # each number has the nearest value
    assert (np.abs(x - values[codes]) <= np.abs(x[:, None] - values).min(axis=1) + 1e-6).all()


def test_kmeans_on_few_different_numbers_is_exact() -> None:
    x = np.array([[1, 2, 2, 1], [5, 5, 1, 2]], np.float32)
    np.testing.assert_array_equal(quantise(x.reshape(1, 8), levels=3).restored(), x.reshape(1, 8))
    shared = quantise(np.full((3, 4), 7, np.float32), levels=2)
    np.testing.assert_array_equal(shared.values, [1])
    np.testing.assert_array_equal(shared.scales, [7, 7, 7])


@pytest.mark.parametrize(("codec", "levels"), [("kmeans", 16), ("kmeans", 256), ("log", 31)])
def test_channels_of_any_scale_are_kept_alike(codec: str, levels: int) -> None:
    x = normal(40, 16, 3, 3) * np.logspace(-6, 3, 40, dtype=np.float32).reshape(-1, 1, 1, 1)
    x[7] = 0
    back = quantise(x, codec=codec, levels=levels).restored()
    lost = np.square(x - back).sum((1, 2, 3)) / np.maximum(np.square(x).sum((1, 2, 3)), 1e-30)
    assert lost.max() < {16: 0.02, 256: 1.5e-4, 31: 0.06}[levels]
    assert not back[7].any()
    if codec == "log":
        assert set(np.unique(np.frexp(np.abs(back[back != 0]))[0])) == {0.5}, "powers of two"
    turned = quantise(np.ascontiguousarray(x.reshape(40, -1).T), codec=codec, levels=levels, axis=1)
    np.testing.assert_array_equal(turned.restored().T, back.reshape(40, -1))


@pytest.mark.parametrize("tiny", [1e-45, 1e-38, 1e-31])
def test_numbers_that_float32_hardly_holds(tiny: float) -> None:
    for codec in ("kmeans", "log"):
        x = np.full((2, 600), tiny, np.float32)
        x[1] = 3e38
        back = quantise(x, codec=codec, levels=15).restored()  # type: ignore[arg-type]
        assert np.isfinite(back).all()
        np.testing.assert_allclose(back[1], x[1], rtol=0.45)  # 2 ** 128 would be nearer, were there one


@pytest.mark.parametrize("codec", ["kmeans", "log"])
def test_zeros_stay_zero_and_nothing_takes_their_place(codec: str) -> None:
    x = normal(64, 64)
    x[np.abs(x) < 1] = 0
    back = quantise(x, codec=codec, levels=15).restored()
    assert (back[x == 0] == 0).all()
    if codec == "kmeans":
        assert (back[x != 0] != 0).all()
    assert not quantise(np.zeros((4, 4), np.float32), codec=codec, levels=15).restored().any()


def test_log_gives_the_nearest_power_of_two() -> None:
    x = normal(4000)
    shared = quantise(x.reshape(1, -1), codec="log", levels=15)
    values, codes = shared.values * shared.scales[0], shared.codes[0]
    assert len(values) == 15
    powers = values[values > 0]
    np.testing.assert_array_equal(np.log2(powers), np.round(np.log2(powers)))
    np.testing.assert_array_equal(values, -values[::-1])
    nearest = np.abs(x[:, None] - values).min(axis=1)
    np.testing.assert_allclose(np.abs(x - values[codes]), nearest, rtol=1e-6)
    # the largest is not cut off, and no larger power would be nearer to it
    assert abs(np.abs(x).max() - powers.max()) <= abs(np.abs(x).max() - 2 * powers.max())
    assert powers.max() <= 4 / 3 * np.abs(x).max()


@pytest.mark.parametrize(("codec", "levels"), [("kmeans", 16), ("kmeans", 256), ("log", 15)])
def test_a_model_there_and_back(tmp_path: Path, codec: str, levels: int) -> None:
    from toolchain.evaluate import run_reference

    model = ir.from_proto(conv_net(channels=64))
    original = model.graph.initializers["w"].const_value.numpy().copy()
    report = encode(model, tmp_path / "net.otc", codec=codec, levels=levels, smallest=512)
    np.testing.assert_array_equal(model.graph.initializers["w"].const_value.numpy(), original)
    back = decode(tmp_path / "net.otc")
    assert [t.name for t in report.tensors] == ["w", "fc_w"]
    assert {d.node for d in report.kept} == {"scale", "bias", "mean", "var", "fc_b"}
    for tensor in report.tensors:
        before = model.graph.initializers[tensor.name].const_value.numpy()
        after = back.graph.initializers[tensor.name].const_value.numpy()
        assert after.dtype == before.dtype
        assert max(len(np.unique(channel)) for channel in after) <= levels
        nmse = float(np.square(before - after).sum() / np.square(before).sum())
        assert abs(nmse - tensor.nmse) < 1e-6 + 0.01 * nmse
        assert nmse < {16: 0.02, 256: 2e-4, 15: 0.05}[levels]
        assert tensor.entropy_bytes <= tensor.encoded_bytes <= 1.1 * tensor.entropy_bytes + 4 * (levels + 64) + 100
    for name in ("scale", "mean", "fc_b"):
        np.testing.assert_array_equal(
            back.graph.initializers[name].const_value.numpy(), model.graph.initializers[name].const_value.numpy()
        )
    assert report.size == (tmp_path / "net.otc").stat().st_size
    feeds = [{"image": normal(2, 3, 16, 16)}]
    (a,), (b,) = run_reference(model, feeds), run_reference(back, feeds)
    error = np.square(a["logits"] - b["logits"]).sum() / np.square(a["logits"]).sum()
    assert 0 < error < 0.3


def test_sixteen_levels_take_less_than_an_eighth(tmp_path: Path) -> None:
    model = ir.from_proto(conv_net(channels=64))
    model.graph.initializers["w"].const_value = ir.Tensor(normal(64, 3, 3, 3), name="w")
    (weight, *_) = encode(model, tmp_path / "net.otc", levels=16).tensors
    assert weight.encoded_bytes < weight.raw_bytes / 8 + 4 * 64 + 100
    pruned = normal(64, 3, 3, 3)
    pruned[np.abs(pruned) < 1.6] = 0  # 89 % zeros
    model.graph.initializers["w"].const_value = ir.Tensor(pruned, name="w")
    (sparse, *_) = encode(model, tmp_path / "net.otc", levels=16).tensors
    assert sparse.encoded_bytes - 4 * 64 < 0.5 * (weight.encoded_bytes - 4 * 64)


@pytest.mark.parametrize(("codec", "levels"), [("kmeans", 1), ("kmeans", 257), ("log", 16), ("log", 1), ("zip", 16)])
def test_bad_options(tmp_path: Path, codec: str, levels: int) -> None:
    with pytest.raises(InvalidInput):
        encode(ir.from_proto(conv_net()), tmp_path / "x", codec=codec, levels=levels)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def sealed(header: dict[str, object], payload: bytes) -> bytes:
    text = json.dumps(header).encode()
    body = MAGIC + struct.pack("<I", len(text)) + text + payload
    return body + hashlib.sha256(body).digest()


def opened(content: bytes) -> tuple[dict, bytes]:
    (length,) = struct.unpack_from("<I", content, 8)
    return json.loads(content[12 : 12 + length]), content[12 + length : -32]


def test_damaged_files(tmp_path: Path) -> None:
    path = tmp_path / "net.otc"
    encode(ir.from_proto(conv_net(channels=64)), path)
    good = path.read_bytes()
    header, payload = opened(good)
    assert opened(sealed(header, payload)) == (header, payload)

    def changed(**entries: object) -> bytes:
        return sealed({**header, **entries}, payload)

    first = header["tensors"][0]
    bomb = zlib.compress(bytes(50_000_000))
    graph = payload[: header["graph_size"]]
    bombed = {**first, "coder": "zlib", "size": len(bomb)}
    rest = payload[header["graph_size"] :]
    values = rest[: 4 * (first["values"] + first["shape"][0])]
    cases = {
        b"": "not a file of encoded weights",
        b"PK\x03\x04": "not a file of encoded weights",
        MAGIC: "SHA-256",
        good[:-1]: "SHA-256",
        good[:100] + bytes([good[100] ^ 1]) + good[101:]: "SHA-256",
        good + b"x": "SHA-256",
        sealed(header, payload[:-1]): "speaks of",
        changed(version=1): "version",
        changed(codec="zip"): "codec",
        changed(extra=1): "extra",
        changed(graph_raw=1 << 40): "graph_raw",
        changed(graph_raw=10): "more than 10 bytes",
        changed(graph_size=-1): "graph_size",
        changed(tensors=[{**first, "shape": [64, 10]}]): "of shape",
        changed(tensors=[{**first, "values": 0}]): "values",
        sealed({**header, "tensors": [bombed]}, graph + values + bomb): "more than",
        changed(tensors=[{**first, "shape": [64, 1 << 40]}]): "raise most_bytes",
        changed(tensors=[{**first, "axis": 4}]): "no axis 4",
        changed(tensors=[{**first, "dtype": "FLOAT16"}]): "of shape",
        changed(tensors=[{**first, "index": 99}]): "no weight 99",
        sealed({**header, "graph_size": len(lzma.compress(b"rubbish")), "graph_raw": 7, "tensors": []},
               lzma.compress(b"rubbish")): "no ONNX",
        sealed({**header, "graph_size": 7, "tensors": []}, b"rubbish"): "decompressed",
        MAGIC + struct.pack("<I", 1 << 31) + hashlib.sha256(MAGIC + struct.pack("<I", 1 << 31)).digest():
            "header is longer",
    }  # fmt: skip
    for content, said in cases.items():
        path.write_bytes(content)
        with pytest.raises(InvalidModel, match=said):
            decode(path)
    with pytest.raises(InvalidModel, match="cannot read"):
        decode(tmp_path / "absent")


def test_weights_in_constants_and_branches(tmp_path: Path) -> None:
    import onnx

    heavy = onnx.numpy_helper.from_array(normal(40, 40), "v")
    text = """<ir_version: 8, opset_import: ["" : 20]> agraph (bool c, float[2, 40] x) => (float[2, 40] y) {
        y = If (c) <then_branch = one () => (float[2, 40] a) { a = Relu (x) },
                    else_branch = two () => (float[2, 40] b) { b = Relu (x) }> }"""
    proto = onnx.parser.parse_model(text)
    then, other = (attribute.g for attribute in proto.graph.node[0].attribute)
    then.initializer.append(heavy)
    then.node[0].CopyFrom(onnx.helper.make_node("MatMul", ["x", "v"], ["a"]))
    other.node[0].CopyFrom(onnx.helper.make_node("MatMul", ["x", "k"], ["b"]))
    other.node.insert(0, onnx.helper.make_node("Constant", [], ["k"], value=heavy))
    model = ir.from_proto(proto)
    report = encode(model, tmp_path / "net.otc", levels=16)
    assert [t.name for t in report.tensors] == ["v", "k"]
    back = ir.to_proto(decode(tmp_path / "net.otc"))
    then, other = (attribute.g for attribute in back.graph.node[0].attribute)
    for tensor in (then.initializer[0], other.node[0].attribute[0].t):
        found = onnx.numpy_helper.to_array(tensor)
        assert max(len(np.unique(column)) for column in found.T) <= 16
        assert np.square(found - normal(40, 40)).mean() < 0.02


def test_codes_beyond_the_values(tmp_path: Path) -> None:
    path = tmp_path / "net.otc"
    encode(ir.from_proto(conv_net(channels=64)), path)
    header, payload = opened(path.read_bytes())
    (first,) = header["tensors"]
    packed = zlib.compress(bytes([first["values"]]) * (64 * 27))
    payload = payload[: header["graph_size"]] + payload[header["graph_size"] :][: 4 * (first["values"] + 64)] + packed
    path.write_bytes(sealed({**header, "tensors": [{**first, "coder": "zlib", "size": len(packed)}]}, payload))
    with pytest.raises(InvalidModel, match="stands for nothing"):
        decode(path)
