"""What is wrong with a recipe, in one sentence: where it stands, which key it is, and what is allowed there."""

from __future__ import annotations

import difflib
import typing
from collections.abc import Iterator
from typing import Any

import pydantic

from passes.base import PassFailed
from runtimes import Error
from toolchain.errors import RecipeError

#: The line of each key and item, by the keys that lead to it.
Marks = dict[tuple[Any, ...], int]


def explained(
    error: pydantic.ValidationError, schema: type[pydantic.BaseModel], origin: str, marks: Marks
) -> RecipeError:
    """The first problem, as one error with file, line, key and what is allowed there.

    Args:
        error: what validating a ``schema`` raised.
        origin: where the values come from.
        marks: the lines of their keys, as far as there are any.
    """
    # A key of one of several forms has a problem for each: the deepest is of the form that was meant.
    problems = sorted(error.errors(), key=lambda problem: -len(_place(problem)))
    problem = problems[0]
    place = _place(problem)
    key = ".".join(str(part) for part in place) or "recipe"
    line = marks.get(place) or marks.get(place[:-1])
    where = f"{origin}:{line}, key {key}" if line else f"{origin}, key {key}"
    if problem["type"] == "extra_forbidden":
        allowed = sorted(_section_at(schema, place[:-1]).model_fields)
        close = difflib.get_close_matches(str(place[-1]), allowed, n=1)
        hint = (f"did you mean {close[0]}? " if close else "") + "allowed here: " + ", ".join(allowed)
        return RecipeError(f"unknown key {str(place[-1])!r}", where=where, hint=hint)
    if problem["type"] == "missing":
        return RecipeError(f"key {str(place[-1])!r} is missing", where=where)
    cause = problem.get("ctx", {}).get("error")
    if isinstance(cause, (Error, PassFailed)):
        what = cause.what if isinstance(cause, Error) else str(cause)
        return RecipeError(what, where=where, hint=cause.hint)
    same = [p["msg"] for p in problems if _place(p) == place]
    if all(message.startswith("Input should be ") for message in same):
        wanted = " or ".join(message.removeprefix("Input should be ") for message in same)
        return RecipeError(f"{problem['input']!r} is not allowed here: it should be {wanted}", where=where)
    return RecipeError(problem["msg"].removeprefix("Value error, "), where=where)


def _place(problem: Any) -> tuple[Any, ...]:
    """The keys that lead to it, without what pydantic adds to name the form of a key that has several."""
    return tuple(
        p for p in problem["loc"] if isinstance(p, int) or not p.startswith(("list[", "literal[", "constrained-"))
    )


def _section_at(section: type[pydantic.BaseModel], place: tuple[Any, ...]) -> type[pydantic.BaseModel]:
    """The section that the keys lead to, from this one on; the number of an item leads no further than its list."""
    for part in place:
        field = section.model_fields.get(part)
        section = next(_sections_in(field.annotation), section) if field is not None else section
    return section


def _sections_in(annotation: Any) -> Iterator[type[pydantic.BaseModel]]:
    """A key's sections: ``prune`` is one or nothing, ``passes`` a word or a list of them."""
    if isinstance(annotation, type) and issubclass(annotation, pydantic.BaseModel):
        yield annotation
    for part in typing.get_args(annotation):
        yield from _sections_in(part)
