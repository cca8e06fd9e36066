"""What happens inside a run: numbers of every logging step, and a report with pictures at its end.

Touches CustomLoraLinear layers and their optimizer, by reading; writes metrics.jsonl, report.png and report.md into the
adapter folder. What was logged is kept by Trainer, in its state and so in every checkpoint.
"""
import json
import math
from pathlib import Path

import torch

from LoTA.layer import CustomLoraLinear
from LoTA.lota_merge import count_moved, shares

LOOKS = 100             # about so many times a run is looked into at most: each time merges all layers in memory
SAMPLE_ROWS = 64        # rows of each layer whose dW is formed


class Monitor:
    """Looks into the ternary layers of a model while tSignSGD trains them."""

    def __init__(self, model, optimizer, omega, num_steps):
        self.layers = {n: m for n, m in model.named_modules() if isinstance(m, CustomLoraLinear)}
        self.optimizer, self.omega, self.num_steps = optimizer, omega, num_steps
        self.next_inside = 0                # the step from which on another look inside is due
        self.kinds = {id(p): n for layer in self.layers.values() for n in ("lora_A", "lora_B")
                      for p in getattr(layer, n).parameters()}
        self.moved = self.moved_in_layer = None

    def look(self, step):
        """The numbers of this logging step: a flat dict, for the console and any tracker.

        sigma; flips_A, flips_B: entries moved in the step; and of the last step, and about LOOKS others, what
        look_inside() finds.
        """
        flips = {"lora_A": 0, "lora_B": 0}
        for p, count in self.optimizer.flipped.items():
            flips[self.kinds[id(p)]] += int(count)
        numbers = {"sigma": self.optimizer.current_sigma(), "flips_A": flips["lora_A"], "flips_B": flips["lora_B"]}
        if step >= self.next_inside or step == self.num_steps:
            self.next_inside = step + math.ceil(self.num_steps / LOOKS)
            numbers |= self.look_inside()
        return numbers

    @torch.no_grad()
    def look_inside(self):
        """What the layers hold now: a flat dict.

        minus, zeros, plus: shares of the entries that are -1, 0, 1; dW_median, dW_99, dW_max: quantiles of |dW|, in
        omega, over SAMPLE_ROWS rows of every layer; mu: mean |offset| in grid steps; scales: mean relative change of
        learned scales; moved: share of the integer weights that a merge would move, and moved_PROJECTION of each.
        """
        minus = plus = entries = 0
        for layer in self.layers.values():
            for matrix in layer.adapter_pair():
                minus, plus = minus + int((matrix < 0).sum()), plus + int((matrix > 0).sum())
                entries += matrix.numel()
        sizes = self.sizes_of_aux()
        mu = self.merge_in_memory()
        changes = [c.abs().mean() for c in (layer.scale_change() for layer in self.layers.values()) if c is not None]
        return {"minus": minus / entries, "zeros": 1 - (minus + plus) / entries, "plus": plus / entries,
                "dW_median": _quantile(sizes, 0.5) / self.omega, "dW_99": _quantile(sizes, 0.99) / self.omega,
                "dW_max": float(sizes.max()) / self.omega, "mu": mu,
                "scales": float(sum(c.cpu() for c in changes)) / max(1, len(changes)),
                **{"moved" if name == "all" else f"moved_{name}": share for name, share in self.shares_moved().items()}}

    @torch.no_grad()
    def sizes_of_aux(self):
        """|dW| of some rows of every layer, flat, on the CPU."""
        sizes = []
        for layer in self.layers.values():
            lora_A, lora_B = layer.adapter_pair()
            some = lora_A[::max(1, lora_A.shape[0] // SAMPLE_ROWS)]
            sizes.append((some.float() @ lora_B.float()).abs().flatten().cpu())
        return torch.cat(sizes)

    def shares_moved(self):
        """{projection: the share of its integers that a merge would move, "all": of all}, as of the last look."""
        return shares(self.moved)

    @torch.no_grad()
    def merge_in_memory(self):
        """Notes what a merge of all layers as they are now would move; returns the mean |mu|."""
        self.moved, self.moved_in_layer, total, count = {}, {}, 0.0, 0
        for name, layer in self.layers.items():
            before, after, mu = layer.merged_grids()
            self.moved_in_layer[name] = count_moved(self.moved, name, before, after)
            if mu is not None:
                total, count = total + float(mu.abs().sum()), count + mu.numel()
        return total / max(1, count)

    def write(self, folder, log_history):
        """metrics.jsonl, report.md and report.png in `folder`; log_history: Trainer's, to the last step."""
        folder, rows = Path(folder), [row for row in log_history if "sigma" in row]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        draw(folder / "report.png", rows, self.moved_in_layer, self.sizes_of_aux(), self.omega)
        last = rows[-1]
        verdict = ("**No integer weight moved.** All of the effect is in the offsets and scales: lower "
                   "--interval_point, or see --recipe." if last["moved"] == 0 else
                   f"{last['moved']:.4%} of the integer weights moved.")
        lines = ["# What this run did", "", verdict, "", "![](report.png)", "", "| at the last look | |", "|---|---|",
                 f"| step | {last['step']} |", f"| loss | {last['loss']:.4f} |",
                 f"| entries of A and B that are -1, 0, 1 | {last['minus']:.1%}, {last['zeros']:.1%}, "
                 f"{last['plus']:.1%} |",
                 f"| median, 99 % and largest \\|dW\\| over omega | {last['dW_median']:.2f}, {last['dW_99']:.2f}, "
                 f"{last['dW_max']:.2f} |", f"| mean \\|mu\\| in grid steps | {last['mu']:.4f} |",
                 f"| mean relative change of the scales | {last['scales']:.4f} |", "",
                 "| projection | integers moved |", "|---|---|",
                 *(f"| {name} | {share:.4%} |" for name, share in self.shares_moved().items()), ""]
        (folder / "report.md").write_text("\n".join(lines))


def line_of(logs, steps):
    """One line for the console out of what a step logged; `steps` is "done/all"."""
    parts = [f"step {steps}", *(f"{name} {logs[name]:{form}}" for name, form in (
        ("loss", ".4f"), ("grad_norm", ".3g"), ("sigma", ".5f")) if name in logs),
        f"flips A {logs['flips_A']} B {logs['flips_B']}"]
    if "moved" in logs:
        by_projection = " ".join(f"{name.removeprefix('moved_').removesuffix('_proj')} {share:.3%}"
                                 for name, share in logs.items() if name.startswith("moved_"))
        parts += [f"-1/0/1 {logs['minus']:.0%}/{logs['zeros']:.0%}/{logs['plus']:.0%}",
                  f"|dW|/omega {logs['dW_median']:.2f} {logs['dW_99']:.2f} {logs['dW_max']:.2f}",
                  f"mu {logs['mu']:.3f}", f"scales {logs['scales']:.3f}",
                  f"moved {logs['moved']:.3%} ({by_projection})"]
    return "  ".join(parts)


def _quantile(values, level):
    """An entry near the quantile: these are pictures of a distribution, and torch.quantile takes 2**24 entries only."""
    return float(values.kthvalue(1 + math.floor(level * (len(values) - 1))).values)


def draw(file, rows, by_layer, sizes, omega):
    """Four pictures: loss and sigma, flips, |dW| with omega, and the share moved in each layer and projection."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, ((loss, flips), (histogram, heat)) = plt.subplots(2, 2, figsize=(11, 7.5))
    steps = [row["step"] for row in rows]
    loss.plot(steps, [row["loss"] for row in rows], color="#1f6fb2")
    loss.set_ylabel("loss", color="#1f6fb2")
    level = loss.twinx()
    level.plot(steps, [row["sigma"] for row in rows], color="#d9822b")
    level.set_ylabel("sigma", color="#d9822b")
    for name, color in (("flips_A", "#7fb069"), ("flips_B", "#1f6fb2")):
        flips.plot(steps, [row[name] for row in rows], label=f"{name[-1]}: entries moved in the step", color=color)
    flips.set_yscale("symlog")
    flips.legend(fontsize=8, frameon=False)
    histogram.hist(sizes.numpy(), bins=range(int(max(float(sizes.max()), omega)) + 3), color="#9aa0a6", align="left")
    histogram.axvline(omega, color="#b2182b")
    histogram.set_yscale("log")
    histogram.set_xlabel("|dW|; the line is omega: only what is beyond it can move an integer")
    columns = list(dict.fromkeys(name.rsplit(".", 1)[-1] for name in by_layer))
    numbers = list(dict.fromkeys(_block(name) for name in by_layer))
    table = [[math.nan] * len(columns) for _ in numbers]
    for name, share in by_layer.items():
        table[numbers.index(_block(name))][columns.index(name.rsplit(".", 1)[-1])] = 100 * share
    picture = heat.imshow(table, aspect="auto", cmap="Blues", vmin=0)
    heat.set_xticks(range(len(columns)), columns, rotation=45, ha="right", fontsize=8)
    heat.set_yticks(range(0, len(numbers), max(1, len(numbers) // 16)), numbers[::max(1, len(numbers) // 16)])
    heat.set_ylabel("layer")
    figure.colorbar(picture, ax=heat, label="% of the integers moved")
    moved = rows[-1]["moved"]
    figure.suptitle(f"{moved:.4%} of the integer weights moved" if moved else "NO INTEGER WEIGHT MOVED",
                    color="black" if moved else "#b2182b")
    figure.tight_layout()
    figure.savefig(file, dpi=110)
    plt.close(figure)


def _block(name):
    """The layer's number in a module's name."""
    return next((part for part in name.split(".") if part.isdigit()), name)
