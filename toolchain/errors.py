"""The toolchain's branch of the one exception tree (its root is ``runtimes.Error``).

::

    runtimes.Error
    ├── (runtimes' own: InvalidInput, InvalidModel, InvalidArtifact, TargetUnavailable, ...)
    ├── SourceError             where a model comes from: unknown name, missing package, unreadable weights
    ├── ExportFailed            PyTorch to ONNX did not work
    ├── GraphError              the graph is invalid, or a pass broke it
    ├── DataError               samples that cannot be read or do not fit the model
    ├── CalibrationError        ranges cannot be found, read, or do not belong to the graph
    ├── FidelityError           the candidate is further from the reference than its bound allows
    ├── RecipeError             a key, type or value in a recipe
    ├── SigningError            a key or certificate that cannot be used, or nothing to sign with
    └── StorageError            the disk: full, read-only, not there

The command line prints any of them as text and exits with 2; ``--debug`` adds the traceback.
"""

from __future__ import annotations

from runtimes import Error


class SourceError(Error):
    """The model source cannot be used: unknown name, missing package, unreadable weights."""


class ExportFailed(Error):
    """torch.export or its translation to ONNX failed."""


class GraphError(Error):
    """The graph is invalid, or a pass broke it."""


class DataError(Error):
    """Samples that cannot be read or do not fit the model."""


class CalibrationError(Error):
    """Ranges cannot be found or read, or do not belong to the graph."""


class FidelityError(Error):
    """The candidate is further from the reference than the bound of its precision."""


class RecipeError(Error):
    """A recipe has an unknown key, a wrong type or a value that is not allowed."""


class SigningError(Error):
    """A key or certificate cannot be used, or the package that signs is not installed."""


class StorageError(Error):
    """The disk is full, read-only or not there."""
