"""Stands in for allpairspy where it is not installed."""
from collections.abc import Callable, Iterator
from itertools import combinations, product


def AllPairs(values: list[list], filter_func: Callable[[tuple], bool]) -> Iterator[tuple]:
    """Cases in which every pair of values meets: always the one with the most pairs that are still missing."""
    pairs = {case: set(combinations(enumerate(case), 2)) for case in product(*values) if filter_func(case)}
    missing = set().union(*pairs.values())
    while missing:
        case = max(pairs, key=lambda case: len(pairs[case] & missing))
        missing -= pairs[case]
        yield case
