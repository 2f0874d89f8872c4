"""What the parts of the server hand each other: requests, answers, what a model takes, and the errors of serving.

Errors, each with the status that it is told by in HTTP and in gRPC::

    ServingError
    ├── InvalidRequest     400  INVALID_ARGUMENT     names, shapes, dtypes, a body that is not what it says
    ├── Unauthenticated    401  UNAUTHENTICATED      no token, or a wrong one
    ├── PermissionDenied   403  PERMISSION_DENIED    a token that is good, but not for this model
    ├── NotFound           404  NOT_FOUND            no such model, version, task or page
    ├── AlreadyExists      409  ALREADY_EXISTS       the name is taken
    ├── TooLarge           413  RESOURCE_EXHAUSTED   a request beyond a limit on sizes
    ├── Overloaded         429  RESOURCE_EXHAUSTED   a queue is full, or memory is: come back later
    ├── DeadlineExceeded   504  DEADLINE_EXCEEDED    the request waited longer than it allows
    ├── Unsupported        501  UNIMPLEMENTED        a part of the protocol that is not served
    ├── Unavailable        503  UNAVAILABLE          the model loads, the server drains
    └── ModelFailed        500  INTERNAL             the runtime failed while it ran
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import numpy as np

from runtimes import Error, TensorSpec

if TYPE_CHECKING:
    from toolchain.serving.options import ModelOptions
    from toolchain.serving.statistics import Statistics


class ServingError(Error):
    """A request that is not answered with a result. ``http`` and ``grpc`` are its statuses."""

    http: ClassVar[int] = 500
    grpc: ClassVar[str] = "INTERNAL"


class InvalidRequest(ServingError):
    """A request that does not follow the protocol, or does not fit the model."""

    http = 400
    grpc = "INVALID_ARGUMENT"


class Unauthenticated(ServingError):
    """A request without a token that is wanted, or with a wrong one."""

    http = 401
    grpc = "UNAUTHENTICATED"


class PermissionDenied(ServingError):
    """A request with a good token that is not for this model."""

    http = 403
    grpc = "PERMISSION_DENIED"


class NotFound(ServingError):
    """There is no such model, version, task or page."""

    http = 404
    grpc = "NOT_FOUND"


class AlreadyExists(ServingError):
    """What is to be made is there already."""

    http = 409
    grpc = "ALREADY_EXISTS"


class TooLarge(ServingError):
    """A request that is larger than the server takes."""

    http = 413
    grpc = "RESOURCE_EXHAUSTED"


class Overloaded(ServingError):
    """The queue is full, too many requests are in flight, or memory is short. Sent again later it may be answered."""

    http = 429
    grpc = "RESOURCE_EXHAUSTED"


class DeadlineExceeded(ServingError):
    """The request's own deadline passed while it waited; the model did not see it."""

    http = 504
    grpc = "DEADLINE_EXCEEDED"


class Unsupported(ServingError):
    """A part of the protocol that this server, or this model, does not have."""

    http = 501
    grpc = "UNIMPLEMENTED"


class Unavailable(ServingError):
    """The model is not ready yet, or the server is shutting down."""

    http = 503
    grpc = "UNAVAILABLE"


class ModelFailed(ServingError):
    """The runtime failed while it ran the model."""


@dataclasses.dataclass(frozen=True, slots=True)
class ModelInfo:
    """One version of a model, as its manifest and its session describe it.

    Attributes:
        name: as in the URL.
        version: a number in text, "1".
        inputs, outputs: with the batch axis, where there is one.
        max_batch_size: 0 where the first axis is not a batch axis that may vary, or batching is switched off;
            else the most rows that are run at once.
        platform: the variant's runtime, such as ``ort-cpu``.
        precision: of the variant, such as ``int8``.
        digest: of the artifact's manifest, hex; "" for a bare ONNX file.
        labels: names of the classes, in their order; empty where the artifact has none.
        preprocessing: how an image becomes the input, as ``ImagePreprocessing.to_json`` has it; None: unknown.
        metadata: the rest of the artifact's own data.
    """

    name: str
    version: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    max_batch_size: int = 0
    platform: str = ""
    precision: str = ""
    digest: str = ""
    labels: tuple[str, ...] = ()
    preprocessing: Mapping[str, Any] | None = None
    metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, slots=True)
