"""The C++ services are built with CMake, run on an artifact, and give what Python gives."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import runtimes
from toolchain.build import build
from toolchain.cache import Cache
from toolchain.recipe import Recipe

ROOT = Path(__file__).resolve().parent.parent
SAMPLES = ROOT / "samples"
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}

# Two inputs and two outputs of different dtypes and sizes, so that none can be taken for another.
NET = """g (float[batch, 3, 8, 8] image, int64[batch, 2] extra) => (float[batch, 3] means, int64[batch, 2] doubled)
{ act = Sigmoid(image)
  pooled = GlobalAveragePool(act)
  means = Flatten(pooled)
  doubled = Add(extra, extra) }"""
# 64 MB go in and 4 bytes come out: a copy of the input shows, and a run takes long enough to be watched.
LARGE = """g (float[1, 4096, 4096] x) => (float[1, 1, 1] y)
{ axes = Constant<value = int64[2] {1, 2}>()
  y = ReduceMax(x, axes) }"""


def artifact_of(folder: Path, graph: str) -> Path:
    model = onnx.parser.parse_model(f'<ir_version: 9, opset_import: ["": 19]> {graph}')
    folder.mkdir()
    onnx.save(model, folder / "net.onnx")
    recipe = Recipe(model=str(folder / "net.onnx")).override(
        benchmark__count=3, benchmark__duration_s=0.0, output=str(folder / "art")
    )
    return build(recipe, cache=Cache(folder / "cache")).path


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return artifact_of(tmp_path_factory.mktemp("cpp") / "net", NET)


def samples(count: int, seed: int = 0) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(seed)
    return [
        {
            "image": rng.normal(size=(1, 3, 8, 8)).astype(np.float32),
            "extra": rng.integers(-(2**30), 2**30, (1, 2)),
        }
        for _ in range(count)
    ]


def request(sample: dict[str, np.ndarray]) -> bytes:
    return sample["image"].tobytes() + sample["extra"].tobytes()


ANSWER = 3 * 4 + 2 * 8


def check(answer: bytes, session: runtimes.Session, sample: dict[str, np.ndarray]) -> None:
    assert len(answer) == ANSWER
    expected = session.run(sample)
    np.testing.assert_allclose(np.frombuffer(answer, np.float32, 3), expected["means"][0], rtol=1e-6)
    np.testing.assert_array_equal(np.frombuffer(answer, np.int64, 2, offset=12), expected["doubled"][0])


def cmake(sample: str, build_folder: Path, *definitions: str, only_configure: bool = False) -> Path:
    """Configures and builds a sample; skips by the name of what is missing here, fails where the build does."""
    scripts = sysconfig.get_path("scripts")
    program = shutil.which("cmake", path=scripts) or shutil.which("cmake")
    if program is None:
        pytest.skip("cmake: not installed (pip install cmake)")
    if not (os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")):
        pytest.skip("c++: no compiler (Debian: apt install g++)")
    commands = [
        [program, "-S", str(SAMPLES / sample), "-B", str(build_folder), *definitions],
        [program, "--build", str(build_folder), "-j", "2"],
    ]
    for command in commands[:1] if only_configure else commands:
        done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=400, check=False)
        said = done.stdout + done.stderr
        for package in ("OpenSSL", "Python"):
            if f"Could NOT find {package}" in said:
                pytest.skip(f"{package}: no development files (Debian: apt install libssl-dev python3-dev)")
        assert done.returncode == 0, said
        assert "warning:" not in said, said
    return build_folder


@pytest.fixture(scope="module")
def embedded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with ``service`` and ``measure``."""
    if importlib.util.find_spec("pybind11") is None:
        pytest.skip("pybind11: not installed (pip install pybind11)")
    folder = tmp_path_factory.mktemp("embed") / "build"
    return cmake("05_cpp_embed", folder, f"-DPython_EXECUTABLE={sys.executable}")


@contextlib.contextmanager
def serving(program: Path, *arguments: str | Path) -> Iterator[int]:
    """Runs the service and gives its port."""
    command = [str(program), *map(str, arguments), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT) as child:
        try:
            assert child.stdout is not None
            said = ""
            for line in child.stdout:
                said += line
                if line.startswith("listening on"):
                    break
            else:
                assert child.stderr is not None
                raise AssertionError(said + child.stderr.read())
            assert "input image: float32[1, 3, 8, 8]\ninput extra: int64[1, 2]\n" in said
            assert "output means: float32[1, 3]\noutput doubled: int64[1, 2]\n" in said
            assert "variant: ort-cpu-fp32" in said
            yield int(line.rsplit(":", 1)[1])
        finally:
            child.kill()


