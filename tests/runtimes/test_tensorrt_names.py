"""Every name of TensorRT that the code uses is there in TensorRT 10, 11 and RTX, or stands in the table.

``tests/data/tensorrt_names.json`` holds the classes, enums and members of the real Python bindings 10.16.1, 11.4.0 and
RTX 1.7.1, as far as they matter here; two of the three cannot be installed everywhere.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from runtimes._tensorrt_api import FLAVORS, Flavor

ROOT = Path(__file__).resolve().parents[2]
NAMES: dict[str, dict[str, list[str]]] = json.loads((ROOT / "tests/data/tensorrt_names.json").read_text())
LISTS = {
    ("tensorrt", 10): "tensorrt-10.16.1",
    ("tensorrt", 11): "tensorrt-11.4.0",
    ("tensorrt-rtx", 1): "tensorrt_rtx-1.7.1",
}
SOURCES = sorted([*(ROOT / "runtimes").glob("_tensorrt_*.py"), ROOT / "runtimes/tensorrt_engine.py"])
#: What a variable of this name is in our code, unless it is a class of ours.
VARIABLES = {
    "builder": ("Builder",),
    "network": ("INetworkDefinition",),
    "parser": ("OnnxParser",),
    "error": ("ParserError",),
    "config": ("IBuilderConfig", "IRuntimeConfig"),
    "profile": ("IOptimizationProfile",),
    "tensor": ("ITensor",),
    "cache": ("ITimingCache",),
    "kernels": ("IRuntimeCache",),
    "runtime": ("Runtime",),
    "engine": ("ICudaEngine",),
    "context": ("IExecutionContext",),
}


def flavors_with(name: str) -> set[tuple[str, int]]:
    """The flavors that have ``Class`` or ``Class.member``."""
    owner, _, member = name.partition(".")
    return {key for key, file in LISTS.items() if owner in NAMES[file] and (not member or member in NAMES[file][owner])}


def in_table(name: str) -> set[tuple[str, int]]:
    """The flavors in whose row of the table the name, or its class, stands."""
    return {(f.target, f.major) for f in FLAVORS if name in f.names or name.partition(".")[0] in f.names}


def used(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """``Class`` or ``Class.member`` for each ``trt.Class.member``, and the line."""
    inner = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Attribute) or id(node) in inner:
            continue
        path: list[str] = []
        at: ast.expr = node
        while isinstance(at, ast.Attribute):
            path.insert(0, at.attr)
            at = at.value
        if isinstance(at, ast.Name):
            path.insert(0, at.id)
        if "trt" in path[:-1]:
            names = [name for name in path[path.index("trt") + 1 :] if not name.startswith("__")]
            if names:
                yield ".".join(names[:2]), node.lineno


def own_names(trees: list[ast.Module]) -> set[str]:
    """What classes of our own have: methods, fields, attributes that are set on self."""
    found = set()
    for tree in trees:
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                found.add(node.name)
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                found.add(node.target.id)
            elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self":
                found.add(node.attr)
    return found


TREES = {path.name: ast.parse(path.read_text()) for path in SOURCES}


def test_the_sources_are_seen() -> None:
    everything = {name for tree in TREES.values() for name, _ in used(tree)}
    assert {
        "Builder",
        "OnnxParser",
        "BuilderFlag.SPARSE_WEIGHTS",
        "MemoryPoolType.WORKSPACE",
        "ILogger.VERBOSE",
    } <= everything
    assert len(everything) >= 20


@pytest.mark.parametrize("file", TREES)
def test_names_of_the_module(file: str) -> None:
    for name, line in used(TREES[file]):
        have = flavors_with(name)
        assert have, f"{file}:{line}: no TensorRT has {name}"
        assert have == set(LISTS) or have == in_table(name), f"{file}:{line}: only {have} have {name}"


@pytest.mark.parametrize("file", [file for file, tree in TREES.items() if any(used(tree))])
def test_names_of_objects(file: str) -> None:
    ours = own_names(list(TREES.values()))
    for node in ast.walk(TREES[file]):
        if not (isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in VARIABLES):
            continue
        candidates = [f"{owner}.{node.attr}" for owner in VARIABLES[node.value.id]]
        if any(
            flavors_with(name) == set(LISTS) or flavors_with(name) == in_table(name) != set() for name in candidates
        ):
            continue
        known = {name: flavors_with(name) for name in candidates if flavors_with(name)}
        assert not known, f"{file}:{node.lineno}: not all have {known}, and the table does not say so"
        assert node.attr in ours | {"what", "hint", "strerror"}, f"{file}:{node.lineno}: no TensorRT has {candidates}"


@pytest.mark.parametrize("flavor", FLAVORS, ids=lambda f: f"{f.target} {f.major}")
def test_the_table_is_true(flavor: Flavor) -> None:
    key = (flavor.target, flavor.major)
    names = NAMES[LISTS[key]]
    for name in flavor.names:
        assert key in flavors_with(name), f"{name} is not in {LISTS[key]}"
        assert flavors_with(name) != set(LISTS), f"{name} is in all, and needs no row"
    assert flavor.cross_compiles == ("set_compute_capability" in names["IBuilderConfig"])
    assert flavor.records_graphs == ("cuda_graph_strategy" in names["IRuntimeConfig"])
    assert "STRONGLY_TYPED" in names["NetworkDefinitionCreationFlag"]
    # where precision can still be set by flags, strong typing has to be asked for
    assert flavor.strongly_typed_flag == ("FP16" in names["BuilderFlag"])


def test_nothing_that_is_gone() -> None:
    text = "".join(path.read_text() for path in SOURCES)
    for gone in ("BuilderFlag.FP16", "BuilderFlag.INT8", "int8_calibrator", "EXPLICIT_BATCH", "platform_has_fast"):
        assert gone not in text
