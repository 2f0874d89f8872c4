"""``path/file.py:name``: a function of the user's own, found, digested and called.

This runs what is in the file. It is only ever a file that the user named.
"""

from __future__ import annotations

import ast
import contextlib
import hashlib
import importlib.util
import linecache
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, cast

from runtimes import Error

_SPELLING = re.compile(r"(?P<path>.+\.py):(?P<name>[A-Za-z_]\w*)")


def split(text: str) -> tuple[Path, str] | None:
    """Takes ``path/file.py:name`` apart; None where the text is not spelled like that."""
    match = _SPELLING.fullmatch(text)
    return (Path(match["path"]), match["name"]) if match else None


#: Modules that were imported from beside a user's file. They are imported anew for the next file: an
#: edited one must count, and so must one of the same name in another folder.
_neighbours: set[str] = set()


@contextlib.contextmanager
def _running(path: Path, error: type[Error]) -> Iterator[None]:
    """Lets the file import its neighbours, and turns whatever it raises into an ``error`` with its line."""
    folder = str(path.resolve().parent)
    before = set(sys.modules)
    sys.path.insert(0, folder)
    try:
        yield
    except (Exception, SystemExit) as cause:
        raise explain(cause, path, error=error) from cause
    finally:
        sys.path.remove(folder)
        for name in set(sys.modules) - before:
            if str(getattr(sys.modules[name], "__file__", None) or "").startswith(folder + os.sep):
                _neighbours.add(name)


def load(path: Path, name: str, *, error: type[Error]) -> Callable[..., Any]:
    """Imports the file and returns its callable ``name``. Modules beside the file can be imported by it.

    Raises:
        error: no such file or name, not callable, or the file fails; with file and line.
    """
    if not path.is_file():
        raise error("no such file", where=str(path), hint="check the path")
    while _neighbours:
        sys.modules.pop(_neighbours.pop(), None)
    module_name = f"user_{re.sub(r'[^A-Za-z0-9_]', '_', path.stem)}"
    spec = importlib.util.spec_from_file_location(module_name, path)
    if spec is None or spec.loader is None:
        raise error("not a Python file", where=str(path), hint="name a .py file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    # Never from a __pycache__: its check is by whole seconds and size, too coarse for a file just edited.
    with _running(path, error):
        exec(compile(path.read_bytes(), str(path), "exec"), module.__dict__)
    function = getattr(module, name, None)
    if not callable(function):
        raise error(
            f"{path.name} has no function {name!r}" if function is None else f"{name!r} is not callable",
            where=str(path),
            hint=_defined(module),
        )
    return cast("Callable[..., Any]", function)


def _defined(module: ModuleType) -> str:
    names = sorted(
        key for key, v in vars(module).items() if callable(v) and getattr(v, "__module__", "") == module.__name__
    )
    return f"it defines {', '.join(names)}" if names else "define it there"


def call(function: Callable[[], Any], path: Path, *, error: type[Error]) -> Any:
    """Calls the user's function; what it raises becomes an ``error`` with file and line."""
    with _running(path, error):
        return function()


def explain(cause: BaseException, path: Path, *, error: type[Error]) -> Error:
    """An error that shows the line of the user's own file at which ``cause`` came up."""
    if isinstance(cause, error):
        return cause
    if isinstance(cause, SyntaxError) and cause.filename:
        return error(f"SyntaxError: {cause.msg}", where=f"{cause.filename}:{cause.lineno}", hint="mend the file")
    folder = str(path.resolve().parent) + os.sep
    where = str(path)
    for frame in traceback.extract_tb(cause.__traceback__):
        if os.path.realpath(frame.filename).startswith(folder) and "site-packages" not in frame.filename:
            where = f"{frame.filename}:{frame.lineno} in {frame.name}"
            if line := linecache.getline(frame.filename, frame.lineno or 0).strip():
                where += f": {line}"
    return error(
        f"{type(cause).__name__}: {cause}",
        where=where,
        hint="mend the file; --debug shows the whole traceback",
    )


def digest(path: Path, *, named: bool = True) -> str:
    """SHA-256 over the file, the modules beside it that it imports (and theirs), and files that it names.

    A string in the source that is the path of a file, relative to the source or absolute, counts as
    named: ``torch.load(HERE / "weights.pth")`` makes the weights part of the digest. What is found
    in other ways (the network, a path put together at run time) cannot be seen from here. ``named`` False leaves
    such files out, for code that writes files of its own.

    Raises:
        OSError: a file cannot be read.
    """
    total = hashlib.sha256()
    for file in sorted({path.resolve(), *_sources(path), *(_named_files(path) if named else ())}):
        with file.open("rb") as stream:
            content = hashlib.file_digest(stream, "sha256")
        total.update(f"{content.hexdigest()}  {os.path.relpath(file, path.resolve().parent)}\n".encode())
    return total.hexdigest()


def _tree(path: Path) -> ast.AST:
    try:
        return ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):  # importing it will say so, with the line
        return ast.Module(body=[], type_ignores=[])


def _sources(path: Path) -> set[Path]:
    """The modules beside ``path`` that it imports, and those that these import."""
    found: set[Path] = set()
    folder = path.resolve().parent

    def visit(file: Path) -> None:
        for name in _imported(_tree(file)):
            top = name.split(".")[0]
            candidates = [folder / f"{top}.py"]
            if (folder / top).is_dir():
                candidates += sorted((folder / top).rglob("*.py"))
            for candidate in candidates:
                if candidate.is_file() and candidate != path.resolve() and candidate not in found:
                    found.add(candidate)
                    visit(candidate)

    visit(path)
    return found


def _imported(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module


def _named_files(path: Path) -> Iterator[Path]:
    folder = path.resolve().parent
    for source in {path.resolve(), *_sources(path)}:
        for node in ast.walk(_tree(source)):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and 0 < len(node.value) < 1000:
                candidate = folder / node.value
                try:
                    if "\0" not in node.value and candidate.is_file():
                        yield candidate.resolve()
                except OSError:  # too long a name, or no permission: then the code cannot read it either
                    continue
