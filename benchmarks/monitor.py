"""What the monitor costs: the time of a look at all layers, and of a logging step's flips, beside the old way's.

    python benchmarks/monitor.py                          60 M weights on a CPU, 8 B on a GPU; omega 0.75 r and 0.1 r
    python benchmarks/monitor.py --shape 8B --blocks 1    one block of 8B, with the time scaled to all blocks
    python benchmarks/monitor.py --quick                  under a minute; prints only

The layers hold random integers. All blocks share those of one block, because 8 B weights would take 4 GB. Each block
has random ternary matrices of its own. The old way copied the sampled |dW| to the CPU, merged every layer, compared the
integers before and after, and read every count by itself. On a CPU a training step of the same shape is timed too, of
8 x 256 tokens as in train_step.py.
"""
import argparse
import math
import tempfile
from pathlib import Path

import torch
from common import print_table, save, time_interleaved
from gptqmodel.nn_modules.qlinear.torch import TorchLinear
from memory import Shape
from peft import LoraConfig
from random_model import SHAPES, write_gptq_llama

from LoTA import ternary
from LoTA.layer import CustomLoraLinear
from LoTA.monitor import SAMPLE_ROWS, Monitor, to_host
from LoTA.packing import count_different, pack_rows
from LoTA.steps import Threshold
from LoTA.ternary import ternarize_
from t_signSGD import tSignSGD

GROUP, RANK = 64, 64


def random_linear(rows: int, cols: int, bits: int, device: str) -> TorchLinear:
    """GPTQModel's layer of random integers."""
    layer = TorchLinear(bits=bits, group_size=GROUP, sym=False, desc_act=False, in_features=rows, out_features=cols,
                        bias=False)
    groups = math.ceil(rows / GROUP)
    layer.qweight = pack_rows(torch.randint(0, 2**bits, (rows, cols), dtype=torch.uint8), bits)
    layer.qzeros = pack_rows(torch.randint(1, 2**bits, (cols, groups)), bits).t().contiguous()
    layer.scales = (torch.rand(groups, cols) / 100).half()
    layer.g_idx = torch.arange(rows, dtype=torch.int32) // GROUP
    layer.qzero_format(format=2)
    return layer.to(device)


def ternary_model(shape: Shape, blocks: int, bits: int, omega: float, device: str) -> torch.nn.Module:
    """The adapted layers of a model of this shape, in modules named as a model's. Its forward is not defined."""
    model, threshold = torch.nn.Module(), Threshold(omega, omega)
    layers = list(shape.quantized().items())[:len(shape.quantized()) // shape.layers]
    bases = {name.split("layers.0.")[1].replace(".", "_"): random_linear(*size, bits, device) for name, size in layers}
    model.layers = torch.nn.ModuleList(torch.nn.ModuleDict(
        {name: CustomLoraLinear(base, "default", LoraConfig(r=RANK), RANK, rule=threshold)
         for name, base in bases.items()}) for _ in range(blocks))
    for name, p in model.named_parameters():
        if "lora_B" in name:                # a fresh B is zero, and nothing would move
            ternarize_(torch.nn.init.normal_(p.data))
    return model


def old_look(monitor: Monitor) -> None:
    """The detailed metrics as they were taken before."""
    for layer in monitor.layers.values():
        for matrix in layer.adapter_pair():
            int((matrix < 0).sum()), int((matrix > 0).sum())
    old_quantiles(monitor)
    for layer in monitor.layers.values():
        packed = layer.packed()
        after, mu = ternary.merge(*layer.adapter_pair(), packed, layer.rule)
        count_different(packed.qweight, after.qweight, packed.bits)
        float(mu.abs().sum())


def old_quantiles(monitor: Monitor) -> None:
    magnitudes = []
    for layer in monitor.layers.values():
        lora_A, lora_B = layer.adapter_pair()
        rows = lora_A[::max(1, lora_A.shape[0] // SAMPLE_ROWS)]
        magnitudes.append((rows.float() @ lora_B.float()).abs().flatten().cpu())
    magnitudes = torch.cat(magnitudes)
    for level in (0.5, 0.99):
        float(magnitudes.kthvalue(1 + math.floor(level * (len(magnitudes) - 1))).values)


@torch.no_grad()
def measure(shape: Shape, blocks: int, bits: int, omega: float, device: str, rounds: int) -> dict[str, float]:
    """{what: seconds} for all blocks of the shape."""
    model = ternary_model(shape, blocks, bits, omega, device)
    optimizer = tSignSGD([p for p in model.parameters() if p.requires_grad])
    optimizer.flipped = {p: torch.zeros((), dtype=torch.int64, device=device)
                         for group in optimizer.param_groups for p in group["params"]}
    monitor = Monitor(model, optimizer, omega, 1)
    layers = monitor.layers.values()
    parts = {"look": monitor.detailed_metrics, "its steps": lambda: [layer.count_steps() for layer in layers],
             "its |dW|": monitor._histograms, "old look": lambda: old_look(monitor),
             "old |dW|": lambda: old_quantiles(monitor), "flips": lambda: to_host(optimizer.flipped.values()),
             "old flips": lambda: [int(count) for count in optimizer.flipped.values()]}
    return {name: s * shape.layers / blocks for name, s in time_interleaved(parts, rounds).items()}


def step_time(shape: Shape, bits: int, omega: float, rounds: int) -> float:
    """Seconds of a training step as benchmarks/train_step.py times it."""
    import train_step
    train_step.OMEGA = omega
    batch = train_step.constant_batch(8, 256, shape.vocabulary)
    with tempfile.TemporaryDirectory() as work:
        folder = write_gptq_llama(Path(work) / "gptq", shape, bits, GROUP)
        step = train_step.make_steps(folder, "LoTA", torch.float32, batch, True)["whole"]
        return time_interleaved({"step": step}, rounds)["step"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    on_gpu = torch.cuda.is_available()
    parser.add_argument("--quick", action="store_true", help="the tiny shape; prints only")
    parser.add_argument("--shape", default="8B" if on_gpu else "60M", choices=SHAPES)
    parser.add_argument("--blocks", type=int, help="build so many blocks, and scale the times to all [all]")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--omega", type=float, nargs="+", default=[48.0, 6.4], help="the rank is 64 [48 6.4]")
    parser.add_argument("--rounds", type=int, default=5, help="timed runs of each [5]")
    parser.add_argument("--output", default="monitor", help="name of the JSON file [monitor]")
    args = parser.parse_args()
    if args.quick:
        args.shape, args.rounds = "tiny", 3
    shape, device, rows = SHAPES[args.shape], "cuda" if on_gpu else "cpu", []
    for omega in args.omega:
        seconds = measure(shape, args.blocks or shape.layers, args.bits, omega, device, args.rounds)
        step = None if on_gpu or args.shape == "8B" else step_time(shape, args.bits, omega, args.rounds)
        rows.append({"shape": args.shape, "bits": args.bits, "omega": omega, **{f"{n}, s": s for n, s in
                     seconds.items()}, "step, s": step, "look / 10 steps": step and seconds["look"] / (10 * step)})
    print_table(f"what the monitor costs, {device}, {args.blocks or shape.layers} of {shape.layers} blocks built", rows)
    save(args.output, rows, args.quick)


if __name__ == "__main__":
    main()
