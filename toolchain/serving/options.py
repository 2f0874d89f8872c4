"""What can be said about how models are served: for one model in ``serving.yaml``, for the server on the command line.

``models/<name>/serving.yaml`` holds fields of ``ModelOptions``; what is not said there is the server's default.
The names are those of Triton's model configuration where it has the thing.
"""

from __future__ import annotations

from typing import Annotated, Literal

import pydantic

Positive = Annotated[int, pydantic.Field(ge=1)]
Share = Annotated[float, pydantic.Field(gt=0, lt=1)]


class _Options(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(frozen=True, extra="forbid")


class Batching(_Options):
    """How requests are put together.

    Attributes:
        max_batch_size: rows at most; 0 switches batching off; None takes 64 where the model has a batch axis.
        preferred_batch_size: a batch that has one of these sizes is run at once, without waiting for the delay.
        max_queue_delay_us: how long the first request of a batch may wait for others, microseconds. With 0 nobody
            waits: what came in while the model was busy is run together.
        queue_size: requests that may wait; more get 429 / RESOURCE_EXHAUSTED.
        default_timeout_ms: the deadline of requests that bring none; None is no deadline.
        priority_levels: how many there are; 1 is served first. A request that names none gets the last.
        padding: input name → the number to fill up with, for inputs whose symbolic axes differ between requests.
            Outputs are cut back where they have an axis of the same name. Only for models that mask what was filled.
        instances: batches that may run at the same time.
    """

    max_batch_size: Annotated[int, pydantic.Field(ge=0, le=65536)] | None = None
    preferred_batch_size: tuple[Positive, ...] = ()
    max_queue_delay_us: Annotated[int, pydantic.Field(ge=0, le=10_000_000)] = 0
    queue_size: Positive = 1024
    default_timeout_ms: Positive | None = None
    priority_levels: Annotated[int, pydantic.Field(ge=1, le=64)] = 1
    padding: dict[str, float] = {}
    instances: Annotated[int, pydantic.Field(ge=1, le=64)] = 1


class VersionPolicy(_Options):
    """Which versions of a model are served, as Triton's policies: exactly one field is set.

    Attributes:
        latest: the newest so many. In a folder that ``toolchain install`` made, the newest is the one in service
            (its ``latest`` pointer), so a rollback there is one here.
        all: every version there is.
        specific: these.
    """

    latest: Positive | None = None
    all: Literal[True] | None = None
    specific: tuple[Positive, ...] | None = None

    @pydantic.model_validator(mode="after")
    def _one(self) -> VersionPolicy:
        if sum(value is not None for value in (self.latest, self.all, self.specific)) != 1:
            raise ValueError("exactly one of latest, all, specific is wanted")
        return self


class Rollout(_Options):
    """How a new version comes into service.

    Attributes:
        canary: the share of requests that the newest version gets while it is on trial; None gives it all at once.
        shadow: the newest version is asked as well while it is on trial, and its answers are thrown away.
        trial_seconds: how long a trial lasts; after it the new version takes over.
        trial_requests: and at least so many requests.
        max_error_rate: beyond this share of failures of the new version, the old one is back at once.
        max_p99_ratio: likewise beyond this multiple of the old version's 99th percentile of latency; None: not held.
    """

    canary: Share | None = None
    shadow: bool = False
    trial_seconds: Annotated[float, pydantic.Field(ge=0)] = 60.0
    trial_requests: Annotated[int, pydantic.Field(ge=0)] = 100
    max_error_rate: Annotated[float, pydantic.Field(ge=0, le=1)] = 0.01
    max_p99_ratio: Annotated[float, pydantic.Field(gt=1)] | None = 2.0


class ResultCache(_Options):
    """Answers kept by a digest of the inputs. Off where ``max_bytes`` is 0.

    Attributes:
        max_bytes: of outputs, of all models together.
        max_age_seconds: an answer that is older is computed again.
    """

    max_bytes: Annotated[int, pydantic.Field(ge=0)] = 0
    max_age_seconds: Annotated[float, pydantic.Field(gt=0)] = 300.0


class ModelOptions(_Options):
    """How one model is served: the fields of ``serving.yaml``.

    Attributes:
        target, variant: as ``runtimes.load`` takes them; None takes the best that runs here.
        session_options: options of the runtime, in place of those of the artifact.
        preload: load it before the server is ready, and not at the first request.
        pin: never evict it.
        result_cache: whether its answers may be kept.
        labels: a text file beside it with a class a line, where the artifact names none.
    """

    target: str | None = None
    variant: str | None = None
    session_options: dict[str, str | int | float | bool] | None = None
    batching: Batching = Batching()
    version_policy: VersionPolicy = VersionPolicy(latest=1)
    rollout: Rollout = Rollout()
    preload: bool = True
    pin: bool = False
    result_cache: bool = True
    labels: str | None = None


class ServerOptions(_Options):
    """How the server runs: the options of ``toolchain serve``.

    Attributes:
        host: the address of HTTP, gRPC and metrics.
        http_port, grpc_port, metrics_port, admin_port: 0 takes any free one, None switches it off. Admin is always on
            the loopback address.
        max_memory: bytes of resident memory that the process may have; None: no bound but the machine's.
        slo_p99_ms: the latency at the 99th percentile to hold; batch size and delay follow from what is measured.
        workers: processes that share the ports.
        threads: of one session, where the model's own ``session_options`` say nothing; None leaves it to the runtime
            with one worker, and divides the cores among several.
        poll_seconds: how often the repository is looked at; 0 never.
        max_request_bytes: of one body or message.
        max_in_flight: requests that are being handled at once, of all models.
        max_in_flight_bytes: and the bytes of their bodies and messages together.
        client_timeout_seconds: the longest that a client may take to send its request.
        connection_seconds: how long a client may keep a connection; then an answer closes it, or gRPC says to open
            another, and no request fails of it. 0: for good; None: 30 with several workers, so that clients come to
            those that were started again, and else for good.
        drain_seconds: how long a shutdown waits for what is in flight.
        tokens: a file of bearer tokens; None asks for none.
        admin_tokens: likewise, for the admin port.
        tls_certificate, tls_key: PEM files; both or none.
        result_cache: bounds of the result cache.
        shared_memory: clients on this machine may register shared memory, and leave tensors there. Only on a loopback
            address: whoever may register can have the server read and write what its user may in ``/dev/shm``.
        trust: as ``runtimes.load`` takes it: vouch for compiled code that was not built on this machine.
        log_format: ``json`` for machines, ``text`` for people.
        log_requests: which requests get a line: ``all``, those that ``failed``, or ``none``.
        trace: write OpenTelemetry traces. Also on where the environment says ``OTEL_EXPORTER_OTLP_ENDPOINT`` or
            ``OTEL_TRACES_EXPORTER``.
        defaults: what models are served with that say nothing themselves.
    """

    model_config = pydantic.ConfigDict(allow_inf_nan=False)

    host: str = "127.0.0.1"
    http_port: Annotated[int, pydantic.Field(ge=0, le=65535)] | None = 8000
    grpc_port: Annotated[int, pydantic.Field(ge=0, le=65535)] | None = 8001
    metrics_port: Annotated[int, pydantic.Field(ge=0, le=65535)] | None = 8002
    admin_port: Annotated[int, pydantic.Field(ge=0, le=65535)] | None = None
    max_memory: Positive | None = None
    slo_p99_ms: Annotated[float, pydantic.Field(gt=0)] | None = None
    workers: Annotated[int, pydantic.Field(ge=1, le=256)] = 1
    threads: Annotated[int, pydantic.Field(ge=1, le=4096)] | None = None
    poll_seconds: Annotated[float, pydantic.Field(ge=0)] = 2.0
    max_request_bytes: Positive = 64 << 20
    max_in_flight: Positive = 4096
    max_in_flight_bytes: Positive = 1 << 30
    client_timeout_seconds: Annotated[float, pydantic.Field(gt=0)] = 30.0
    connection_seconds: Annotated[float, pydantic.Field(ge=0)] | None = None
    drain_seconds: Annotated[float, pydantic.Field(ge=0)] = 30.0
    tokens: str | None = None
    admin_tokens: str | None = None
    tls_certificate: str | None = None
    tls_key: str | None = None
    result_cache: ResultCache = ResultCache()
    shared_memory: bool = False
    trust: bool = False
    log_format: Literal["json", "text"] = "text"
    log_requests: Literal["all", "failed", "none"] = "failed"
    trace: bool = False
    defaults: ModelOptions = ModelOptions()
