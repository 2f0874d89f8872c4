"""The Hugging Face hub and its local cache, as far as a model's configuration and weights go.

Only ``download`` needs a package. What is read of the cache is its documented layout:
https://huggingface.co/docs/huggingface_hub/guides/manage-cache
"""

from __future__ import annotations

import os
import re
import socket
import threading
import urllib.parse
import urllib.request
from pathlib import Path

from toolchain.errors import SourceError
from toolchain.weights import PIP_EXPORT

#: how long the hub may take to accept a connection before it counts as unreachable, in seconds
PROBE_SECONDS = 2.0


def offline() -> bool:
    """Whether the user has forbidden the hub: HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE."""
    text = os.environ.get("HF_HUB_OFFLINE") or os.environ.get("TRANSFORMERS_OFFLINE") or ""
    return text.upper() in ("1", "ON", "YES", "TRUE")


def cache_folder() -> Path:
    """The folder of the hub's local cache, by the same environment variables as huggingface_hub."""
    home = os.environ.get("HF_HOME") or os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    text = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE") or os.path.join(home, "hub")
    return Path(os.path.expandvars(os.path.expanduser(text)))


def cached_snapshot(repository: str, revision: str) -> Path | None:
    """The folder of a cached revision that has a configuration; its name is the commit. Needs no package."""
    root = cache_folder() / ("models--" + repository.replace("/", "--"))
    commit = revision
    if not re.fullmatch(r"[0-9a-f]{40}", revision):
        try:
            commit = (root / "refs" / revision).read_text(encoding="utf-8").strip()
        except (OSError, ValueError):
            return None
    folder = root / "snapshots" / commit
    return folder if (folder / "config.json").is_file() else None


def weight_files(folder: Path) -> list[Path]:
    """The files of weights in a model's folder, best format first; empty where there are none.

    One safetensors file, plain or of one variant (``model.fp16.safetensors``); the shards that an index
    names; or a ``pytorch_model.bin``.
    """
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    if (folder / "model.safetensors.index.json").is_file():
        shards = sorted(folder.glob("model-*.safetensors"))
        return [*shards, folder / "model.safetensors.index.json"] if shards else []
    variants = sorted(path for path in folder.glob("model.*.safetensors") if path.is_file())
    if len(variants) == 1:
        return variants
    return [folder / "pytorch_model.bin"] if (folder / "pytorch_model.bin").is_file() else []


def reachable() -> bool:
    """Whether the hub's host, or the proxy that leads to it, accepts a connection within 2 seconds.

    Asked before any download, because the libraries below retry for half a minute on a dead network.
    """
    endpoint = urllib.parse.urlsplit(os.environ.get("HF_ENDPOINT") or "https://huggingface.co")
    proxies = urllib.request.getproxies()
    if endpoint.hostname and endpoint.scheme in proxies and not urllib.request.proxy_bypass(endpoint.hostname):
        proxy = proxies[endpoint.scheme]
        endpoint = urllib.parse.urlsplit(proxy if "//" in proxy else f"//{proxy}", scheme=endpoint.scheme)
    try:
        host, port = endpoint.hostname, endpoint.port or (80 if endpoint.scheme == "http" else 443)
    except ValueError:  # a port that is no number
        return False
    answers: list[bool] = []

    def connect() -> None:
        try:
            with socket.create_connection((host, port), timeout=PROBE_SECONDS):
                answers.append(True)
        except OSError:
            answers.append(False)

    # In a thread: looking the name up has no time-out of its own.
    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(PROBE_SECONDS)
    return bool(answers and answers[0])


def download(repository: str, revision: str, *, with_weights: bool = True) -> Path:
    """Fetches a model's configuration and weights into the local cache.

    Returns:
        The snapshot's folder; its name is the commit.

    Raises:
        SourceError: there is no such model, or the network failed; says which.
    """
    try:
        import huggingface_hub
    except ImportError as error:
        raise SourceError(f"huggingface_hub is missing: {error}", where=repository, hint=PIP_EXPORT) from error
    patterns = ["config.json", "preprocessor_config.json"]
    if with_weights:
        patterns += ["model.safetensors", "model.safetensors.index.json", "model-*.safetensors"]
    where = f"hub:{repository}@{revision}"
    try:
        folder = Path(huggingface_hub.snapshot_download(repository, revision=revision, allow_patterns=patterns))
        if with_weights and not weight_files(folder):
            folder = Path(
                huggingface_hub.snapshot_download(
                    repository, revision=revision, allow_patterns=[*patterns, "pytorch_model.bin"]
                )
            )
    except Exception as error:  # the HTTP library underneath changes with its version, and so do its errors
        reason = str(error).strip().split("\n")[0]
        raise SourceError(
            f"the hub does not give it: {type(error).__name__}: {reason}",
            where=where,
            hint="check the id and the revision; a gated model needs HF_TOKEN",
        ) from error
    if not (folder / "config.json").is_file():
        raise SourceError("no config.json: not a transformers model", where=where, hint="write a FILE.py:FACTORY")
    return folder
