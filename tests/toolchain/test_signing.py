"""Signed bundles: who signed, what is refused, and that OpenSSF's own tool says the same of what was installed."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from bundle_support import joined, keys, make_artifact, parts, require

from runtimes import _trust
from runtimes import install as installing
from runtimes._signature import InvalidSignature, Signer, check_signature
from runtimes._unpack import header
from toolchain.bundle import bundle
from toolchain.errors import SigningError
from toolchain.signing import SigningKey, sign


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_artifact(tmp_path_factory.mktemp("artifact") / "tiny")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """Keys and certificates by file name."""
    require("model_signing", "cryptography")
    return keys(tmp_path_factory.mktemp("keys"))


def signed(artifact: Path, path: Path, **key: Any) -> Path:
    bundle(artifact, path, platform="linux-x86_64", with_ort_format=False, key=SigningKey(**key))
    return path


def test_a_key(artifact: Path, made: Mapping[str, Path], tmp_path: Path) -> None:
    path = signed(artifact, tmp_path / "a.tar", key=made["key.pem"])
    done = installing.install(path, tmp_path / "root", signer=Signer(key=made["key.pub"]))
    assert (done.signed_by or "").startswith("key ")
    assert installing.verify(tmp_path / "root", signer=Signer(key=made["key.pub"])).signed_by == done.signed_by
    assert installing.verify(path, signer=Signer(key=made["key.pub"])).signed_by == done.signed_by
    with pytest.raises(InvalidSignature, match="another key"):
        installing.verify(path, signer=Signer(key=made["other.pub"]))
    with pytest.raises(InvalidSignature, match="not with a certificate"):
        installing.verify(path, signer=Signer(roots=(made["root.pem"],)))
    with pytest.raises(InvalidSignature, match="not a public key"):
        installing.verify(path, signer=Signer(key=made["root.pem"]))


def test_a_certificate(artifact: Path, made: Mapping[str, Path], tmp_path: Path) -> None:
    path = signed(artifact, tmp_path / "a.tar", key=made["signing.key"], certificate=made["signing.pem"])
    done = installing.install(path, tmp_path / "root", signer=Signer(roots=(made["root.pem"],)))
    assert done.signed_by == "CN=Builds"
    # A root of the same name with another key vouches for nobody here.
    with pytest.raises(InvalidSignature, match="no given root vouches"):
        installing.verify(path, signer=Signer(roots=(made["strange.pem"],)))
    with pytest.raises(InvalidSignature, match="with a certificate, not with this key"):
        installing.verify(path, signer=Signer(key=made["key.pub"]))


def test_a_certificate_that_may_not_vouch_for_others(artifact: Path, made: Mapping[str, Path], tmp_path: Path) -> None:
    path = signed(
        artifact, tmp_path / "a.tar", key=made["below.key"], certificate=made["below.pem"], chain=(made["signing.pem"],)
    )
    with pytest.raises(InvalidSignature, match="no given root vouches for CN=Below"):
        installing.verify(path, signer=Signer(roots=(made["root.pem"],)))


def test_a_root_is_not_for_signing(
    artifact: Path, made: Mapping[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SigningError, match="devices would refuse"):
        signed(artifact, tmp_path / "a.tar", key=made["root.key"], certificate=made["root.pem"])
    monkeypatch.setattr("toolchain.signing.may_sign", lambda certificate: True)  # as others may have signed it
    path = signed(artifact, tmp_path / "a.tar", key=made["root.key"], certificate=made["root.pem"])
    with pytest.raises(InvalidSignature, match="not for signing"):
        installing.verify(path, signer=Signer(roots=(made["root.pem"],)))


def test_an_unsigned_bundle_is_refused_before_anything_is_unpacked(
    artifact: Path, made: Mapping[str, Path], tmp_path: Path
) -> None:
    bundle(artifact, tmp_path / "a.tar", platform="linux-x86_64", with_ort_format=False)
    with pytest.raises(InvalidSignature, match="not signed"):
        installing.install(tmp_path / "a.tar", tmp_path / "root", signer=Signer(key=made["key.pub"]))
    assert [p.name for p in (tmp_path / "root").iterdir()] == [".lock"]
    with pytest.raises(InvalidSignature, match="not signed"):
        installing.verify(artifact, signer=Signer(key=made["key.pub"]))


def test_a_signature_of_another_bundle_is_refused(artifact: Path, made: Mapping[str, Path], tmp_path: Path) -> None:
    """The manifest of one and the signature of another, both sound in themselves."""
    first = parts(signed(artifact, tmp_path / "a.tar", key=made["key.pem"]))
    other = make_artifact(tmp_path / "other", seed=1)
    second = parts(signed(other, tmp_path / "b.tar", key=made["key.pem"]))
    (tmp_path / "c.tar").write_bytes(joined([*second[:2], first[2], *second[3:]]))
    with pytest.raises(InvalidSignature, match="what was signed is not what is here"):
        installing.install(tmp_path / "c.tar", tmp_path / "root", signer=Signer(key=made["key.pub"]))


@pytest.mark.parametrize(
    "change",
    [
        lambda b: b.update(mediaType="x"),
        lambda b: b.pop("dsseEnvelope"),
        lambda b: b["dsseEnvelope"].update(payloadType="application/json"),
        lambda b: b["dsseEnvelope"].update(signatures=[]),
        lambda b: b["dsseEnvelope"].update(signatures=b["dsseEnvelope"]["signatures"] * 2),
        lambda b: b["dsseEnvelope"]["signatures"][0].update(sig="AAAA"),
        lambda b: b["dsseEnvelope"]["signatures"][0].update(sig="%%%"),
        lambda b: b["dsseEnvelope"].update(payload=base64.b64encode(b"{}").decode()),
        lambda b: b["verificationMaterial"].update(publicKey=[]),
        lambda b: b["verificationMaterial"]["publicKey"].update(hint="00"),
        lambda b: b.update(verificationMaterial={}),
    ],
)
def test_a_signature_that_was_touched(
    artifact: Path, made: Mapping[str, Path], change: Callable[[dict[str, Any]], object]
) -> None:
    digests = {"manifest.json": "ab" * 32, "v/model.onnx": "cd" * 32}
    good = sign(digests, SigningKey(key=made["key.pem"]), name="tiny")
    signer = Signer(key=made["key.pub"])
    assert check_signature(good, digests, signer, where="x")
    tree = json.loads(good)
    change(tree)
    with pytest.raises(InvalidSignature):
        check_signature(json.dumps(tree).encode(), digests, signer, where="x")


@pytest.mark.parametrize("change", [{"more": "ab" * 32}, {"v/model.onnx": "ce" * 32}, {"v/model.onnx": None}])
def test_it_covers_every_file_and_no_other(made: Mapping[str, Path], change: dict[str, str | None]) -> None:
    digests = {"manifest.json": "ab" * 32, "v/model.onnx": "cd" * 32}
    for key in ("key", "other"):  # P-256 and P-384
        good = sign(digests, SigningKey(key=made[f"{key}.pem"]), name="tiny")
        now = {name: digest for name, digest in {**digests, **change}.items() if digest is not None}
        with pytest.raises(InvalidSignature, match=next(iter(change))):
            check_signature(good, now, Signer(key=made[f"{key}.pub"]), where="x")


def test_openssf_verifies_what_was_installed(artifact: Path, made: Mapping[str, Path], tmp_path: Path) -> None:
    """With its own tool, on the folder as it lies there, and not once a byte of it is another."""
    path = signed(artifact, tmp_path / "a.tar", key=made["key.pem"])
    root = tmp_path / "root"
    installing.install(path, root)
    command = [
        sys.executable, "-m", "model_signing", "verify", "key", str(root / "1"), "--signature", str(root / "1.sig"),
        "--public_key", str(made["key.pub"]),
    ]  # fmt: skip
    assert subprocess.run(command, capture_output=True, check=False).returncode == 0
    file = root / "1" / "recipe.yaml"
    file.write_text("model: another\n")
    assert subprocess.run(command, capture_output=True, check=False).returncode != 0


def test_a_plan_of_a_signed_bundle_is_noted(
    artifact: Path, made: Mapping[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    noted: list[tuple[str, str]] = []
    monkeypatch.setattr(_trust, "note_signed", lambda sha, who: noted.append((sha, who)))
    monkeypatch.setattr(installing, "selftest_apart", lambda folder, **_: ())
    path = signed(artifact, tmp_path / "a.tar", key=made["key.pem"])
    entries = parts(path)
    tree = json.loads(entries[0][1])
    ours = tree["components"]["model"]["variants"]["ort-cpu-fp32"]["executor_info"]["toolchain"]
    ours["fingerprint"]["plan_sha256"] = "12" * 32
    content = json.dumps(tree).encode()
    from hashlib import sha256

    digests = {name: e["sha256"] for name, e in tree["additional_metadata"]["toolchain"]["files"].items()}
    digests["manifest.json"] = sha256(content).hexdigest()
    said = f"{digests['manifest.json']}  manifest.json\n".encode()
    signature = sign(digests, SigningKey(key=made["key.pem"]), name="tiny")
    first = {"manifest.json": content, "manifest.sha256": said, "manifest.sig": signature}
    entries = [*((header(name, len(data)), data) for name, data in first.items()), *entries[3:]]
    (tmp_path / "b.tar").write_bytes(joined(entries))
    installing.install(tmp_path / "b.tar", tmp_path / "root")
    assert not noted, "a signature that nobody checked vouches for nothing"
    done = installing.install(tmp_path / "b.tar", tmp_path / "root", signer=Signer(key=made["key.pub"]))
    assert noted == [("12" * 32, done.signed_by)]


def test_what_cannot_sign(artifact: Path, made: Mapping[str, Path], tmp_path: Path) -> None:
    for key, said in (
        ({"key": made["rsa.pem"]}, "another kind than elliptic curve"),
        ({"key": made["key.pub"]}, "no private key in PEM"),
        ({"key": tmp_path / "absent"}, "cannot be read: No such file"),
        ({"key": made["key.pem"], "certificate": made["signing.pem"]}, "of another key"),
        ({"key": made["key.pem"], "certificate": made["key.pem"]}, "no certificate in PEM"),
    ):
        with pytest.raises(SigningError, match=said):
            signed(artifact, tmp_path / "a.tar", **key)
        assert not (tmp_path / "a.tar").exists()


def test_one_of_the_two_says_whose_signature(tmp_path: Path) -> None:
    with pytest.raises(InvalidSignature, match="one of the two"):
        Signer()
    with pytest.raises(InvalidSignature, match="one of the two"):
        Signer(key=tmp_path, roots=(tmp_path,))


def test_without_the_packages_the_errors_say_what_to_install(
    artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("cryptography", "model_signing"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(SigningError, match="onnx-toolchain"):
        signed(artifact, tmp_path / "a.tar", key=tmp_path / "key.pem")
    with pytest.raises(InvalidSignature) as caught:
        check_signature(b"{}", {}, Signer(key=tmp_path / "key.pub"), where="x")
    assert "pip install cryptography" in str(caught.value)
