"""Datasets of every kind, what they refuse, and seeded inputs."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from runtimes import TensorSpec
from toolchain.data import Dataset, open_dataset, seeded_inputs
from toolchain.errors import DataError
from toolchain.preprocessing import ImagePreprocessing, open_image, preprocess

X = TensorSpec("x", "float32", ("batch", 3))
IDS = TensorSpec("ids", "int64", ("batch", "sequence"))
MASK = TensorSpec("mask", "int64", ("batch", "sequence"))
PIXELS = TensorSpec("pixel_values", "float32", ("batch", 3, 4, 4))
PLAIN = ImagePreprocessing(size=(4, 4), resize=(4, 4), rescale=1.0)


def _rows(dataset: Dataset, name: str = "x") -> list[list[float]]:
    return [row.tolist() for batch in dataset for row in batch.inputs[name]]


def _labels(dataset: Dataset) -> list[int]:
    return [label for batch in dataset for label in (batch.labels if batch.labels is not None else ())]


@pytest.fixture
def x(tmp_path: Path) -> np.ndarray:
    array = np.arange(21, dtype=np.float32).reshape(7, 3)
    np.save(tmp_path / "x.npy", array)
    np.savez(tmp_path / "x.npz", x=array, labels=np.arange(7, dtype=np.uint8))
    return array


# --- arrays


def test_npz_in_batches_with_labels(tmp_path: Path, x: np.ndarray) -> None:
    dataset = open_dataset(str(tmp_path / "x.npz"), inputs=[X], batch_size=3)
    assert [len(batch.inputs["x"]) for batch in dataset] == [3, 3, 1]
    assert _rows(dataset) == x.tolist()  # a second time through, from the start
    assert _labels(dataset) == list(range(7))
    assert next(iter(dataset)).labels.dtype == np.int64  # type: ignore[union-attr]
    assert dataset.describe() == {
        "kind": "npz",
        "name": "x.npz",
        "samples": 7,
        "labelled": True,
        "classes": None,
        "skipped": 0,
        "dropped": 0,
    }


def test_npy_feeds_the_only_input(tmp_path: Path, x: np.ndarray) -> None:
    dataset = open_dataset(str(tmp_path / "x.npy"), inputs=[X])
    assert _rows(dataset) == x.tolist()
    assert dataset.labelled is False
    assert _labels(dataset) == []


def test_limit_takes_samples_from_everywhere(tmp_path: Path, x: np.ndarray) -> None:
    dataset = open_dataset(str(tmp_path / "x.npz"), inputs=[X], limit=3)
    assert _labels(dataset) == [0, 2, 4]
    assert dataset.len_hint == 3
    assert _labels(open_dataset(str(tmp_path / "x.npz"), inputs=[X], limit=99)) == list(range(7))


def test_a_fixed_batch_is_kept_and_the_rest_dropped_and_counted(tmp_path: Path, x: np.ndarray) -> None:
    fixed = TensorSpec("x", "float32", (2, 3))
    dataset = open_dataset(str(tmp_path / "x.npy"), inputs=[fixed], batch_size=5)
    assert [batch.inputs["x"].shape for batch in dataset] == [(2, 3)] * 3
    assert (dataset.len_hint, dataset.dropped) == (6, 1)
    with pytest.raises(DataError, match="7 samples, but the model takes exactly 8"):
        open_dataset(str(tmp_path / "x.npy"), inputs=[TensorSpec("x", "float32", (8, 3))])


def test_label_offset(tmp_path: Path, x: np.ndarray) -> None:
    assert _labels(open_dataset(str(tmp_path / "x.npz"), inputs=[X], label_offset=1)) == list(range(1, 8))


ARRAYS = {"ids": np.zeros((4, 5), np.int64), "mask": np.zeros((4, 5), np.int64)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mask": None}, "no array for input 'mask'"),
        ({"extra": np.zeros(4)}, "no input 'extra'"),
        ({"mask": np.zeros((4, 5), np.int32)}, "another dtype: mask is int32"),
        ({"mask": np.zeros((4,), np.int64)}, "another rank"),
        ({"mask": np.zeros((4, 6), np.int64)}, "axis 1 is 6, not 5"),
        ({"mask": np.zeros((3, 5), np.int64)}, "different numbers of samples: ids 4, mask 3"),
        ({"labels": np.zeros(3, np.int64)}, "different numbers of samples: ids 4, mask 4, labels 3"),
        ({"labels": np.zeros(4)}, "labels are float64"),
        ({"ids": np.zeros((0, 5), np.int64), "mask": np.zeros((0, 5), np.int64)}, "no samples"),
    ],
)
def test_arrays_that_do_not_fit(tmp_path: Path, change: dict[str, np.ndarray | None], message: str) -> None:
    path = tmp_path / "bad.npz"
    np.savez(path, **{k: v for k, v in (ARRAYS | change).items() if v is not None})  # type: ignore[arg-type]
    with pytest.raises(DataError) as caught:
        open_dataset(str(path), inputs=[IDS, MASK])
    assert message in caught.value.what
    assert "bad.npz" in str(caught.value.where)


def test_an_input_that_is_called_labels_is_an_input(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", labels=np.ones((2, 3), np.float32))
    dataset = open_dataset(str(tmp_path / "a.npz"), inputs=[TensorSpec("labels", "float32", (None, 3))])
    assert dataset.labelled is False
    assert _rows(dataset, "labels") == [[1, 1, 1]] * 2


def _write_pickle(path: Path) -> None:
    with path.open("wb") as stream:
        np.save(stream, np.array([{}], dtype=object), allow_pickle=True)


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("objects.npy", _write_pickle),
        ("empty.npz", lambda path: path.write_bytes(b"")),
        ("cut.npz", lambda path: path.write_bytes(path.with_name("x.npz").read_bytes()[:200])),
        ("text.npy", lambda path: path.write_text("no array")),
        ("absent.npz", lambda path: None),
        ("table.csv", lambda path: path.write_text("1,2")),
    ],
)
def test_unreadable_files_are_named(tmp_path: Path, x: np.ndarray, name: str, write: Callable[[Path], object]) -> None:
    write(tmp_path / name)
    with pytest.raises(DataError) as caught:
        open_dataset(str(tmp_path / name), inputs=[X])
    assert name in str(caught.value)


def test_npy_for_two_inputs(tmp_path: Path, x: np.ndarray) -> None:
    with pytest.raises(DataError, match="one array for a model with 2 inputs"):
        open_dataset(str(tmp_path / "x.npy"), inputs=[IDS, MASK])


# --- images


def _save(path: Path, shade: int) -> None:
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (6, 5), (shade, 0, 0)).save(path)


@pytest.fixture
def classes(tmp_path: Path) -> Path:
    pytest.importorskip("PIL")
    root = tmp_path / "images"
    for c, name in enumerate(("cat", "dog", "owl")):
        for i in range(4):
            _save(root / name / f"{i}.png", c * 10 + i)
    (root / "cat" / ".DS_Store").write_text("")
    (root / "cat" / "notes.txt").write_text("")
    (root / ".git").mkdir()
    return root


def _shades(dataset: Dataset) -> list[int]:
    return [int(image[0, 0, 0]) for batch in dataset for image in batch.inputs["pixel_values"]]


def test_class_folders_in_sorted_order(classes: Path) -> None:
    dataset = open_dataset(str(classes), inputs=[PIXELS], preprocessing=PLAIN, batch_size=5, class_count=3)
    assert _shades(dataset) == [0, 1, 2, 3, 10, 11, 12, 13, 20, 21, 22, 23]
    assert _labels(dataset) == [0] * 4 + [1] * 4 + [2] * 4
    assert [len(batch.inputs["pixel_values"]) for batch in dataset] == [5, 5, 2]
    described = dataset.describe()
    assert (described["classes"], described["skipped"], described["samples"]) == (3, 1, 12)
    assert str(classes.parent) not in json.dumps(described)


def test_limit_sees_every_class(classes: Path) -> None:
    dataset = open_dataset(str(classes), inputs=[PIXELS], preprocessing=PLAIN, limit=3, class_count=3)
    assert _labels(dataset) == [0, 1, 2]


@pytest.mark.parametrize(
    ("where", "table", "wanted"),
    [
        ("images/classes.json", {"cat": 7, "dog": 5, "owl": 900}, {7, 5, 900}),
        ("wnid_to_index.json", {"cat": 1, "dog": 2, "owl": 3, "other": 0}, {1, 2, 3}),
        ("classes.json", ["owl", "emu", "dog", "cat"], {3, 2, 0}),
        (None, ["owl", "dog", "cat"], {0, 1, 2}),
    ],
)
def test_where_labels_come_from(classes: Path, where: str | None, table: object, wanted: set[int]) -> None:
    names = None
    if where is None:
        names = table
    else:
        (classes.parent / where).write_text(json.dumps(table))
    dataset = open_dataset(
        str(classes), inputs=[PIXELS], preprocessing=PLAIN, class_names=names, class_count=1000  # type: ignore[arg-type]
    )  # fmt: skip
    labels = dict(zip(_shades(dataset), _labels(dataset), strict=True))
    index = table if isinstance(table, dict) else {name: i for i, name in enumerate(table)}  # type: ignore[arg-type, var-annotated]
    assert labels[0] == index["cat"]
    assert labels[10] == index["dog"]
    assert labels[20] == index["owl"]
    assert set(labels.values()) == wanted


def test_folders_that_are_numbers_are_labels(tmp_path: Path) -> None:
    for name in ("2", "10"):
        _save(tmp_path / "n" / name / "a.png", int(name))
    dataset = open_dataset(str(tmp_path / "n"), inputs=[PIXELS], preprocessing=PLAIN, class_count=1000)
    assert dict(zip(_shades(dataset), _labels(dataset), strict=True)) == {2: 2, 10: 10}


def test_unknown_classes_are_not_guessed(classes: Path) -> None:
    with pytest.raises(DataError, match="which class is the folder 'cat'") as caught:
        open_dataset(str(classes), inputs=[PIXELS], preprocessing=PLAIN, class_count=1000)
    assert "classes.json" in str(caught.value.hint)
    (classes / "classes.json").write_text('{"cat": 1, "dog": 2}')
    with pytest.raises(DataError, match="which class is the folder 'owl'"):
        open_dataset(str(classes), inputs=[PIXELS], preprocessing=PLAIN, class_count=1000)
    (classes / "classes.json").write_text('{"cat": -1}')
    with pytest.raises(DataError, match="not a table of classes"):
        open_dataset(str(classes), inputs=[PIXELS], preprocessing=PLAIN)


def test_flat_folder_has_no_labels_and_keeps_the_order(tmp_path: Path) -> None:
    for i in range(9):
        _save(tmp_path / "flat" / f"{i}.PNG", i * 20)
    dataset = open_dataset(str(tmp_path / "flat"), inputs=[PIXELS], preprocessing=PLAIN, batch_size=2)
    assert _shades(dataset) == [i * 20 for i in range(9)]
    assert all(batch.labels is None for batch in dataset)
    first = next(iter(dataset)).inputs["pixel_values"][1]
    np.testing.assert_array_equal(first, preprocess(open_image(tmp_path / "flat" / "1.PNG"), PLAIN))


def test_an_unreadable_image_is_named_when_its_turn_comes(classes: Path) -> None:
    (classes / "dog" / "2.png").write_bytes(b"\x89PNG\r\n\x1a\nrubbish")
    dataset = open_dataset(str(classes), inputs=[PIXELS], preprocessing=PLAIN, class_count=3, batch_size=4)
    batches = iter(dataset)
    assert len(next(batches).inputs["pixel_values"]) == 4
    with pytest.raises(DataError) as caught:
        list(batches)
    assert os.path.join("dog", "2.png") in str(caught.value.where)


@pytest.mark.parametrize(
    ("inputs", "spec", "message"),
    [
        ([PIXELS], None, "how to preprocess"),
        ([IDS, MASK], PLAIN, "feeds one input"),
        ([TensorSpec("x", "float32", ("n", 3, 5, 5))], PLAIN, "axis 2 is 4, not 5"),
        ([TensorSpec("x", "float32", ("n", 4, 4, 3))], PLAIN, "axis 1 is 3, not 4"),
        ([TensorSpec("x", "uint8", ("n", 3, 4, 4))], PLAIN, "another dtype"),
    ],
)
def test_images_that_do_not_fit(
    classes: Path, inputs: list[TensorSpec], spec: ImagePreprocessing | None, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        open_dataset(str(classes), inputs=inputs, preprocessing=spec, class_count=3)


def test_folders_without_images(tmp_path: Path, classes: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "a.txt").write_text("")
    with pytest.raises(DataError, match=r"no images \(1 other files\)"):
        open_dataset(str(tmp_path / "empty"), inputs=[PIXELS], preprocessing=PLAIN)
    _save(classes / "stray.png", 1)
    with pytest.raises(DataError, match="side by side"):
        open_dataset(str(classes), inputs=[PIXELS], preprocessing=PLAIN, class_count=3)


def test_real_images_and_their_table(assets: Path) -> None:
    spec = TensorSpec("pixel_values", "float32", ("batch", 3, 224, 224))
    lite = ImagePreprocessing(size=(224, 224), resize=256, crop="center")
    dataset = open_dataset(str(assets / "imagenet" / "val250"), inputs=[spec], preprocessing=lite, limit=20)
    assert sorted(set(_labels(dataset))) == [0, 217, 482, 491, 497, 566, 569, 571, 574, 701]
    assert len(_labels(dataset)) == 20


# --- python


def _script(path: Path, body: str) -> str:
    file = path / "samples.py"
    file.write_text("import numpy as np\n" + body)
    return f"{file}:samples"


def test_python_function_with_labels_and_limit(tmp_path: Path) -> None:
    text = _script(
        tmp_path,
        "def samples():\n    for i in range(100):\n        yield {'x': np.full((2, 3), i, np.float32)}, [i, i]\n",
    )
    dataset = open_dataset(text, inputs=[X], limit=5, label_offset=1)
    assert _labels(dataset) == [1, 1, 2, 2, 3]
    assert [row[0] for row in _rows(dataset)] == [0, 0, 1, 1, 2]
    assert dataset.describe()["name"] == "samples.py:samples"


@pytest.mark.parametrize(
    ("body", "message", "place"),
    [
        ("def samples():\n    yield {'y': np.zeros((1, 3), np.float32)}", "no array for input 'x'", "batch 0"),
        ("def samples():\n    yield {'x': np.zeros((1, 3))}", "another dtype", "batch 0"),
        ("def samples():\n    yield 5", "it yields a int", "batch 0"),
        ("def samples():\n    yield {'x': np.zeros((2, 3), np.float32)}, [1]", "1 labels for 2 samples", "batch 0"),
        ("def samples():\n    return iter(())", "it yields nothing", "samples.py:samples"),
        ("def samples():\n    yield from ()\n    1 / 0", "ZeroDivisionError", "samples.py:4 in samples: 1 / 0"),
        ("def samples():\n    return 7", "TypeError", "samples.py"),
    ],
)
def test_python_functions_that_go_wrong(tmp_path: Path, body: str, message: str, place: str) -> None:
    dataset = open_dataset(_script(tmp_path, body), inputs=[X])
    with pytest.raises(DataError) as caught:
        list(dataset)
    assert message in caught.value.what
    assert place in str(caught.value.where)


def test_python_file_that_does_not_import(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        open_dataset(_script(tmp_path, "import no_such_module\n"), inputs=[X])
    assert "samples.py:2" in str(caught.value.where)
    with pytest.raises(DataError, match="no function 'samples'") as caught:
        open_dataset(_script(tmp_path, "def other(): ...\n"), inputs=[X])
    assert "other" in str(caught.value.hint)


# --- fingerprints


def test_fingerprint_follows_content(tmp_path: Path, classes: Path, x: np.ndarray) -> None:
    def key(**options: object) -> str:
        arguments = {"inputs": [PIXELS], "preprocessing": PLAIN, "class_count": 3} | options
        return open_dataset(str(classes), **arguments).fingerprint()  # type: ignore[arg-type]

    keys = [key(), key(limit=4), key(label_offset=1), key(preprocessing=ImagePreprocessing(size=(4, 4), resize=(4, 4)))]
    (classes / "cat" / "0.png").rename(classes / "owl" / "9.png")
    keys.append(key())
    _save(classes / "owl" / "9.png", 200)
    os.utime(classes / "owl" / "9.png", ns=(1, 1))
    keys.append(key())
    assert len(set(keys)) == len(keys)
    assert key() == keys[-1]

    def array_key() -> str:
        return open_dataset(str(tmp_path / "x.npz"), inputs=[X]).fingerprint()

    before = array_key()
    assert array_key() == before
    np.savez(tmp_path / "x.npz", x=x + 1, labels=np.arange(7))
    assert array_key() != before

    text = _script(tmp_path, "from helper import VALUE\ndef samples(): ...\n")
    (tmp_path / "helper.py").write_text("VALUE = 1")
    before = open_dataset(text, inputs=[X]).fingerprint()
    (tmp_path / "helper.py").write_text("VALUE = 2")
    assert open_dataset(text, inputs=[X]).fingerprint() != before


# --- seeded inputs


def test_seeded_inputs_resolve_symbols_once() -> None:
    specs = [
        TensorSpec("input_ids", "int64", ("batch", "sequence")),
        TensorSpec("attention_mask", "int64", ("batch", "sequence")),
        TensorSpec("token_type_ids", "int64", ("batch", "sequence")),
        TensorSpec("state", "float16", (2, "batch", 8)),
        TensorSpec("pixels", "float32", ("N", 3, "height", None)),
        TensorSpec("sr", "int64", ()),
        TensorSpec("flag", "bool", (4,)),
        TensorSpec("wave", "bfloat16", ("samples_len", 2)),
        TensorSpec("picture", "uint8", (1, 8, 8, 3)),
        TensorSpec("words", "string", (2,)),
    ]
    inputs = seeded_inputs(specs, batch=5, seed=3, dims={"sequence": 7})
    assert {name: array.shape for name, array in inputs.items()} == {
        "input_ids": (5, 7),
        "attention_mask": (5, 7),
        "token_type_ids": (5, 7),
        "state": (2, 5, 8),
        "pixels": (5, 3, 224, 224),
        "sr": (),
        "flag": (4,),
        "wave": (16, 2),
        "picture": (1, 8, 8, 3),
        "words": (2,),
    }
    assert set(np.unique(inputs["input_ids"])) <= set(range(8))
    assert inputs["attention_mask"].min() == 1
    assert inputs["token_type_ids"].max() == 0
    assert inputs["sr"] == 16000
    assert inputs["wave"].dtype == ml_dtypes.bfloat16
    assert inputs["picture"].max() > 100
    for spec in specs:
        assert spec.dtype in ("string", inputs[spec.name].dtype.name)


def test_seeded_inputs_depend_on_the_seed_and_on_nothing_else() -> None:
    again = seeded_inputs([X, IDS], seed=1)
    np.testing.assert_array_equal(seeded_inputs([X], seed=1)["x"], again["x"])
    assert (seeded_inputs([X], seed=2)["x"] != again["x"]).all()
    other = seeded_inputs([TensorSpec("z", "float32", ("batch", 3))], seed=1)["z"]
    assert (other != again["x"]).all()


def test_seeded_inputs_refuse_what_has_no_values() -> None:
    with pytest.raises(DataError, match="dtype optional"):
        seeded_inputs([TensorSpec("x", "optional", (1,))])
    with pytest.raises(DataError, match="dimension batch is 0"):
        seeded_inputs([X], batch=0)
