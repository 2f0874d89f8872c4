"""Tensors in shared memory: the regions that clients on this machine register, and requests whose tensors lie there.

Triton's system shared memory extension (docs/protocol/extension_shared_memory.md of its server): a client puts tensors
into POSIX shared memory (shm_overview(7)), registers a part of it under a name, and sends the name in place of data.

Nothing is mapped. A client may cut its memory short at any time, and whoever touches a mapped page that is gone is
ended by SIGBUS; ``pread`` comes back with less. So an input is copied once, out of the client's memory into ours, and
what the client does to it afterwards is seen by nobody. Nor is anything kept open: memory whose client died is freed.

Whoever registers a key has us read and write what our user may open in ``/dev/shm``. So it is only done where asked for
(``--shared-memory``), on the loopback address, with a token where there are tokens, for regular files that stand there
under their own name, and never for a page in a browser, which reaches the loopback address too.

The table of regions is a folder that all workers have: a link for each, named by the digest of the region's name, whose
text describes it. ``symlink`` makes such an entry whole or not at all, refuses a second one of the same name, and
``readlink`` reads it in one call: no locks, no messages, and a worker that is started again knows what the others know.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import hashlib
import json
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from toolchain.serving import describe, tensors, wire
from toolchain.serving.base import (
    AlreadyExists,
    Hosted,
    InvalidRequest,
    ModelInfo,
    NotFound,
    Overloaded,
    Request,
    Response,
    Shared,
    Span,
    TooLarge,
)
from toolchain.serving.limits import REFUSAL_SECONDS

if TYPE_CHECKING:
    from toolchain.serving.limits import Bytes

#: Where Linux keeps POSIX shared memory.
MEMORY = Path("/dev/shm")
#: Regions that may be registered at a time.
MAX_REGIONS = 1024
#: Of a region's name, bytes in UTF-8; a key may have as many as a file's name.
MAX_NAME_BYTES, _MAX_KEY_BYTES = 200, 255
#: glibc's semaphores are files there too: to write into one would let others wait for ever.
_SEMAPHORE = "sem."
#: Tensors of more bytes are copied in a thread; fewer take less time than the way there: 40 us for an image of 600 kB.
_IN_THREAD = 1 << 20
#: Where there is no room, a request with tensors from so many bytes on is held back like one that sends them.
_LARGE = 64 << 10
_LARGEST = 1 << 62
_PARAMETERS = ("shared_memory_region", "shared_memory_byte_size", "shared_memory_offset")


@dataclasses.dataclass(frozen=True, slots=True)
class Region:
    """What a client registered.

    Attributes:
        name: the client's, of this registration.
        key: of the POSIX shared memory, as the client says it: ``/name`` or ``name``.
        offset, byte_size: the part of that memory which is the region.
        device, inode: of the file, so that no other takes its place under the same key.
    """

    name: str
    key: str
    offset: int
    byte_size: int
    device: int
    inode: int

    def open(self, flags: int) -> tuple[int, int]:
        """A descriptor of the memory, and how long that is now. Raises InvalidRequest where it is gone."""
        file, found = _open(self.key, flags)
        if (found.st_dev, found.st_ino) != (self.device, self.inode):
            os.close(file)
            raise InvalidRequest(
                f"region {self.name!r}: other memory is called {self.key!r} now", hint="unregister it, and register it"
            )
        return file, found.st_size

    def as_json(self) -> dict[str, Any]:
        """As the protocol tells of it."""
        return {"name": self.name, "key": self.key, "offset": self.offset, "byte_size": self.byte_size}


def span(what: str, parameters: Mapping[str, Any]) -> Span | None:
    """Where the parameters of a tensor say that it lies; None where they say nothing of shared memory.

    Args:
        what: the tensor, for errors.
        parameters: of an input or a requested output.

    Raises:
        InvalidRequest: a part of it is missing, or of another kind.
    """
    region, size, offset = [parameters.get(name) for name in _PARAMETERS]
    if region is None and size is None and offset is None:
        return None
    if type(region) is not str or size is None:
        raise InvalidRequest(f"{what} names shared memory in part", hint=f"send {_PARAMETERS[0]} and {_PARAMETERS[1]}")
    offset = 0 if offset is None else offset
    for name, value in (("byte_size", size), ("offset", offset)):
        _check_number(f"shared_memory_{name} of {what}", value)
    return Span(region, offset, size)


def check_input(name: str, datatype: str, shape: tuple[int, ...], where: Span, *, max_bytes: int) -> None:
    """Holds an input's place against its shape. Raises InvalidRequest, and TooLarge for strings that are."""
    if datatype == "BYTES":
        if where.byte_size > max_bytes:
            raise TooLarge(f"input {name!r} has {where.byte_size} bytes, and at most {max_bytes} are taken")
        return
    wanted = tensors.size(datatype, shape)
    if where.byte_size != wanted:
        raise InvalidRequest(
            f"input {name!r} has a shared_memory_byte_size of {where.byte_size}, and its shape {list(shape)} of "
            f"{datatype} takes {wanted}"
        )


