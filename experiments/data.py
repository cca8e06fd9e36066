"""Cuts ViGGO's train split into parts for the experiments: rows for the bases, for tuning and for choosing.

    python experiments/data.py --data_dir DATA --output DIR

DATA holds ViGGO's train.csv and test.csv. The rows of train.csv are shuffled with a fixed seed and cut. DIR gets four
folders, each with a train.csv and a test.csv:

    base_recovery/   train.csv: the first half of the rows
    base_task/       train.csv: the same rows without the three functions in LACKING
    tune/            train.csv: the next 40 %, with all functions
    choose/          train.csv: that of tune/; test.csv: the last 10 %, so that no test row chooses a setting

Everywhere but in choose/ test.csv is DATA's.

With --turned the halves change places, so that earlier choices are confirmed on rows that chose nothing. The bases
learn from the second half, which holds the rows for tuning and choosing above. Rows of the first half are for tuning if
a row of the second half has the same meaning. The others are test.csv: 220 meanings, 3 rows each. There is no choose/,
and DATA's test.csv is not used.
"""
import argparse
import csv
import random
from pathlib import Path

LACKING = ("verify_attribute", "suggest", "request_explanation")        # 22 % of train.csv, 31 % of test.csv

Rows = list[dict[str, str]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", required=True, help="a folder with ViGGO's train.csv and test.csv")
    parser.add_argument("--output", required=True, help="the folder that gets the parts")
    parser.add_argument("--turned", action="store_true", help="the halves change places: see above")
    args = parser.parse_args()
    rows, test = read(Path(args.data_dir) / "train.csv"), read(Path(args.data_dir) / "test.csv")
    random.Random(0).shuffle(rows)
    half, first_to_choose = len(rows) // 2, len(rows) * 9 // 10
    choosing = {}
    if args.turned:
        base, other = rows[half:], rows[:half]
        seen = {row["mr"] for row in base}
        tune, test = [row for row in other if row["mr"] in seen], [row for row in other if row["mr"] not in seen]
    else:
        base, tune = rows[:half], rows[half:first_to_choose]
        choosing = {"choose": (tune, rows[first_to_choose:])}
    lacking = [row for row in base if row["mr"].partition("(")[0] not in LACKING]
    parts = {"base_recovery": (base, test), "base_task": (lacking, test), "tune": (tune, test), **choosing}
    for name, (train_rows, test_rows) in parts.items():
        folder = Path(args.output) / name
        folder.mkdir(parents=True, exist_ok=True)
        write(folder / "train.csv", train_rows)
        write(folder / "test.csv", test_rows)
        print(f"{folder}: {len(train_rows)} rows to train on, {len(test_rows)} to score")


def read(file: Path) -> Rows:
    """The rows of a csv file, {column: text} each."""
    with open(file, newline="", encoding="utf-8") as f:
        return list(csv.DictReader(f))


def write(file: Path, rows: Rows) -> None:
    """Writes rows, at least one, to a csv file."""
    with open(file, "w", newline="", encoding="utf-8") as f:
        writer = csv.DictWriter(f, rows[0])
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
