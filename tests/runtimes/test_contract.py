"""The contract of ``runtimes.Session``, on every backend that works here."""

from __future__ import annotations

import gc
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from runtime_contract import CASES, Case, check
from runtime_support import save_model

import runtimes

BACKENDS = ("ort-cpu", "reference")
RELU = "g (float[N, 3] x) => (float[N, 3] y) { y = Relu(x) }"
PAIR = "g (float[N, 3] a, float[N, 3] b) => (float[N, 3] y) { y = Add(a, b) }"

Load = Callable[..., runtimes.Session]


@pytest.fixture(params=BACKENDS)
def load(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Load]:
    """Compiles a graph and loads it on one backend."""
    name = request.param
    state = runtimes.backend(name).probe()
    if not state.available:
        pytest.skip(f"{name}: {state.reason}")
    made: list[runtimes.Session] = []

    def load(graph: str, **save: int) -> runtimes.Session:
        file = save_model(tmp_path / f"{len(made)}.onnx", graph, **save)
        compiled = runtimes.compile(file, name, tmp_path / f"{len(made)}")
        made.append(runtimes.backend(name).load(compiled))
        return made[-1]

    yield load
    for session in made:
        session.close()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_case(load: Load, case: Case) -> None:
    session = load(case.graph)
    before = {name: array.copy() for name, array in case.feeds.items()}
    for _ in range(2):  # first through the thorough check, then through what it remembers
        check(case, session.run(case.feeds))
    for name, array in case.feeds.items():
        assert np.array_equal(array, before[name])


def test_specs(load: Load) -> None:
    session = load("g (float[N, 3, 2] a, int64 s, string[?] t) => (float[N, 3, 2] y, string[?] u) "
                   "{ f = Cast<to = 1>(s)  y = Add(a, f)  u = Identity(t) }")  # fmt: skip
    assert session.inputs == (
        runtimes.TensorSpec("a", "float32", ("N", 3, 2)),
        runtimes.TensorSpec("s", "int64", ()),
        runtimes.TensorSpec("t", "string", (None,)),
    )
    assert [spec.name for spec in session.outputs] == ["y", "u"]
    assert session.outputs[0] == runtimes.TensorSpec("y", "float32", ("N", 3, 2))
    assert session.target.runtime in BACKENDS
    assert session.info["target"] == str(session.target)


def test_outputs_are_new_each_time(load: Load) -> None:
    session = load(RELU)
    feeds = {"x": np.ones((2, 3), "float32")}
    first = session.run(feeds)["y"]
    first[...] = 9
    assert (session.run(feeds)["y"] == 1).all()
    assert (feeds["x"] == 1).all()


@pytest.mark.parametrize(
    ("feeds", "said"),
    [
        ({}, "no 'x'.*wanted: x: float32\\[N, 3\\]"),
        ({"y": np.zeros((1, 3), "float32")}, "no 'x'; unknown: 'y'"),
        ({"x": np.zeros((1, 3), "float32"), "z": np.zeros(1)}, "unknown: 'z'"),
        ({"x": np.zeros((1, 3))}, "float64\\[1, 3\\] was given, float32\\[N, 3\\] is wanted"),
        ({"x": np.zeros((1, 3), "int32")}, "int32\\[1, 3\\] was given"),
        ({"x": np.zeros((1, 3), ">f4")}, "big-endian float32.*byte order"),
        ({"x": np.zeros((3,), "float32")}, "1 dimensions in place of 2"),
        ({"x": np.zeros((1, 3, 1), "float32")}, "3 dimensions in place of 2"),
        ({"x": np.zeros((), "float32")}, "0 dimensions in place of 2"),
        ({"x": np.zeros((1, 4), "float32")}, "dimension 1 is 4 in place of 3"),
        ({"x": [[1.0, 2.0, 3.0]]}, "a list was given, a numpy array .*np.asarray"),
        ({"x": 1.0}, "a float was given"),
        ({"x": None}, "a NoneType was given"),
        ({"x": np.float32(1)}, "a numpy.float32 was given"),
        ({"x": np.ma.masked_array(np.zeros((1, 3), "float32"), mask=True)}, "mask would be lost"),
        ([np.zeros((1, 3), "float32")], "a dict of name to array, not as list"),
    ],
)
def test_wrong_inputs_are_shown(load: Load, feeds: object, said: str) -> None:
    session = load(RELU)
    good = {"x": np.ones((1, 3), "float32")}
    session.run(good)  # what is remembered must not let anything else in
    with pytest.raises(runtimes.InvalidInput) as caught:
        session.run(feeds)  # type: ignore[arg-type]
    assert re.search(said, str(caught.value), re.DOTALL), str(caught.value)
    assert (session.run(good)["y"] == 1).all()


