"""500 mutated bundles with a fixed seed: each is refused with an error of ours, in little memory, and nothing is
written outside its target.

They are installed in a process of its own whose memory is bounded, so that what takes more is refused by the system and
shows as an error that is not ours.
"""

from __future__ import annotations

import json
import os
import random
import resource
import struct
import zipfile
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from bundle_support import edited, endings, has_cryptography, joined, make_artifact, packed, parts, plain

import runtimes
from runtimes import install as installing
from runtimes._unpack import CHECKSUM, MANIFEST, checksum, header
from toolchain.bundle import bundle

CASES = 500
SEED = 6
MEMORY = 200 << 20
#: All zeros: more than the ratio allows for, and less than would take long to make.
BOMB = 100 << 20

Entries = list[tuple[bytes, bytes]]
Mutation = Callable[[random.Random, "Original"], tuple[bytes, bool]]


class Original:
    """A sound bundle in one ending, and its parts."""

    def __init__(self, path: Path, ending: str) -> None:
        self.ending = ending
        self.raw = path.read_bytes()
        self.archive = plain(path)
        self.entries = parts(path)
        self.manifest = json.loads(self.entries[0][1])

    def pack(self, entries: Entries) -> bytes:
        return packed(joined(entries), self.ending)

    def with_manifest(self, content: bytes, entries: Entries | None = None) -> bytes:
        """Another manifest, with its checksum, and other files where they are given."""
        said = checksum(content)
        first = [(header(MANIFEST, len(content)), content), (header(CHECKSUM, len(said)), said)]
        return self.pack([*first, *(self.entries[2:] if entries is None else entries)])

    def listed(self, tree: dict[str, Any], entries: Entries | None = None) -> bytes:
        return self.with_manifest(json.dumps(tree).encode(), entries)

    def tree(self) -> dict[str, Any]:
        """A copy of the manifest to change."""
        return json.loads(self.entries[0][1])


def files_of(tree: dict[str, Any]) -> dict[str, Any]:
    return tree["additional_metadata"]["toolchain"]["files"]


def truncated(rng: random.Random, o: Original) -> bytes:
    return o.raw[: rng.randrange(len(o.raw))]


def bit_flipped(rng: random.Random, o: Original) -> bytes:
    raw = bytearray(o.raw)
    raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
    return bytes(raw)


def burst(rng: random.Random, o: Original) -> bytes:
    raw = bytearray(o.raw)
    at, size = rng.randrange(len(raw) - 64), rng.randrange(8, 64)
    raw[at : at + size] = bytes(255 - b for b in raw[at : at + size])
    return bytes(raw)


def archive_flipped(rng: random.Random, o: Original) -> bytes:
    raw = bytearray(o.archive)
    raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
    return packed(bytes(raw), o.ending)


def reordered(rng: random.Random, o: Original) -> bytes:
    entries = list(o.entries)
    first, second = rng.sample(range(len(entries)), 2)
    entries[first], entries[second] = entries[second], entries[first]
    return o.pack(entries)


SLIPS = (
    "../evil", "../../evil", "a/../../evil", "/tmp/evil", "//evil", "./evil", "a//evil", "C:/evil", "a\\..\\evil", "..",
    "evil/..", "\x01evil", "evil\n",
)  # fmt: skip


def slip_in_archive(rng: random.Random, o: Original) -> bytes:
    entries = list(o.entries)
    at = rng.randrange(1, len(entries))
    name = rng.choice(SLIPS).encode()
    head = edited(entries[at][0], lambda b: b.__setitem__(slice(0, 100), name.ljust(100, b"\0")))
    entries[at] = (head, entries[at][1])
    return o.pack(entries)


def renamed(o: Original, name: str, at: int = 0) -> bytes:
    """A file under another name, in the manifest and in the archive alike."""
    tree = o.tree()
    files = files_of(tree)
    old = sorted(files)[at]
    files[name] = files.pop(old)
    entries = dict(zip(sorted(files_of(o.manifest)), o.entries[2:], strict=True))
    content = entries.pop(old)[1]
    try:
        head = header(name, len(content))
    except (runtimes.InvalidArtifact, UnicodeEncodeError):
        head = header("x", len(content))
    entries[name] = (head, content)
    return o.listed(tree, [entries[key] for key in sorted(entries)])


def slip_in_manifest(rng: random.Random, o: Original) -> bytes:
    return renamed(o, rng.choice(SLIPS), rng.randrange(len(o.entries) - 2))


