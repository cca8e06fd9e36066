"""Whether a generated text is right: the scores that --score names.

Touches Python's import path, for a function of the user's.
"""
import importlib
import re
import sys
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path

from LoTA import UserError

Score = Callable[[str, str], bool]          # (prediction, label) -> whether the prediction is right

# A sign behind a digit is a minus between two numbers. An exponent has 4 digits at most, because Decimal takes no more
# than 18 of them and a model may write any number.
NUMBER = re.compile(r"(?:(?<![\d.])[-+])?(?:(?:\d{1,3}(?:,\d{3})+(?!,?\d)|\d+)(?:\.\d+)?|\.\d+)"
                    r"(?:[eE][-+]?\d{1,4}(?!\d))?")


def exact(prediction: str, label: str) -> bool:
    """The texts are equal. White space around them does not count."""
    return prediction.strip() == label.strip()


def number(prediction: str, label: str) -> bool:
    """The last numbers of both texts are equal: 1,000.0 and 1000 are. A text without a number is wrong."""
    found = last_number(prediction)
    return found is not None and found == last_number(label)


def last_number(text: str) -> Decimal | None:
    """The last number in a text, exactly. None where it has none."""
    found = NUMBER.findall(text)
    return Decimal(found[-1].replace(",", "")) if found else None


SCORES = {"exact": exact, "number": number}


def find_score(name: str) -> Score:
    """The score that --score names: one of SCORES, or module:function, looked for in the working folder too.

    Raises UserError where there is none. The function that is returned raises UserError where the user's own fails, or
    says neither True nor False.
    """
    if name in SCORES:
        return SCORES[name]
    module, mark, function = name.partition(":")
    if not (module and mark and function):
        raise UserError(f"--score {name} is none of {', '.join(SCORES)}, and not module:function")
    before = list(sys.path)
    sys.path.insert(0, str(Path.cwd()))
    try:
        own = getattr(importlib.import_module(module), function, None)
    except Exception as error:
        raise UserError(f"--score {name}: the module cannot be imported ({type(error).__name__}: {error}); it must lie "
                        "in the working folder or be installed") from error
    finally:
        sys.path[:] = before
    if not callable(own):
        raise UserError(f"--score {name}: {module} has no function {function}")

    def score(prediction: str, label: str) -> bool:
        try:
            right = own(prediction, label)
        except Exception as error:
            raise UserError(f"--score {name} failed ({type(error).__name__}: {error}) on the prediction "
                            f"{prediction[:80]!r} and the label {label[:80]!r}") from error
        if right not in (True, False):
            raise UserError(f"--score {name} must return True or False, not {right!r}")
        return bool(right)
    return score


def check_labels(name: str | None, labels: list[str]) -> None:
    """Raises UserError where a label can never be right, because --score is number and it has none."""
    without = next((i for i, label in enumerate(labels, 1) if name == "number" and last_number(label) is None), None)
    if without:
        raise UserError(f"--score number: the answer of row {without} has no number: {labels[without - 1][:80]!r}")
