"""A small artifact as a build writes it, bundles of it, keys, and what may go wrong with them."""

from __future__ import annotations

import functools
import importlib.util
import io
import shutil
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from toolchain_support import conv_net, save

import runtimes
from runtimes._unpack import BLOCK, CHECKSUM, END, MANIFEST, SIGNATURE, checksum, header, open_bundle, zstd
from toolchain import selftest
from toolchain.artifact import Variant, write_artifact
from toolchain.bundle import _packer


def endings() -> list[str]:
    """What bundles can be here: Zstandard is an extra."""
    try:
        zstd()
    except runtimes.InvalidArtifact:
        return [".tar", ".tar.gz"]
    return [".tar", ".tar.gz", ".tar.zst"]


def has_cryptography() -> bool:
    return importlib.util.find_spec("cryptography") is not None


def require(*modules: str) -> None:
    """Skips, by name, where one of the packages is not installed."""
    for name in modules:
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name}: not installed (the extras sign and install have it)")
    if "openssl" in modules or shutil.which("openssl") is None:
        pytest.skip("openssl: no such command")


def make_artifact(root: Path, *, seed: int = 0, name: str = "tiny", channels: int = 8) -> Path:
    """An artifact with one FP32 variant for ort-cpu, an exported model and a self-test."""
    work = root.with_name(f"{root.name}-work")
    work.mkdir(parents=True)
    exported = save(conv_net(seed=seed, channels=channels), work / "model.onnx")
    compiled = runtimes.compile(exported, "ort-cpu", work / "ort-cpu-fp32")
    variants = [Variant(compiled, "fp32", {})]
    test = selftest.make_selftest(exported, variants)
    write_artifact(
        root,
        name=name,
        version="1",
        variants=variants,
        exported=work,
        texts={"recipe.yaml": "model: tiny\n", **test.contents},
        metadata={
            "build_key": "0",
            "source": {"model": "tiny.onnx", "weights": {"kind": "given", "digest": "ab" * 32}},
            "recipe": {"model": "tiny.onnx"},
            "machine": {"cpu": "some", "packages": {"numpy": "2.0.0", "onnxruntime": "1.31.1"}},
            selftest.KEY: test.metadata,
        },
    )
    shutil.rmtree(work)
    return root


@functools.cache
def keys(folder: Path) -> Mapping[str, Path]:
    """A key pair, another, and a signing certificate under a root, made as ``toolchain/signing.py`` says."""
    (folder / "usage.txt").write_text("keyUsage=critical,digitalSignature\nextendedKeyUsage=codeSigning\n")
    curve = "-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes"
    usage = "-addext keyUsage=critical,keyCertSign,cRLSign"
    for line in (
        "ecparam -genkey -name prime256v1 -noout -out key.pem",
        "ec -in key.pem -pubout -out key.pub",
        "ecparam -genkey -name secp384r1 -noout -out other.pem",
        "ec -in other.pem -pubout -out other.pub",
        "genrsa -out rsa.pem 2048",
        f"req -x509 {curve} -keyout root.key -out root.pem -days 3650 -subj /CN=Root {usage}",
        f"req -x509 {curve} -keyout strange.key -out strange.pem -days 3650 -subj /CN=Root {usage}",
        f"req {curve} -keyout signing.key -out request.pem -subj /CN=Builds",
        "x509 -req -in request.pem -CA root.pem -CAkey root.key -CAcreateserial -days 365 -extfile usage.txt "
        "-out signing.pem",
        # vouched for by a certificate that may not vouch
        f"req {curve} -keyout below.key -out below.csr -subj /CN=Below",
        "x509 -req -in below.csr -CA signing.pem -CAkey signing.key -CAcreateserial -days 365 -extfile usage.txt "
        "-out below.pem",
    ):
        subprocess.run(["openssl", *line.split()], cwd=folder, check=True, capture_output=True)
    return {path.name: path for path in folder.iterdir()}


def parts(bundle: Path) -> list[tuple[bytes, bytes]]:
    """Header and content of every entry of a bundle."""
    raw = plain(bundle)
    found = []
    at = 0
    while any(raw[at : at + BLOCK]):
        size = int(raw[at + 124 : at + 135], 8)
        found.append((raw[at : at + BLOCK], raw[at + BLOCK : at + BLOCK + size]))
        at += BLOCK + size + -size % BLOCK
    return found


def plain(bundle: Path) -> bytes:
    """A bundle's archive, whatever it is compressed with."""
    with open_bundle(bundle) as reader:
        first = {MANIFEST: reader.manifest, CHECKSUM: checksum(reader.manifest), SIGNATURE: reader.signature}
        entries = [(header(name, len(content)), content) for name, content in first.items() if content is not None]
        pieces = [joined(entries, reader._pending)]
        while piece := reader._read(1 << 20):
            pieces.append(piece)
    return b"".join(pieces)


def joined(entries: list[tuple[bytes, bytes]], end: bytes = END) -> bytes:
    """An archive of these entries."""
    return b"".join(head + content + bytes(-len(content) % BLOCK) for head, content in entries) + end


def packed(archive: bytes, ending: str) -> bytes:
    """An archive compressed as the bundler does."""
    file = io.BytesIO()
    with _packer(file, f"x{ending}") as packer:
        packer.write(archive)
    return file.getvalue()


def edited(head: bytes, change: Callable[[bytearray], object]) -> bytes:
    """A header with fields changed and its sum made right again."""
    block = bytearray(head)
    change(block)
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)
