"""Runs the measurements of the spine one after the other: `make bench`.

    python benchmarks/run_all.py [--save benchmarks/results/NAME.md]

Builds the two artifacts that are measured first. Nothing else should run on the machine meanwhile.
"""

from __future__ import annotations

import argparse
import datetime
import os
import subprocess
import sys
from pathlib import Path

from toolchain.machine import this_machine

ROOT = Path(__file__).resolve().parent.parent
IMAGES = Path(os.environ.get("ASSETS", ROOT.parent / "shared" / "assets")) / "imagenet" / "val250"
RESNET = "artifacts/resnet50"

COMMANDS: list[tuple[str, list[str]]] = [
    ("Cost of our run, bind and import", ["runtime_overhead.py", "--model", f"{RESNET}/ort-cpu-fp32/model.onnx"]),
    ("From a path to the first result", ["load_time.py", "--artifact", RESNET]),
    ("Latency against the export as it came", ["latency_vs_export.py", "--artifact", RESNET]),
    ("How long a build takes", ["build_time.py"]),
    ("Accuracy against PyTorch", ["accuracy.py", "--images", str(IMAGES)]),
]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save", type=Path, help="write what was printed here, as Markdown")
    options = parser.parse_args()
    for model in ("resnet50", "efficientnet_lite0"):
        subprocess.run([sys.executable, "-m", "toolchain", "build", model], cwd=ROOT, check=True, capture_output=True)
    machine = this_machine()
    versions = ", ".join(f"{name} {version}" for name, version in machine.packages.items())
    head = f"{datetime.date.today()}, {machine.cpu}, {machine.cores} cores, {machine.system}, Python {machine.python}"
    text = [f"# Measurements, {head}\n\n{versions}\n"]
    failed = 0
    for title, command in COMMANDS:
        print(f"\n## {title}", flush=True)
        if command[0] == "accuracy.py" and not IMAGES.is_dir():
            print(f"skipped: no images at {IMAGES.name}; set ASSETS")
            continue
        done = subprocess.run(
            [sys.executable, ROOT / "benchmarks" / command[0], *command[1:]],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
        print(done.stdout, end="", flush=True)
        if done.returncode:
            print(done.stderr, file=sys.stderr)
            failed += 1
        shown = " ".join(["python", f"benchmarks/{command[0]}", *command[1:]]).replace(
            str(IMAGES), "$ASSETS/imagenet/val250"
        )
        text.append(f"## {title}\n\n`{shown}`\n\n```\n{done.stdout.rstrip()}\n```\n")
    if options.save:
        options.save.parent.mkdir(parents=True, exist_ok=True)
        options.save.write_text("\n".join(text), encoding="utf-8")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
