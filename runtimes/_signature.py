"""Checks an OpenSSF model signature over the files of an artifact, offline, with a public key or with certificates.

The format is that of OpenSSF Model Signing 1.0 (``model-signing``, which ``toolchain/signing.py`` signs with and which
verifies the same signature over an installed artifact): a Sigstore bundle with a DSSE envelope around an in-toto
statement, whose resources are the SHA-256 of every file. A signature here covers the manifest and everything that the
manifest lists, and both have to name the same files with the same digests.

``model-signing`` itself brings three dozen packages; a device needs ``cryptography`` and nothing else. Elliptic curve
keys on P-256, P-384 and P-521, as the format has them.

See https://github.com/ossf/model-signing-spec, https://github.com/secure-systems-lab/dsse/blob/v1.0.2/protocol.md and
https://in-toto.io/Statement/v1.
"""

from __future__ import annotations

import base64
import binascii
import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from runtimes.base import InvalidArtifact

_MEDIA_TYPE = "application/vnd.dev.sigstore.bundle.v0.3+json"
_PAYLOAD_TYPE = "application/vnd.in-toto+json"
_STATEMENT = "https://in-toto.io/Statement/v1"
_PREDICATE = "https://model_signing/signature/v1.0"
_LONGEST_CHAIN = 8
_PUBLIC_KEY = "the public half of the key that signed: openssl ec -in key.pem -pubout -out key.pub"