def strange_name(rng: random.Random, o: Original) -> bytes:
    last = sorted(files_of(o.manifest))[-1]
    names = (
        "con", "aux.onnx", "a/NUL", "dot.", "space ", "a/b?", 'quote"', last.upper(), f"{last}/below", "MANIFEST.JSON",
        "/".join("d" * 20), "n" * 300, "manifest.json/x", "\ud800", "manifest.sig", "Manifest.sha256",
    )  # fmt: skip
    return renamed(o, rng.choice(names))


def link(rng: random.Random, o: Original) -> bytes:
    """A link, device, folder or extended header in place of a file, or beside it, leading to where it must not."""
    entries = list(o.entries)
    kind = rng.choice(b"123456 7xgLKSV")
    target = rng.choice((b"/etc/passwd", b"../../evil", b"manifest.json"))

    def change(block: bytearray) -> None:
        block[156] = kind
        block[157:257] = target.ljust(100, b"\0")

    at = rng.randrange(1, len(entries))
    head = edited(entries[at][0], change)
    if rng.random() < 0.5:
        entries[at] = (head, entries[at][1])
    else:
        entries.insert(at, (edited(head, lambda b: b.__setitem__(slice(124, 136), b"%011o\0" % 0)), b""))
    return o.pack(entries)


def field(rng: random.Random, o: Original) -> bytes:
    """An owner, a mode, a time, another magic: with the right sum, and still not what a bundle has."""
    entries = list(o.entries)
    start, value = rng.choice(
        [(100, b"0004755\0"), (108, b"0001750\0"), (116, b"0001750\0"), (136, b"14000000000\0"), (257, b"ustar  \0"),
         (265, b"root"), (297, b"wheel"), (329, b"0000001\0"), (500, b"x")]
    )  # fmt: skip
    at = rng.randrange(len(entries))
    head = edited(entries[at][0], lambda b: b.__setitem__(slice(start, start + len(value)), value))
    entries[at] = (head, entries[at][1])
    return o.pack(entries)


def size_in_archive(rng: random.Random, o: Original) -> bytes:
    entries = list(o.entries)
    at = rng.randrange(len(entries))
    size = rng.choice(
        [b"77777777777\0", b"00000000000\0", b"-0000000001\0", b"xxxxxxxxxxx\0", b"\x80" + b"\xff" * 11, b" " * 12]
    )
    entries[at] = (edited(entries[at][0], lambda b: b.__setitem__(slice(124, 136), size)), entries[at][1])
    return o.pack(entries)


def wrong_digest(rng: random.Random, o: Original) -> bytes:
    tree = o.tree()
    entry = files_of(tree)[rng.choice(list(files_of(tree)))]
    digit = rng.randrange(64)
    digest = entry["sha256"]
    other = rng.choice([c for c in "0123456789abcdef" if c != digest[digit]])
    entry["sha256"] = digest[:digit] + other + digest[digit + 1 :]
    return o.listed(tree)


def wrong_size(rng: random.Random, o: Original) -> bytes:
    tree = o.tree()
    files_of(tree)[rng.choice(list(files_of(tree)))]["size"] += rng.choice((-1, 1, 512, 1 << 40))
    return o.listed(tree)


def huge_number(rng: random.Random, o: Original) -> bytes:
    text = json.dumps(o.tree())
    digits = rng.choice((25, 300, 4299, 4300, 4301, 100_000))
    number = rng.choice(("-", "")) + "9" * digits + rng.choice(("", "e999999", ".5"))
    key = rng.choice(('"size": ', '"schema": '))
    at = text.index(key) + len(key)
    end = at + min(text[at:].index(mark) for mark in ",}" if mark in text[at:])
    return o.with_manifest((text[:at] + number + text[end:]).encode())


def extra_file(rng: random.Random, o: Original) -> bytes:
    entries = list(o.entries)
    name = rng.choice(("extra.bin", "zzz", "ort-cpu-fp32/.hidden", "manifest.json", "manifest.sha256"))
    content = b"payload" * rng.randrange(100)
    entries.insert(rng.randrange(1, len(entries) + 1), (header(name, len(content)), content))
    return o.pack(entries)


def missing_or_twice(rng: random.Random, o: Original) -> bytes:
    entries = list(o.entries)
    at = rng.randrange(len(entries))
    if rng.random() < 0.5:
        del entries[at]
    else:
        entries.insert(at, entries[at])
    return o.pack(entries)


def nested(rng: random.Random, o: Original) -> bytes:
    opening = rng.choice(('{"a":', "["))
    depth = rng.choice((500, 5_000, 300_000))
    text = json.dumps(o.tree())[:-1] + ', "x": ' + opening * depth
    closing = "1" + ("}" if "{" in opening else "]") * depth + "}"
    return o.with_manifest((text + rng.choice((closing, ""))).encode())


