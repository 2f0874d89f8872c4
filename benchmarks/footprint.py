"""What has to be on a device to run a model: packages, download and installed size, ours beside others'.

    python benchmarks/footprint.py [--json out.json] [--only runtime,openvino] [--python 3.11]

Nothing is installed and next to nothing downloaded. pip resolves each set of requirements (``--dry-run``) as a user
would get it from PyPI, whatever is configured on this machine; the size of a download is what the server says, and the
installed size is the sum over the list of contents at the end of each wheel, which is fetched by itself. Bytecode that
pip writes on top is not counted, for nobody. Our own wheel is built.

What PyPI has of torch for Linux is built for CUDA and brings gigabytes; who takes a CPU build from elsewhere has less.
So the last size is that without torch and all that it brings for GPUs: less than anybody can have.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import io
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import urllib.request
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

#: What is compared: a name, and what a user would hand to pip. {ours} is the checkout.
SETS = {
    "runtime": ("onnx-toolchain[runtime]", ["{ours}[runtime]"]),
    "raw": ("numpy onnxruntime", ["numpy", "onnxruntime"]),
    "openvino": ("openvino", ["openvino"]),
    "build": ("onnx-toolchain[build,ort-cpu]", ["{ours}[build,ort-cpu]"]),
    "optimum": ("optimum[onnxruntime]", ["optimum[onnxruntime]"]),
    "olive": ("olive-ai onnxruntime", ["olive-ai", "onnxruntime"]),
}
#: How the names of torch and of the packages begin that it brings for GPUs.
OF_TORCH = ("torch ", "triton ", "nvidia-", "cuda-")


@dataclasses.dataclass(frozen=True, slots=True)
class Footprint:
    """What one set of requirements brings; sizes in bytes. ``without_torch`` is of what is installed."""

    name: str
    packages: tuple[str, ...]
    download: int
    installed: int
    without_torch: int
    largest: tuple[tuple[str, int], ...]


class Remote(io.RawIOBase):
    """A file on a server that answers to ranges, as far as it is read."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._at = 0
        with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=60) as reply:
            self.size = int(reply.headers["Content-Length"])

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self.size}[whence]
        return self._at

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        wanted = min(len(buffer), self.size - self._at)
        if wanted <= 0:
            return 0
        header = {"Range": f"bytes={self._at}-{self._at + wanted - 1}"}
        with urllib.request.urlopen(urllib.request.Request(self.url, headers=header), timeout=60) as reply:
            if reply.status != 206:
                raise OSError(f"{self.url}: the server sends no part of a file")
            content = reply.read()
        buffer[: len(content)] = content
        self._at += len(content)
        return len(content)


def wheel_sizes(wheel: io.BufferedIOBase) -> int:
    """The bytes that a wheel takes when it is unpacked."""
    with zipfile.ZipFile(wheel) as archive:  # type: ignore[arg-type]
        return sum(entry.file_size for entry in archive.infolist())


def own_wheel(folder: Path) -> Path:
    """Builds this project's wheel, from a copy: setuptools leaves its traces where it builds."""
    source = folder / "source"
    for name in ("toolchain", "passes", "runtimes"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check", "--no-deps"]
    subprocess.run([*command, "--wheel-dir", str(folder), str(source)], check=True)
    (wheel,) = folder.glob("*.whl")
    return wheel


def resolve(requirements: list[str], folder: Path, python: str) -> list[tuple[str, str]]:
    """The name, version and address of every wheel that pip would install."""
    report = folder / "report.json"
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed"]
    command += ["--no-input", "--disable-pip-version-check"]
    # For a named Python pip wants to know where to, although nothing is installed.
    command += ["--only-binary", ":all:", "--python-version", python, "--target", str(folder / "none")]
    # As from PyPI: an index or a folder of wheels that is configured here may hold other builds.
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PIP_") or key == "PIP_CERT"}
    environment["PIP_CONFIG_FILE"] = os.devnull
    subprocess.run([*command, "--report", str(report), *requirements], check=True, env=environment)
    return [
        (f"{item['metadata']['name']} {item['metadata']['version']}", item["download_info"]["url"])
        for item in json.loads(report.read_text())["install"]
    ]


def measure(name: str, requirements: list[str], wheel: Path, python: str) -> Footprint:
    with tempfile.TemporaryDirectory() as scratch:
        asked = [text.replace("{ours}", str(wheel)) for text in requirements]
        found = resolve(asked, Path(scratch), python)

    def sizes(item: tuple[str, str]) -> tuple[str, int, int]:
        package, url = item
        if url.startswith("file:"):
            return package, wheel.stat().st_size, wheel_sizes(wheel.open("rb"))
        remote = Remote(url)
        try:
            return package, remote.size, wheel_sizes(io.BufferedReader(remote, 1 << 17))
        except zipfile.BadZipFile:
            raise SystemExit(f"{package}: {url} is no wheel") from None

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        rows = list(pool.map(sizes, found))
    largest = sorted(((package, unpacked) for package, _, unpacked in rows), key=lambda row: -row[1])
    return Footprint(
        name,
        tuple(sorted(package for package, _, _ in rows)),
        sum(size for _, size, _ in rows),
        sum(unpacked for _, _, unpacked in rows),
        sum(unpacked for package, _, unpacked in rows if not package.startswith(OF_TORCH)),
        tuple(largest[:3]),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the JSON line to a file")
    parser.add_argument("--only", default=",".join(SETS), help=f"of {','.join(SETS)}")
    parser.add_argument("--python", default=f"{sys.version_info.major}.{sys.version_info.minor}", help="such as 3.11")
    options = parser.parse_args()
    keys = options.only.split(",")
    if unknown := set(keys) - set(SETS):
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    with tempfile.TemporaryDirectory() as scratch:
        wheel = own_wheel(Path(scratch))
        sizes = f"{'download MB':>12} {'installed MB':>13} {'without torch':>14}"
        print(f"{'what':32} {'packages':>8} {sizes}  largest, installed")
        rows = []
        for key in keys:
            row = measure(SETS[key][0], SETS[key][1], wheel, options.python)
            largest = ", ".join(f"{package.split()[0]} {size / 1e6:.0f}" for package, size in row.largest)
            sizes = f"{row.download / 1e6:12.1f} {row.installed / 1e6:13.1f} {row.without_torch / 1e6:14.1f}"
            print(f"{row.name:32} {len(row.packages):8} {sizes}  {largest}", flush=True)
            rows.append(dataclasses.asdict(row))
    line = json.dumps({"benchmark": "footprint", "python": options.python, "machine": platform.machine(), "rows": rows})
    print(line)
    if options.json:
        options.json.write_text(line + "\n")


if __name__ == "__main__":
    main()
