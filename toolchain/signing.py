"""Signs artifacts with OpenSSF Model Signing, offline; ``runtimes/_signature.py`` checks what this makes.

Needs the extra ``sign``: ``model-signing``, and ``pyopenssl``, which it imports and does not ask for. Keys and
certificates are those of OpenSSL. A key of one's own, to sign with and to give to devices::

    openssl ecparam -genkey -name prime256v1 -noout -out key.pem
    openssl ec -in key.pem -pubout -out key.pub

A root certificate, which devices trust, and a signing certificate under it, which can be replaced without them::

    openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -keyout root.key -out root.pem \
        -days 3650 -subj "/CN=Models root" -addext keyUsage=critical,keyCertSign,cRLSign
    openssl req -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -keyout key.pem -out request.pem \
        -subj "/CN=Model builds"
    printf "keyUsage=critical,digitalSignature\\nextendedKeyUsage=codeSigning\\n" > usage.txt
    openssl x509 -req -in request.pem -CA root.pem -CAkey root.key -CAcreateserial -days 365 -extfile usage.txt \
        -out certificate.pem

An ECDSA signature holds a random number, so a signed bundle differs from run to run in the signature, and only there.
"""

from __future__ import annotations

import dataclasses
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from runtimes._signature import may_sign
from toolchain.errors import SigningError


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SigningKey:
    """What is signed with.

    Attributes:
        key: PEM of an elliptic curve private key (P-256, P-384 or P-521), not encrypted.
        certificate: PEM of the certificate of that key; None signs with the bare key.
        chain: PEM of the certificates between it and the root that devices have.
    """

    key: Path
    certificate: Path | None = None
    chain: tuple[Path, ...] = ()


@dataclasses.dataclass(frozen=True, slots=True)
class _Digest:
    """As model-signing has them: it asks for these three."""

    algorithm: str
    digest_value: bytes

    @property
    def digest_hex(self) -> str:
        return self.digest_value.hex()


@dataclasses.dataclass(frozen=True, slots=True)
class _KnownDigests:
    """Stands where model-signing hashes a folder: the manifest has every digest, and no byte is read again."""

    name: str
    digests: Mapping[str, str]

    def hash(self, model_path: Any) -> Any:
        from model_signing import manifest

        kind = manifest.SerializationType.from_args({"method": "files", "hash_type": "sha256", "allow_symlinks": False})
        items = [kind.new_item(n, _Digest("sha256", bytes.fromhex(d))) for n, d in sorted(self.digests.items())]
        return manifest.Manifest(self.name, items, kind)


def sign(digests: Mapping[str, str], key: SigningKey, *, name: str) -> bytes:
    """A signature over files that are named by their digests.

    Args:
        digests: every file, POSIX path relative to the artifact, to its SHA-256 in hex.
        key: what to sign with.
        name: of the model, for whoever reads the signature.

    Returns:
        The bytes of the signature: a Sigstore bundle in JSON.

    Raises:
        SigningError: model-signing is not installed, or a key or certificate cannot be used.
    """
    try:
        from model_signing import signing
    except ImportError as error:
        raise SigningError(
            f"model-signing cannot be imported: {error}", hint="run: pip install 'onnx-toolchain[sign]'"
        ) from None
    _check(key)
    try:
        config = signing.Config()
        if key.certificate is None:
            config.use_elliptic_key_signer(private_key=key.key)
        else:
            # model-signing 1.1 takes no empty chain; the certificate itself adds nothing to its own.
            chain = key.chain or (key.certificate,)
            config.use_certificate_signer(
                private_key=key.key, signing_certificate=key.certificate, certificate_chain=chain
            )
        config.set_hashing_config(_KnownDigests(name, digests))
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "manifest.sig"
            config.sign(folder, path)
            return path.read_bytes()
    except (ValueError, TypeError, OSError, AttributeError) as error:
        raise SigningError(
            f"cannot sign: {error}",
            where=", ".join(map(os.fspath, (key.key, *([key.certificate] if key.certificate else ()), *key.chain))),
        ) from error


def _check(key: SigningKey) -> None:
    """Says what is wrong with a key or its certificate in our own words, before anything is packed.

    Raises:
        SigningError: it cannot be read, is no elliptic curve key, or the certificate is another's or not for signing.
    """
    from cryptography import x509
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    make_one = "openssl ecparam -genkey -name prime256v1 -noout -out key.pem"
    try:
        private = serialization.load_pem_private_key(key.key.read_bytes(), password=None)
    except OSError as error:
        raise SigningError(
            f"the key cannot be read: {error.strerror}", where=str(key.key), hint="check the path"
        ) from error
    except TypeError:
        raise SigningError(
            "the key is encrypted", where=str(key.key), hint=f"openssl pkey -in {key.key.name} -out plain.pem"
        ) from None
    except ValueError as error:
        raise SigningError("that is no private key in PEM", where=str(key.key), hint=make_one) from error
    if not isinstance(private, ec.EllipticCurvePrivateKey):
        raise SigningError("the key is of another kind than elliptic curve", where=str(key.key), hint=make_one)
    if key.certificate is None:
        return
    try:
        certificate = x509.load_pem_x509_certificate(key.certificate.read_bytes())
    except (OSError, ValueError) as error:
        raise SigningError(
            "that is no certificate in PEM", where=str(key.certificate), hint="give the certificate of the key"
        ) from error
    if certificate.public_key() != private.public_key():
        raise SigningError(
            "the certificate is of another key", where=str(key.certificate), hint=f"give that of {key.key}"
        )
    if not may_sign(certificate):
        raise SigningError(
            "devices would refuse the certificate: it is not for signing code",
            where=str(key.certificate),
            hint="it needs keyUsage=digitalSignature or extendedKeyUsage=codeSigning",
        )