def many_values(rng: random.Random, o: Original) -> bytes:
    """Short text, much memory: as large as a manifest may be."""
    value = rng.choice(("[]", "{}", '""', "0", '{"a":1}'))
    room = (2 << 20) - len(json.dumps(o.tree())) - 64
    more = ",".join([value] * (room // (len(value) + 1)))
    return o.with_manifest((json.dumps(o.tree())[:-1] + f', "x": [{more}]}}').encode())


def large_manifest(rng: random.Random, o: Original) -> bytes:
    return o.with_manifest(json.dumps(o.tree()).encode() + b" " * (3 << 20))


def invalid_utf8(rng: random.Random, o: Original) -> bytes:
    content = bytearray(o.entries[0][1])
    at = rng.randrange(len(content))
    content[at:at] = rng.choice((b"\xff", b"\xc0\xaf", b"\xed\xa0\x80", b"\xf5\x80\x80\x80", b"\x80"))
    return o.with_manifest(bytes(content))


def no_json(rng: random.Random, o: Original) -> bytes:
    text = o.entries[0][1].decode()
    at = rng.randrange(1, len(text) - 2)
    return o.with_manifest(
        rng.choice((b"", b"null", b"[]", b"NaN", text[:at].encode(), (text + text).encode(), b"{}", b'"' + b"a" * 999))
    )


def wrong_type(rng: random.Random, o: Original) -> bytes:
    tree = o.tree()
    other = rng.choice(([], 1, None, True, "x", {"y": 1}))
    places = [
        (tree, "components"), (tree, "layout"), (tree, "schema_version"), (tree, "additional_metadata"),
        (tree["components"], "model"), (tree["additional_metadata"], "toolchain"),
        (tree["additional_metadata"]["toolchain"], "files"), (tree["additional_metadata"]["toolchain"], "schema"),
        (files_of(tree), next(iter(files_of(tree)))),
    ]  # fmt: skip
    holder, key = rng.choice(places)
    if key == "schema" and other in (1, True):
        other = "1"
    holder[key] = other
    return o.listed(tree)


_bombs: dict[str, bytes] = {}


def bomb(rng: random.Random, o: Original) -> bytes:
    """Says truly what it is, down to the digest, and unpacks to a thousand times its size."""
    import hashlib

    if o.ending == ".tar":  # nothing unpacks: then one that only says so
        tree = o.tree()
        files_of(tree)[rng.choice(list(files_of(tree)))]["size"] = rng.choice((1 << 36, 1 << 50, 1 << 62))
        return o.listed(tree)
    if o.ending not in _bombs:
        content = bytes(BOMB)
        tree = o.tree()
        files_of(tree).clear()
        files_of(tree)["bomb.bin"] = {"sha256": hashlib.sha256(content).hexdigest(), "size": BOMB}
        variants = tree["components"]["model"]["variants"]
        variants.clear()
        _bombs[o.ending] = o.listed(tree, [(header("bomb.bin", BOMB), content)])
    return _bombs[o.ending]


def trailing(rng: random.Random, o: Original) -> bytes:
    more = rng.choice((b"\0", b"x", bytes(512), bytes(10240), o.raw))
    return o.raw + more if rng.random() < 0.5 else packed(o.archive + more, o.ending)


def another_format(rng: random.Random, o: Original) -> bytes:
    file = BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("../../evil", "x")
    return rng.choice(
        (b"", b"\0", bytes(1024), rng.randbytes(5000), file.getvalue(), b"\x1f\x8b", b"\x28\xb5\x2f\xfd",
         b"\x28\xb5\x2f\xfd\x04\xf8" + rng.randbytes(100), b"\x1f\x8b\x08\x04" + struct.pack("<IH", 0, 0) + b"x" * 99)
    )  # fmt: skip


def wrong_signature(rng: random.Random, o: Original) -> bytes:
    """No signature, or something in the place of one: always with a signature asked for."""
    content = rng.choice(
        (b"", b"{}", b"[]", b"\xff", b"null", b'{"mediaType": "x"}', b"[" * 100_000, b'{"a":' * 50_000,
         b'{"mediaType": "application/vnd.dev.sigstore.bundle.v0.3+json", "dsseEnvelope": []}')
    )  # fmt: skip
    entries = list(o.entries)
    if rng.random() < 0.9:
        entries.insert(2, (header("manifest.sig", len(content)), content))
    return o.pack(entries)


MUTATIONS: dict[Callable[[random.Random, Original], bytes], int] = {
    truncated: 2, bit_flipped: 3, burst: 2, archive_flipped: 2, reordered: 1, slip_in_archive: 1, slip_in_manifest: 1,
    strange_name: 1, link: 2, field: 1, size_in_archive: 1, wrong_digest: 1, wrong_size: 1, huge_number: 1,
    extra_file: 1, missing_or_twice: 1, nested: 1, many_values: 1, large_manifest: 1, invalid_utf8: 1, no_json: 1,
    wrong_type: 1, bomb: 1, trailing: 1, another_format: 1, wrong_signature: 2,
}  # fmt: skip


class Accepted(BaseException):
    """A mutated bundle reached the self-test. No error of the program's, so that nothing there handles it."""


def mutants(originals: list[Original]) -> Iterator[tuple[int, str, Original, bytes]]:
    rng = random.Random(SEED)
    kinds = [kind for kind, weight in MUTATIONS.items() for _ in range(weight)]
    for number in range(CASES):
        kind, original = kinds[number % len(kinds)], originals[number // len(kinds) % len(originals)]
        yield number, kind.__name__, original, kind(rng, original)


def attack(folder: Path, originals: list[Original], key: Path) -> str:
    """Installs every mutant over an installed version. Returns what went wrong, "" where nothing did."""
    root = folder / "inside" / "root"
    bundle_file = folder / "inside" / "bundle"
    signer = installing.Signer(key=key)
    before = tree_of(folder)
    for number, kind, original, content in mutants(originals):
        bundle_file.write_bytes(content)
        what = f"mutant {number}, {kind}, {original.ending}"
        try:
            installing.install(bundle_file, root, signer=signer if kind == "wrong_signature" else None)
            return f"{what}: installed"
        except runtimes.Error as error:
            if not str(error):
                return f"{what}: refused without a word"
        except Accepted as accepted:
            # Compressed data has padding, whose bits say nothing: what comes out is then the same, and is no damage.
            if original.raw == content or kind not in ("bit_flipped", "burst") or original.ending == ".tar":
                return f"{what}: accepted, {accepted}"
            if accepted.args[0] != original.manifest:
                return f"{what}: other content was accepted"
        bundle_file.unlink()
        if tree_of(folder) != before:
            return f"{what}: left something behind: {tree_of(folder) ^ before}"
    return ""


def tree_of(folder: Path) -> set[tuple[str, int]]:
    return {(str(p), p.lstat().st_size if p.is_file() else -1) for p in folder.rglob("*")}


def test_500_mutated_bundles_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # nothing here is about the disk, which is slow
    artifact = make_artifact(tmp_path / "artifact")
    originals = []
    for ending in endings():
        bundle(artifact, tmp_path / f"b{ending}", platform="linux-x86_64", with_ort_format=False)
        originals.append(Original(tmp_path / f"b{ending}", ending))
    key = tmp_path / "key.pub"
    if has_cryptography():
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import ec

        public = ec.generate_private_key(ec.SECP256R1()).public_key()
        key.write_bytes(
            public.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
        )
    target = tmp_path / "target"
    (target / "inside" / "root").mkdir(parents=True)
    monkeypatch.setattr(installing, "selftest_apart", lambda *a, **k: ())
    installing.install(tmp_path / "b.tar", target / "inside" / "root")

    def reached(folder: Path, **_: Any) -> None:
        raise Accepted(json.loads((folder / MANIFEST).read_bytes()))

    monkeypatch.setattr(installing, "selftest_apart", reached)
    for original in originals:
        bomb(random.Random(0), original)  # made before memory is bounded
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        said = "it died"
        try:
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            most = pages * resource.getpagesize() + MEMORY
            resource.setrlimit(resource.RLIMIT_AS, (most, most))
            said = attack(target, originals, key)
        except BaseException as error:  # noqa: BLE001 - whatever it is, the parent has to hear of it
            import traceback

            said = f"{type(error).__name__}: {error}\n{traceback.format_exc()[-2000:]}"
        finally:
            os.write(writer, said.encode()[:60_000])
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        said = pipe.read().decode()
    os.waitpid(child, 0)
    assert said == ""


def test_every_kind_of_mutation_changes_something(tmp_path: Path) -> None:
    """The fuzzing would prove nothing with mutants that are sound bundles."""
    artifact = make_artifact(tmp_path / "artifact")
    bundle(artifact, tmp_path / "b.tar", platform="linux-x86_64", with_ort_format=False)
    original = Original(tmp_path / "b.tar", ".tar")
    assert joined(original.entries) == original.raw
    for kind in MUTATIONS:
        for seed in range(20):
            changed = kind(random.Random(seed), original)
            assert changed != original.raw or kind is wrong_signature, kind.__name__