def receive(client: socket.socket, size: int) -> bytes:
    got = b""
    while len(got) < size:
        block = client.recv(size - len(got))
        assert block, "the service closed the connection"
        got += block
    return got


def test_05_answers_as_python_does_on_several_connections_at_once(artifact: Path, embedded: Path) -> None:
    given = samples(6)
    with serving(embedded / "service", artifact, "--threads", "1") as port, runtimes.load(artifact) as session:
        with contextlib.ExitStack() as stack:
            clients = [stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=60)) for _ in range(3)]
            for round_of in (given[:3], given[3:]):
                for client, sample in zip(clients, round_of, strict=True):  # all are asked before any is heard
                    client.sendall(request(sample))
                for client, sample in zip(clients, round_of, strict=True):
                    check(receive(client, ANSWER), session, sample)
        # Half a request and a farewell: that connection is over, the service is not.
        with socket.create_connection(("127.0.0.1", port), timeout=60) as rude:
            rude.sendall(request(given[0])[:100])
        with socket.create_connection(("127.0.0.1", port), timeout=60) as client:
            client.sendall(request(given[1]))
            check(receive(client, ANSWER), session, given[1])


def test_05_copies_nothing_and_lets_the_gil_go(tmp_path: Path, embedded: Path) -> None:
    large = artifact_of(tmp_path / "large", LARGE)
    done = subprocess.run(
        [embedded / "measure", large, "0.2"], capture_output=True, text=True, env=ENVIRONMENT, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["same_memory"] is True
    assert found["input_bytes"] == 64 << 20
    assert found["grown_bytes"] < 8 << 20
    assert found["gil_taken"] >= 1
    assert found["runs_per_s_1"] > 0
    assert found["runs_per_s_2"] > 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nothing-here"], "nothing-here"),
        (["{artifact}", "--port", "65536"], "0 to 65535"),
        (["{artifact}", "--port"], "usage"),
        (["{artifact}", "--prot", "1"], "usage"),
        ([], "usage"),
    ],
)
def test_05_says_what_is_wrong(artifact: Path, embedded: Path, arguments: list[str], said: str) -> None:
    words = [word.format(artifact=artifact) for word in arguments]
    done = subprocess.run(
        [embedded / "service", *words], capture_output=True, text=True, env=ENVIRONMENT, timeout=60, check=False
    )
    assert done.returncode == 2, done.stdout
    assert done.stderr.startswith("error: ")
    assert said in done.stderr