class Span:
    """Where a tensor lies in shared memory: ``byte_size`` bytes from ``offset`` on, of a region that was registered."""

    region: str
    offset: int
    byte_size: int


@dataclasses.dataclass(frozen=True, slots=True)
class Shared:
    """The tensors of a request that lie in shared memory (``shared_memory.py``).

    Attributes:
        inputs: name, the protocol's name of the dtype, shape, and where it is.
        outputs: name → where it is to be written.
    """

    inputs: tuple[tuple[str, str, tuple[int, ...], Span], ...]
    outputs: Mapping[str, Span]


@dataclasses.dataclass(slots=True)
class Request:
    """One inference that was asked for, decoded and checked against ``ModelInfo`` (``tensors.check``).

    Attributes:
        model: its name.
        version: the version asked for; "" lets the server choose.
        inputs: an array for each of the model's inputs, C-contiguous, of its dtype, views of what the client sent: not
            always aligned. Nobody writes into them.
        outputs: the outputs asked for; () is all of them.
        id: the client's own name for it, handed back.
        priority: 1 is served first; 0 is the model's default.
        deadline_ns: ``time.monotonic_ns()`` at which an answer is worth nothing any more; None where there is none.
        received_ns: ``time.monotonic_ns()`` when its first byte was handled; queue time is counted from here.
        shared: tensors that lie in shared memory: ``shared_memory.Regions.infer`` adds them to ``inputs``. None: none.
    """

    model: str
    version: str
    inputs: Mapping[str, np.ndarray]
    outputs: tuple[str, ...] = ()
    id: str = ""
    priority: int = 0
    deadline_ns: int | None = None
    received_ns: int = 0
    shared: Shared | None = None


@dataclasses.dataclass(slots=True)
class Response:
    """The answer to a ``Request``.

    Attributes:
        model, version: which answered.
        outputs: in the order asked for. May be views of a larger batch: read, do not write.
        id: the request's.
        cached: it came from the result cache.
        queue_ns, compute_ns: how long the request waited, and how long the model ran for it; for logs and traces.
        written: outputs that were written to shared memory; the answer carries no data of them.
    """

    model: str
    version: str
    outputs: Mapping[str, np.ndarray]
    id: str = ""
    cached: bool = False
    queue_ns: int = 0
    compute_ns: int = 0
    written: frozenset[str] = frozenset()


class Served(Protocol):
    """What answers requests for the transports: ``models.Models``, and stand-ins in tests of a transport."""

    def info(self, model: str, version: str = "") -> ModelInfo:
        """What a model takes; of the version that would answer now where none is asked for.

        Cheap, and loads nothing: transports ask before they decode. Raises NotFound, Unavailable.
        """
        ...

    def versions(self, model: str) -> tuple[str, ...]:
        """The versions that may be asked for, ascending. Raises NotFound."""
        ...

    def names(self) -> tuple[str, ...]:
        """All models, sorted, whether ready or not."""
        ...

    def is_ready(self, model: str | None = None, version: str = "") -> bool:
        """Whether a model, or for None anything at all, can answer at once or after loading. Raises NotFound."""
        ...

    def expecting(self, model: str, version: str = "") -> contextlib.AbstractContextManager[None]:
        """Around the reading of a large request, so that nobody reads what would be refused. Loads nothing.

        Raises NotFound, Unavailable, and Overloaded where there is no room for one more.
        """
        ...

    async def infer(self, request: Request) -> Response:
        """Answers. Raises ServingError; nothing else leaves it but cancellation."""
        ...


class Hosted(Served, Protocol):
    """``Served`` and what it tells of itself: what the transports ask for beside inference. ``models.Models`` is it."""

    def model_options(self, model: str) -> ModelOptions:
        """How a model is served: its ``serving.yaml``, or the server's defaults. Loads nothing. Raises NotFound."""
        ...

    def index(self) -> list[dict[str, Any]]:
        """Every version of every model: ``name``, ``version``, ``state``, ``reason``."""
        ...

    def all_statistics(self) -> Mapping[tuple[str, str], Statistics]:
        """(model, version) → its counts, of all that were loaded and were there a while ago."""
        ...

    def cache_statistics(self) -> dict[str, Any]:
        """Of the result cache, as JSON values."""
        ...

    def resources(self) -> dict[str, Any]:
        """Memory: resident, its cap and trend, by model; as JSON values."""
        ...
