"""The time of one step of tSignSGD over the adapters of an 8B model, of torch.quantile's and of fused AdamW's.

    python benchmarks/optimizer.py            Llama-3.1-8B's seven projections, 32 layers, rank 64: 168 M entries
    python benchmarks/optimizer.py --quick    one layer; prints only

It needs torch and safetensors. Times are medians of runs that alternate.
"""
import argparse

import torch
from common import print_table, save, time_interleaved
from memory import MODELS

from t_signSGD import TAU, tSignSGD

RANK, SHAPE = 64, MODELS["8B"]


@torch.no_grad()
def quantile_step(parameters: list[torch.nn.Parameter], level: float) -> None:
    """Eq. 6 as it is printed, with torch.quantile."""
    for p in parameters:
        size = p.grad.abs()
        moves = size > torch.quantile(size, level).clamp(min=TAU)
        p.sub_(p.grad.sign() * moves).clamp_(-1, 1)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one layer of 32; prints only")
    parser.add_argument("--rounds", type=int, default=5, help="timed runs of each peer [5]")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    parameters = []
    layers = list(SHAPE.quantized().values())
    for rows, cols in layers[:len(layers) // SHAPE.layers] if args.quick else layers:
        for size in ((RANK, rows), (cols, RANK)):
            p = torch.nn.Parameter(torch.randint(-1, 2, size, device=device).float())
            p.grad = torch.randn(size, device=device)
            parameters.append(p)
    entries = sum(p.numel() for p in parameters)
    rows = []
    for level in (0.95, 0.999):
        ours = tSignSGD(parameters, threshold_ratio=level)
        adamw = torch.optim.AdamW(parameters, lr=0.0, weight_decay=0.0, fused=True)
        seconds = time_interleaved({"torch.quantile": lambda level=level: quantile_step(parameters, level),
                                    "tSignSGD": ours.step, "fused AdamW": adamw.step}, args.rounds)
        rows += [{"entries": entries, "sigma": level, "optimizer": name, "step_s": s,
                  "/ torch.quantile": s / seconds["torch.quantile"], "/ fused AdamW": s / seconds["fused AdamW"]}
                 for name, s in seconds.items()]
    print_table(f"one step over {entries / 1e6:.0f} M entries in {len(parameters)} tensors, {device}", rows)
    save("optimizer", rows, args.quick)


if __name__ == "__main__":
    main()
