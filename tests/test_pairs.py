"""pairs.pairwise() against the full product: it leaves out cases, but no pair of values."""
from itertools import product
from math import prod

import pytest
import torch
from pairs import pairs_of, pairwise


def pairs_in(cases):
    return set().union(*map(pairs_of, cases))


def values_of(params):
    return [param.values for param in params]


@pytest.mark.parametrize("sizes", [(2, 2), (7, 4), (4, 7, 3), (4, 7, 3, 3, 2), (2, 5, 2, 2), (1, 6, 3, 1, 2)])
def test_every_pair_occurs(sizes):
    """All pairs of the full product are there. With three or more parameters that take a choice the cases are fewer."""
    parameters = {f"p{i}": range(size) for i, size in enumerate(sizes)}
    cases = values_of(pairwise(**parameters))
    assert pairs_in(cases) == pairs_in(product(*parameters.values()))
    assert len(set(cases)) == len(cases) and cases == values_of(pairwise(**parameters))
    if sum(size > 1 for size in sizes) > 2:
        assert len(cases) < prod(sizes)


@pytest.mark.parametrize("sizes", [(3, 3), (3, 4, 2), (4, 5, 2, 3)])
def test_what_does_not_exist_is_left_out(sizes):
    """The first value of p0 exists with the last value of p1 only; all other pairs occur."""
    def exists(first, second, *others):
        return first != 0 or second == sizes[1] - 1
    cases = values_of(pairwise(exists=exists, **{f"p{i}": range(size) for i, size in enumerate(sizes)}))
    assert all(exists(*case) for case in cases)
    assert pairs_in(cases) == pairs_in(case for case in product(*map(range, sizes)) if exists(*case))


def test_further_cases_and_ids():
    """A case of `also` comes last, and once. An id names every value."""
    also = [(2, torch.float32, None), (8, None, 1.0)]
    params = pairwise(bits=(2, 3), dtype=(torch.float32,), kappa=(None,), also=also)
    assert [param.id for param in params] == ["bits=2, dtype=float32, kappa=None", "bits=3, dtype=float32, kappa=None",
                                              "bits=8, dtype=None, kappa=1.0"]
