"""Draws docs/picture.svg, the picture on the first page: one small layer, its adapter, and the merge.

    python docs/picture.py

The numbers come from LoTA.ternary itself: 2 bits, rank 3, omega = 1.5, one group of four rows.
"""
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch

from LoTA.packed import PackedLayer
from LoTA.packing import pack_rows
from LoTA.ternary import Threshold, merge

matplotlib.rcParams["svg.hashsalt"] = "lota"        # the same numbers draw the same file
BITS, OMEGA = 2, 1.5
WEIGHT_INT = torch.tensor([[1, 3, 2, 0], [2, 1, 1, 3], [3, 0, 2, 1], [0, 2, 3, 2]])
A = torch.tensor([[1, 1, 0], [0, -1, 1], [1, 1, 1], [-1, 0, -1]]).float()
B = torch.tensor([[1, 0, -1, 1], [1, 1, -1, 0], [0, -1, 1, 1]]).float()
UP, DOWN, PLAIN = "#1f6fb2", "#d9822b", "#eef1f4"


def draw_matrix(ax, left: float, values: list[list[str]], title: str, below: str, colors: list[list[str]]) -> None:
    """Draws a matrix of cells. Its top left corner is at (left, 0), and a cell is 1 x 1."""
    for i, row in enumerate(values):
        for j, value in enumerate(row):
            ax.add_patch(plt.Rectangle((left + j, -i - 1), 1, 1, facecolor=colors[i][j], edgecolor="white"))
            ax.text(left + j + 0.5, -i - 0.5, value, ha="center", va="center", fontsize=11,
                    color="white" if colors[i][j] in (UP, DOWN) else "black")
    middle = left + len(values[0]) / 2
    ax.text(middle, 0.35, title, ha="center", va="bottom", fontsize=11)
    ax.text(middle, -len(values) - 0.35, below, ha="center", va="top", fontsize=9, color="#555555")


def main() -> None:
    scales, g_idx = torch.ones(1, 4), torch.zeros(4).int()
    packed = PackedLayer(pack_rows(WEIGHT_INT, BITS), torch.zeros(1, 1).int(), scales, g_idx, BITS, "gptq_v2")
    merged, offset = merge(A, B, packed, Threshold(OMEGA, OMEGA))
    delta_w, step = (A @ B).int(), merged.weight_int.int() - WEIGHT_INT
    moved = [[UP if s > 0 else DOWN if s < 0 else PLAIN for s in row] for row in step.tolist()]
    plain = [[PLAIN] * 4 for _ in range(4)]

    figure, ax = plt.subplots(figsize=(11, 3.3))
    signed = [[f"{v:+d}" if v else "0" for v in row] for row in delta_w.tolist()]
    draw_matrix(ax, 0, [[str(v) for v in row] for row in WEIGHT_INT.tolist()], r"$W_{int}$",
                "GPTQ's integers,\n0 … 3 at 2 bits", plain)
    ax.text(5, -2, "+", fontsize=20, ha="center", va="center")
    draw_matrix(ax, 6, signed, r"$\Delta W = A \cdot B$", "A and B hold −1, 0, 1\nand are trained", plain)
    ax.text(11.1, -2, r"$|\Delta W| > \omega$" + "\n→", fontsize=12, ha="center", va="center")
    draw_matrix(ax, 12.2, [[f"{v:+d}" if v else "0" for v in row] for row in step.tolist()], r"$\hat{W}$",
                "a step for each weight,\nnever off the grid", moved)
    ax.text(17.2, -2, "→", fontsize=20, ha="center", va="center")
    draw_matrix(ax, 18.2, [[str(v) for v in row] for row in merged.weight_int.tolist()], r"$W_{int} + \hat{W}$",
                "merged: integers\non the same grid", moved)
    draw_matrix(ax, 23.4, [[f"{v:.2f}"] for v in offset[0].tolist()], r"$\mu$",
                "what is left,\none number a\ngroup and output", [[PLAIN]] * 4)
    ax.set_xlim(-0.3, 26.2)
    ax.set_ylim(-5.9, 1.2)
    ax.set_aspect("equal")
    ax.axis("off")
    figure.tight_layout()
    file = Path(__file__).parent / "picture.svg"
    figure.savefig(file, metadata={"Date": None})
    print(f"drawn: docs/{file.name}")


if __name__ == "__main__":
    main()
