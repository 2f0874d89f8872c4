"""The contract of ``runtimes.Session`` as tests, for every backend there is: ours, and those of other distributions.

A backend is held to it by a class in a test file (pytest, onnx, numpy and ml_dtypes are wanted)::

    import pytest

    pytest.register_assert_rewrite("runtimes.testing")   # failed assertions then show their values
    from runtimes.testing import RuntimeContract

    class TestMine(RuntimeContract):
        target = "mine"
        cannot = {"echo-string": "has no strings"}

``cannot`` is the list of what the runtime is unable to do. Each entry is held true as well: the test must end in a
``runtimes.Error`` or in a wrong result, and fails where the runtime has learned it meanwhile. Where the backend does
not work on this machine, the whole class is skipped by name.
"""

from __future__ import annotations

import gc
import os
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

import runtimes
from runtimes._testing_cases import CASES, Case

__all__ = ["CASES", "Case", "Load", "RuntimeContract", "check", "save_model"]

#: What the fixture ``load`` is: a graph in ONNX text becomes a session.
Load = Callable[[str], runtimes.Session]

_RELU = "g (float[N, 3] x) => (float[N, 3] y) { y = Relu(x) }"
_PAIR = "g (float[N, 3] a, float[N, 3] b) => (float[N, 3] y) { y = Add(a, b) }"


def save_model(path: Path, graph: str, *, opset: int = 19, ir_version: int = 9) -> Path:
    """Writes the model of one graph in ONNX's text form (https://github.com/onnx/onnx/blob/main/docs/Syntax.md)."""
    import onnx

    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(onnx.parser.parse_model(f'<ir_version: {ir_version}, opset_import: ["": {opset}]>\n{graph}'), path)
    return path


def check(case: Case, outputs: Mapping[str, np.ndarray]) -> None:
    """Asserts that outputs are a case's: names in order, dtype, shape, values."""
    assert list(outputs) == list(case.wanted)
    for name, wanted in case.wanted.items():
        given = outputs[name]
        assert type(given) is np.ndarray
        assert given.dtype == wanted.dtype
        assert given.shape == wanted.shape
        if case.bound:
            assert np.abs(given - wanted).max() <= case.bound * np.abs(wanted).max()
        else:
            assert np.array_equal(given, wanted)


