"""Cuts ViGGO's train split for the experiments: rows for the bases, other rows for tuning, rows for choosing.

    python runs/experiment_data.py --data_dir DATA --output DIR

DATA holds train.csv and test.csv. Writes four folders, each with its train.csv or test.csv or both:
base_recovery/ (half of the rows), base_task/ (these without the three functions of LACKING), tune/ (40 %, all
functions) and choose/ (tune's train.csv, and as test.csv the last 10 %, so that no test row is used for choosing
anything). The cut is by a shuffle with a fixed seed; test.csv is DATA's everywhere else.
"""
import argparse
import csv
import random
import shutil
from pathlib import Path

LACKING = ("verify_attribute", "suggest", "request_explanation")        # 22 % of train, 31 % of test


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", required=True)
    parser.add_argument("--output", required=True)
    args = parser.parse_args()
    source, output = Path(args.data_dir), Path(args.output)
    with open(source / "train.csv", newline="", encoding="utf-8") as f:
        header, *rows = csv.reader(f)
    meaning = header.index("mr")
    random.Random(0).shuffle(rows)
    half, most = len(rows) // 2, len(rows) * 9 // 10
    parts = {"base_recovery": rows[:half], "tune": rows[half:most], "choose": rows[half:most],
             "base_task": [row for row in rows[:half] if row[meaning].partition("(")[0] not in LACKING]}

    def write(file, some):
        with open(file, "w", newline="", encoding="utf-8") as f:
            csv.writer(f).writerows([header, *some])

    for name, some in parts.items():
        (output / name).mkdir(parents=True, exist_ok=True)
        write(output / name / "train.csv", some)
        if name != "choose":
            shutil.copyfile(source / "test.csv", output / name / "test.csv")
    write(output / "choose" / "test.csv", rows[most:])
    print(", ".join(f"{name}: {len(some)} rows" for name, some in parts.items()),
          f"for choosing: {len(rows) - most}: {output}")


if __name__ == "__main__":
    main()
