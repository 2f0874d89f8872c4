"""Classes of channels that have to be cut together: union-find over whole arrays of indices.

An atom is a number. An axis of a tensor carries an array of atoms, one for each index along it; indices of any axes
that carry the same atom disappear together. Joining is elementwise over two arrays, vectorised, because a network has
tens of thousands of channels in hundreds of tensors.
"""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
import numpy.typing as npt

#: an atom for each index along an axis; None where the axis is never cut
Labels: TypeAlias = npt.NDArray[np.int64] | None


class Atoms:
    """Hands out atoms, joins them into classes, and remembers which may not be cut and why."""

    def __init__(self) -> None:
        self._parent = np.arange(1024, dtype=np.int64)
        self._frozen: list[tuple[npt.NDArray[np.int64], str, bool]] = []
        self.count = 0

    def fresh(self, count: int) -> npt.NDArray[np.int64]:
        """New atoms, each in a class of its own."""
        start, self.count = self.count, self.count + count
        if self.count > len(self._parent):
            grown = np.arange(2 * self.count, dtype=np.int64)
            grown[: len(self._parent)] = self._parent
            self._parent = grown
        return np.arange(start, self.count, dtype=np.int64)

    def join(self, left: npt.NDArray[np.int64], right: npt.NDArray[np.int64]) -> None:
        """Makes one class of ``left[i]`` and ``right[i]``, for each i (arrays that broadcast)."""
        if left is right:
            return
        while True:
            a, b = np.broadcast_arrays(self.roots(left), self.roots(right))
            differ = a != b
            if not differ.any():
                return
            a, b = a[differ], b[differ]
            # One root may get several new parents here; the smallest stays, the next turn sees to the others.
            np.minimum.at(self._parent, np.maximum(a, b), np.minimum(a, b))

    def freeze(self, labels: Labels, reason: str, *, by_another: bool = False) -> None:
        """Keeps the classes of these atoms from being cut; ``by_another``: only since something else is not cut."""
        if labels is not None and labels.size:
            self._frozen.append((labels, reason, by_another))

    def roots(self, labels: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """The one atom that stands for each class, in the shape of ``labels``."""
        found = self._parent[labels]
        while True:
            further = self._parent[found]
            if np.array_equal(further, found):
                self._parent[labels] = found
                return found
            found = further

    def reasons(self) -> npt.NDArray[np.int64]:
        """For each atom that is a root the index of the first reason why its class is kept, -1 where it may go."""
        none = len(self._frozen)
        first = np.full(self.count, none, dtype=np.int64)
        for index, (labels, _, _) in enumerate(self._frozen):
            np.minimum.at(first, self.roots(labels), index)
        first[first == none] = -1
        return first

    def kept_themselves(self) -> npt.NDArray[np.bool_]:
        """For each atom that is a root whether its class would be kept if everything else were cut."""
        found = np.zeros(self.count, dtype=np.bool_)
        for labels, _, by_another in self._frozen:
            if not by_another:
                found[self.roots(labels)] = True
        return found

    def reason(self, index: int) -> str:
        """The text of a reason, for a person."""
        return self._frozen[index][1]
