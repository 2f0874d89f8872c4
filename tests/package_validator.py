"""A strict validator of ONNX Runtime's model packages, schema 1, portable layout. No test by itself.

Written from the format's own description (model_package/README.md and onnxruntime/core/session/model_package/README.md
of ONNX Runtime), for any package and not for ours: it knows nothing of what we keep in it, and shares no code with
what writes or reads our artifacts. Where that description allows what could not work, such as a variant that no
execution provider can be asked for, this is stricter.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

TOP = {
    "schema_version",
    "package_name",
    "package_version",
    "description",
    "layout",
    "components",
    "shared_assets",
    "additional_metadata",
}
COMPONENT = {"component_name", "variants", "additional_metadata"}
VARIANT = {"variant_directory", "ep", "device", "compatibility_string", "executor_info", "additional_metadata"}
ORT = {"model_file", "session_options", "provider_options"}
#: Options that make ONNX Runtime write files: a package that sets one does not open.
WRITING = {
    "session.debug_layout_transformation",
    "session.collect_node_memory_stats_to_file",
    "session.enable_profiling",
    "session.optimized_model_filepath",
}
#: Options whose value is a path inside the package.
PATHS = {"session.model_external_initializers_file_folder_path", "ep.context_file_path"}
ASSET = re.compile(r"sha256:([0-9a-f]{64})(?:/(.*))?", re.DOTALL)


class Broken(Exception):
    """A rule that the package does not keep."""


def validate(root: Path) -> None:
    """Raises Broken with the first rule that the package at ``root`` does not keep."""
    check(root.is_dir(), "a package is a directory")
    for path in walk(root):
        mode = path.lstat().st_mode
        check(stat.S_ISREG(mode) or stat.S_ISDIR(mode), f"{path.name}: only plain files and directories are portable")
    manifest = read_object(root / "manifest.json")
    check_keys(manifest, TOP, "the manifest")
    version = manifest.get("schema_version")
    check(
        isinstance(version, str) and re.fullmatch(r"1\.\d+", version) is not None,
        f"schema_version {version!r}: a text '1.<minor>' is required",
    )
    for key in ("package_name", "package_version", "description"):
        check(isinstance(manifest.get(key, ""), str), f"{key} is a text")
    check(manifest.get("layout", "portable") == "portable", "only the portable layout can be shipped")
    for directory in asset_directories(root):
        check_asset(directory)
    assets = as_object(manifest.get("shared_assets", {}), "shared_assets")
    for uri, place in assets.items():
        match = ASSET.fullmatch(uri)
        check(match is not None and match[2] is None, f"shared_assets: {uri!r} is no sha256:<hex>")
        directory = inside(root, root, place, f"shared_assets[{uri!r}]")
        check(directory.is_dir(), f"shared_assets[{uri!r}] is no directory")
        check(directory_hash(directory) == uri, f"shared_assets[{uri!r}] holds something else")
    components = as_object(manifest.get("components"), "components")
    check(bool(components), "a package has at least one component")
    for name, value in components.items():
        where = f"component {name!r}"
        directory = root
        if isinstance(value, str):
            file = inside(root, root, value, where)
            file = file / "component.json" if file.is_dir() else file
            value, directory = read_object(file), file.parent
        check_component(root, directory, as_object(value, where), assets, where)


def check_component(root: Path, directory: Path, body: dict[str, Any], assets: dict[str, str], where: str) -> None:
    check_keys(body, COMPONENT, where)
    check(isinstance(body.get("component_name", ""), str), f"{where}: component_name is a text")
    variants = as_object(body.get("variants"), f"{where}, variants")
    check(bool(variants), f"{where}: a component has at least one variant")
    for name, variant in variants.items():
        check_variant(root, directory, name, as_object(variant, f"{where}, variant {name!r}"), assets)


def check_variant(root: Path, component: Path, name: str, body: dict[str, Any], assets: dict[str, str]) -> None:
    where = f"variant {name!r}"
    check_keys(body, VARIANT, where)
    folder = inside(root, component, body.get("variant_directory", name), f"{where}, variant_directory")
    check(folder.is_dir(), f"{where}: its variant_directory is no directory")
    for key in ("ep", "device", "compatibility_string"):
        check(isinstance(body.get(key, ""), str), f"{where}: {key} is a text")
    check(
        "ep" not in body or re.fullmatch(r"\w+ExecutionProvider", body["ep"], re.ASCII) is not None,
        f"{where}: {body.get('ep')!r} is no name of an execution provider",
    )
    check(body.get("device", "cpu") in ("cpu", "gpu", "npu"), f"{where}: the device is cpu, gpu or npu")
    check("device" not in body or "ep" in body, f"{where}: a device of no execution provider")
    executors = as_object(body.get("executor_info", {}), f"{where}, executor_info")
    for namespace, value in executors.items():
        at = f"{where}, executor_info.{namespace}"
        if isinstance(value, str):
            value = read_object(inside(root, folder, value, at))
        value = as_object(value, at)
        if namespace == "ort":
            check("ep" in body, f"{at}: without an ep no program can ask for it")
            check_ort(root, folder, value, assets, at)
    check("ep" not in body or "ort" in executors, f"{where}: an ep, and nothing that ONNX Runtime could load")


def check_ort(root: Path, folder: Path, body: dict[str, Any], assets: dict[str, str], where: str) -> None:
    check_keys(body, ORT, where)
    model = resolve(root, folder, body.get("model_file"), assets, f"{where}.model_file")
    check(model.is_file(), f"{where}.model_file is no file")
    for key in ("session_options", "provider_options"):
        for option, value in as_object(body.get(key, {}), f"{where}.{key}").items():
            check(isinstance(value, str), f"{where}.{key}.{option} is a text")
            if key == "session_options":
                check(option not in WRITING, f"{where}: {option} writes files")
                if option in PATHS:
                    resolve(root, folder, value, assets, f"{where}.{option}")


def resolve(root: Path, base: Path, value: Any, assets: dict[str, str], where: str) -> Path:
    """A path of the ``ort`` slot: relative to the variant, or into a shared asset."""
    check(isinstance(value, str), f"{where} is a text")
    match = ASSET.fullmatch(value)
    if match is None:
        return inside(root, base, value, where)
    uri = f"sha256:{match[1]}"
    directory = inside(root, root, assets.get(uri, f"shared_assets/sha256-{match[1]}"), where)
    check(directory.is_dir(), f"{where}: there is no shared asset {uri}")
    return directory if match[2] is None else inside(directory, directory, match[2], where)


def inside(root: Path, base: Path, value: Any, where: str) -> Path:
    """A portable path: relative, POSIX, nowhere up or out, and something is there."""
    check(isinstance(value, str), f"{where} is a text")
    parts = value.split("/")
    check(
        bool(value) and not value.startswith("/") and "\\" not in value and re.match("[A-Za-z]:", value) is None,
        f"{where}: {value!r} is no relative POSIX path",
    )
    check(not {"", ".", ".."} & set(parts), f"{where}: {value!r} is not in its plain form")
    path = base / value
    check(path.exists(), f"{where}: {value!r} is not there")
    check(path.resolve().is_relative_to(root.resolve()), f"{where}: {value!r} leads out of the package")
    return path


def asset_directories(root: Path) -> Iterator[Path]:
    folder = root / "shared_assets"
    if folder.is_dir():
        yield from sorted(folder.iterdir())


def check_asset(directory: Path) -> None:
    match = re.fullmatch("sha256-([0-9a-f]{64})", directory.name)
    check(match is not None and directory.is_dir(), f"shared_assets/{directory.name}: not sha256-<hex>")
    assert match is not None
    check(directory_hash(directory) == f"sha256:{match[1]}", f"shared_assets/{directory.name} holds something else")


def directory_hash(directory: Path) -> str:
    """The URI of a directory: of its files' digests and paths, in the order of the paths."""
    files = {path.relative_to(directory).as_posix(): path for path in walk(directory) if path.is_file()}
    lines = [f"{hashlib.sha256(files[name].read_bytes()).hexdigest()}  {name}\n" for name in sorted(files)]
    return "sha256:" + hashlib.sha256("".join(lines).encode()).hexdigest()


def walk(root: Path) -> Iterator[Path]:
    for folder, directories, files in os.walk(root, followlinks=False):
        yield from (Path(folder) / name for name in (*directories, *files))


def read_object(path: Path) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        check(len({key for key, _ in pairs}) == len(pairs), f"{path.name}: a key comes twice")
        return dict(pairs)

    def constant(text: str) -> Any:
        raise Broken(f"{path.name}: {text} is not JSON")

    check(path.is_file(), f"{path.name} is not there")
    try:
        tree = json.loads(path.read_bytes().decode(), object_pairs_hook=unique, parse_constant=constant)
    except (ValueError, RecursionError) as error:
        raise Broken(f"{path.name} is not JSON: {error}") from None
    return as_object(tree, path.name)


def as_object(value: Any, where: str) -> dict[str, Any]:
    check(isinstance(value, dict), f"{where} is an object")
    found: dict[str, Any] = value
    return found


def check_keys(body: dict[str, Any], known: set[str], where: str) -> None:
    check(body.keys() <= known, f"{where}: unknown {sorted(body.keys() - known)}")


def check(kept: bool, rule: str) -> None:
    if not kept:
        raise Broken(rule)
