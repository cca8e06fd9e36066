"""Stands in for pytest where it is not installed. It marks functions as pytest does; benchmarks/gpu_check.py reads it.
"""
import re
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace


def param(*values, id: str | None = None) -> SimpleNamespace:
    return SimpleNamespace(values=values, id=id)


@contextmanager
def raises(error: type[Exception], match: str) -> Iterator[None]:
    try:
        yield
    except error as raised:
        assert re.search(match, str(raised)), raised
    else:
        raise AssertionError(f"no {error.__name__}")


class mark:
    """The marks that the tests use."""

    @staticmethod
    def skipif(condition: bool, reason: str) -> SimpleNamespace:
        return SimpleNamespace(name="skipif", args=(condition,))

    @staticmethod
    def parametrize(names: str, values):
        def add(function):
            added = SimpleNamespace(name="parametrize", args=(names, list(values)))
            function.pytestmark = [*getattr(function, "pytestmark", []), added]
            return function
        return add
