"""Cuts ViGGO's train split for the recovery experiment: rows for the base, other rows for tuning, rows for choosing.

    python runs/recovery_data.py --data_dir DATA --output DIR

DATA holds train.csv and test.csv. Writes base/, tune/ and choose/, each with its train.csv; test.csv is DATA's in base/
and tune/, and in choose/ the rows for choosing settings, so that no test row is used for choosing anything. The cut is
by a shuffle with a fixed seed: half, 40 % and 10 %.
"""
import argparse
import csv
import random
import shutil
from pathlib import Path


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", required=True)
    parser.add_argument("--output", required=True)
    args = parser.parse_args()
    source, output = Path(args.data_dir), Path(args.output)
    with open(source / "train.csv", newline="", encoding="utf-8") as f:
        header, *rows = csv.reader(f)
    random.Random(0).shuffle(rows)
    half, most = len(rows) // 2, len(rows) * 9 // 10
    parts = {"base": rows[:half], "tune": rows[half:most], "choose": rows[half:most]}

    def write(file, some):
        with open(file, "w", newline="", encoding="utf-8") as f:
            csv.writer(f).writerows([header, *some])

    for name, some in parts.items():
        (output / name).mkdir(parents=True, exist_ok=True)
        write(output / name / "train.csv", some)
        if name != "choose":
            shutil.copyfile(source / "test.csv", output / name / "test.csv")
    write(output / "choose" / "test.csv", rows[most:])
    print(f"{half} rows for the base, {most - half} for tuning, {len(rows) - most} for choosing: {output}")


if __name__ == "__main__":
    main()
