"""What bundling, verifying and installing cost against the same done by hand with sha256sum, tar and zstd.

    python benchmarks/bundle.py artifacts/resnet50 [--rounds 5] [--ending .tar.zst]

Each round takes our way and by hand turn by turn; the ratio is the median over rounds. Ours is measured inside a
process that has imported what it needs. An install writes through to the disk and then tests the model, and by hand
does neither: the test is shown by itself, and by hand is also shown with ``sync``.
Peak memory is that of the process that packs or unpacks, without the self-test's own, and for a model of many times the
size too (``--large`` MB of random weights in external data).
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent

#: Runs one step and prints a line of JSON. Sizes in kB, as Linux gives them: not ru_maxrss, which a child takes over
#: from whoever started it.
STEP = """
import json, sys, time
def peak():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmHWM"))
sys.path.insert(0, {root!r})
from pathlib import Path
from runtimes import install as installing
tested = [0.0]
real = installing.selftest_apart
def timed(folder, **more):
    start = time.perf_counter()
    found = real(folder, **more)
    tested[0] += time.perf_counter() - start
    return found
installing.selftest_apart = timed
step, source, target = sys.argv[1:]
if step == "bundle":
    from toolchain.bundle import bundle
    run = lambda: bundle(Path(source), Path(target), platform="linux-x86_64", with_ort_format=False)
elif step == "verify":
    run = lambda: installing.verify(source)
else:
    run = lambda: installing.install(source, target)
