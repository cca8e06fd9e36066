"""Makes the README's tables of results and its two figures from the lines of JSON in experiments/results/.

    python runs/experiment_table.py            # prints the tables, draws results.svg and ablation.svg beside the lines
    python runs/experiment_table.py --readme   # and puts the tables between their marks in README.md
    python runs/experiment_table.py --lines choose.jsonl      # any other file of lines, run by run, for the log

Means over the seeds with their standard deviation (n - 1); medians of what was moved, of sizes and times.
"""
import argparse
import json
from pathlib import Path
from statistics import mean, median, stdev

from experiment_runs import CENTRE, CENTRES, VARIED

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "experiments" / "results"
# The README's tables: {file of lines: how many of the columns}.
TABLES = {"test.jsonl": 12, "confirm.jsonl": 7}
END_MARK = "<!-- end of what it made -->\n"
# Methods in the table's order: (as the runs call them, as the README does, colour).
METHODS = (("GPTQ", "GPTQ", "#c9c9c9"), ("LoRA", "LoRA, its adapter kept", "#7fb069"),
           ("QA-LoRA", "QA-LoRA", "#e6b450"), ("LoTA, published", "LoTA, as published", "#a6c8e6"),
           ("LoTA, steps", "LoTA, `--recipe steps`", "#b79fd6"), ("LoTA, grid", "LoTA, `--recipe grid`", "#5b9bd5"),
           ("LoTA, learned", "LoTA, `--recipe learned`", "#1f4e8c"))
PANELS = 5              # in a row of the ablation's figure
SETTINGS = {"recovery": "recovery: the base knows the task",
            "task": "task-specific: the base lacks three of nine functions"}
# Table 1 of the paper, Llama 3.1 8B: {bits: {method: (MMLU after Alpaca, ViGGO after an epoch of it)}}.
PAPER = {16: {"16-bit base": ("68.25", "–")},
         4: {"GPTQ": ("66.89", "–"), "LoRA": ("67.08", "88.64"), "QA-LoRA": ("66.96", "51.15"),
             "LoTA, published": ("67.18", "60.30")},
         3: {"GPTQ": ("38.61", "–"), "LoRA": ("54.68", "82.20"), "QA-LoRA": ("52.37", "43.86"),
             "LoTA, published": ("55.89", "55.96")},
         2: {"GPTQ": ("26.53", "–"), "LoRA": ("27.35", "80.70"), "QA-LoRA": ("26.56", "37.18"),
             "LoTA, published": ("28.49", "41.98")}}


def read_lines(file):
    return [json.loads(line) for line in Path(file).read_text().splitlines()]


def method_of(line):
    """The one of METHODS' names that the line's method begins with, else the line's own."""
    return next((name for name, _, _ in METHODS if line["method"].startswith(name)), line["method"])


def chosen(lines, **wanted):
    return [line for line in lines if all((method_of(line) if key == "method" else line[key]) == value
                                          for key, value in wanted.items())]


def spread(values, form, scale=1):
    """The "mean ± standard deviation" of the values that are there, "(2)" behind those of two seeds; "" for none."""
    values = [scale * value for value in values if value is not None]
    if not values:
        return ""
    return (f"{mean(values):{form}}" + (f" ± {stdev(values):{form}}" if len(values) > 1 else "")
            + (" (2)" if len(values) == 2 else ""))


def row_of(lines, bits, method, label):
    """One row of the README's tables, a list of cells, or None where nothing was run."""
    both = [chosen(lines, setting=setting, bits=bits, method=method) for setting in SETTINGS]
    if not any(both):
        return None
    cells = [str(bits), label]
    for some in both:
        cells += [spread([line["accuracy"] for line in some], ".1f", 100),
                  spread([line["loss"] for line in some], ".3f")]

    def middle(key, form, scale=1, lines=both[0] + both[1]):
        values = [line[key] for line in lines if line.get(key) is not None]
        return f"{scale * median(values):{form}}" if values else ""
    moved = [middle("moved", ".3f", 100, some) for some in both]
    size = (middle("gptq_mb", ".2f", lines=chosen(lines, bits=bits)) if method == "GPTQ"       # others' lines say it
            else middle("merged_mb", ".2f"))
    cells += [" / ".join(filter(None, moved)), middle("adapter_mb", ".2f"), size, middle("train_s", ".0f")]
    paper = PAPER[bits].get(method)
    return [*cells, *(f"*{cell}*" for cell in paper)] if paper else [*cells, "", ""]


def table(lines, columns):
    """A table of the README, its first so many columns, with what it needs to be read."""
    header = ["bits", "method", "recovery: exact match, %", "loss", "task: exact match, %", "loss",
              "integers moved (recovery / task), %", "adapter MB, float32", "merged MB", "training, s",
              "*paper, 8B: MMLU*", "*paper, 8B: ViGGO*"]
    rows = [row_of(lines, 16, "16-bit base", "the base"),
            *(row_of(lines, bits, method, label) for bits in (4, 3, 2) for method, label, _ in METHODS)]
    rows = [header, ["---"] * len(header), *filter(None, rows)]
    rows = [f"| {' | '.join(row[:columns])} |" for row in rows]
    merging = [line for line in lines if line.get("differ_from_live") is not None]
    seeds = sorted({line["seed"] for line in lines if "train" in line})
    differ = sum(line["differ_from_live"] for line in merging)
    note = (f"Seeds {', '.join(map(str, seeds))}: mean ± standard deviation"
            + (", with (2) of two of them" if any("(2)" in row for row in rows) else "")
            + f". In the {len(merging)} runs that merge, {sum(line['rows'] for line in merging):,} answers were given "
              f"merged and live: {differ} differ.")
    return "\n".join([*rows, "", note, ""])