def test_an_accepted_shape_of_one_input_does_not_excuse_another(load: Load) -> None:
    session = load(PAIR)
    one, two = np.ones((1, 3), "float32"), np.ones((2, 3), "float32")
    assert session.run({"a": one, "b": one})["y"].shape == (1, 3)
    assert session.run({"a": two, "b": two})["y"].shape == (2, 3)
    with pytest.raises(runtimes.InvalidInput, match="'N' is 1 before"):
        session.run({"a": one, "b": two})


def test_names_that_stand_for_no_size_are_not_compared(load: Load) -> None:
    session = load("g (float[None, 3] a, float[None] b) => (float[None, 3] y) { y = Mul(a, b) }")
    assert session.run({"a": np.ones((2, 3), "float32"), "b": np.ones(3, "float32")})["y"].shape == (2, 3)


@pytest.mark.parametrize(
    "array",
    [
        np.array(["a", 3], dtype=object),
        np.array([None], dtype=object),
        np.array([b"a"], dtype=object),
        np.array([b"a"]),
        np.array([1.0]),
    ],
    ids=["mixed", "none", "bytes", "bytes-dtype", "float"],
)
def test_only_text_is_a_string(load: Load, array: np.ndarray) -> None:
    session = load("g (string[N] x) => (string[N] y) { y = Identity(x) }")
    session.run({"x": np.array(["a"] * len(array), dtype=object)})
    with pytest.raises(runtimes.InvalidInput, match="string\\[N\\] is wanted"):
        session.run({"x": array})


def test_numpys_own_strings_are_taken(load: Load) -> None:
    session = load("g (string[N] x) => (string[N] y) { y = Identity(x) }")
    assert session.run({"x": np.array(["a", "bcd"])})["y"].tolist() == ["a", "bcd"]


def test_memmap_is_taken(load: Load, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.full((2, 3), -1, "float32"))
    session = load(RELU)
    assert (session.run({"x": np.load(tmp_path / "x.npy", mmap_mode="r")})["y"] == 0).all()


def test_many_shapes(load: Load) -> None:
    session = load(RELU)
    for batch in range(400):
        assert session.run({"x": np.ones((batch, 3), "float32")})["y"].shape == (batch, 3)
    assert len(session._check._accepted) <= 256  # type: ignore[attr-defined]  # a service sees any number


@pytest.mark.parametrize("kind", ["bfloat16", "float8e4m3fn", "float8e5m2"])
def test_types_that_numpy_lacks(load: Load, kind: str) -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    dtype = np.dtype(getattr(ml_dtypes, kind.replace("float8", "float8_")))
    session = load(f"g ({kind}[N, 2] x, float[N] z) => ({kind}[N, 2] y, float[N] w) {{ y = Identity(x)  w = Neg(z) }}")
    assert session.inputs[0].dtype == dtype.name
    x = np.array([[1, -2], [0.5, 4], [8, 0]], dtype)
    z = np.ones(3, "float32")
    for feeds_x in (x, np.asfortranarray(x), x[:0]):
        outputs = session.run({"x": feeds_x, "z": z[: len(feeds_x)]})
        assert outputs["y"].dtype == dtype
        assert np.array_equal(outputs["y"].view("uint8"), np.ascontiguousarray(feeds_x).view("uint8"))
        assert (outputs["w"] == -1).all()
    with pytest.raises(runtimes.InvalidInput, match="is wanted"):
        session.run({"x": x.view("uint8"), "z": z})
    binding = session.bind({"x": (3, 2), "z": (3,)})
    binding.inputs["x"][...] = x
    binding.run()
    assert np.array_equal(binding.outputs["y"].astype("float32"), x.astype("float32"))


