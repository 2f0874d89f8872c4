"""The gRPC side: inference.GRPCInferenceService, with the messages that tritonclient carries.

A second copy of the protocol's messages in one process would end it (``duplicate symbol``), so there is none.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TYPE_CHECKING, Any

import grpc
from google.protobuf import json_format, message_factory
from google.protobuf.message import DecodeError
from tritonclient.grpc import service_pb2

from toolchain.serving import describe, grpc_codec, memory_routes, model_config, wire
from toolchain.serving.base import Hosted, InvalidRequest, ServingError, Unsupported
from toolchain.serving.limits import Bytes
from toolchain.serving.options import ServerOptions

if TYPE_CHECKING:
    from toolchain.serving.auth import Auth
    from toolchain.serving.shared_memory import Regions

_log = logging.getLogger("toolchain.serving")
_SERVICE = service_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"]
#: Requests of one stream that are handled at once; more wait in the connection, whose flow control tells the client.
_STREAM_WINDOW = 256
_WHY_NOT = {
    "RepositoryModelLoad": "models are loaded on the admin port, not here",
    "RepositoryModelUnload": "models are unloaded on the admin port, not here",
    "CudaSharedMemoryStatus": memory_routes.NO_CUDA,
    "CudaSharedMemoryRegister": memory_routes.NO_CUDA,
}


def make_servicer(
    served: Hosted,
    *,
    options: ServerOptions,
    auth: Auth | None = None,
    held: Bytes | None = None,
    regions: Regions | None = None,
    everywhere: describe.Everywhere | None = None,
) -> Servicer:
    """What answers gRPC; ``add_to`` puts it into a server.

    Args:
        served: the models.
        options: limits on sizes; the rest of them is not looked at.
        auth: asked for every call that names a model or lists them; None lets everyone in.
        held: bounds the bytes of all requests that are being handled; None takes the bound of ``options``.
        regions: of shared memory; None serves none.
        everywhere: of several workers, see ``describe.statistics``.
    """
    return Servicer(served, options, auth, held or Bytes(options.max_in_flight_bytes), regions, everywhere)


class Servicer:
    """The calls of the service. Those that are not here are answered with UNIMPLEMENTED and why."""

    def __init__(
        self,
        served: Hosted,
        options: ServerOptions,
        auth: Auth | None,
        held: Bytes,
        regions: Regions | None,
        everywhere: describe.Everywhere | None,
    ) -> None:
        self._served = served
        self._everywhere = everywhere
        self._regions = regions
        self._held = held
        self._readers: set[asyncio.Task[None]] = set()
        self._auth = auth
        self._cached = options.result_cache.max_bytes > 0
        self._decoder = grpc_codec.Decoder(max_bytes=options.max_request_bytes, shared=regions is not None)
        self._encoder = grpc_codec.Encoder()

    def add_to(self, server: grpc.aio.Server) -> None:
        """Registers every call of the service."""
        handlers: dict[str, grpc.RpcMethodHandler] = {
            # These two take and give bytes: see grpc_codec.py.
            "ModelInfer": grpc.unary_unary_rpc_method_handler(self._infer),
            "ModelStreamInfer": grpc.stream_stream_rpc_method_handler(self._stream),
        }
        answers: dict[str, Callable[[Any, str | None], Any]] = {
            "ServerLive": self._server_live,
            "ServerReady": self._server_ready,
            "ModelReady": self._model_ready,
            "ServerMetadata": self._server_metadata,
            "ModelMetadata": self._model_metadata,
            "ModelConfig": self._model_config,
            "ModelStatistics": self._model_statistics,
            "RepositoryIndex": self._repository_index,
            "SystemSharedMemoryStatus": self._memory_status,
            "SystemSharedMemoryRegister": self._memory_register,
            "SystemSharedMemoryUnregister": self._memory_unregister,
            "CudaSharedMemoryUnregister": self._cuda_unregister,
        }
        for method in _SERVICE.methods:
            if method.name not in handlers:
                handlers[method.name] = grpc.unary_unary_rpc_method_handler(
                    self._call(
                        answers.get(method.name) or _unsupported(method.name),
                        message_factory.GetMessageClass(method.input_type).FromString,
                    ),
                    response_serializer=message_factory.GetMessageClass(method.output_type).SerializeToString,
                )
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(_SERVICE.full_name, handlers),))

    def drain(self) -> None:
        """Streams take no more requests: each ends when those that it has are answered."""
        for reader in self._readers:
            reader.cancel()

    async def _infer(self, message: bytes, context: grpc.aio.ServicerContext[Any, Any]) -> bytes:
        received_ns = time.monotonic_ns()
        try:
            self._held.take(len(message))
            try:
                parts = grpc_codec.split(message)
                return await self._answer(parts, self._token(context), received_ns, _deadline(context))
            finally:
                self._held.give(len(message))
        except Exception as error:  # noqa: BLE001 - whatever it is, the client is answered; _tell logs what is not its fault
            _tell(context, error)
            return b""

    async def _answer(
        self, message: grpc_codec.Message, token: str | None, received_ns: int, deadline_ns: int | None
    ) -> bytes:
        if self._auth is not None:
            self._auth.check(message.model, token)
        info = self._served.info(message.model, message.version)
        try:
            request = self._decoder.read(message, info, received_ns=received_ns, deadline_ns=deadline_ns)
        except ServingError:
            describe.count_refused(self._served, info, received_ns)
            raise
        if request.shared is not None and self._regions is not None:
            return self._encoder.write(await self._regions.infer(self._served, request, info))
        return self._encoder.write(await self._served.infer(request))

    async def _stream(
        self, messages: AsyncIterator[bytes], context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[bytes]:
        """Handles the requests of a stream at once, and answers them in their order."""
        token, deadline_ns = self._token(context), _deadline(context)
        answers: asyncio.Queue[asyncio.Task[bytes] | None] = asyncio.Queue()
        window = asyncio.Semaphore(_STREAM_WINDOW)

        async def read() -> None:
            async for message in messages:
                work = self._stream_one(message, token, time.monotonic_ns(), deadline_ns)
                answers.put_nowait(asyncio.create_task(work))
                await window.acquire()

        reader = asyncio.create_task(read())
        reader.add_done_callback(lambda _: answers.put_nowait(None))
        self._readers.add(reader)
        try:
            while (answer := await answers.get()) is not None:
                yield await answer
                window.release()
            if reader.cancelled():
                await context.abort(grpc.StatusCode.UNAVAILABLE, "the server is shutting down")
            reader.result()
        finally:
            self._readers.discard(reader)
            reader.cancel()
            while not answers.empty():
                left = answers.get_nowait()
                if left is not None:
                    left.cancel()

    async def _stream_one(self, message: bytes, token: str | None, received_ns: int, deadline_ns: int | None) -> bytes:
        identifier = ""
        try:
            parts = grpc_codec.split(message)
            identifier = parts.id
            self._held.take(len(message))
            try:
                return grpc_codec.stream_answer(await self._answer(parts, token, received_ns, deadline_ns))
            finally:
                self._held.give(len(message))
        except Exception as error:  # noqa: BLE001 - one request's failure is told in its answer; the stream goes on
            return grpc_codec.stream_error(_explained(error)[1], identifier)

    def _call(
        self, answer: Callable[[Any, str | None], Any], parse: Callable[[bytes], Any]
    ) -> Callable[..., Awaitable[Any]]:
        # Parsed here: what grpc.aio cannot parse it answers with UNKNOWN, and logs with a traceback.
        async def call(message: bytes, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
            try:
                answered = answer(_parsed(message, parse), self._token(context))
                return await answered if inspect.isawaitable(answered) else answered
            except Exception as error:  # noqa: BLE001 - as in _infer
                await context.abort(*_explained(error))

        return call

    def _token(self, context: grpc.aio.ServicerContext[Any, Any]) -> str | None:
        if self._auth is None:
            return None
        value = next((value for key, value in context.invocation_metadata() or () if key == "authorization"), None)
        return value.decode("latin-1") if isinstance(value, bytes) else value

    def _allow(self, model: str | None, token: str | None) -> None:
        if self._auth is not None:
            self._auth.check(model, token)

    def _server_live(self, _: Any, token: str | None) -> Any:
        return service_pb2.ServerLiveResponse(live=True)

    def _server_ready(self, _: Any, token: str | None) -> Any:
        return service_pb2.ServerReadyResponse(ready=self._served.is_ready())

    def _model_ready(self, request: Any, token: str | None) -> Any:
        self._allow(request.name, token)
        return service_pb2.ModelReadyResponse(ready=self._served.is_ready(request.name, request.version))

    def _server_metadata(self, _: Any, token: str | None) -> Any:
        return service_pb2.ServerMetadataResponse(**describe.server(shared_memory=self._regions is not None))

    def _model_metadata(self, request: Any, token: str | None) -> Any:
        self._allow(request.name, token)
        return service_pb2.ModelMetadataResponse(**describe.model(self._served, request.name, request.version))

    def _model_config(self, request: Any, token: str | None) -> Any:
        self._allow(request.name, token)
        info = self._served.info(request.name, request.version)
        config = model_config.as_message(info, self._served.model_options(request.name), cached=self._cached)
        return service_pb2.ModelConfigResponse(config=config)

    async def _model_statistics(self, request: Any, token: str | None) -> Any:
        self._allow(request.name or None, token)
        counts = await describe.statistics(self._served, request.name, request.version, everywhere=self._everywhere)
        return json_format.ParseDict({"model_stats": counts}, service_pb2.ModelStatisticsResponse())

    def _repository_index(self, request: Any, token: str | None) -> Any:
        self._allow(None, token)
        entries = describe.index(self._served, ready=request.ready)
        return json_format.ParseDict({"models": entries}, service_pb2.RepositoryIndexResponse())

    def _memory(self, token: str | None) -> Regions:
        self._allow(None, token)
        if self._regions is None:
            raise Unsupported(memory_routes.OFF)
        return self._regions

    async def _memory_status(self, request: Any, token: str | None) -> Any:
        found = await asyncio.to_thread(self._memory(token).status, request.name)
        answer = service_pb2.SystemSharedMemoryStatusResponse()
        for region in found:
            answer.regions[region.name].MergeFrom(answer.RegionStatus(**region.as_json()))
        return answer

    async def _memory_register(self, request: Any, token: str | None) -> Any:
        known = self._memory(token)
        await asyncio.to_thread(
            known.register, request.name, request.key, offset=request.offset, byte_size=request.byte_size
        )
        return service_pb2.SystemSharedMemoryRegisterResponse()

    async def _memory_unregister(self, request: Any, token: str | None) -> Any:
        await asyncio.to_thread(self._memory(token).unregister, request.name)
        return service_pb2.SystemSharedMemoryUnregisterResponse()

    def _cuda_unregister(self, _: Any, token: str | None) -> Any:
        # There are none, so nothing is left to do: perf_analyzer asks for it before it registers other memory.
        if self._regions is None:
            raise Unsupported(memory_routes.NO_CUDA)
        self._allow(None, token)
        return service_pb2.CudaSharedMemoryUnregisterResponse()


def _parsed(message: bytes, parse: Callable[[bytes], Any]) -> Any:
    try:
        return parse(message)
    except DecodeError:
        raise InvalidRequest("the message is not that of this method") from None


def _unsupported(method: str) -> Callable[[Any, str | None], Any]:
    def answer(_: Any, token: str | None) -> Any:
        raise Unsupported(_WHY_NOT.get(method, f"{method} is not served"))

    return answer


def _deadline(context: grpc.aio.ServicerContext[Any, Any]) -> int | None:
    seconds = context.time_remaining()
    return None if seconds is None else time.monotonic_ns() + int(seconds * 1e9)


def _tell(context: grpc.aio.ServicerContext[Any, Any], error: Exception) -> None:
    status, text = _explained(error)
    context.set_code(status)
    context.set_details(text)


def _explained(error: Exception) -> tuple[grpc.StatusCode, str]:
    if isinstance(error, ServingError):
        return grpc.StatusCode[error.grpc], wire.message(error)
    _log.error("a request failed in the server", exc_info=error)
    return grpc.StatusCode.INTERNAL, "the server failed; its log says how"
