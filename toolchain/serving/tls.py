"""The certificate of the server, for HTTP and for gRPC, read again when its files change.

Connections that stand keep the certificate they were opened with; new ones get the new one. The pair is tried on a
context of its own first, so that a half-replaced pair is complained of and the one before stays in use.
"""

from __future__ import annotations

import ssl
from pathlib import Path

import grpc

from runtimes import Error


class InvalidCertificate(Error):
    """A certificate or key that cannot be read, or that do not belong together."""


class Certificate:
    """A certificate and its key, in PEM files.

    Args:
        certificate: with the certificates between it and the root behind it.
        key: not encrypted.

    Raises:
        InvalidCertificate: they cannot be used.
    """

    def __init__(self, certificate: Path, key: Path) -> None:
        self._files = (certificate, key)
        self._identity = self._look()
        self._pair = self._read()
        self.context = _context(*self._files)

    def refresh(self) -> bool:
        """Reads the files again if they are others than before. Reads a disk: called in a thread, now and then.

        Returns:
            Whether they had changed.

        Raises:
            InvalidCertificate: the new ones cannot be used; those before stay in use.
        """
        identity = self._look()
        if identity == self._identity:
            return False
        self._identity = identity  # also of files that are wrong: they are complained of once
        _context(*self._files)
        self._pair = self._read()
        self.context.load_cert_chain(*self._files)
        return True

    def credentials(self) -> grpc.ServerCredentials:
        """For a gRPC server; follows ``refresh``."""
        return grpc.dynamic_ssl_server_credentials(self._configuration(), self._configuration)

    def _configuration(self) -> grpc.ServerCertificateConfiguration:
        certificate, key = self._pair
        return grpc.ssl_server_certificate_configuration([(key, certificate)])

    def _look(self) -> tuple[tuple[int, ...], ...]:
        try:
            found = [path.stat() for path in self._files]
        except OSError as error:
            raise InvalidCertificate(
                f"certificate or key cannot be read: {error.strerror}",
                where=error.filename,
                hint="--tls-certificate and --tls-key are PEM files that this user may read",
            ) from error
        return tuple((f.st_dev, f.st_ino, f.st_size, f.st_mtime_ns, f.st_ctime_ns) for f in found)

    def _read(self) -> tuple[bytes, bytes]:
        certificate, key = (path.read_bytes() for path in self._files)
        return certificate, key


def _context(certificate: Path, key: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        # Without a password callback OpenSSL asks the terminal for the one of an encrypted key.
        context.load_cert_chain(certificate, key, password=lambda: "")
    except (OSError, ssl.SSLError, ValueError) as error:
        raise InvalidCertificate(
            f"certificate and key cannot be used: {error}",
            where=f"{certificate}, {key}",
            hint="both are PEM files, the key is that of the certificate and not encrypted",
        ) from error
    return context
