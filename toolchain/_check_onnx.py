"""Child process of ``onnx_file.py``: checks one ONNX file and says what is wrong with it on standard output."""

from __future__ import annotations

import resource
import sys

import onnx


def main(path: str) -> int:
    # Files of 2 GB and more are checked by path, without loading them whole; hostile ones may still ask for a lot.
    limit = 16 * 2**30
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        onnx.checker.check_model(path, full_check=True)
    except (
        onnx.checker.ValidationError,
        onnx.shape_inference.InferenceError,
        RuntimeError,
        ValueError,
        MemoryError,
    ) as error:
        sys.stdout.write(f"{error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
