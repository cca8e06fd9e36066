"""Draws the figure of docs/speed.md from the JSON files in benchmarks/results/, and one of each GPU that has some.

    python benchmarks/plot.py            -> benchmarks/results/performance_cpu.svg, performance_NVIDIA_H100_... .svg
    python benchmarks/plot.py --device NAME     one device only (the end of the JSON files' names)
"""
import argparse
import re

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from common import RESULTS

from LoTA.storage import read_json

matplotlib.rcParams["svg.hashsalt"] = "lota"        # the same rows draw the same file
COLORS = {"bare": "#9aa0a6", "plain": "#d98880", "lota": "#1f6fb2", "gptq": "#c9c9c9", "lora": "#7fb069",
          "qalora": "#e6b450", "GPTQ": "#c9c9c9", "GPTQ + LoRA": "#7fb069", "merged LoTA": "#1f6fb2",
          "LoRA": "#7fb069", "QA-LoRA": "#e6b450", "LoTA": "#1f6fb2", "torch.quantile": "#d98880",
          "tSignSGD": "#1f6fb2", "fused AdamW": "#7fb069"}


def bars(axes, rows, group, name, value, title, reference=None):
    """Grouped bars: rows of dicts, `group` and `name` functions of a row, `value` a key."""
    groups, names = list(dict.fromkeys(map(group, rows))), list(dict.fromkeys(row[name] for row in rows))
    width = 0.8 / len(names)
    for i, kind in enumerate(names):
        heights = {group(row): row[value] for row in rows if row[name] == kind}
        axes.bar([g + (i - (len(names) - 1) / 2) * width for g in range(len(groups))],
                 [heights.get(g, 0) for g in groups], width, label=kind, color=COLORS.get(kind))
    if reference is not None:
        axes.axhline(reference, color="black", linewidth=0.8, linestyle=":")
    axes.set_xticks(range(len(groups)), groups, fontsize=8)
    axes.set_title(title, fontsize=10, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=7, frameon=False)


def results(name, device):
    """The rows of one benchmark, or [] where it was not run on this device."""
    path = RESULTS / f"{name}_{device}.json"
    return read_json(path)["rows"] if path.exists() else []


def devices():
    """The ends of the names of the layers' and training steps' JSON files: cpu, or a GPU's name."""
    names = (re.fullmatch(r"(?:layer|train_step_[18]B)_(cpu|[A-Z].*)", path.stem) for path in RESULTS.glob("*.json"))
    return sorted({name[1] for name in names if name})


def draw(device):
    """Writes the figure of one device."""
    steps = [row for name in ("train_step", "train_step_1B", "train_step_8B") for row in results(name, device)]
    layer = [row for row in results("layer", device) if row["bits"] == 4 and row["peer"] != "lota, W' kept"]
    panels = [
        (layer, lambda r: f"{r['shape']}\n{r['tokens']} tokens", "peer", "step / bare",
         "One layer, forward + backward, 4 bits: time / bare products", 1),
        (layer, lambda r: f"{r['shape']}\n{r['tokens']} tokens", "peer", "memory_mb",
         "One layer, forward + backward, 4 bits: peak extra MB", None),
        (steps, lambda r: f"{r['shape']}, {r['bits']} bits", "method", "/ LoRA",
         "Whole training step: time / LoRA", 1),
        (results("generate", device), lambda r: f"{r['shape']}, {r['bits']} bits\nbatch {r['batch']}", "model",
         "/ GPTQ", "Generation: tokens per second / bare GPTQ", 1)]
    panels = [panel for panel in panels if panel[0]]
    figure, axes = plt.subplots((len(panels) + 1) // 2, 2, figsize=(11, 3.2 * ((len(panels) + 1) // 2)), squeeze=False)
    for panel, ax in zip(panels, axes.flat, strict=False):
        bars(ax, *panel)
    for ax in axes.flat[len(panels):]:
        ax.axis("off")
    figure.tight_layout()
    path = RESULTS / f"performance_{device}.svg"
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
    print(path)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", help="the end of the JSON files' names [every device that has some]")
    device = parser.parse_args().device
    for name in [device] if device else devices():
        draw(name)


if __name__ == "__main__":
    main()
