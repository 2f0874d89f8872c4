"""Reads a bundle: an artifact in one file, checked as it comes in, and never trusted further than it was checked.

A bundle is a ustar archive, plain (``.tar``), in gzip (``.tar.gz``) or in Zstandard (``.tar.zst``), with no choices
left, so that the same artifact gives the same bytes and a reader need not interpret anything::

    manifest.json      of the artifact: the name, size and SHA-256 of every file
    manifest.sha256    of that, as sha256sum writes it: so that no byte of a bundle can be damaged unnoticed
    manifest.sig       an OpenSSF model signature over all of them, where it is signed
    …                  every file of the manifest, and nothing else, in the order of their names

Every entry is a plain file of mode 0644, of nobody, from 1970. The manifest says which entry comes next and how long it
is, so the header that has to stand there is known before it is read, and is compared byte by byte: links, devices,
folders, absolute paths, ``..``, extra files and another order are all the same thing, a header that is not the one
expected. Nothing is written under a name that an archive gives.

``tar`` and ``zstd`` open it by hand. ``.tar`` and ``.tar.gz`` need nothing but Python; ``.tar.zst`` needs Python 3.14
or the package ``backports.zstd``, which is the standard library's module for older Pythons.

See POSIX.1-2017, pax, "ustar Interchange Format"; RFC 1952 (gzip); RFC 8878 (Zstandard).
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import tarfile
import unicodedata
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any, Protocol

from runtimes._digests import FileEntry
from runtimes._versions import sync_folder, write_through
from runtimes.base import InvalidArtifact

MANIFEST = "manifest.json"
CHECKSUM = "manifest.sha256"
SIGNATURE = "manifest.sig"
BLOCK = 512
#: What stands behind the last entry.
END = bytes(2 * BLOCK)
#: 2 MiB, as ``zstd -3`` has it: what a reader has to keep.
ZSTD_WINDOW_LOG = 21
#: Magic; no size, one segment or dictionary, but a checksum; the window.
ZSTD_START = bytes.fromhex("28b52ffd04") + bytes([ZSTD_WINDOW_LOG - 10 << 3])
#: Magic, deflate, no flags, no time, no hint, an unknown system.
GZIP_START = bytes.fromhex("1f8b08000000000000ff")

_CHUNK = 1 << 20
_FREE_OF_RATIO = 64 << 20
#: Names that Windows keeps for itself, with any ending.
_RESERVED = frozenset({"con", "prn", "aux", "nul", *(f"{port}{n}" for port in ("com", "lpt") for n in range(10))})


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What is refused unseen. A manifest is parsed whole, so its cap is what bounds memory.

    Attributes:
        total: bytes of all files together.
        files: how many.
        depth: folders in a path, with the file.
        manifest, signature: bytes.
        ratio: unpacked to packed bytes, beyond the first 64 MiB.
    """

    total: int = 64 << 30
    files: int = 10_000
    depth: int = 16
    manifest: int = 2 << 20
    signature: int = 4 << 20
    ratio: int = 200


def zstd() -> Any:
    """The Zstandard module: the standard library's, or its backport.

    Raises:
        InvalidArtifact: neither is here.
    """
    try:
        try:
            from compression import zstd  # type: ignore[import-not-found, unused-ignore]  # Python 3.14
        except ImportError:
            from backports import zstd  # type: ignore[attr-defined, import-not-found, no-redef, unused-ignore]
    except ImportError:
        raise InvalidArtifact(
            "Python has no Zstandard here, which .tar.zst needs",
            hint="run: pip install backports.zstd; or make the bundle as .tar.gz or .tar, which need nothing",
        ) from None
    return zstd


def header(name: str, size: int) -> bytes:
    """The 512 bytes before an entry. They follow from its name and its size alone.

    Raises:
        InvalidArtifact: the name does not fit: 255 bytes of UTF-8, of which 100 after one of its slashes.
    """
    entry = tarfile.TarInfo(name)
    try:
        if size < 8**11:
            entry.size = size
            return entry.tobuf(tarfile.USTAR_FORMAT, "utf-8", "strict")
        # ustar ends at 8 GiB. Beyond it the field is binary, which GNU tar began and all read; the sum is over spaces.
        block = bytearray(entry.tobuf(tarfile.USTAR_FORMAT, "utf-8", "strict"))
        block[124:136] = b"\x80" + size.to_bytes(11, "big")
        block[148:156] = b" " * 8
        block[148:156] = b"%06o\0 " % sum(block)
        return bytes(block)
    except (ValueError, OverflowError):
        raise InvalidArtifact(f"a bundle has no room for the name {name!r}", hint="shorten it") from None


