"""Child process of ``opset.py``: converts one ONNX file to a newer opset, and says what is wrong on standard output."""

from __future__ import annotations

import resource
import sys

import onnx
import onnx.version_converter


def main(source: str, destination: str, opset: str) -> int:
    limit = 16 * 2**30
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        converted = onnx.version_converter.convert_version(onnx.load(source, load_external_data=False), int(opset))
        onnx.save(converted, destination)
    # the converter's own class, what pybind11 makes of C++'s, and what protobuf raises
    except (onnx.version_converter.ConvertError, RuntimeError, ValueError, MemoryError) as error:
        sys.stdout.write(f"{error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
