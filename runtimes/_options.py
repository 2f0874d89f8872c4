"""What every backend does with its options: reads them, checks their values, and says what is wrong with them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, get_args

from runtimes.base import Backend, InvalidInput


def read_options(backend: Backend, given: Any) -> Any:
    """The backend's own options type, from it or from a mapping; its fields are all that is allowed.

    Raises:
        InvalidInput: neither, an option that there is not, or a value that it does not take.
    """
    kind = backend.options_type
    if given is None or isinstance(given, kind):
        return given
    if not isinstance(given, Mapping):
        raise InvalidInput(
            f"options of {backend.name} are {_a(kind.__name__)} or a mapping, not a {type(given).__name__}"
        )
    known = _names(kind)
    for key in given:
        if key not in known:
            raise InvalidInput(f"{backend.name} has no option {key!r}", hint=f"it has: {', '.join(known) or 'none'}")
    return kind(**given)


def own_options(backend: Backend, options: Any) -> Any:
    """Options of the backend's own type, its defaults where there are none. Raises InvalidInput on anything else."""
    kind = backend.options_type
    if options is None:
        return kind()
    if not isinstance(options, kind):
        example = f"{_names(kind)[0]}=..." if _names(kind) else ""
        raise InvalidInput(
            f"options of {backend.name} are {_a(kind.__name__)}, not a {type(options).__name__}",
            hint=f"{type(backend).__module__}.{kind.__name__}({example})",
        )
    return options


def check_choice(of: str, options: Any, name: str, choices: Any) -> None:
    """Raises InvalidInput where an option is none of the values of a Literal."""
    if getattr(options, name) not in get_args(choices):
        raise bad_option(of, name, getattr(options, name), f"one of {', '.join(get_args(choices))}")


def check_whole(of: str, options: Any, name: str, least: int, most: int) -> None:
    """Raises InvalidInput where an option is no whole number in this range, both ends included."""
    value = getattr(options, name)
    if type(value) is not int or not least <= value <= most:
        raise bad_option(of, name, value, f"a whole number from {least} to {most}")


def check_switches(of: str, options: Any) -> None:
    """Raises InvalidInput where an option that is on or off by default is neither."""
    for field in dataclasses.fields(options):
        if isinstance(field.default, bool) and type(getattr(options, field.name)) is not bool:
            raise bad_option(of, field.name, getattr(options, field.name), "true or false")


def bad_option(of: str, name: str, value: object, wanted: str) -> InvalidInput:
    """The error for a value that an option does not take."""
    return InvalidInput(f"{name} is {value!r}", where=f"option {name} of {of}", hint=f"wanted: {wanted}")


def _names(kind: Any) -> list[str]:
    return [field.name for field in dataclasses.fields(kind)]


def _a(name: str) -> str:
    return f"{'an' if name[0] in 'AEIOU' else 'a'} {name}"
