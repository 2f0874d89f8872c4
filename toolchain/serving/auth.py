"""Bearer tokens: a file of them, read again when it changes, compared in constant time.

A line of the file is a token, and after it the models that it is for; none of them is all of them::

    # who                                  what for
    sha256:9f86d081884c7d65…               resnet50 bert
    sha256:60303ae22b998861…
    s3cret-in-the-clear                    resnet50

``sha256:`` is the digest of a token in hex (``printf %s TOKEN | sha256sum``), so that the file need not hold it. Tokens
are digested before they are compared, and each is compared with every one of the file by ``hmac.compare_digest``: the
time tells neither how much of a token was right nor which line it stands in.
"""

from __future__ import annotations

import dataclasses
import hashlib
import hmac
import os
import re
import stat
from pathlib import Path

from runtimes import Error
from toolchain.serving.base import PermissionDenied, Unauthenticated

_DIGEST = re.compile(r"sha256:([0-9a-fA-F]{64})")
#: RFC 6750, 2.1: b64token.
_TOKEN = re.compile(r"[A-Za-z0-9._~+/-]{8,512}=*")
_MODEL = re.compile(r"[A-Za-z0-9_.-]+")


class InvalidTokens(Error):
    """A file of tokens that cannot be read, holds something else, or is readable by everybody."""


@dataclasses.dataclass(frozen=True, slots=True)
class _Known:
    digest: bytes
    models: frozenset[str]


def _identity(path: Path) -> tuple[int, ...]:
    found = path.stat()
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def read_tokens(path: Path) -> tuple[_Known, ...]:
    """Reads a file of tokens. Raises InvalidTokens; its message holds no token."""
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            if not stat.S_ISREG(mode):
                raise InvalidTokens("not a file of tokens", where=str(path))
            if os.name == "posix" and mode & 0o027:
                raise InvalidTokens(
                    f"others than its owner may read or change the tokens: mode {stat.S_IMODE(mode):04o}",
                    where=str(path),
                    hint=f"chmod 600 {path}",
                )
            text = file.read(1 << 22).decode()
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or error
        raise InvalidTokens(
            f"the tokens cannot be read: {why}", where=str(path), hint="a text file, a token a line"
        ) from error
    known = []
    for number, line in enumerate(text.splitlines(), 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        where = f"{path}, line {number}"
        if digest := _DIGEST.fullmatch(words[0]):
            value = bytes.fromhex(digest[1])
        elif words[0].startswith("sha256:"):
            raise InvalidTokens(
                "sha256: is followed by 64 digits in hex", where=where, hint="printf %s TOKEN | sha256sum"
            )
        elif _TOKEN.fullmatch(words[0]):
            value = hashlib.sha256(words[0].encode()).digest()
        else:
            raise InvalidTokens(
                "not a token: it has 8 characters at least, letters, digits and ._~+/-",
                where=where,
                hint='python -c "import secrets; print(secrets.token_urlsafe(32))" makes one',
            )
        if wrong := [word for word in words[1:] if not _MODEL.fullmatch(word)]:
            raise InvalidTokens(f"not the name of a model: {wrong[0]!r}", where=where)
        known.append(_Known(value, frozenset(words[1:])))
    if not known:
        raise InvalidTokens(
            "the file holds no token", where=str(path), hint="write one, or leave the option out to ask for none"
        )
    return tuple(known)


class Auth:
    """Who may ask for what.

    Args:
        path: the file of tokens; None lets everybody in.

    Raises:
        InvalidTokens: the file cannot be used.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._known: tuple[_Known, ...] = ()
        self._identity: tuple[int, ...] = ()
        if path is not None:
            self.refresh()

    @property
    def wanted(self) -> bool:
        """Whether a token is asked for at all."""
        return self._path is not None

    def refresh(self) -> bool:
        """Reads the file again if it is another one than before. Reads a disk: called in a thread, now and then.

        Returns:
            Whether it had changed.

        Raises:
            InvalidTokens: the new file cannot be used; the tokens of the one before stay valid.
        """
        if self._path is None:
            return False
        try:
            identity = _identity(self._path)
        except OSError as error:
            raise InvalidTokens(
                f"the tokens cannot be read: {error.strerror}",
                where=str(self._path),
                hint="a text file, a token a line",
            ) from error
        if identity == self._identity:
            return False
        self._identity = identity  # also of a file that is wrong: it is complained of once
        self._known = read_tokens(self._path)
        return True

    def check(self, model: str | None, authorization: str | None) -> None:
        """Lets a request through, or does not.

        Args:
            model: which it is about; None where it is about none in particular: any token will do.
            authorization: the header of that name.

        Raises:
            Unauthenticated: there is no token, or it is none of those in the file.
            PermissionDenied: the token is not for this model.
        """
        if self._path is None:
            return
        scheme, _, token = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not token:
            raise Unauthenticated("a token is wanted", hint="send the header `Authorization: Bearer TOKEN`")
        digest = hashlib.sha256(token.strip().encode("utf-8", "surrogateescape")).digest()
        # One token may stand in several lines. All lines are compared, whichever matched.
        matching = [known for known in self._known if hmac.compare_digest(known.digest, digest)]
        if not matching:
            raise Unauthenticated("the token is not valid", hint="ask whoever runs this server for one")
        if model is not None and not any(not known.models or model in known.models for known in matching):
            raise PermissionDenied(f"the token is not for the model {model!r}")
