"""A bill of materials in CycloneDX 1.6: the model, its files with their digests, the packages that made it.

Plain JSON, written by us: ``cyclonedx-python-lib`` brings eight packages to make a dictionary. The tests use it, to
hold this against its copy of the schema. There is no time and no random number in it: equal artifacts, equal bytes.

See https://cyclonedx.org/docs/1.6/json and ECMA-424; package URLs: https://github.com/package-url/purl-spec.
"""

from __future__ import annotations

import json
import urllib.parse
import uuid
from collections.abc import Mapping
from typing import Any

from runtimes._digests import FileEntry
from runtimes.package import Package

#: Where it lies in a bundle.
FILE = "sbom.cdx.json"
#: Of the name of a bill in RFC 4122's version 5: our own, so that equal content has an equal name.
_SPACE = uuid.UUID("5c3a7e52-86d1-5d0e-9c6b-2f1f0d2b7a10")


def bill(package: Package, files: Mapping[str, FileEntry]) -> str:
    """The bill of what is made of an artifact.

    Args:
        package: the artifact, whose metadata has source, weights and packages.
        files: those that are shipped.
    """
    machine = package.metadata.get("machine") or {}
    packages = machine.get("packages", {}) if isinstance(machine, dict) else {}
    source = package.metadata.get("source")
    model = f"pkg:generic/{_quoted(package.name)}@{_quoted(package.version)}?checksum=sha256:{package.digest}"
    libraries = [
        {"type": "library", "bom-ref": f"pkg:pypi/{name}@{version}", "name": name, "version": version,
         "purl": f"pkg:pypi/{name}@{_quoted(version)}", "scope": "excluded"}
        for name, version in sorted(packages.items())
    ]  # fmt: skip
    data = [
        {"type": "file", "bom-ref": f"file:{name}", "name": name,
         "hashes": [{"alg": "SHA-256", "content": entry.sha256}]}
        for name, entry in sorted(files.items())
    ]  # fmt: skip
    properties = [{"name": "onnx-toolchain:manifest-sha256", "value": package.digest}]
    if source is not None:
        properties.append({"name": "onnx-toolchain:source", "value": json.dumps(source, sort_keys=True)})
    component: dict[str, Any] = {
        "type": "machine-learning-model", "bom-ref": model, "name": package.name,
        "version": package.version or "0", "purl": model, "properties": properties,
    }  # fmt: skip
    if package.description:
        component["description"] = package.description
    return json.dumps({
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": f"urn:uuid:{uuid.uuid5(_SPACE, package.digest + ' '.join(sorted(files)))}",
        "version": 1,
        "metadata": {"component": component},
        "components": [*data, *libraries],
        "dependencies": [{"ref": model, "dependsOn": [one["bom-ref"] for one in (*data, *libraries)]}],
    }, indent=1, ensure_ascii=False) + "\n"  # fmt: skip


def _quoted(text: str) -> str:
    return urllib.parse.quote(text or "0", safe=".-_~")
