"""Small models in ONNX text, and a writer of packages that follows nothing but the layout in package.py."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import onnx


def save_model(path: Path, text: str, *, opset: int = 19, ir_version: int = 9) -> Path:
    """Writes the model of one graph in ONNX's text form."""
    header = f'<ir_version: {ir_version}, opset_import: ["": {opset}]>\n'
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(onnx.parser.parse_model(header + text), path)
    return path


def save_with_data(path: Path, *, location: str | None = None, **entries: str) -> Path:
    """Writes y = x + w, w[4] float32 in external data. Any entry can be overridden with a lie."""
    model = onnx.parser.parse_model(
        '<ir_version: 9, opset_import: ["": 19]> g (float[4] x) => (float[4] y) { y = Add(x, w) }'
    )
    weight = model.graph.initializer.add()
    weight.name, weight.data_type = "w", onnx.TensorProto.FLOAT
    weight.dims.append(4)
    weight.data_location = onnx.TensorProto.EXTERNAL
    stored = {"location": location or "w.bin", "offset": "0", "length": "16", **entries}
    for key, value in stored.items():
        weight.external_data.add(key=key, value=value)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(model.SerializeToString())
    return path


def variant_body(name: str, *, target: str = "ort-cpu", **ours: Any) -> dict[str, Any]:
    """The manifest's body of one variant that ONNX Runtime can run too."""
    return {
        "variant_directory": name,
        "ep": "CPUExecutionProvider",
        "device": "cpu",
        "executor_info": {
            "ort": {"model_file": "model.onnx", "session_options": {}},
            "toolchain": {"target": target, "precision": "fp32", "model_file": "model.onnx", **ours},
        },
    }


def manifest_of(root: Path, variants: dict[str, Any]) -> dict[str, Any]:
    """The manifest of a folder as it is, with the digest of every file in it."""
    files = {
        path.relative_to(root).as_posix(): {
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            "size": path.stat().st_size,
        }
        for path in sorted(root.rglob("*"))
        if path.is_file() and path.name != "manifest.json"
    }
    return {
        "schema_version": "1.0",
        "package_name": "tiny",
        "package_version": "1",
        "layout": "portable",
        "components": {"model": {"variants": variants}},
        "additional_metadata": {"toolchain": {"schema": 1, "files": files, "recipe": {"precision": "fp32"}}},
    }


def write_package(root: Path, variants: dict[str, Any]) -> dict[str, Any]:
    """Writes the manifest over whatever lies in ``root`` already."""
    manifest = manifest_of(root, variants)
    (root / "manifest.json").write_text(json.dumps(manifest))
    return manifest