def checksum(manifest: bytes) -> bytes:
    """The content of the entry behind the manifest."""
    return f"{hashlib.sha256(manifest).hexdigest()}  {MANIFEST}\n".encode()


def check_files(files: Mapping[str, FileEntry], where: str, *, limits: Limits) -> int:
    """Holds the files of a manifest against what may be unpacked on any system. Returns their bytes together.

    Raises:
        InvalidArtifact: too many, too large, too deep, or names that some file system does not keep apart.
    """
    if len(files) > limits.files:
        raise InvalidArtifact(f"the bundle has more than {limits.files:,} files", where=where)
    total = 0
    folders: set[str] = set()
    seen: set[str] = set()
    for name, entry in files.items():
        parts = name.split("/")
        if len(parts) > limits.depth:
            raise InvalidArtifact(f"{name[:100]!r} is more than {limits.depth} folders deep", where=where)
        for part in parts:
            if part != part.rstrip(". ") or part.split(".")[0].lower() in _RESERVED or set(part) & set('<>"|?*'):
                raise InvalidArtifact(f"{name[:200]!r} is no name for a file on every system", where=where)
        folded = [unicodedata.normalize("NFC", part).casefold() for part in parts]
        seen.add("/".join(folded))
        folders.update("/".join(folded[:end]) for end in range(1, len(parts)))
        total += entry.size
        if total > limits.total:
            raise InvalidArtifact(f"the bundle unpacks to more than {limits.total >> 30} GiB", where=where)
    if len(seen) < len(files) or seen & folders:
        raise InvalidArtifact("names in the bundle differ in case only, or a file is a folder too", where=where)
    if seen & {MANIFEST, CHECKSUM, SIGNATURE}:
        raise InvalidArtifact("the bundle lists its own manifest, checksum or signature as a file", where=where)
    return total


class _Source(Protocol):
    """Unpacked bytes."""

    def read(self, size: int, /) -> bytes:
        """At most ``size`` bytes, at least one; none at the end. Raises on damage."""