def test_a_failing_run_is_told_and_leaves_the_session_whole(load: Load, capfd: pytest.CaptureFixture[str]) -> None:
    session = load("g (float[N] x, int64[1] shape) => (float[M] y) { y = Reshape(x, shape) }")
    with pytest.raises(runtimes.RunFailed):
        session.run({"x": np.ones(4, "float32"), "shape": np.array([3])})
    assert session.run({"x": np.ones(4, "float32"), "shape": np.array([4])})["y"].shape == (4,)
    assert capfd.readouterr().err == ""


def test_bind(load: Load) -> None:
    session = load(PAIR)
    binding = session.bind({"a": (2, 3), "b": (2, 3)})
    arrays = {**binding.inputs, **binding.outputs}
    assert {name: (a.shape, a.dtype.name) for name, a in arrays.items()} == {
        name: ((2, 3), "float32") for name in "aby"
    }
    for value in (1.0, 2.0):
        binding.inputs["a"][...] = value
        binding.inputs["b"][...] = 10
        binding.run()
        assert (binding.outputs["y"] == value + 10).all()
    assert all(array is {**binding.inputs, **binding.outputs}[name] for name, array in arrays.items())


@pytest.mark.parametrize(
    ("shapes", "said"),
    [
        ({}, "no 'a', 'b'"),
        ({"a": (2, 3), "b": (2, 4)}, "dimension 1 is 4 in place of 3"),
        ({"a": (2, 3), "b": (3, 3)}, "'N' is 2 before"),
        ({"a": (2, 3), "b": (2,)}, "1 dimensions in place of 2"),
        ({"a": (-1, 3), "b": (-1, 3)}, "not a shape"),
        ({"a": (1.5, 3), "b": (1, 3)}, "not a shape"),
    ],
)
def test_bind_refuses(load: Load, shapes: dict[str, tuple[int, ...]], said: str) -> None:
    with pytest.raises(runtimes.InvalidInput, match=re.escape(said)):
        load(PAIR).bind(shapes)


def test_bind_finds_shapes_that_are_not_declared(load: Load) -> None:
    session = load("g (float[N, 3] x) => (float[M] y) { m = Constant<value_ints = [-1]>()  y = Reshape(x, m) }")
    binding = session.bind({"x": (4, 3)})
    binding.inputs["x"][...] = np.arange(12).reshape(4, 3)
    binding.run()
    assert binding.outputs["y"].tolist() == list(range(12))


def test_bind_refuses_shapes_that_depend_on_data(load: Load) -> None:
    with pytest.raises(runtimes.InvalidInput, match="depends on the data"):
        load("g (float[N] x) => (int64[1, M] y) { y = NonZero(x) }").bind({"x": (4,)})


def test_bind_zero_size(load: Load) -> None:
    binding = load(RELU).bind({"x": (0, 3)})
    binding.run()
    assert binding.outputs["y"].shape == (0, 3)


def test_bind_strings(load: Load) -> None:
    with pytest.raises(runtimes.InvalidInput, match="strings"):
        load("g (string[N] x) => (string[N] y) { y = Identity(x) }").bind({"x": (1,)})


def test_closed(load: Load) -> None:
    session = load(RELU)
    binding = session.bind({"x": (1, 3)})
    session.close()
    session.close()
    for use in (
        lambda: session.run({"x": np.zeros((1, 3), "float32")}),
        lambda: session.bind({"x": (1, 3)}),
        binding.run,
    ):
        with pytest.raises(runtimes.SessionClosed):
            use()
    with load(RELU) as other:
        other.run({"x": np.zeros((1, 3), "float32")})
    with pytest.raises(runtimes.SessionClosed):
        other.run({"x": np.zeros((1, 3), "float32")})


