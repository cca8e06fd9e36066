"""pairwise() chooses a few test cases in which every pair of values meets, in place of the full product."""
from collections.abc import Callable, Hashable, Iterable
from itertools import combinations, product

import pytest
from allpairspy import AllPairs


def pairs_of(case: tuple[Hashable, ...]) -> set[tuple]:
    """The pairs of values that meet in a case: {(position, value, other position, other value)}."""
    return {(*one, *other) for one, other in combinations(enumerate(case), 2)}


def pairwise(*, exists: Callable[..., bool] = lambda *case: True, also: Iterable[tuple] = (),
             **parameters: Iterable[Hashable]) -> list:
    """Cases for pytest.mark.parametrize. Every pair of values of any two parameters occurs in some case.

    The full product repeats each pair many times, yet a fault rarely needs more than two values together.

    parameters: at least two, {name: values}. A case holds one value of each, in this order.
    exists: is called with the values of a case in this order; False leaves the case out.
    also: further cases, because a fault can need three values together.
    """
    values = [list(each) for each in parameters.values()]
    cases = [tuple(case) for case in AllPairs(
        values, filter_func=lambda case: len(case) < len(values) or exists(*case))]
    met = set().union(*map(pairs_of, cases))
    for case in product(*values):       # with a filter AllPairs may stop before the last pair
        if exists(*case) and not pairs_of(case) <= met:
            cases.append(case)
            met |= pairs_of(case)
    return [pytest.param(*case, id=", ".join(map(_label, parameters, case))) for case in dict.fromkeys([*cases, *also])]


def _label(name: str, value: Hashable) -> str:
    return f"{name}={getattr(value, '__name__', str(value).removeprefix('torch.'))}"