class Regions:
    """The regions that are registered, of all workers together, and the way of requests through them.

    Args:
        folder: the table; made here where it is not there.
        held: bounds the bytes of all requests that are handled: what is read from a region counts.
    """

    def __init__(self, folder: Path, held: Bytes) -> None:
        folder.mkdir(mode=0o700, exist_ok=True)
        self._folder = os.fsencode(folder)
        self._held = held

    def register(self, name: str, key: str, *, offset: int, byte_size: int) -> None:
        """Makes memory known under a name. Looks at files: called in a thread.

        Raises:
            InvalidRequest: there is no such memory, it is smaller, or a value is none.
            AlreadyExists: the name is taken.
            Overloaded: there are ``MAX_REGIONS``.
        """
        if not isinstance(name, str) or not name.isprintable() or not 0 < len(name.encode()) <= MAX_NAME_BYTES:
            raise InvalidRequest(
                f"{str(name)[:40]!r} is no name of a region", hint=f"printable text, {MAX_NAME_BYTES} bytes at most"
            )
        _check_number("offset", offset)
        _check_number("byte_size", byte_size)
        if not byte_size:
            raise InvalidRequest(f"region {name!r} has no bytes")
        file, found = _open(key, os.O_RDONLY)
        os.close(file)
        if offset + byte_size > found.st_size:
            raise InvalidRequest(
                f"region {name!r} ends at {offset + byte_size}, and the memory {key!r} has {found.st_size} bytes"
            )
        # Those that come to it at once may be a few more: the bound is one on what a client can pile up.
        if len(os.listdir(self._folder)) >= MAX_REGIONS:
            raise Overloaded(f"{MAX_REGIONS} regions are registered, which is all that may", hint="unregister some")
        entry = [name, key, offset, byte_size, found.st_dev, found.st_ino]
        try:
            os.symlink(json.dumps(entry, ensure_ascii=False).encode(), self._entry(name))
        except FileExistsError:
            raise AlreadyExists(f"a region {name!r} is registered", hint="unregister it first") from None

    def unregister(self, name: str = "") -> None:
        """Forgets a region, or all of them. One that is not there is no error. Called in a thread."""
        for entry in [self._entry(name)] if name else self._entries():
            try:
                os.unlink(entry)
            except FileNotFoundError:  # another was quicker, or it never was
                continue

    def status(self, name: str = "") -> list[Region]:
        """A region, or all of them, by name. Called in a thread. Raises NotFound."""
        if name:
            return [self._find(name)]
        found = []
        for entry in self._entries():
            try:
                found.append(_described(os.readlink(entry)))
            except FileNotFoundError:  # it was unregistered meanwhile
                continue
        return sorted(found, key=lambda region: region.name)

    async def infer(self, served: Hosted, request: Request, info: ModelInfo) -> Response:
        """Answers a request with ``shared`` tensors: reads its inputs, and writes its outputs where it says.

        Args:
            served: answers it.
            request: its ``inputs`` lack those that are shared; they are filled in.
            info: of its model.

        Raises:
            NotFound: there is no such region.
            InvalidRequest: a tensor lies outside its region, or the memory is gone, shorter, or may not be written.
            ServingError: as ``served.infer``.
        """
        shared = request.shared
        assert shared is not None
        size = sum(where.byte_size for _, _, _, where in shared.inputs)
        self._held.take(size)
        try:
            try:
                # before anything is read or run
                outputs = {
                    name: (self._placed(f"output {name!r}", where), where) for name, where in shared.outputs.items()
                }
                places = [self._placed(f"input {name!r}", where) for name, _, _, where in shared.inputs]
                if size >= _LARGE:
                    with served.expecting(request.model, request.version):
                        read = await _copied(size, _read_all, shared, places)
                else:
                    read = _read_all(shared, places)
            except (InvalidRequest, NotFound):
                describe.count_refused(served, info, request.received_ns)
                raise
            except Overloaded:
                await asyncio.sleep(REFUSAL_SECONDS)
                raise
            request.inputs = {**request.inputs, **read}
            response = await served.infer(request)
            if outputs:
                total = sum(response.outputs[name].nbytes for name in outputs)
                await _copied(total, _write_all, response, outputs)
                response = dataclasses.replace(response, written=frozenset(outputs))
            return response
        finally:
            self._held.give(size)

    def _placed(self, what: str, where: Span) -> Region:
        """The region of a tensor, which lies in it."""
        region = self._find(where.region)
        if where.offset + where.byte_size > region.byte_size:
            raise InvalidRequest(
                f"{what} ends at {where.offset + where.byte_size} of the region {where.region[:80]!r}, which has "
                f"{region.byte_size} bytes"
            )
        return region

    def _find(self, name: str) -> Region:
        try:
            return _described(os.readlink(self._entry(name)))
        except FileNotFoundError:
            raise NotFound(f"no region {name[:80]!r} is registered", hint="register it first") from None

    def _entry(self, name: str) -> bytes:
        digest = hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=16)
        return os.path.join(self._folder, digest.hexdigest().encode())

    def _entries(self) -> list[bytes]:
        return [os.path.join(self._folder, each) for each in os.listdir(self._folder)]


