"""Optimisation profiles of an engine: which one takes a set of input shapes, and what to say where none does."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

Shape = tuple[int, ...]
#: smallest, most frequent and largest
Bounds = tuple[Shape, Shape, Shape]


@dataclasses.dataclass(frozen=True, slots=True)
class Profile:
    """What an engine takes in one of its profiles.

    Attributes:
        shapes: the bounds of each input's shape.
        values: the bounds of the elements of those inputs that are themselves shapes.
    """

    shapes: Mapping[str, Bounds]
    values: Mapping[str, Bounds] = dataclasses.field(default_factory=dict)

    def takes(self, shapes: Mapping[str, Shape], values: Mapping[str, Shape]) -> bool:
        """Whether all shapes, and the values of shape inputs where they are given, are inside the bounds."""
        return all(_inside(shapes[name], bounds) for name, bounds in self.shapes.items()) and all(
            _inside(values[name], bounds) for name, bounds in self.values.items() if name in values
        )

    def distance(self, shapes: Mapping[str, Shape]) -> float:
        """How far shapes are from those that the profile is fastest at: the sum of |log| of the ratios of sizes."""
        return sum(
            abs(math.log(max(size, 1) / max(best, 1)))
            for name, (_, middle, _) in self.shapes.items()
            for size, best in zip(shapes[name], middle, strict=True)
        )

    def __str__(self) -> str:
        return ", ".join(_written(name, bounds) for name, bounds in (*self.shapes.items(), *self.values.items()))


def choose_profile(profiles: Sequence[Profile], shapes: Mapping[str, Shape], values: Mapping[str, Shape]) -> int | None:
    """The profile that takes the shapes and is fastest nearest to them; the first of equals; None where none does."""
    fitting = [index for index, profile in enumerate(profiles) if profile.takes(shapes, values)]
    return min(fitting, key=lambda index: profiles[index].distance(shapes), default=None)


@dataclasses.dataclass(frozen=True, slots=True)
class Stand:
    """Two sets of input shapes in the place of one with sizes of 0, which differ only there.

    Attributes:
        small, large: the sets.
        sizes: what stands for the zeros, as (in small, in large).
    """

    small: dict[str, Shape]
    large: dict[str, Shape]
    sizes: frozenset[tuple[int, int]]

    def at_zero(self, small: Sequence[Shape], large: Sequence[Shape]) -> list[Shape] | None:
        """The shapes of outputs for the zeros, from those for ``small`` and ``large``.

        None where a size does not grow in proportion to one that stands for a zero, and unless every output is empty:
        what is in one that is not cannot be known without running.
        """
        shapes = []
        for one, other in zip(small, large, strict=True):
            shape = []
            for a, b in zip(one, other, strict=True):
                if a != b and not any(a * most == b * least for least, most in self.sizes):
                    return None
                shape.append(a if a == b else 0)
            shapes.append(tuple(shape))
        return shapes if all(0 in shape for shape in shapes) else None


def substitutes(profile: Profile, shapes: Mapping[str, Shape]) -> Stand | None:
    """Shapes that a profile takes in place of some with sizes of 0, which kernels refuse as a rule.

    None where the other sizes do not fit either, or where the profile leaves no second size to try.
    """
    small: dict[str, Shape] = {}
    large: dict[str, Shape] = {}
    sizes: set[tuple[int, int]] = set()
    for name, (low, _, high) in profile.shapes.items():
        given = shapes[name]
        if len(given) != len(low):
            return None
        bounds = list(zip(given, low, high, strict=True))
        if any(size != 0 and not least <= size <= most for size, least, most in bounds):
            return None
        small[name] = tuple(size or least for size, least, _ in bounds)
        large[name] = tuple(size or most for size, _, most in bounds)
        sizes.update((least, most) for size, least, most in bounds if size == 0)
    if not sizes or any(least == most for least, most in sizes):
        return None
    return Stand(small, large, frozenset(sizes))


def describe(profiles: Sequence[Profile]) -> str:
    """Every profile, for an error message."""
    return "; ".join(f"profile {index}: {profile}" for index, profile in enumerate(profiles))


def _inside(shape: Shape, bounds: Bounds) -> bool:
    low, _, high = bounds
    return len(shape) == len(low) and all(
        least <= size <= most for least, size, most in zip(low, shape, high, strict=True)
    )


def _written(name: str, bounds: Bounds) -> str:
    low, best, high = bounds
    if low == high:
        return f"{name} {list(low)}"
    return f"{name} {list(low)} to {list(high)}, fastest at {list(best)}"