def draw_results(lines, file):
    """Exact match by bits and method, both settings side by side, with the seeds as dots."""
    plt = pyplot()
    figure, axes = plt.subplots(1, len(SETTINGS), figsize=(11, 3.6), sharey=True)
    for ax, setting in zip(axes, SETTINGS, strict=True):
        present = [m for m in METHODS if chosen(lines, setting=setting, method=m[0])]
        width = 0.84 / max(1, len(present))
        for place, bits in enumerate((4, 3, 2)):
            for i, (method, label, color) in enumerate(present):
                values = [100 * line["accuracy"] for line in chosen(lines, setting=setting, bits=bits, method=method)]
                if not values:
                    continue
                x = place + (i - (len(present) - 1) / 2) * width
                ax.bar(x, mean(values), width, color=color, label=label.replace("`", "") if place == 0 else None)
                if len(values) > 1:
                    ax.plot([x] * len(values), values, ".", color="black", markersize=3)
        for base in chosen(lines, setting=setting, method="16-bit base"):
            ax.axhline(100 * base["accuracy"], color="black", linewidth=0.8, linestyle=":", label="16-bit base")
        ax.set_xticks(range(3), ["4 bits", "3 bits", "2 bits"])
        ax.set_title(SETTINGS[setting], fontsize=10, loc="left")
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("exact match, %")
    handles, labels = axes[0].get_legend_handles_labels()
    axes[-1].legend(handles, labels, fontsize=7, frameon=False, ncols=3, loc="upper right")    # where bars are low
    save(figure, file)


def draw_ablation(lines, file):
    """One panel for each thing that was varied: the loss of each centre along it, its own value drawn full."""
    plt = pyplot()
    what = list(dict.fromkeys(line["varied"] for line in lines if "varied" in line))
    centres = [{**line, "varied": varied, "value": CENTRE[varied][line["centre"]]}
               for line in lines if "varied" not in line for varied in what if line["centre"] in CENTRE[varied]]
    rows = -(-len(what) // PANELS)
    figure, axes = plt.subplots(rows, PANELS, figsize=(2.9 * PANELS, 2.6 * rows), squeeze=False, sharey=True)
    for ax, varied in zip(axes.flat, what, strict=False):
        some = [line for line in lines + centres if line.get("varied") == varied]
        values = list(VARIED[varied][1].values())
        order = sorted({v for value in values for v in value}, key=lambda v: (isinstance(v, str), v))
        for centre in dict.fromkeys(line["centre"] for line in some):
            points = {line["value"]: line["loss"] for line in some if line["centre"] == centre}
            recipe, bits, setting = CENTRES[centre]
            color = next(color for name, _, color in METHODS if name == f"LoTA, {recipe}")
            places = [i for i, value in enumerate(order) if value in points]
            style = "" if isinstance(order[0], str) else "-" if (bits, setting) == (2, "recovery") else "--"
            ax.plot(places, [points[order[i]] for i in places], markersize=4, color=color, label=centre, marker="o",
                    linestyle=style, markerfacecolor="white")
            if (own := CENTRE[varied][centre]) in points:
                ax.plot([order.index(own)], [points[own]], "o", markersize=5, color=color)
        ax.set_xticks(range(len(order)), order, fontsize=8)
        ax.set_title(varied, fontsize=10, loc="left")
        ax.spines[["top", "right"]].set_visible(False)
    for ax in axes[:, 0]:
        ax.set_ylabel("loss")
        ax.set_yscale("log", subs=())
        ax.yaxis.set_major_locator(plt.matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
        ax.yaxis.set_major_formatter("{x:g}")
    for ax in axes.flat[len(what):]:
        ax.axis("off")
    axes.flat[-1].legend(*axes.flat[0].get_legend_handles_labels(), fontsize=8, frameon=False)
    save(figure, file)


def pyplot():
    import matplotlib
    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "lota"        # the same lines draw the same file
    import matplotlib.pyplot as plt
    return plt


def save(figure, file):
    figure.tight_layout()
    figure.savefig(file, metadata={"Date": None})
    print(f"drawn: {Path(file).relative_to(ROOT)}")


def with_tables(text):
    """`text`, the README's, with the tables of the committed lines between their marks."""
    for name, columns in TABLES.items():
        mark = f"<!-- made by runs/experiment_table.py of {name} -->\n"
        before, rest = text.split(mark, 1)
        text = before + mark + table(read_lines(RESULTS / name), columns) + END_MARK + rest.split(END_MARK, 1)[1]
    return text


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--readme", action="store_true", help="write the tables into README.md")
    parser.add_argument("--lines", help="print this file of experiments/results/ run by run instead")
    args = parser.parse_args()
    if args.lines:
        print("| run | seed | exact match | loss | integers moved | differ live |\n|---|---|---|---|---|---|")
        for line in read_lines(RESULTS / args.lines):
            moved = "" if line.get("moved") is None else f"{line['moved']:.3%}"
            loss = f"{line['loss']:.4f}" if "loss" in line else ""
            print(f"| {line['name']} | {line['seed']} | {line['accuracy']:.1%} | {loss} | {moved} | "
                  f"{line.get('differ_from_live', '')} |")
        return
    for name, columns in TABLES.items():
        print(table(read_lines(RESULTS / name), columns))
    draw_results(read_lines(RESULTS / "test.jsonl"), RESULTS / "results.svg")
    draw_ablation(read_lines(RESULTS / "ablation.jsonl"), RESULTS / "ablation.svg")
    if args.readme:
        readme = ROOT / "README.md"
        readme.write_text(with_tables(readme.read_text()))


if __name__ == "__main__":
    main()
