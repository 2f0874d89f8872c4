"""What an artifact was made of: its recipe, and the float graph that was calibrated and quantised, made again."""

from __future__ import annotations

import onnx_ir as ir

from runtimes import InvalidArtifact, package
from toolchain.artifact import EXPORTED, PRUNED
from toolchain.onnx_file import read_onnx
from toolchain.optimize import optimize
from toolchain.preprocessing import ImagePreprocessing
from toolchain.recipe import Recipe, from_dict


def recipe_of(found: package.Package) -> Recipe:
    """The recipe, with the names of files but not their folders. Raises InvalidArtifact, RecipeError."""
    tree = found.metadata.get("recipe")
    if tree is None:
        raise InvalidArtifact(
            "it does not say how it was built", where=str(found.root), hint="build it with toolchain build"
        )
    return from_dict(tree, origin="the artifact's recipe")


def float_graph(found: package.Package) -> ir.Model:
    """The float graph that ``toolchain build`` calibrated and lowered: what pruning left, else the exported model after
    the recipe's passes. It does not matter which variants the artifact holds.

    Args:
        found: an artifact whose digests were checked.

    Raises:
        InvalidArtifact: it holds neither, as a bundle does not.
        InvalidModel, GraphError: see ``read_onnx`` and ``optimize``.
    """
    if was_pruned(found):
        return read_onnx(found.root / PRUNED)
    if not (found.root / EXPORTED).is_file():
        raise InvalidArtifact(
            "it holds no float model",
            where=str(found.root),
            hint="take the artifact that toolchain build wrote, or the model as .onnx",
        )
    model = read_onnx(found.root / EXPORTED)
    optimize(model, recipe_of(found).pipeline())
    return model


def was_pruned(found: package.Package) -> bool:
    """Whether its variants compute another function than the exported model."""
    return bool((found.metadata.get("prune") or {}).get("changed", False))


def preprocessing_of_artifact(found: package.Package) -> ImagePreprocessing | None:
    """How images become its input, where it knows. Raises DataError."""
    tree = found.metadata.get("preprocessing")
    return ImagePreprocessing.from_json(tree) if tree else None
