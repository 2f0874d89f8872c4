"""What the malformed requests of the test of abuse share: the model, wrong sizes, shared memory that is not."""

from __future__ import annotations

import dataclasses
import os
import random
from typing import Any

import numpy as np

#: The model that they are sent to: x float32 [N, 4], k int64 [N, 2]; served with at most this many rows at once.
MODEL, MAX_ROWS = "two", 64
X = np.arange(4, dtype=np.float32).reshape(1, 4)
K = np.array([[5, -7]], np.int64)
#: Shared memory of 64 bytes that is registered as a region of that name. With -link, -folder and -pipe behind it there
#: are such things beside it, with -short a file of 8 bytes.
REGION = f"toolchain-abuse-{os.getpid()}"

DTYPES = [
    "BOOL",
    "UINT8",
    "INT32",
    "INT64",
    "FP16",
    "FP32",
    "FP64",
    "BF16",
    "BYTES",
    "fp32",
    "",
    "FLOAT",
    "🙂",
    "FP32\0",
]
SIZES = [-1, 0, 1, 15, 17, 2**31 - 1, 2**31, 2**32, 2**62, 2**63 - 1]
SHAPES = [
    [], [4], [1], [1, 4, 1], [1, -4], [-1, 4], [0, 4], [4, 1], [2, 4], [1, 2**62], [2**31, 2**31, 4], [2**63 - 1, 4],
    [65, 4], [2**32, 4], [1] * 40, [1, 3], [1, 5],
]  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Mutant:
    """A request that is wrong.

    Attributes:
        kind: what is wrong with it.
        data: over HTTP the bytes of the whole request; over gRPC the message.
        method: of gRPC.
        cut: it ends before it is whole, so the server may just close.
        harmless: it may be right after all: what was changed at random can be something that has no meaning.
    """

    kind: str
    data: bytes
    method: str = "ModelInfer"
    cut: bool = False
    harmless: bool = False


def misplaced(r: random.Random) -> dict[str, Any]:
    """The parameters of a tensor of 16 bytes that lies nowhere."""
    right: dict[str, Any] = {"region": REGION, "byte_size": 16, "offset": r.choice([0, 16, 48])}
    which = r.choice(list(right))
    if r.random() < 0.2 and which != "offset":
        del right[which]
    elif which == "region":
        right[which] = r.choice(["", "nope", "../" + REGION, "/" + REGION, REGION + "\0", "x" * 5000, "🙂"])
    elif which == "byte_size":
        right[which] = r.choice([s for s in SIZES if s < 16] + [2**31, 2**62, 2**63 - 1])
        if right[which] in (0, 1, 15) and r.random() < 0.5:
            right["offset"] = r.choice([64, 65, 2**62])
    else:
        right[which] = r.choice([-1, 49, 64, 65, 2**31, 2**62, 2**63 - 1])
    return {f"shared_memory_{name}": value for name, value in right.items()}


_KEYS: list[Any] = [
    "", "/", ".", "..", "/..", "//" + REGION, f"/../shm/{REGION}", "/etc/passwd", "/dev/shm/" + REGION, REGION + "/",
    REGION + "-link", REGION + "-folder", REGION + "-pipe", REGION + "-short", REGION + "-none", "/sem.x", "x" * 256,
    "x" * 5000, "a\nb", "a\0b",
]  # fmt: skip


def registration(r: random.Random) -> tuple[str, dict[str, Any]]:
    """A name, and what is wrong to be registered by it."""
    name, said = f"new-{r.randrange(10**9)}", {"key": "/" + REGION, "offset": 0, "byte_size": 64}
    match r.randrange(4):
        case 0:
            name = r.choice([REGION, "x" * 300, "ü" * 150, "a\nb"])
        case 1:
            said["key"] = r.choice(_KEYS)
        case 2:
            said["offset"] = r.choice([1, 64, 65, 2**31, 2**62, 2**63 - 1, 2**64 - 1])
        case _:
            said["byte_size"] = r.choice([0, 65, 2**31, 2**62, 2**63 - 1, 2**64 - 1])
    return name, said