class BundleReader:
    """One pass over a bundle, in constant memory.

    Attributes:
        where: the bundle, for messages.
        limits: what is refused.
        manifest: the bytes of the manifest, unchecked.
        signature: the bytes of the signature, unchecked; None where it is not signed.
    """

    def __init__(self, file: IO[bytes], where: str, *, limits: Limits) -> None:
        """Reads up to the first file. Raises InvalidArtifact."""
        self.where = where
        self.limits = limits
        self._source = _source(file, where, limits.ratio)
        self._pending = self._exactly(BLOCK)
        self.manifest = self._whole(MANIFEST, limits.manifest)
        self._pending = self._exactly(BLOCK)
        if self._whole(CHECKSUM, BLOCK) != checksum(self.manifest):
            raise InvalidArtifact("the manifest is damaged: its SHA-256 is another", where=where, hint="copy it again")
        self._pending = self._exactly(BLOCK)
        self.signature: bytes | None = None
        if _name(self._pending) == SIGNATURE:
            self.signature = self._whole(SIGNATURE, limits.signature)
            self._pending = self._exactly(BLOCK)

    def files(self, files: Mapping[str, FileEntry]) -> Iterator[tuple[str, Iterator[bytes]]]:
        """Each file's name and content in pieces, in order. Each content has to be consumed before the next.

        The SHA-256 is compared when the last piece was handed out; after the last file the bundle has to end.

        Raises:
            InvalidArtifact: anything is not what the manifest says.
        """
        for name in sorted(files):
            if self._pending != header(name, files[name].size):
                raise self._unexpected(name, files[name].size)
            yield name, self._content(name, files[name])
            self._pending = self._exactly(BLOCK)
        if self._pending + self._exactly(BLOCK) != END:
            raise self._unexpected(None, 0)
        if self._read(1):
            raise InvalidArtifact("there is more behind the end of the bundle", where=self.where)

    def _content(self, name: str, entry: FileEntry) -> Iterator[bytes]:
        digest = hashlib.sha256()
        left = entry.size
        while left:
            piece = self._read(min(left, _CHUNK))
            if not piece:
                raise self._cut()
            left -= len(piece)
            digest.update(piece)
            yield piece
        if digest.hexdigest() != entry.sha256:
            raise InvalidArtifact(
                f"{name!r} is not the file that was built: its SHA-256 is {digest.hexdigest()}, not {entry.sha256}",
                where=self.where,
                hint="it was changed or damaged on the way: copy or make the bundle again",
            )
        self._padding(entry.size)

    def _whole(self, name: str, most: int) -> bytes:
        """The content of an entry that is not in the manifest, whose header is pending."""
        size = _size(self._pending)
        if _name(self._pending) != name or size is None:
            raise self._unexpected(name, None)
        if size > most:
            raise InvalidArtifact(f"{name} is larger than {most:,} bytes", where=self.where)
        if self._pending != header(name, size):
            raise self._unexpected(name, size)
        content = self._exactly(size)
        self._padding(size)
        return content

    def _padding(self, size: int) -> None:
        if any(self._exactly(-size % BLOCK)):
            raise InvalidArtifact("there is something between the files of the bundle", where=self.where)

    def _read(self, size: int) -> bytes:
        try:
            return self._source.read(size)
        except (zlib.error, EOFError) as error:
            raise InvalidArtifact(f"the bundle is damaged: {error}", where=self.where, hint="copy it again") from None
        except OSError as error:
            raise InvalidArtifact(f"the bundle cannot be read: {error.strerror}", where=self.where) from error

    def _exactly(self, size: int) -> bytes:
        found = bytearray()
        while len(found) < size:
            piece = self._read(size - len(found))
            if not piece:
                raise self._cut()
            found += piece
        return bytes(found)

    def _cut(self) -> InvalidArtifact:
        return InvalidArtifact("the bundle ends too early", where=self.where, hint="copy it again")

    def _unexpected(self, name: str | None, size: int | None) -> InvalidArtifact:
        """Says what stands where another header was expected."""
        expected = "the end of the bundle" if name is None else repr(name)
        found = repr(_name(self._pending)[:200])
        kinds = {b"1": "a hard link", b"2": "a symlink", b"3": "a device", b"4": "a device", b"5": "a folder"}
        kind = self._pending[156:157]
        if not any(self._pending):
            what = f"the bundle ends where {expected} should be"
        elif self._pending[257:262] != b"ustar":
            what = f"what stands where {expected} should be is no header of a ustar archive"
        elif kind != b"0":
            what = f"{found} is {kinds.get(kind, 'no plain file')}, and {expected} should be there"
        elif _name(self._pending) == name and _size(self._pending) != size:
            what = f"{found} is not as long as the manifest says"
        elif _name(self._pending) == name:
            what = f"the entry of {found} has an owner, a time or a mode, which a bundle has not"
        else:
            what = f"{found} stands where {expected} should be"
        return InvalidArtifact(what, where=self.where, hint="make the bundle with: toolchain bundle")


@contextlib.contextmanager
def open_bundle(path: str | os.PathLike[str], *, limits: Limits | None = None) -> Iterator[BundleReader]:
    """Opens a bundle and reads its manifest and signature.

    Raises:
        InvalidArtifact: no bundle, or a damaged or unsafe one; or it is Zstandard and Python has none here.
    """
    where = os.fspath(path)
    if os.path.isdir(where):
        raise InvalidArtifact(
            "that is a folder, and a bundle is a file",
            where=where,
            hint=f"make one of an artifact: toolchain bundle {where} --for PLATFORM -o FILE.tar",
        )
    try:
        file = open(path, "rb", buffering=0)
    except FileNotFoundError:
        raise InvalidArtifact("there is no such file", where=where, hint="check the path") from None
    except (OSError, ValueError) as error:
        why = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise InvalidArtifact(
            f"the file cannot be opened: {why}", where=where, hint="check the path, and who may read it"
        ) from None
    with file:
        yield BundleReader(file, where, limits=limits or Limits())


def unpack(reader: BundleReader, files: Mapping[str, FileEntry], directory: Path | None) -> None:
    """Writes the files of a bundle, each checked against its digest and on the disk when this returns.

    Args:
        reader: at its first file.
        files: those of its manifest, which was checked.
        directory: a folder of ours, empty; None only checks.

    Raises:
        InvalidArtifact: anything is not what the manifest says; what was written so far is the caller's to remove.
    """
    made: set[Path] = set()
    for name, pieces in reader.files(files):
        if directory is None:
            for _ in pieces:
                pass
            continue
        path = directory / name
        if path.parent not in made:
            path.parent.mkdir(parents=True, exist_ok=True)
            made.update(parent for parent in path.parents if parent.is_relative_to(directory))
        write_through(path, pieces)
    for folder in made:
        sync_folder(folder)


