"""Scores saved answers by this project's rules and by those of the published scripts.

    python experiments/scoring.py RESULTS.json ...

RESULTS.json are files that mode 2 wrote for gsm8k, sql or viggo. Prints, for each, how many answers both rules call
right, and how many only one of them does.
"""
import argparse
import json
from collections.abc import Callable
from pathlib import Path

from data_print_save import TASKS
from LoTA import UserError, run_script


def published_gsm8k(text: str) -> str:
    """What follows the last ####, as text; the whole answer where there is none."""
    return text.rsplit("####", 1)[-1].strip()


def published_viggo(text: str) -> tuple[str, list[str]]:
    """(function, sorted parts between commas). A comma inside a value's brackets separates too."""
    function, _, rest = text.strip().partition("(")
    return function, sorted(part.strip() for part in rest.removesuffix(")").split(","))


# {data set: what two answers must have in common to be equal}, as a description of the published scripts has it.
PUBLISHED: dict[str, Callable[[str], object]] = {"gsm8k": published_gsm8k, "sql": str.strip, "viggo": published_viggo}


def count(results: dict) -> dict[str, int]:
    """{"rows", "both", "here", "published"}: the answers, and those that are right by both rules or by one alone.

    Raises UserError where the data set has no published rule.
    """
    data_set = results.get("data_set")
    if data_set not in PUBLISHED:
        raise UserError(f"the published scripts have no score for '{data_set}'; they have {', '.join(PUBLISHED)}")
    key, score, found = PUBLISHED[data_set], TASKS[data_set].score, {"rows": 0, "both": 0, "here": 0, "published": 0}
    for item in results["predictions"]:
        here = score(item["prediction"], item["label"])
        published = key(item["prediction"]) == key(item["label"])
        found["rows"] += 1
        if here or published:
            found["both" if here and published else "here" if here else "published"] += 1
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+", help="JSON files of mode 2")
    for file in parser.parse_args().results:
        found = count(json.loads(Path(file).read_text()))
        print(f"{Path(file).name}: {found['rows']} answers; right by both {found['both']}, only here {found['here']}, "
              f"only by the published rule {found['published']}")


if __name__ == "__main__":
    run_script(main)