def test_eight_threads(load: Load) -> None:
    """Eight threads, each with data and shapes of its own, for a second: all get their own results."""
    session = load("g (float[N, 64] x, float[64, 64] w) => (float[N, 64] y) { p = MatMul(x, w)  y = Relu(p) }")
    rng = np.random.default_rng(0)
    w = rng.integers(-3, 4, (64, 64)).astype("float32")  # small whole numbers: any order of sums is exact
    stop = time.monotonic() + 1
    wrong: list[object] = []
    rounds = [0] * 8

    def work(index: int) -> None:
        x = np.random.default_rng(index).integers(-3, 4, (index + 1, 64)).astype("float32")
        wanted = np.maximum(x @ w, 0)
        try:
            while time.monotonic() < stop and not wrong:
                if not np.array_equal(session.run({"x": x, "w": w})["y"], wanted):
                    wrong.append(index)
                rounds[index] += 1
        except runtimes.Error as error:
            wrong.append(error)

    _in_threads(work)
    assert wrong == []
    assert min(rounds) > 0


def test_close_while_others_run(load: Load) -> None:
    """Every call ends with the right result or with SessionClosed, and after close all end with that."""
    session = load("g (float[N, 64] x, float[64, 64] w) => (float[N, 64] y) { y = MatMul(x, w) }")
    feeds = {"x": np.ones((32, 64), "float32"), "w": np.ones((64, 64), "float32")}
    started = threading.Barrier(9)
    ends: list[object] = []

    def work(index: int) -> None:
        started.wait()
        try:
            while True:
                if not (session.run(feeds)["y"] == 64).all():
                    ends.append("wrong")
                    return
        except runtimes.Error as error:
            ends.append(type(error))

    threads = [threading.Thread(target=work, args=(index,)) for index in range(8)]
    for thread in threads:
        thread.start()
    started.wait()
    time.sleep(0.05)
    session.close()
    for thread in threads:
        thread.join(30)
    assert ends == [runtimes.SessionClosed] * 8


def _in_threads(work: Callable[[int], None]) -> None:
    threads = [threading.Thread(target=work, args=(index,)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)


def _resident() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no VmRSS")


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs /proc to read the memory in use")
@pytest.mark.parametrize("backend", BACKENDS)
def test_load_and_close_leaves_nothing(backend: str, tmp_path: Path) -> None:
    """300 cycles of a model with 1 MiB of weights: what one cycle keeps would be 300 MiB."""
    file = save_model(
        tmp_path / "m.onnx",
        "g (float[N, 512] x) => (float[N, 512] y) { s = Constant<value_ints = [512, 512]>() "
        " w = ConstantOfShape<value = float[1] {0.5}>(s)  y = MatMul(x, w) }",
    )
    compiled = runtimes.compile(file, backend, tmp_path / "c")
    feeds = {"x": np.ones((1, 512), "float32")}

    def cycle() -> None:
        with runtimes.backend(backend).load(compiled) as session:
            session.run(feeds)
            session.bind({"x": (1, 512)}).run()

    for _ in range(30):
        cycle()
    gc.collect()
    before = _resident()
    for _ in range(300 if backend == "ort-cpu" else 60):
        cycle()
    gc.collect()
    assert _resident() - before < 30 << 20


def test_results_can_be_left_on_the_device(load: Load) -> None:
    session = load(RELU)
    feeds = {"x": np.array([[-1, 2, 3]], "float32")}
    assert np.array_equal(np.from_dlpack(session.run(feeds, outputs="device")["y"]), [[0, 2, 3]])
    with pytest.raises(runtimes.InvalidInput, match="'host' or 'device'"):
        session.run(feeds, outputs="cpu")  # type: ignore[arg-type]