class InvalidSignature(InvalidArtifact):
    """A signature that is missing, is not of the key or certificate asked for, or covers something else."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Signer:
    """Whose signature is asked for: that of a public key, or of anyone whom a root certificate vouches for.

    Attributes:
        key: PEM of an elliptic curve public key.
        roots: PEM of the certificates that are trusted. Exactly one of the two is given.
    """

    key: Path | None = None
    roots: tuple[Path, ...] = ()

    def __post_init__(self) -> None:
        if (self.key is None) == (not self.roots):
            raise InvalidSignature(
                "a public key or root certificates, one of the two, say whose signature is wanted",
                where="--verify, --root-certificate",
                hint="give one of them",
            )


def check_signature(signature: bytes | None, digests: Mapping[str, str], signer: Signer, *, where: str) -> str:
    """Checks that the signer signed exactly these files.

    Args:
        signature: the signature's bytes; None where there is none.
        digests: file, POSIX path relative to the artifact, to its SHA-256 in hex: all that there are.
        signer: whose signature has to be there.
        where: what is signed, for messages.

    Returns:
        Who signed, for a person: the key's fingerprint, or the subject of the certificate.

    Raises:
        InvalidSignature: in every other case.
    """
    if signature is None:
        raise InvalidSignature(
            "it is not signed, and a signature is asked for",
            where=where,
            hint="ask whoever made it for a signed one: toolchain bundle --sign KEY.pem",
        )
    _require_cryptography(where)
    try:
        bundle = _object(json.loads(signature.decode("utf-8")))
        if bundle.get("mediaType") != _MEDIA_TYPE:
            raise ValueError(f"the media type is {bundle.get('mediaType')!r}")
        envelope = _object(bundle["dsseEnvelope"])
        if envelope["payloadType"] != _PAYLOAD_TYPE:
            raise ValueError(f"the payload is {envelope['payloadType']!r}")
        payload = base64.b64decode(envelope["payload"], validate=True)
        (entry,) = envelope["signatures"]
        raw = base64.b64decode(_object(entry)["sig"], validate=True)
        material = _object(bundle["verificationMaterial"])
        public_key, who = _public_key(material, signer)
        _check_raw(public_key, raw, payload)
        resources = _resources(_object(json.loads(payload.decode("utf-8"))))
    except InvalidSignature as error:
        raise InvalidSignature(error.what, where=where, hint=error.hint) from None
    except (KeyError, TypeError, ValueError, RecursionError, OSError, binascii.Error) as error:
        raise InvalidSignature(f"the signature cannot be read: {error}", where=where) from None
    if resources != digests:
        differing = sorted(name for name in {**resources, **digests} if resources.get(name) != digests.get(name))
        raise InvalidSignature(
            f"what was signed is not what is here: {differing[0]!r} differs",
            where=where,
            hint="it was changed after it was signed: get it again",
        )
    return who


def _require_cryptography(where: str) -> None:
    try:
        import cryptography  # noqa: F401
    except ImportError:
        raise InvalidSignature(
            "no signature can be checked here: cryptography is not installed",
            where=where,
            hint="run: pip install cryptography",
        ) from None


def _public_key(material: dict[str, Any], signer: Signer) -> tuple[Any, str]:
    """The key that has to have signed, and whose it is."""
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    if signer.key is None:
        return _from_certificates(material, signer.roots)
    try:
        key = serialization.load_pem_public_key(signer.key.read_bytes())
    except OSError as error:
        raise InvalidSignature(
            f"the public key cannot be read: {signer.key}: {error.strerror}", hint="check the path"
        ) from None
    except ValueError:
        raise InvalidSignature(f"not a public key in PEM: {signer.key}", hint=_PUBLIC_KEY) from None
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise InvalidSignature(f"not an elliptic curve key: {signer.key}", hint=_PUBLIC_KEY)
    pem = key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    fingerprint = hashlib.sha256(pem).hexdigest()
    if "publicKey" not in material:
        raise InvalidSignature("it was signed with a certificate, not with this key", hint="give the root certificate")
    hint = _object(material["publicKey"]).get("hint")
    if hint not in (None, fingerprint):
        raise InvalidSignature(
            f"it was signed with another key: {hint}, and this is {fingerprint}",
            hint="give the key of whoever made it, if you trust them",
        )
    return key, f"key {fingerprint}"


def _from_certificates(material: dict[str, Any], roots: Sequence[Path]) -> tuple[Any, str]:
    """The key of the signing certificate, whose chain ends in one of the roots.

    As in ``model-signing``, certificates have to be valid at the moment the signing certificate begins: nothing offline
    says when it was signed, and the clock of a device says little.
    """
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric import ec

    if "x509CertificateChain" not in material:
        raise InvalidSignature("it was signed with a key, not with a certificate", hint="give the public key")
    encoded = _object(material["x509CertificateChain"])["certificates"]
    if not isinstance(encoded, list) or not 1 <= len(encoded) <= _LONGEST_CHAIN:
        raise ValueError(f"a chain has 1 to {_LONGEST_CHAIN} certificates")
    given = [
        x509.load_der_x509_certificate(base64.b64decode(_object(one)["rawBytes"], validate=True)) for one in encoded
    ]
    try:
        trusted = [one for path in roots for one in x509.load_pem_x509_certificates(path.read_bytes())]
    except (OSError, ValueError) as error:
        raise InvalidSignature(
            f"no certificates: {', '.join(map(str, roots))}: {error}", hint="give root certificates in PEM"
        ) from None
    leaf = given[0]
    who = leaf.subject.rfc4514_string()
    if not may_sign(leaf):
        raise InvalidSignature(f"the certificate of {who} is not for signing")
    moment = leaf.not_valid_before_utc
    current = leaf
    for below in range(_LONGEST_CHAIN):
        _check_extensions(current)
        if not current.not_valid_before_utc <= moment <= current.not_valid_after_utc:
            raise InvalidSignature(f"the certificate of {current.subject.rfc4514_string()} was not valid then")
        if current in trusted:
            break
        issuers = [one for one in (*trusted, *given[1:]) if _issued(one, current, below)]
        if not issuers:
            raise InvalidSignature(
                f"no given root vouches for {current.subject.rfc4514_string()}",
                hint="give the root certificate of whoever made it, if you trust them",
            )
        current = issuers[0]
    else:
        raise InvalidSignature(f"the chain of {who} is longer than {_LONGEST_CHAIN} certificates")
    key = leaf.public_key()
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise InvalidSignature(f"the certificate of {who} has no elliptic curve key")
    return key, who


def _issued(issuer: Any, certificate: Any, below: int) -> bool:
    """Whether a certificate may vouch for others and did so for this one, which has ``below`` under it."""
    from cryptography import x509
    from cryptography.exceptions import InvalidSignature as Refused

    try:
        certificate.verify_directly_issued_by(issuer)
    except (Refused, ValueError, TypeError):
        return False
    found = {type(one.value): one.value for one in issuer.extensions}
    basic, usage = found.get(x509.BasicConstraints), found.get(x509.KeyUsage)
    # RFC 5280, 4.2.1.3: a certificate that does not say what its key is for rules nothing out.
    if basic is None or not basic.ca or (usage is not None and not usage.key_cert_sign):
        return False
    return basic.path_length is None or basic.path_length >= below


def may_sign(certificate: Any) -> bool:
    from cryptography import x509
    from cryptography.x509.oid import ExtendedKeyUsageOID

    found = {type(one.value): one.value for one in certificate.extensions}
    usage, extended = found.get(x509.KeyUsage), found.get(x509.ExtendedKeyUsage)
    if usage is not None and usage.digital_signature:
        return True
    return extended is not None and ExtendedKeyUsageOID.CODE_SIGNING in extended


def _check_extensions(certificate: Any) -> None:
    """RFC 5280, 4.2: what is critical and not understood means that the certificate is not to be used."""
    from cryptography import x509

    understood = (x509.BasicConstraints, x509.KeyUsage, x509.ExtendedKeyUsage, x509.SubjectAlternativeName)
    for one in certificate.extensions:
        if one.critical and not isinstance(one.value, understood):
            raise InvalidSignature(f"a certificate has a critical extension that is not known here: {one.oid}")


def _check_raw(public_key: Any, raw: bytes, payload: bytes) -> None:
    from cryptography.exceptions import InvalidSignature as Refused
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec

    sizes: dict[int, Any] = {256: hashes.SHA256(), 384: hashes.SHA384(), 521: hashes.SHA512()}
    if public_key.curve.name not in ("secp256r1", "secp384r1", "secp521r1"):
        raise InvalidSignature(f"keys on {public_key.curve.name} are not used for this")
    # DSSE's pre-authentication encoding: what is signed says what it is.
    signed = b"DSSEv1 %d %s %d %s" % (len(_PAYLOAD_TYPE), _PAYLOAD_TYPE.encode(), len(payload), payload)
    try:
        public_key.verify(raw, signed, ec.ECDSA(sizes[public_key.curve.key_size]))
    except Refused:
        raise InvalidSignature("the signature is not of this key", hint="get the artifact and the key again") from None


def _resources(statement: dict[str, Any]) -> dict[str, str]:
    """File -> SHA-256 of a statement that was signed."""
    if statement["_type"] != _STATEMENT or statement["predicateType"] != _PREDICATE:
        raise ValueError(f"what was signed is no model but {statement['predicateType']!r}")
    found: dict[str, str] = {}
    resources = _object(statement["predicate"])["resources"]
    for one in resources:
        if one["algorithm"] != "sha256" or one["name"] in found or not isinstance(one["digest"], str):
            raise ValueError(f"no single SHA-256 of {one['name']!r}")
        found[one["name"]] = one["digest"]
    return found


def _object(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError("an object is missing")
    return value
