"""Dataclasses as plain JSON values, and back."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any, TypeVar

T = TypeVar("T")


def to_json(value: Any) -> Any:
    """Dataclasses as plain JSON values; infinities become the strings that ``from_json`` reads back."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_json(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(key): to_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_json(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def from_json(kind: type[T], tree: Any) -> T:
    """Plain JSON values as a dataclass. Raises pydantic.ValidationError."""
    import pydantic  # heavy, and not needed to write

    found: T = pydantic.TypeAdapter(kind).validate_python(tree)
    return found


def dumps(value: Any) -> str:
    """One line of strict JSON."""
    return json.dumps(to_json(value), allow_nan=False, ensure_ascii=False)
