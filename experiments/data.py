"""Cuts ViGGO's train split for the experiments: rows for the bases, other rows for tuning, rows for choosing.

    python runs/experiment_data.py --data_dir DATA --output DIR

DATA holds train.csv and test.csv. Writes four folders, each with its train.csv or test.csv or both:
base_recovery/ (half of the rows), base_task/ (these without the three functions of LACKING), tune/ (40 %, all
functions) and choose/ (tune's train.csv, and as test.csv the last 10 %, so that no test row is used for choosing
anything). The cut is by a shuffle with a fixed seed; test.csv is DATA's everywhere else.

With --turned the halves change places, and no row of DATA's test.csv is used: the bases get what was for tuning and
choosing; of the other half, on which nothing was ever scored, the rows whose meaning the bases have seen are for
tuning, all others (220 meanings, 3 rows each) are test.csv: what was chosen before is confirmed on rows new to it.
"""
import argparse
import csv
import random
from pathlib import Path

LACKING = ("verify_attribute", "suggest", "request_explanation")        # 22 % of train, 31 % of test


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", required=True)
    parser.add_argument("--output", required=True)
    parser.add_argument("--turned", action="store_true", help="the halves change places: see above")
    args = parser.parse_args()
    rows, test = read(Path(args.data_dir) / "train.csv"), read(Path(args.data_dir) / "test.csv")
    random.Random(0).shuffle(rows)
    half, most = len(rows) // 2, len(rows) * 9 // 10
    choosing = {}
    if args.turned:
        base, other = rows[half:], rows[:half]
        seen = {row["mr"] for row in base}
        tune, test = [row for row in other if row["mr"] in seen], [row for row in other if row["mr"] not in seen]
    else:
        base, tune = rows[:half], rows[half:most]
        choosing = {"choose": (tune, rows[most:])}
    lacking = [row for row in base if row["mr"].partition("(")[0] not in LACKING]
    parts = {"base_recovery": (base, test), "base_task": (lacking, test), "tune": (tune, test), **choosing}
    for name, (train_rows, test_rows) in parts.items():
        folder = Path(args.output) / name
        folder.mkdir(parents=True, exist_ok=True)
        write(folder / "train.csv", train_rows)
        write(folder / "test.csv", test_rows)
        print(f"{folder}: {len(train_rows)} rows, {len(test_rows)} to be scored")


def read(file):
    with open(file, newline="", encoding="utf-8") as f:
        return list(csv.DictReader(f))


def write(file, rows):
    with open(file, "w", newline="", encoding="utf-8") as f:
        writer = csv.DictWriter(f, rows[0])
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
