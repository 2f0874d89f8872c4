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
        # TypeError: an encrypted key without a password; AttributeError: a key that has no curve, such as RSA's
        raise SigningError(
            f"cannot sign: {error}",
            where=", ".join(map(os.fspath, (key.key, *([key.certificate] if key.certificate else ()), *key.chain))),
            hint="give an elliptic curve key: openssl ecparam -genkey -name prime256v1 -noout -out key.pem",
        ) from error
