"""Which models and versions there are on disk: reads folders and holds nothing open.

What can be served::

    model.onnx                      one file: version 1 of the model "model"
    resnet50/manifest.json …        one artifact: version 1 of "resnet50"
    resnet50/{1,2,latest}           versions that ``toolchain install`` made: ``latest`` says which is in service
    models/resnet50/{1,2,…}         a repository: a folder for each model, with numbered artifacts, or versions that
           mobile/manifest.json …   ``install`` made, or an artifact itself, which is version 1 then
           resnet50/serving.yaml    how it is served: fields of ``options.ModelOptions``

An artifact in a folder that is named by a number is a version; where versions are in there, it is a model of that name.
Names of models match ``[A-Za-z0-9_.-]+`` and do not begin with a dot; versions are whole numbers from 1 without
leading zeros. Anything hidden is ignored: it is being written or removed. A version arrives by rename, so it is taken
when its manifest is there; a numbered folder without one is reported and left alone. A link that leads out of the
repository is refused, whatever it leads to.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import pydantic
import yaml

from runtimes import Error, InvalidArtifact, _versions
from runtimes._manifest import Manifest, read_manifest
from toolchain.serving.options import ModelOptions, VersionPolicy

MODEL_NAME = re.compile(r"(?!\.)[A-Za-z0-9_.-]{1,128}")
VERSION_NAME = re.compile(r"[1-9][0-9]{0,8}")
#: The file beside the versions that says how a model is served.
OPTIONS_FILE = "serving.yaml"
_MANIFEST = "manifest.json"
_MAX_YAML = 1 << 16

#: What makes a file the same file: device, inode, size, mtime, ctime.
_Identity = tuple[int, int, int, int, int]


@dataclasses.dataclass(frozen=True, slots=True)
class Version:
    """One version that is whole on disk.

    Attributes:
        model: the model's name.
        number: 1, 2, …
        path: the artifact's real folder, or an ONNX file.
        digest: of the artifact's manifest, hex; of an ONNX file, of what makes it the same file.
        bytes: what is read to load it, at most: the first guess of what it takes in memory.
        bare: it is an ONNX file and no artifact.
    """

    model: str
    number: int
    path: Path
    digest: str
    bytes: int
    bare: bool = False


@dataclasses.dataclass(frozen=True, slots=True)
class Found:
    """What is on disk of one model.

    Attributes:
        name: the model's.
        folder: where ``serving.yaml`` and a file of labels would lie; None where the model is one file or artifact.
        options: the defaults with what ``serving.yaml`` says.
        versions: whole ones, ascending.
        problems: version → why it cannot be taken.
        in_service: where ``latest`` points to in a folder that ``install`` made.
        problem: what is wrong with the model as a whole; "" where nothing is. Then what is served stays as it is.
    """

    name: str
    folder: Path | None
    options: ModelOptions
    versions: tuple[Version, ...]
    problems: Mapping[int, str] = dataclasses.field(default_factory=dict)
    in_service: int | None = None
    problem: str = ""


@dataclasses.dataclass(frozen=True, slots=True)
class Snapshot:
    """What one look at the disk found: models by name, and what lies there that is none."""

    models: Mapping[str, Found]
    remarks: tuple[str, ...] = ()


def selected(policy: VersionPolicy, versions: Sequence[int], in_service: int | None) -> tuple[int, ...]:
    """The versions that a policy serves, ascending.

    Args:
        policy: of the model.
        versions: those that are there.
        in_service: where ``latest`` points to; versions above it were rolled back from, or are about to come.
    """
    numbers = sorted(versions)
    if policy.specific is not None:
        return tuple(number for number in numbers if number in policy.specific)
    if policy.latest is not None:
        if in_service is not None:
            numbers = [number for number in numbers if number <= in_service]
        numbers = numbers[-policy.latest :]
    return tuple(numbers)


def open_source(path: str | os.PathLike[str]) -> Source:
    """What a path is: an ONNX file, an artifact, installed versions, or a repository of models.

    Raises:
        InvalidArtifact: there is nothing, or nothing that can be served; or its name is none for a model.
    """
    place = Path(os.path.abspath(path))
    if not place.exists():
        raise InvalidArtifact("there is no such file or folder", where=str(path), hint="check the path")
    kind: Kind
    if place.is_file():
        if place.suffix != ".onnx":
            raise InvalidArtifact(
                "that file cannot be served",
                where=str(path),
                hint="give an .onnx file, an artifact's folder, or a folder of models; "
                "a bundle is installed first: toolchain install BUNDLE --to FOLDER",
            )
        kind = "file"
    elif not place.is_dir():
        raise InvalidArtifact("that is neither a file nor a folder", where=str(path))
    elif os.path.lexists(place / _MANIFEST):
        kind = "artifact"
    elif _holds_versions(place):
        kind = "model"
    else:
        return Source(place, "repository")
    name = place.stem if kind == "file" else place.name
    if not MODEL_NAME.fullmatch(name):
        raise InvalidArtifact(
            f"{name!r} cannot be the name of a model",
            where=str(path),
            hint="rename it: letters, digits, '_', '.' and '-', and no dot in front",
        )
    return Source(place, kind)


Kind = Literal["file", "artifact", "model", "repository"]


def _holds_versions(place: Path) -> bool:
    """Whether a folder holds the versions of one model. Else it holds models, whose names may be numbers, too.

    What lies in a folder with a number says which: an artifact is a version, and versions are a model. One with
    neither is a version that has not arrived.

    Raises:
        InvalidArtifact: it holds both.
    """
    if os.path.lexists(place / _versions.POINTER) or os.path.lexists(place / OPTIONS_FILE):
        return True
    folders = [name for name in sorted(os.listdir(place)) if not name.startswith(".") and (place / name).is_dir()]
    numbered = [name for name in folders if VERSION_NAME.fullmatch(name)]
    versions = [name for name in numbered if os.path.lexists(place / name / _MANIFEST)]
    models = [name for name in folders if _is_model(place / name) and name not in versions]
    if versions and models:
        raise InvalidArtifact(
            f"{versions[0]!r} is an artifact and would be version {versions[0]} of {place.name!r}, and {models[0]!r} "
            "holds versions and would be a model",
            where=str(place),
            hint=f"if {versions[0]!r} is a model, move the artifact into {versions[0]}/1; if it is a version, "
            f"serve {models[0]!r} by itself",
        )
    return bool(numbered) and not models


def _is_model(folder: Path) -> bool:
    """Whether there are versions in it, or what says how they are served."""
    if os.path.lexists(folder / _versions.POINTER) or os.path.lexists(folder / OPTIONS_FILE):
        return True
    return any(VERSION_NAME.fullmatch(name) and os.path.lexists(folder / name / _MANIFEST) for name in _names(folder))


def _names(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError:  # it is being removed, or is not ours to look into
        return []


class Source:
    """A place on disk that is served. ``scan`` is called from one thread at a time.

    Args:
        path: absolute.
        kind: what it is, as ``open_source`` found.
    """

    def __init__(self, path: Path, kind: Kind) -> None:
        self.path = path
        self.kind = kind
        self._known: dict[Path, tuple[_Identity, str, int]] = {}
        self._options: dict[Path, tuple[_Identity, ModelOptions]] = {}

    def scan(self, defaults: ModelOptions) -> Snapshot:
        """Looks at the disk. What did not change since the last look costs a stat.

        Args:
            defaults: what holds where ``serving.yaml`` says nothing.

        Raises:
            OSError: it cannot be read now, which says nothing of what is there.
        """
        if self.kind == "repository":
            return self._repository(defaults)
        if self.kind == "model":
            return Snapshot({self.path.name: self._model(self.path.name, self.path, defaults, inside=None)})
        name = self.path.stem if self.kind == "file" else self.path.name
        return Snapshot({name: self._single(name, Path(os.path.realpath(self.path)), defaults)})

    def _repository(self, defaults: ModelOptions) -> Snapshot:
        models: dict[str, Found] = {}
        remarks = []
        root = Path(os.path.realpath(self.path))
        for name in sorted(os.listdir(self.path)):
            path = self.path / name
            if name.startswith(".") or not path.is_dir():
                if path.is_symlink() and not path.exists():
                    remarks.append(f"{name!r} is a link to nothing")
                continue
            if not MODEL_NAME.fullmatch(name):
                remarks.append(f"{name!r} cannot be the name of a model: letters, digits, '_', '.' and '-'")
            elif not _within(path, root):
                remarks.append(f"{name!r} is a link that leads out of the repository, and is not followed")
            else:
                try:
                    models[name] = self._model(name, path, defaults, inside=root)
                except OSError as error:  # it is being removed
                    remarks.append(f"{name!r} cannot be read: {error}")
        return Snapshot(models, tuple(remarks))

    def _single(self, name: str, path: Path, defaults: ModelOptions) -> Found:
        try:
            return Found(name, None, defaults, (self._version(name, 1, path),))
        except Error as error:
            return Found(name, None, defaults, (), {1: error.what})

    def _model(self, name: str, path: Path, defaults: ModelOptions, *, inside: Path | None) -> Found:
        if os.path.lexists(path / _MANIFEST):
            return self._single(name, Path(os.path.realpath(path)), defaults)
        boundary = inside or Path(os.path.realpath(path))
        problem = ""
        try:
            options = self._read_options(path / OPTIONS_FILE, defaults, boundary)
        except InvalidArtifact as error:
            problem = f"{error.what} ({error.where})"
            _, options = self._options.get(path / OPTIONS_FILE, (None, defaults))
        versions = []
        problems: dict[int, str] = {}
        for entry in sorted(os.listdir(path)):
            if not VERSION_NAME.fullmatch(entry) or not (path / entry).is_dir():
                continue
            number = int(entry)
            real = Path(os.path.realpath(path / entry))
            if not _within(real, boundary):
                problems[number] = "it is a link that leads out of the repository, and is not followed"
                continue
            try:
                versions.append(self._version(name, number, real))
            except Error as error:
                problems[number] = error.what
        in_service = None
        if os.path.lexists(path / _versions.POINTER):
            try:
                in_service = _versions.current(path)
            except InvalidArtifact as error:
                problem = problem or error.what
        versions.sort(key=lambda version: version.number)
        return Found(name, path, options, tuple(versions), problems, in_service, problem)

    def _version(self, model: str, number: int, path: Path) -> Version:
        """Raises InvalidArtifact, OSError."""
        if path.is_file():
            identity = _identity(path)
            digest = hashlib.sha256(repr(identity).encode()).hexdigest()
            return Version(model, number, path, digest, identity[2], bare=True)
        manifest = path / _MANIFEST
        if not os.path.lexists(manifest):
            raise InvalidArtifact(
                "it has no manifest.json: it is not whole yet, or no artifact",
                where=str(path),
                hint="versions arrive whole: copy into a hidden folder and rename it",
            )
        identity = _identity(manifest)
        known = self._known.get(path)
        if known is None or known[0] != identity:
            found = read_manifest(path)
            known = (identity, hashlib.sha256(found.content).hexdigest(), _largest_variant(found))
            self._known[path] = known
        return Version(model, number, path, known[1], known[2])

    def _read_options(self, path: Path, defaults: ModelOptions, boundary: Path) -> ModelOptions:
        """Raises InvalidArtifact with the file and the key."""
        if not os.path.lexists(path):
            self._options.pop(path, None)
            return defaults
        if not _within(path, boundary):
            raise InvalidArtifact(f"{OPTIONS_FILE} is a link that leads out of the repository", where=str(path))
        try:
            identity = _identity(path)
            known = self._options.get(path)
            if known is None or known[0] != identity:
                known = (identity, read_options(path, defaults))
                self._options[path] = known
            return known[1]
        except OSError as error:
            raise InvalidArtifact(f"{OPTIONS_FILE} cannot be read: {error.strerror}", where=str(path)) from None


def read_options(path: Path, defaults: ModelOptions) -> ModelOptions:
    """Reads a ``serving.yaml``; groups of options keep the defaults of what they do not say.

    Raises:
        InvalidArtifact: it is no YAML, or a key, type or value is not allowed; ``where`` has the file and the key.
        OSError: it cannot be read.
    """
    content = path.read_bytes()
    if len(content) > _MAX_YAML:
        raise InvalidArtifact(f"{OPTIONS_FILE} is larger than {_MAX_YAML >> 10} KiB", where=str(path))
    try:
        said = yaml.safe_load(content.decode("utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise InvalidArtifact(
            f"{OPTIONS_FILE} is no YAML: {getattr(error, 'problem', None) or error}", where=f"{path}{line}"
        ) from None
    if said is None:
        return defaults
    if not isinstance(said, dict):
        raise InvalidArtifact(f"{OPTIONS_FILE} is a mapping of options", where=str(path))
    tree: dict[str, Any] = {}
    for key, value in said.items():
        default = getattr(defaults, key, None) if isinstance(key, str) else None
        # A policy is one choice, and not three options; the other groups are merged.
        merges = isinstance(value, dict) and isinstance(default, pydantic.BaseModel) and key != "version_policy"
        tree[str(key)] = {**default.model_dump(), **value} if merges and default is not None else value
    kept = {name: getattr(defaults, name) for name in ModelOptions.model_fields if name not in tree}
    try:
        return ModelOptions.model_validate({**kept, **tree})
    except pydantic.ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(str(part) for part in first["loc"])
        why = "there is no such option" if first["type"] == "extra_forbidden" else first["msg"]
        raise InvalidArtifact(
            f"{OPTIONS_FILE}: {key}: {why}",
            where=f"{path}, key {key!r}",
            hint=f"its options are {', '.join(ModelOptions.model_fields)}" if len(first["loc"]) == 1 else None,
        ) from None


def _largest_variant(manifest: Manifest) -> int:
    """The bytes that loading may read: those of the largest variant, in its larger form."""
    largest = 0
    for variant in manifest.variants:
        forms: dict[bool, int] = {True: 0, False: 0}
        prepared = f"{variant.directory}/{(variant.prepared_file or '').rpartition('/')[0]}/"
        for name, entry in manifest.files.items():
            if name.startswith(variant.directory + "/"):
                forms[name.startswith(prepared)] += entry.size
        largest = max(largest, *forms.values())
    return largest


def _within(path: Path, root: Path) -> bool:
    real = Path(os.path.realpath(path))
    return real == root or root in real.parents


def _identity(path: Path) -> _Identity:
    status = os.stat(path)
    return (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