class RuntimeContract:
    """What every backend has to do. Subclass it as ``Test…`` and set ``target``.

    Attributes:
        target: as ``runtimes.load`` takes it.
        cannot: what the runtime is unable to do, and why: the name of a test without ``test_``, or the id of one
            of its parameters (such as a case's name), to a sentence.
        duration_s: how long eight threads run at once.
        cycles: how often a model is loaded and closed.
    """

    target: ClassVar[str]
    cannot: ClassVar[Mapping[str, str]] = {}
    duration_s: ClassVar[float] = 10.0
    cycles: ClassVar[int] = 1000

    def compile_options(self, model: Path) -> Any:
        """Options to compile a model with, such as profiles for its dynamic dimensions. Override it where needed."""
        return None

    def load_options(self) -> Any:
        """Options to load with. Override it where needed."""
        return None

    @pytest.fixture(autouse=True)
    def _absent_or_unable(self, request: pytest.FixtureRequest) -> None:
        target = runtimes.Target.parse(self.target)
        state = runtimes.backend(target.runtime).can_run(target)
        if not state.available:
            pytest.skip(f"{self.target}: {state.reason}")
        for name in _names(request.node):
            if reason := self.cannot.get(name):
                mark = pytest.mark.xfail(raises=(runtimes.Error, AssertionError), strict=True, reason=reason)
                request.applymarker(mark)

    @pytest.fixture
    def load(self, tmp_path: Path) -> Iterator[Load]:
        """Compiles a graph and loads it."""
        made: list[runtimes.Session] = []

        def load(graph: str) -> runtimes.Session:
            compiled = self._compile(graph, tmp_path / str(len(made)))
            made.append(runtimes.backend(compiled.target.runtime).load(compiled, options=self.load_options()))
            return made[-1]

        yield load
        for session in made:
            session.close()

    def _compile(self, graph: str, folder: Path) -> runtimes.Compiled:
        file = save_model(folder.with_suffix(".onnx"), graph)
        return runtimes.compile(file, self.target, folder, options=self.compile_options(file))

    def test_cannot_names_what_is_tested(self, request: pytest.FixtureRequest) -> None:
        assert request.cls is not None
        collected = {
            name for item in request.session.items if getattr(item, "cls", None) is request.cls for name in _names(item)
        }
        if len(collected) < len(CASES):
            pytest.skip("only a part of the contract was selected")
        unknown = sorted(set(self.cannot) - collected)
        assert not unknown, f"cannot names what is no test: {', '.join(unknown)}"

    @pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
    def test_case(self, load: Load, case: Case) -> None:
        session = load(case.graph)
        before = {name: array.copy() for name, array in case.feeds.items()}
        for _ in range(2):  # first through the thorough check, then through what it remembers
            check(case, session.run(case.feeds))
        for name, array in case.feeds.items():
            assert np.array_equal(array, before[name])

    def test_a_device_that_is_not_there_is_refused(self, tmp_path: Path) -> None:
        target = f"{runtimes.Target.parse(self.target).runtime}:no_such_device"
        with pytest.raises(runtimes.Error, match="no_such_device"):
            runtimes.load(save_model(tmp_path / "m.onnx", _RELU), target=target)

    def test_outputs_are_new_each_time(self, load: Load) -> None:
        session = load(_RELU)
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
    def test_wrong_inputs_are_shown(self, load: Load, feeds: object, said: str) -> None:
        session = load(_RELU)
        good = {"x": np.ones((1, 3), "float32")}
        session.run(good)  # what is remembered must not let anything else in
        with pytest.raises(runtimes.InvalidInput) as caught:
            session.run(feeds)  # type: ignore[arg-type]
        assert re.search(said, str(caught.value), re.DOTALL), str(caught.value)
        assert (session.run(good)["y"] == 1).all()

    def test_an_accepted_shape_of_one_input_does_not_excuse_another(self, load: Load) -> None:
        session = load(_PAIR)
        one, two = np.ones((1, 3), "float32"), np.ones((2, 3), "float32")
        assert session.run({"a": one, "b": one})["y"].shape == (1, 3)
        assert session.run({"a": two, "b": two})["y"].shape == (2, 3)
        with pytest.raises(runtimes.InvalidInput, match="'N' is 1 before"):
            session.run({"a": one, "b": two})

    def test_names_that_stand_for_no_size_are_not_compared(self, load: Load) -> None:
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
    def test_only_text_is_a_string(self, load: Load, array: np.ndarray) -> None:
        session = load("g (string[N] x) => (string[N] y) { y = Identity(x) }")
        session.run({"x": np.array(["a"] * len(array), dtype=object)})
        with pytest.raises(runtimes.InvalidInput, match="string\\[N\\] is wanted"):
            session.run({"x": array})

    def test_numpys_own_strings_are_taken(self, load: Load) -> None:
        session = load("g (string[N] x) => (string[N] y) { y = Identity(x) }")
        assert session.run({"x": np.array(["a", "bcd"])})["y"].tolist() == ["a", "bcd"]

    def test_memmap_is_taken(self, load: Load, tmp_path: Path) -> None:
        np.save(tmp_path / "x.npy", np.full((2, 3), -1, "float32"))
        session = load(_RELU)
        assert (session.run({"x": np.load(tmp_path / "x.npy", mmap_mode="r")})["y"] == 0).all()

    def test_many_shapes(self, load: Load) -> None:
        session = load(_RELU)
        for batch in range(400):
            assert session.run({"x": np.ones((batch, 3), "float32")})["y"].shape == (batch, 3)

    @pytest.mark.parametrize("kind", ["bfloat16", "float8e4m3fn", "float8e5m2"])
    def test_types_that_numpy_lacks(self, load: Load, kind: str) -> None:
        ml_dtypes = pytest.importorskip("ml_dtypes")
        dtype = np.dtype(getattr(ml_dtypes, kind.replace("float8", "float8_")))
        session = load(
            f"g ({kind}[N, 2] x, float[N] z) => ({kind}[N, 2] y, float[N] w) {{ y = Identity(x)  w = Neg(z) }}"
        )
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

    def test_bind(self, load: Load) -> None:
        session = load(_PAIR)
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
    def test_bind_refuses(self, load: Load, shapes: dict[str, tuple[int, ...]], said: str) -> None:
        with pytest.raises(runtimes.InvalidInput, match=re.escape(said)):
            load(_PAIR).bind(shapes)

    def test_bind_finds_shapes_that_are_not_declared(self, load: Load) -> None:
        session = load("g (float[N, 3] x) => (float[M] y) { m = Constant<value_ints = [-1]>()  y = Reshape(x, m) }")
        binding = session.bind({"x": (4, 3)})
        binding.inputs["x"][...] = np.arange(12).reshape(4, 3)
        binding.run()
        assert binding.outputs["y"].tolist() == list(range(12))

    def test_bind_refuses_shapes_that_depend_on_data(self, load: Load) -> None:
        with pytest.raises(runtimes.InvalidInput, match="depends on the data"):
            load("g (float[N] x) => (int64[1, M] y) { y = NonZero(x) }").bind({"x": (4,)})

    def test_bound_results_of_another_shape_are_told(self, load: Load) -> None:
        """The declared shape, or a trial, may be wrong about a result that depends on data: nothing old may be left."""
        session = load("g (float[N] x) => (float[N] y) { c = Cast<to = 9>(x)  y = Compress<axis = 0>(x, c) }")
        try:
            binding = session.bind({"x": (4,)})
        except runtimes.InvalidInput:
            return  # it did not trust what is declared, and tried: that is as good
        for value in (5, 7):
            binding.inputs["x"][...] = value
            binding.run()
            assert (binding.outputs["y"] == value).all()
            binding.inputs["x"][0] = 0
            with pytest.raises(runtimes.RunFailed):
                binding.run()

    def test_bind_zero_size(self, load: Load) -> None:
        binding = load(_RELU).bind({"x": (0, 3)})
        binding.run()
        assert binding.outputs["y"].shape == (0, 3)

    def test_bind_strings(self, load: Load) -> None:
        with pytest.raises(runtimes.InvalidInput, match="strings"):
            load("g (string[N] x) => (string[N] y) { y = Identity(x) }").bind({"x": (1,)})

    @pytest.mark.parametrize(
        "graph",
        [
            _RELU,
            "g (float[N, 3] x, string[N, 2] s, int64 n) => (float[N, 3] y, string[N, 2] t, int64 m) "
            "{ y = Relu(x)  t = Identity(s)  m = Identity(n) }",
        ],
        ids=["numbers", "and-strings"],
    )
    def test_trimmed(self, load: Load, graph: str, capfd: pytest.CaptureFixture[str]) -> None:
        """It gives back what is kept, says nothing, and the session runs on as before."""
        session = load(graph)
        x = np.arange(-300, 300, dtype="float32").reshape(200, 3)
        feeds = {"x": x, "s": np.full((200, 2), "a", object), "n": np.array(1)}
        feeds = {spec.name: feeds[spec.name] for spec in session.inputs}
        capfd.readouterr()
        session.trim()
        for _ in range(3):
            assert np.array_equal(session.run(feeds)["y"], np.maximum(x, 0))
            session.trim()
            session.trim()
        assert capfd.readouterr() == ("", "")

    def test_trimmed_while_others_run(self, load: Load) -> None:
        session = load("g (float[N, 64] x, float[64, 64] w) => (float[N, 64] y) { p = MatMul(x, w)  y = Relu(p) }")
        feeds = {"x": np.ones((64, 64), "float32"), "w": np.ones((64, 64), "float32")}
        stop = threading.Event()
        ends: list[object] = []

        def work() -> None:
            try:
                while not stop.is_set():
                    if not (session.run(feeds)["y"] == 64).all():
                        ends.append("wrong")
                        return
                ends.append(None)
            except runtimes.Error as error:
                ends.append(error)

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for _ in range(100):
            session.trim()
        stop.set()
        for thread in threads:
            thread.join(30)
        assert ends == [None] * 4

    def test_closed(self, load: Load) -> None:
        session = load(_RELU)
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
        with load(_RELU) as other:
            other.run({"x": np.zeros((1, 3), "float32")})
        with pytest.raises(runtimes.SessionClosed):
            other.run({"x": np.zeros((1, 3), "float32")})

    def test_close_while_others_run(self, load: Load) -> None:
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

    def test_results_can_be_left_on_the_device(self, load: Load) -> None:
        session = load(_RELU)
        feeds = {"x": np.array([[-1, 2, 3]], "float32")}
        assert np.array_equal(np.from_dlpack(session.run(feeds, outputs="device")["y"]), [[0, 2, 3]])
        with pytest.raises(runtimes.InvalidInput, match="'host' or 'device'"):
            session.run(feeds, outputs="cpu")  # type: ignore[arg-type]

    def test_specs(self, load: Load) -> None:
        session = load(
            "g (float[N, 3, 2] a, int64 s) => (float[N, 3, 2] y, int64 u) "
            "{ f = Cast<to = 1>(s)  y = Add(a, f)  u = Identity(s) }"
        )
        assert session.inputs == (
            runtimes.TensorSpec("a", "float32", ("N", 3, 2)),
            runtimes.TensorSpec("s", "int64", ()),
        )
        assert session.outputs == (
            runtimes.TensorSpec("y", "float32", ("N", 3, 2)),
            runtimes.TensorSpec("u", "int64", ()),
        )
        assert session.target == runtimes.Target.parse(self.target)
        assert session.info["target"] == self.target

    def test_a_string_in_and_out_is_in_the_specs(self, load: Load) -> None:
        session = load("g (string[?] t) => (string[?] u) { u = Identity(t) }")
        assert session.inputs == (runtimes.TensorSpec("t", "string", (None,)),)

    def test_a_failing_run_is_told_and_leaves_the_session_whole(
        self, load: Load, capfd: pytest.CaptureFixture[str]
    ) -> None:
        session = load("g (float[N] a, float[M] b) => (float[K] y) { y = Add(a, b) }")
        two, three = np.ones(2, "float32"), np.ones(3, "float32")
        capfd.readouterr()
        for _ in range(3):
            with pytest.raises(runtimes.RunFailed):
                session.run({"a": two, "b": three})
            assert session.run({"a": three, "b": three})["y"].tolist() == [2, 2, 2]
        assert capfd.readouterr().err == ""

    def test_eight_threads(self, load: Load) -> None:
        """Eight threads at once, each with data and shapes of its own: all get their own results, to the last bit."""
        session = load("g (float[N, 64] x, float[64, 64] w) => (float[N, 64] y) { p = MatMul(x, w)  y = Relu(p) }")
        rng = np.random.default_rng(0)
        w = rng.integers(-3, 4, (64, 64)).astype("float32")  # small whole numbers: any order of sums is exact
        stop = time.monotonic() + self.duration_s
        wrong: list[object] = []
        rounds = [0] * 8

        def work(index: int) -> None:
            x = np.random.default_rng(index).integers(-3, 4, (index + 1, 64)).astype("float32")
            wanted = np.maximum(x @ w, 0)
            try:
                while not (wrong or (rounds[index] and time.monotonic() > stop)):
                    if not np.array_equal(session.run({"x": x, "w": w})["y"], wanted):
                        wrong.append(index)
                    rounds[index] += 1
            except runtimes.Error as error:
                wrong.append(error)

        threads = [threading.Thread(target=work, args=(index,)) for index in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(self.duration_s + 60)
        assert not any(thread.is_alive() for thread in threads)
        assert wrong == []
        assert min(rounds) > 0

    @pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs /proc to read the memory in use")
    def test_load_and_close_leaves_nothing(self, tmp_path: Path) -> None:
        """A model with 256 KiB of weights: what one cycle keeps of it would be 256 MiB after a thousand."""
        compiled = self._compile(
            "g (float[N, 256] x) => (float[N, 256] y) { s = Constant<value_ints = [256, 256]>() "
            " w = ConstantOfShape<value = float[1] {0.5}>(s)  y = MatMul(x, w) }",
            tmp_path / "c",
        )
        backend, options = runtimes.backend(compiled.target.runtime), self.load_options()
        feeds = {"x": np.ones((1, 256), "float32")}

        def cycle() -> None:
            with backend.load(compiled, options=options) as session:
                session.run(feeds)
                session.bind({"x": (1, 256)}).run()

        # The first cycles fill what the runtime and the allocator keep for good.
        for _ in range(self.cycles // 10):
            cycle()
        gc.collect()
        before = _resident()
        for _ in range(self.cycles):
            cycle()
        gc.collect()
        assert _resident() - before < 24 << 20


def _names(item: Any) -> tuple[str, ...]:
    """What a test is called in ``cannot``: its function's name without ``test_``, and the id of its parameter."""
    function = item.function.__name__.removeprefix("test_")
    return (function, item.callspec.id) if hasattr(item, "callspec") else (function,)


def _resident() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no VmRSS")