base = peak()
start = time.perf_counter()
run()
seconds = time.perf_counter() - start
print(json.dumps({{"seconds": seconds - tested[0], "tested": tested[0], "peak": peak(), "base": base}}))
"""


def ours(step: str, source: Path, target: Path) -> dict[str, float]:
    """Runs one of our steps in a process of its own."""
    code = STEP.format(root=str(ROOT))
    command = [sys.executable, "-c", code, step, str(source), str(target)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def by_hand(command: str, folder: Path) -> float:
    """Seconds that a shell takes."""
    start = time.perf_counter()
    subprocess.run(["bash", "-ec", f"set -o pipefail; {command}"], cwd=folder, check=True, capture_output=True)
    return time.perf_counter() - start


def prepared(artifact: Path, folder: Path) -> Path:
    """The artifact; with a self-test, where it was built before there were any."""
    from runtimes.package import read_package
    from toolchain import selftest
    from toolchain.artifact import EXPORTED, Variant, write_artifact

    package = read_package(artifact)
    if selftest.KEY in package.metadata:
        return artifact
    variants = [Variant(package.compiled(v), v.precision, v.session_options) for v in package.variants]
    test = selftest.make_selftest(package.root / EXPORTED, variants)
    write_artifact(
        folder / "artifact",
        name=package.name,
        version=package.version,
        variants=variants,
        exported=(package.root / EXPORTED).parent,
        texts=test.contents,
        metadata={**package.metadata, selftest.KEY: test.metadata},
    )
    return folder / "artifact"


def large_artifact(folder: Path, megabytes: int) -> Path:
    """An artifact with one file of random bytes that no model reads: nothing here may depend on its size."""
    import hashlib

    import numpy as np
    import onnx

    import runtimes
    from toolchain import selftest
    from toolchain.artifact import Variant, write_artifact

    text = '<ir_version: 9, opset_import: ["": 19]> g (float[N, 3] x) => (float[N, 3] y) { y = Relu(x) }'
    work = folder / "work"
    work.mkdir()
    onnx.save(onnx.parser.parse_model(text), work / "model.onnx")
    variants = [Variant(runtimes.compile(work / "model.onnx", "ort-cpu", work / "v"), "fp32", {})]
    rng = np.random.default_rng(0)
    with (work / "v" / "weights.bin").open("wb") as file:
        for _ in range(megabytes):
            file.write(rng.bytes(1 << 20))
    test = selftest.make_selftest(work / "model.onnx", variants)
    write_artifact(
        folder / "large",
        name="large",
        version="1",
        variants=variants,
        exported=work,
        texts=test.contents,
        metadata={selftest.KEY: test.metadata, "seed": hashlib.sha256(b"0").hexdigest()},
    )
    shutil.rmtree(work)
    return folder / "large"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--ending", default=".tar.zst")
    parser.add_argument("--large", type=int, default=0, help="also one of so many MB")
    parsed = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    pack = {".tar.zst": "zstd -3 -T1 -q", ".tar.gz": "gzip -6", ".tar": "cat"}[parsed.ending]
    open_ = {".tar.zst": "zstd -d -q", ".tar.gz": "gzip -d", ".tar": "cat"}[parsed.ending]
    result: dict[str, Any] = {"rounds": parsed.rounds, "ending": parsed.ending}
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as name:
        folder = Path(name)
        artifact = prepared(parsed.artifact, folder)
        bundle = folder / f"ours{parsed.ending}"
        hand = folder / f"hand{parsed.ending}"
        ours("bundle", artifact, bundle)
        # By hand packs what the bundle holds, so that both do the same work.
        same = folder / "same"
        same.mkdir()
        by_hand(f"{open_} < {bundle} | tar x -C {same}", folder)
        steps: dict[str, list[dict[str, float]]] = {"bundle": [], "verify": [], "install": []}
        for _ in range(parsed.rounds):
            sums = "find . -type f ! -name SUMS | sort | xargs sha256sum > SUMS"
            packed = ours("bundle", artifact, bundle)
            steps["bundle"].append(packed | {"hand": by_hand(f"{sums}; tar c . | {pack} > {hand}", same)})
            way = f"{open_} < {hand} | tar x -C {folder}/out; cd {folder}/out; sha256sum -c SUMS"
            shutil.rmtree(folder / "out", ignore_errors=True)
            (folder / "out").mkdir()
            steps["verify"].append(ours("verify", bundle, folder) | {"hand": by_hand(way, same)})
            for place in ("out", "root"):
                shutil.rmtree(folder / place, ignore_errors=True)
            (folder / "out").mkdir()
            install = ours("install", bundle, folder / "root")
            install["hand"] = by_hand(way, same)
            shutil.rmtree(folder / "out")
            (folder / "out").mkdir()
            install["hand_sync"] = by_hand(f"{way}; sync {folder}/out/* {folder}/out/*/*", same)
            steps["install"].append(install)
        result["megabytes"] = sum(f.stat().st_size for f in same.rglob("*") if f.is_file()) / 1e6
        print(f"{result['megabytes']:.0f} MB in {parsed.ending}\n")
        print(f"{'step':10} {'ours, s':>8} {'by hand, s':>10} {'ratio':>6} {'peak, MB':>9} {'of which imports':>17}")
        for step, rows in steps.items():
            found = {
                "seconds": statistics.median(row["seconds"] for row in rows),
                "hand": statistics.median(row["hand"] for row in rows),
                "ratio": statistics.median(row["seconds"] / row["hand"] for row in rows),
                "peak_mb": max(row["peak"] for row in rows) / 1e3,
                "base_mb": max(row["base"] for row in rows) / 1e3,
            }
            if step == "install":
                found["ratio_sync"] = statistics.median(row["seconds"] / row["hand_sync"] for row in rows)
                found["selftest"] = statistics.median(row["tested"] for row in rows)
            result[step] = found
            print(
                f"{step:10} {found['seconds']:8.2f} {found['hand']:10.2f} {found['ratio']:6.2f} "
                f"{found['peak_mb']:9.0f} {found['base_mb']:17.0f}"
            )
        print(f"\ninstall against by hand with sync: {result['install']['ratio_sync']:.2f}; ", end="")
        print(f"the self-test takes {result['install']['selftest']:.2f} s more")
        if parsed.large:
            big = large_artifact(folder, parsed.large)
            peaks = {}
            for step, source, target in (
                ("bundle", big, bundle),
                ("verify", bundle, folder),
                ("install", bundle, folder / "big"),
            ):
                peaks[step] = ours(step, source, target)["peak"] / 1e3
            result["large"] = {"megabytes": parsed.large, "peak_mb": peaks}
            print(f"{parsed.large} MB: peak " + ", ".join(f"{step} {peak:.0f} MB" for step, peak in peaks.items()))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
