"""What happens inside a run: numbers for every logging step, and a report with pictures at the end.

Touches CustomLoraLinear layers and their optimizer, by reading. Writes metrics.jsonl, report.png and report.md into the
adapter folder. Trainer keeps what was logged in its state, so every checkpoint has it too.
"""
import json
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import accumulate
from pathlib import Path

import torch

from LoTA.layer import CustomLoraLinear
from LoTA.lota_merge import Moved

DETAILED_STEPS = 100    # detailed metrics are taken about so often in a run, because each time all layers are looked at
# At least so many steps lie between two looks in a run of 100 steps or more. A shorter run has about so many looks. On
# a CPU a look takes up to 4 % of a step of 2,048 tokens (benchmarks/monitor.py), so all take less than 1 % of a run of
# 50 steps or more. Steps are counted and not timed, because a resumed run must look at the same ones.
DISTANCE = 10
SAMPLE_ROWS = 64        # |dW| is sampled on at least so many evenly spaced rows of a layer, or on all of fewer
FINE = 16               # where dW is no integer, its histogram has so many bins for a step of the grid ...
BINS = 64 * FINE        # ... and all that is beyond the last bin is in the last one


class Monitor:
    """Reads the layers of a model whose adapters are steps on the grid, while an optimizer trains them.

    omega: the threshold that |dW| is measured by. None: dW is rounded (LR-QAT), and |dW| is measured in grid steps.
    log_history: what Trainer logged before, in a resumed run. Its detailed metrics go on at the same distance.
    """

    def __init__(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer, omega: float | None, num_steps: int,
                 log_history: Sequence[dict] = ()):
        self.layers = {n: m for n, m in model.named_modules() if isinstance(m, CustomLoraLinear)}
        self.optimizer, self.omega, self.num_steps = optimizer, omega, num_steps
        self.unit = FINE if omega is None else omega        # what a number of the histogram is divided by
        self.interval = max(math.ceil(num_steps / DETAILED_STEPS), min(DISTANCE, num_steps // DISTANCE))
        # The step from which on detailed metrics are due.
        self.next_detailed = max((row["step"] + self.interval for row in log_history if "moved" in row), default=0)
        self.matrix_of = {id(p): matrix for layer in self.layers.values() for matrix in ("lora_A", "lora_B")
                          for p in getattr(layer, matrix).parameters()}
        # When the last detailed metrics were taken: what a merge would have moved, and how many sampled entries had
        # |dW| = 0, 1, ... r, or FINE times as much of it where it is no integer.
        self.moved: Moved | None = None
        self.histogram: list[int] = []

    def metrics(self, step: int) -> dict[str, float]:
        """The numbers of a logging step, for the console and any tracker.

        With t-SignSGD: sigma of the last step, and flips_A and flips_B, the entries that the last step moved. Steps at
        the interval, and the last one, also have the detailed metrics.
        """
        numbers = {}
        if self.omega is not None:
            flips = {"lora_A": 0, "lora_B": 0}
            for p, count in zip(self.optimizer.flipped, to_host(self.optimizer.flipped.values()), strict=True):
                flips[self.matrix_of[id(p)]] += int(count)
            numbers = {"sigma": self.optimizer.current_sigma(), "flips_A": flips["lora_A"], "flips_B": flips["lora_B"]}
        if step >= self.next_detailed or step == self.num_steps:
            self.next_detailed = step + self.interval
            numbers |= self.detailed_metrics()
        return numbers

    @torch.no_grad()
    def detailed_metrics(self) -> dict[str, float]:
        """What the layers hold now. Also sets self.moved and self.histogram.

        minus, zeros, plus: the shares of the entries of A and B that are negative, 0 and positive.
        dW_median, dW_99, dW_max: quantiles of |dW| / omega, or of |dW| in grid steps, over a sample of the rows of
        every layer.
        mu: mean |mu| in grid steps. scales: mean |relative change| of learned scales.
        moved: the share of the integers that a merge would move. moved_PROJECTION: the same for one projection.

        All is counted on the devices of the layers. The CPU waits for each device once.
        """
        measured = [self._measure(layer) for layer in self.layers.values()]
        bins = self._histograms()
        numbers = iter(to_host([*(number for numbers in measured for number in numbers.values()), *bins]))
        measured = [{name: next(numbers) for name in names} for names in measured]
        self.histogram = [int(sum(counts)) for counts in zip(*numbers, strict=True)]
        self.moved = Moved()
        for (name, layer), counted in zip(self.layers.items(), measured, strict=True):
            self.moved.add(name, int(counted["moved"]), layer.in_features * layer.out_features)
        total = {name: sum(counted.get(name, 0) for counted in measured)
                 for name in ("minus", "plus", "mu_sum", "scale_change")}
        layers = self.layers.values()
        entries = sum(matrix.numel() for layer in layers for matrix in layer.adapter_pair())
        offsets = sum(layer.groups().count * layer.out_features for layer, counted in zip(layers, measured, strict=True)
                      if "mu_sum" in counted)
        scales = sum("scale_change" in counted for counted in measured)
        shares = {"moved" if name == "all" else f"moved_{name}": share for name, share in self.moved.shares().items()}
        return {"minus": total["minus"] / entries, "zeros": 1 - (total["minus"] + total["plus"]) / entries,
                "plus": total["plus"] / entries, "dW_median": quantile(self.histogram, 0.5) / self.unit,
                "dW_99": quantile(self.histogram, 0.99) / self.unit,
                "dW_max": quantile(self.histogram, 1.0) / self.unit, "mu": total["mu_sum"] / max(1, offsets),
                "scales": total["scale_change"] / max(1, scales), **shares}

    def _measure(self, layer: CustomLoraLinear) -> dict[str, torch.Tensor]:
        """0-dim tensors on the layer's device: the counts minus, plus and moved, and where there are a mu and learned
        scales, mu_sum, the sum of |mu|, and scale_change, the mean |relative change|."""
        pair, (moved, mu), change = layer.adapter_pair(), layer.count_steps(), layer.scale_change()
        numbers = {"minus": sum(torch.count_nonzero(matrix < 0) for matrix in pair),
                   "plus": sum(torch.count_nonzero(matrix > 0) for matrix in pair), "moved": moved}
        if mu is not None:
            numbers["mu_sum"] = mu.abs().sum()
        if change is not None:
            numbers["scale_change"] = change.abs().mean()
        return numbers

    def _histograms(self) -> list[torch.Tensor]:
        """For each device that has layers, how many of their sampled entries have |dW| = 0, 1, ... r: int64 [r + 1].

        r is the largest rank. Where dW is no integer, FINE |dW| is cut to integers below BINS. Every row has bins of
        its own at first, because on a GPU millions of additions to a few numbers would wait for each other.
        torch.bincount would make the CPU wait.
        """
        size, on_device = BINS, {}
        if self.omega is not None:
            size = 1 + max(layer.adapter_pair()[1].shape[0] for layer in self.layers.values())
        for layer in self.layers.values():
            magnitudes = layer.sampled_delta_w(SAMPLE_ROWS).abs_()
            if self.omega is None:
                magnitudes.mul_(FINE).clamp_(max=BINS - 1)
            magnitudes = magnitudes.long()
            bins = torch.zeros(len(magnitudes), size, dtype=torch.int32, device=magnitudes.device)
            bins.scatter_add_(1, magnitudes, bins.new_ones(()).expand_as(magnitudes))
            on_device[bins.device] = on_device.get(bins.device, 0) + bins.sum(0)
        return list(on_device.values())

    def write(self, folder: Path, log_history: list[dict]) -> None:
        """Writes metrics.jsonl, report.md and report.png. log_history: Trainer's, to the last step."""
        rows = [row for row in log_history if "loss" in row]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        draw(folder / "report.png", rows, self.moved.in_layer, self.histogram, self.omega)
        ternary = self.omega is not None
        last = rows[-1]
        remedy = "lower --interval_point, or see --recipe" if ternary else "raise --learning_rate, or see --dither"
        learned = last["mu"] or last["scales"]
        effect = "All of the effect is in the offsets and scales" if learned else "The run did nothing"
        verdict = (f"**No integer weight moved.** {effect}: {remedy}." if last["moved"] == 0 else
                   f"{last['moved']:.4%} of the integer weights moved.")
        lines = ["# What this run did", "", verdict, "", "![](report.png)", "", "| at the last step | |", "|---|---|",
                 f"| step | {last['step']} |", f"| loss | {last['loss']:.4f} |",
                 f"| entries of A and B that are {'-1, 0, 1' if ternary else 'negative, 0, positive'} | "
                 f"{last['minus']:.1%}, {last['zeros']:.1%}, {last['plus']:.1%} |",
                 f"| median, 99 % and largest \\|dW\\| {'over omega' if ternary else 'in grid steps'} | "
                 f"{last['dW_median']:.2f}, {last['dW_99']:.2f}, {last['dW_max']:.2f} |",
                 f"| mean \\|mu\\| in grid steps | {last['mu']:.4f} |",
                 f"| mean relative change of the scales | {last['scales']:.4f} |", "",
                 "| projection | integers moved |", "|---|---|",
                 *(f"| {name} | {share:.4%} |" for name, share in self.moved.shares().items()), ""]
        (folder / "report.md").write_text("\n".join(lines))


def console_line(logs: dict, steps: str) -> str:
    """One line for the console, from what a step logged. steps: "done/all"."""
    parts = [f"step {steps}", *(f"{name} {logs[name]:{form}}" for name, form in (
        ("loss", ".4f"), ("grad_norm", ".3g"), ("learning_rate", ".3g"), ("sigma", ".5f")) if name in logs)]
    ternary = "sigma" in logs
    if ternary:
        parts.append(f"flips A {logs['flips_A']} B {logs['flips_B']}")
    if "moved" in logs:
        by_projection = " ".join(f"{name.removeprefix('moved_').removesuffix('_proj')} {share:.3%}"
                                 for name, share in logs.items() if name.startswith("moved_"))
        parts += [f"{'-1/0/1' if ternary else '-/0/+'} {logs['minus']:.0%}/{logs['zeros']:.0%}/{logs['plus']:.0%}",
                  f"|dW|/{'omega' if ternary else 's'} {logs['dW_median']:.2f} {logs['dW_99']:.2f} "
                  f"{logs['dW_max']:.2f}",
                  f"mu {logs['mu']:.3f}", f"scales {logs['scales']:.3f}",
                  f"moved {logs['moved']:.3%} ({by_projection})"]
    return "  ".join(parts)


def quantile(histogram: Sequence[int], level: float) -> int:
    """An entry next to the quantile of integers 0, 1, ... that occur so often. That is close enough for a report."""
    rank = math.floor(level * (sum(histogram) - 1))         # counted from 0 for the smallest
    return next(value for value, up_to in enumerate(accumulate(histogram)) if up_to > rank)


def to_host(tensors: Iterable[torch.Tensor]) -> list:
    """What .tolist() gives for each of the 0- or 1-dim tensors, with a single transfer from every device.

    They travel as float64, which holds float32 and counts up to 2**53 exactly.
    """
    tensors, alike = list(tensors), defaultdict(list)
    for i, tensor in enumerate(tensors):
        alike[tensor.device, tensor.dtype].append(i)
    parts = defaultdict(lambda: ([], []))                   # {device: (indices into tensors, float64 tensors)}
    for (device, _), indices in alike.items():
        parts[device][0].extend(indices)
        parts[device][1].append(torch.cat([tensors[i].reshape(-1) for i in indices]).double())
    values = [None] * len(tensors)
    for indices, flat in parts.values():
        numbers = iter(torch.cat(flat).tolist())
        for i in indices:
            values[i] = [next(numbers) for _ in range(tensors[i].numel())] if tensors[i].dim() else next(numbers)
    return values


def draw(file: Path, rows: list[dict], moved_in_layer: dict[str, float], counts: list[int],
         omega: float | None) -> None:
    """Draws four pictures: loss and sigma, flips, |dW| with omega, and the share moved by layer and projection.

    Where omega is None: loss and learning rate, the share moved by step, |dW| in grid steps, and the last one.
    counts: how many sampled entries have |dW| = 0, 1, ..., or FINE |dW|.
    """
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, ((loss, flips), (histogram, heat)) = plt.subplots(2, 2, figsize=(11, 7.5))
    steps = [row["step"] for row in rows]
    loss.plot(steps, [row["loss"] for row in rows], color="#1f6fb2")
    loss.set_ylabel("loss", color="#1f6fb2")
    schedule, second = ("sigma", "sigma") if omega is not None else ("learning_rate", "learning rate")
    other = loss.twinx()
    other.plot(steps, [row[schedule] for row in rows], color="#d9822b")
    other.set_ylabel(second, color="#d9822b")
    unit, border = (1, omega) if omega is not None else (FINE, 0.5)
    if omega is not None:
        for name, color in (("flips_A", "#7fb069"), ("flips_B", "#1f6fb2")):
            flips.plot(steps, [row[name] for row in rows], label=f"{name[-1]}: entries moved in the step", color=color)
        flips.set_yscale("symlog")
        flips.legend(fontsize=8, frameon=False)
        histogram.set_xlabel("|dW|; the line is omega: only what is beyond it can move an integer")
    else:
        looks = [row for row in rows if "moved" in row]
        flips.plot([row["step"] for row in looks], [100 * row["moved"] for row in looks], color="#1f6fb2")
        flips.set_ylabel("% of the integers moved")
        histogram.set_xlabel("|dW| in grid steps; beyond the line it moves an integer without any dither")
    shown = range(int(max(quantile(counts, 1.0), border * unit)) + 2)
    histogram.bar([k / unit for k in shown], [counts[k] if k < len(counts) else 0 for k in shown], width=1 / unit,
                  color="#9aa0a6")
    histogram.axvline(border, color="#b2182b")
    histogram.set_yscale("log")
    columns = list(dict.fromkeys(name.rsplit(".", 1)[-1] for name in moved_in_layer))
    numbers = list(dict.fromkeys(_block(name) for name in moved_in_layer))
    table = [[math.nan] * len(columns) for _ in numbers]
    for name, share in moved_in_layer.items():
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


def _block(name: str) -> str:
    """The number of the transformer block in a module's name."""
    return next((part for part in name.split(".") if part.isdigit()), name)
