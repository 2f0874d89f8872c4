"""How long a build takes: after the export, and again from the cache.

    python benchmarks/build_time.py [--model resnet50] [--rounds 3] [--json out.json]

Every round starts with an empty cache of its own. "after the export" is the time of the whole command less that of
the export stage and of the interpreter's start; the two repeats are the whole command as a user waits for it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def run(model: str, folder: Path) -> tuple[float, dict[str, object]]:
    command = [sys.executable, "-m", "toolchain", "build", model, "--weights", "random", "-o", "artifact", "--json"]
    environment = {**os.environ, "TOOLCHAIN_CACHE": str(folder / "cache")}
    started = time.perf_counter()
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=True)
    return time.perf_counter() - started, json.loads(done.stdout)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows: dict[str, list[float]] = {}
    for _ in range(options.rounds):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            total, first = run(options.model, folder)
            stages = {s["name"]: s["seconds"] for s in first["report"]["stages"]}  # type: ignore[index]
            started = time.perf_counter()
            subprocess.run([sys.executable, "-m", "toolchain", "--help"], capture_output=True, check=True)
            interpreter = time.perf_counter() - started
            again, _ = run(options.model, folder)
            shutil.rmtree(folder / "artifact")
            repacked, _ = run(options.model, folder)
            for key, seconds in {
                "first build, all of it": total,
                "  export": stages["export"],
                **{f"  {name}": seconds for name, seconds in stages.items() if name != "export"},
                "after the export": total - stages["export"] - interpreter,
                "repeated, artifact there": again,
                "repeated, artifact removed": repacked,
            }.items():
                rows.setdefault(key, []).append(seconds)
    print(f"{options.model}, {options.rounds} rounds, seconds")
    for key, values in rows.items():
        print(f"{key:<28} median {statistics.median(values):6.2f}   min {min(values):6.2f}   max {max(values):6.2f}")
    result = {"benchmark": "build_time", "model": options.model, "seconds": rows}
    print(json.dumps(result))
    if options.json:
        options.json.write_text(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