def _name(block: bytes) -> str:
    name, prefix = (block[start:end].split(b"\0")[0] for start, end in ((0, 100), (345, 500)))
    return (prefix + b"/" + name if prefix else name).decode("utf-8", "replace")


def _size(block: bytes) -> int | None:
    field = block[124:136]
    if field[:1] == b"\x80":
        return int.from_bytes(field[1:], "big")
    text = field.rstrip(b"\0 ")
    return int(text, 8) if text and set(text) <= set(b"01234567") else None


def _source(file: IO[bytes], where: str, ratio: int) -> _Source:
    start = file.read(len(GZIP_START))
    packed = _Packed(file, start, where, ratio)
    if start.startswith(ZSTD_START[:4]):
        if not start.startswith(ZSTD_START):
            raise InvalidArtifact(
                "this is Zstandard, but no bundle", where=where, hint="make it with: toolchain bundle"
            )
        return _Zstd(packed)
    if start.startswith(GZIP_START[:2]):
        if start != GZIP_START:
            raise InvalidArtifact("this is gzip, but no bundle", where=where, hint="make it with: toolchain bundle")
        return _Gzip(packed)
    if not start:
        raise InvalidArtifact("the file is empty", where=where, hint="copy it again")
    if not MANIFEST.encode().startswith(start):
        raise InvalidArtifact(
            "this is no bundle: it begins with neither manifest.json nor Zstandard nor gzip",
            where=where,
            hint="give what toolchain bundle wrote",
        )
    return packed


class _Packed:
    """The file itself. Counts what was read of it, and bounds what that may become."""

    def __init__(self, file: IO[bytes], start: bytes, where: str, ratio: int) -> None:
        self._file = file
        self._start = start
        self._where = where
        self._ratio = ratio
        self._read = self._made = 0

    def read(self, size: int, /) -> bytes:
        piece, self._start = self._start[:size], self._start[size:]
        piece = piece or self._file.read(size)
        self._read += len(piece)
        return piece

    def count(self, made: int) -> None:
        """Notes how many bytes were unpacked. Raises InvalidArtifact where that is too many for what was read."""
        self._made += made
        if self._made > _FREE_OF_RATIO + self._ratio * self._read:
            raise InvalidArtifact(
                f"the bundle unpacks to more than {self._ratio} times its size",
                where=self._where,
                hint="a bundle of your own that is so sparse: make it as .tar",
            )


class _Zstd:
    def __init__(self, packed: _Packed) -> None:
        module = zstd()
        self._packed = packed
        self._error: type[Exception] = module.ZstdError
        largest = {module.DecompressionParameter.window_log_max: ZSTD_WINDOW_LOG}
        self._decompressor = module.ZstdDecompressor(options=largest)

    def read(self, size: int, /) -> bytes:
        while not self._decompressor.eof:
            fresh = self._packed.read(_CHUNK // 8) if self._decompressor.needs_input else b""
            if self._decompressor.needs_input and not fresh:
                raise EOFError("it ends too early")
            try:
                made: bytes = self._decompressor.decompress(fresh, size)
            except self._error as error:
                raise EOFError(str(error)) from None
            if made:
                self._packed.count(len(made))
                return made
        if self._decompressor.unused_data or self._packed.read(1):
            raise EOFError("there is more behind its end")
        return b""


class _Gzip:
    def __init__(self, packed: _Packed) -> None:
        self._packed = packed
        self._decompressor = zlib.decompressobj(31)
        self._left = b""

    def read(self, size: int, /) -> bytes:
        while not self._decompressor.eof:
            fresh = self._left or self._packed.read(_CHUNK // 8)
            made = self._decompressor.decompress(fresh, size)
            self._left = self._decompressor.unconsumed_tail
            if made:
                self._packed.count(len(made))
                return made
            if not fresh:
                raise EOFError("it ends too early")
        if self._decompressor.unused_data or self._packed.read(1):
            raise EOFError("there is more behind its end")
        return b""
