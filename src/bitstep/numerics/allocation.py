"""Where bits do most: one choice for each of many, the least error in all, within a budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise


def allocate(choices: Mapping[str, Sequence[tuple[float, float]]], room: float) -> dict[str, int]:
    """Index of the choice taken for each name, starting from choice 0.

    choices: (cost, error) by name, costs ascending
    room: what all names may cost together beyond their choices 0

    The errors of the names are taken to add up. A name moves along the corners of the lower convex hull of its error
    over cost, so that every step lowers the error by less per cost than the one before. Steps of all names are taken in
    the order of how much they lower the error per cost; where one does not fit, its name stays where it is.
    """
    steps = []
    for name, pairs in choices.items():
        hull = _lower_hull(pairs)
        for place, further in pairwise(hull):
            extra = pairs[further][0] - pairs[place][0]
            steps.append(((pairs[place][1] - pairs[further][1]) / extra, name, further, extra))
    chosen, full = dict.fromkeys(choices, 0), set()
    for _, name, place, extra in sorted(steps, reverse=True):
        if name in full or extra > room:
            full.add(name)
        else:
            chosen[name] = place
            room -= extra
    return chosen


def _lower_hull(pairs: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the corners of the lower convex hull, from the first pair on, while the error falls."""
    hull = [0]
    for place in range(1, len(pairs)):
        while len(hull) > 1 and _slope(pairs, hull[-2], hull[-1]) >= _slope(pairs, hull[-2], place):
            hull.pop()
        if pairs[place][1] < pairs[hull[-1]][1]:
            hull.append(place)
    return hull


def _slope(pairs: Sequence[tuple[float, float]], a: int, b: int) -> float:
    return (pairs[b][1] - pairs[a][1]) / (pairs[b][0] - pairs[a][0])