@pytest.fixture(scope="module", params=["openvino", "onnxruntime"])
def native(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program without Python, on one of its two runtimes."""
    folder = tmp_path_factory.mktemp("native") / "build"
    if request.param == "onnxruntime":
        if not os.environ.get("ORT_HOME"):
            pytest.skip("ORT_HOME: not set (ONNX Runtime's wheel has no C++ headers)")
        return cmake("06_cpp_native", folder) / "native"
    if importlib.util.find_spec("openvino") is None:
        pytest.skip("openvino: not installed (pip install openvino)")
    return cmake("06_cpp_native", folder, f"-DPYTHON={sys.executable}", "-DORT_HOME=") / "native"


def test_06_finds_onnx_runtime_where_debian_puts_it(tmp_path: Path) -> None:
    triplet = sysconfig.get_config_var("MULTIARCH")
    if not triplet:
        pytest.skip("multiarch: this system has no such folders")
    for name in ("include/onnxruntime/onnxruntime_cxx_api.h", f"lib/{triplet}/libonnxruntime.so"):
        (tmp_path / "usr" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "usr" / name).touch()
    cmake("06_cpp_native", tmp_path / "build", f"-DORT_HOME={tmp_path / 'usr'}", only_configure=True)
    found = (tmp_path / "build" / "CMakeCache.txt").read_text()
    assert f"ORT_LIBRARY:FILEPATH={tmp_path}/usr/lib/{triplet}/libonnxruntime.so" in found


def run_native(program: Path, *arguments: str | Path, given: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    # The runtime is found without Python: by the program's own search path.
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "LD_LIBRARY_PATH")}
    return subprocess.run(
        [program, *arguments], input=given, capture_output=True, env=environment, timeout=60, check=False
    )


def test_06_answers_as_python_does(artifact: Path, native: Path) -> None:
    given = samples(4)
    done = run_native(native, artifact, given=b"".join(map(request, given)))
    assert done.returncode == 0, done.stderr.decode()
    assert b"ort-cpu-fp32/model.onnx" in done.stderr
    assert len(done.stdout) == 4 * ANSWER
    with runtimes.load(artifact) as session:
        for number, sample in enumerate(given):
            check(done.stdout[number * ANSWER : (number + 1) * ANSWER], session, sample)


def test_06_takes_a_batch_and_measures(artifact: Path, native: Path) -> None:
    pair = samples(2)
    whole = b"".join(np.concatenate([sample[name] for sample in pair]).tobytes() for name in ("image", "extra"))
    done = run_native(native, artifact, "--batch", "2", given=whole)
    assert done.returncode == 0, done.stderr.decode()
    means = np.frombuffer(done.stdout, np.float32, 6).reshape(2, 3)
    with runtimes.load(artifact) as session:
        for row, sample in zip(means, pair, strict=True):
            np.testing.assert_allclose(row, session.run(sample)["means"][0], rtol=1e-6)
    found = json.loads(run_native(native, artifact, "--bench", "0.1", "--threads", "1").stdout)
    assert found["runs"] > 0
    assert 0 < found["min_ms"] <= found["p50_ms"]


def edited(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    """A change of the manifest as JSON."""

    def apply(root: Path) -> None:
        path = root / "manifest.json"
        tree = json.loads(path.read_text())
        change(tree)
        path.write_text(json.dumps(tree))

    return apply


def text(old: str, new: str | bytes) -> Callable[[Path], None]:
    """A change of the manifest's text, once."""

    def apply(root: Path) -> None:
        path = root / "manifest.json"
        content = path.read_bytes()
        assert old.encode() in content
        path.write_bytes(content.replace(old.encode(), new if isinstance(new, bytes) else new.encode(), 1))

    return apply


def variant(tree: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = tree["components"]["model"]["variants"]["ort-cpu-fp32"]
    return found


def ours(tree: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = variant(tree)["executor_info"]["toolchain"]
    return found


def files(tree: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = tree["additional_metadata"]["toolchain"]["files"]
    return found


def flip(root: Path) -> None:
    model = root / "ort-cpu-fp32" / "model.onnx"
    content = bytearray(model.read_bytes())
    content[len(content) // 2] ^= 1
    model.write_bytes(content)


def link(root: Path) -> None:
    model = root / "ort-cpu-fp32" / "model.onnx"
    model.rename(root.parent / "elsewhere.onnx")
    model.symlink_to(root.parent / "elsewhere.onnx")


DAMAGE: dict[str, Callable[[Path], object]] = {
    "a flipped bit": flip,
    "a longer file": lambda root: (root / "ort-cpu-fp32" / "model.onnx").open("ab").write(b"\0"),
    "a link": link,
    "a missing file": lambda root: (root / "recipe.yaml").unlink(),
    "a file more": lambda root: (root / "ort-cpu-fp32" / "more.bin").write_bytes(b""),
    "no manifest": lambda root: (root / "manifest.json").unlink(),
    "an empty manifest": lambda root: (root / "manifest.json").write_bytes(b""),
    "a manifest cut off": lambda root: os.truncate(root / "manifest.json", 300),
    "a manifest that is a folder": lambda root: ((root / "manifest.json").unlink(), (root / "manifest.json").mkdir()),
    "text after the end": lambda root: (root / "manifest.json").open("a").write("{}"),
    "a key twice": text('"layout": "portable"', '"layout": "portable", "layout": "portable"'),
    "invalid utf-8": text('"package_name": "', b'"package_name": "\xc0\xaf'),
    "half a surrogate": text('"package_name": "', '"package_name": "\\ud800'),
    "a control character": text('"package_name": "', '"package_name": "\x01'),
    "a comma too many": text('"layout": "portable",', '"layout": "portable",,'),
    "NaN": text('"schema": 1', '"schema": NaN'),
    "deep nesting": text('"schema": 1', '"schema": ' + "[" * 100_000),
    "a huge number": text('"schema": 1', '"schema": 1' + "0" * 5000),
    "another schema": edited(lambda tree: tree.update(schema_version="2.0")),
    "another layout": edited(lambda tree: tree.update(layout="installed")),
    "a newer schema of ours": edited(lambda tree: tree["additional_metadata"]["toolchain"].update(schema=2)),
    "no layout": edited(lambda tree: tree.pop("layout")),
    "an unknown key": edited(lambda tree: tree.update(more=1)),
    "an unknown key of a variant": edited(lambda tree: variant(tree).update(deice="cpu")),
    "an unknown key of ours": edited(lambda tree: ours(tree).update(models="model.onnx")),
    "a schema that is no number": edited(lambda tree: tree.update(schema_version="1.x")),
    "nothing of ours": edited(lambda tree: tree.update(additional_metadata={})),
    "a way out": edited(lambda tree: ours(tree).update(model_file="../../elsewhere.onnx")),
    "an absolute path": edited(lambda tree: ours(tree).update(model_file="/etc/hostname")),
    "a folder that is a way out": edited(lambda tree: variant(tree).update(variant_directory="..")),
    "a file that is not listed": edited(lambda tree: ours(tree).update(model_file="other.onnx")),
    "a listed way out": edited(lambda tree: files(tree).update({"../x": {"sha256": "0" * 64, "size": 1}})),
    "another digest": edited(lambda tree: files(tree)["ort-cpu-fp32/model.onnx"].update(sha256="0" * 64)),
    "a negative size": edited(lambda tree: files(tree)["ort-cpu-fp32/model.onnx"].update(size=-1)),
    "a size that is a text": edited(lambda tree: files(tree)["ort-cpu-fp32/model.onnx"].update(size="1")),
    "a model that is no text": edited(lambda tree: ours(tree).update(model_file=["model.onnx"])),
    "variants in a list": edited(lambda tree: tree["components"]["model"].update(variants=[])),
}


@pytest.mark.parametrize("damage", list(DAMAGE))
def test_06_refuses_what_python_refuses(artifact: Path, native: Path, tmp_path: Path, damage: str) -> None:
    root = tmp_path / "art"
    shutil.copytree(artifact, root)
    # Python would load the prepared form and never look at the portable one.
    shutil.rmtree(root / "ort-cpu-fp32" / "prepared")
    edited(lambda tree: ours(tree).update(prepared_file=None, fingerprint={}))(root)
    edited(lambda tree: [files(tree).pop(name) for name in list(files(tree)) if "/prepared/" in name])(root)
    sound = run_native(native, root, given=request(samples(1)[0]))
    assert sound.returncode == 0, sound.stderr.decode()
    DAMAGE[damage](root)
    with pytest.raises(runtimes.Error):
        runtimes.load(root)
    done = run_native(native, root, given=request(samples(1)[0]))
    assert done.returncode == 2, done.stderr.decode()
    assert done.stderr.startswith(b"error: ")
    assert done.stdout == b""


def test_06_refuses_weights_in_other_files(native: Path, tmp_path: Path) -> None:
    """The digests vouch for the artifact's own files, and for nothing that a model would open beside them."""
    root = tmp_path / "art"
    weight = onnx.TensorProto(name="w", data_type=1, dims=[4], data_location=onnx.TensorProto.EXTERNAL)
    weight.external_data.add(key="location", value="../../secret")
    model = onnx.parser.parse_model(
        '<ir_version: 9, opset_import: ["": 19]> g (float[4] x) => (float[4] y) { y = Add(x, w) }'
    )
    model.graph.initializer.append(weight)
    (root / "v").mkdir(parents=True)
    content = model.SerializeToString()
    for form in (content, content.replace(b"\x0a\x08location", b"\x0a\x88\x80\x00location")):  # a longer way to say 8
        (root / "v" / "model.onnx").write_bytes(form)
        listed = {"v/model.onnx": {"sha256": hashlib.sha256(form).hexdigest(), "size": len(form)}}
        executor = {"toolchain": {"target": "ort-cpu", "precision": "fp32", "model_file": "model.onnx"}}
        manifest = {
            "schema_version": "1.0",
            "package_name": "n",
            "package_version": "1",
            "layout": "portable",
            "components": {"model": {"variants": {"v": {"executor_info": executor}}}},
            "additional_metadata": {"toolchain": {"schema": 1, "files": listed}},
        }
        (root / "manifest.json").write_text(json.dumps(manifest))
        done = run_native(native, root, given=b"\0" * 16)
        assert done.returncode == 2
        assert b"weights in other files" in done.stderr


def test_06_says_what_it_has(artifact: Path, native: Path) -> None:
    done = run_native(native, artifact, "--variant", "ort-cpu-int8")
    assert done.returncode == 2
    assert b"no variant ort-cpu-int8; it has: ort-cpu-fp32 (ort-cpu)" in done.stderr
    short = run_native(native, artifact, given=b"abc")
    assert short.returncode == 2
    assert b"has 3 bytes, one takes 784" in short.stderr
    assert run_native(native, artifact, "--batch", "0").returncode == 2