@functools.lru_cache(MAX_REGIONS)
def _described(text: bytes) -> Region:
    return Region(*json.loads(text))


async def _copied(size: int, copy: Any, *arguments: Any) -> Any:
    """The result of a function that copies so many bytes; in a thread where that takes long."""
    if size > _IN_THREAD:
        return await asyncio.to_thread(copy, *arguments)
    return copy(*arguments)


def _check_number(what: str, value: object) -> None:
    if type(value) is not int or not 0 <= value <= _LARGEST:
        raise InvalidRequest(f"{what} is {str(value)[:40]!r}", hint="it is a number of bytes")


def _open(key: str, flags: int) -> tuple[int, os.stat_result]:
    """A descriptor of POSIX shared memory, and what is known of it."""
    name = key.removeprefix("/") if isinstance(key, str) else ""
    if not name.isprintable() or "/" in name or name in ("", ".", "..") or len(name.encode()) > _MAX_KEY_BYTES:
        raise InvalidRequest(f"{str(key)[:40]!r} is no key of shared memory", hint="/NAME, as shm_open takes it")
    if name.startswith(_SEMAPHORE):
        raise InvalidRequest(f"the key {key[:80]!r} is a semaphore's", hint="call the memory something else")
    try:
        # Not following links; and not waiting, should it be a pipe.
        file = os.open(MEMORY / name, flags | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise InvalidRequest(
            f"the shared memory {key[:80]!r} cannot be opened: {error.strerror}",
            hint="it has to be there, and open to the server's user, as long as it is registered",
        ) from None
    found = os.fstat(file)
    if not stat.S_ISREG(found.st_mode):
        os.close(file)
        raise InvalidRequest(f"the key {key[:80]!r} is not shared memory")
    return file, found


def _read_all(shared: Shared, places: list[Region]) -> dict[str, np.ndarray]:
    return {
        name: wire.from_bytes(name, datatype, shape, _read(region, where))
        for (name, datatype, shape, where), region in zip(shared.inputs, places, strict=True)
    }


def _read(region: Region, where: Span) -> memoryview:
    """A tensor's bytes, in memory of our own."""
    data = np.empty(where.byte_size, np.uint8).data
    at, begin = 0, region.offset + where.offset
    file, _ = region.open(os.O_RDONLY)
    try:
        while at < len(data):
            count = os.preadv(file, [data[at:]], begin + at)
            if not count:
                raise InvalidRequest(f"the memory of region {region.name!r} is shorter than it was registered")
            at += count
    except OSError as error:
        raise InvalidRequest(f"the memory of region {region.name!r} cannot be read: {error.strerror}") from None
    finally:
        os.close(file)
    return data.toreadonly()


def _write_all(response: Response, outputs: Mapping[str, tuple[Region, Span]]) -> None:
    for name, (region, where) in outputs.items():
        data = memoryview(wire.to_bytes(response.outputs[name]))
        if len(data) > where.byte_size:
            raise InvalidRequest(
                f"output {name!r} has {len(data)} bytes, and {where.byte_size} are there for it in the region "
                f"{region.name!r}"
            )
        _write(region, where, data)


def _write(region: Region, where: Span, data: memoryview) -> None:
    at, begin = 0, region.offset + where.offset
    file, size = region.open(os.O_WRONLY)
    try:
        # To write behind the end would make the file longer.
        if size < begin + len(data):
            raise InvalidRequest(f"the memory of region {region.name!r} is shorter than it was registered")
        while at < len(data):
            at += os.pwrite(file, data[at:], begin + at)
    except OSError as error:
        raise InvalidRequest(f"the memory of region {region.name!r} cannot be written: {error.strerror}") from None
    finally:
        os.close(file)
