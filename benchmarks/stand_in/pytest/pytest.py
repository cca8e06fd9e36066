"""Stands in for pytest where it is not installed. It marks functions as pytest does; benchmarks/gpu_check.py reads it.
"""
from types import SimpleNamespace


def param(*values, id: str | None = None) -> SimpleNamespace:
    return SimpleNamespace(values=values, id=id)


class mark:
    """The marks that tests/test_kernels.py and tests/test_cuda.py use."""

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
