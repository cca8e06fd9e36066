"""One layer, forward and forward + backward: the time and the peak extra memory of LoTA and its peers.

    python benchmarks/layer.py            on a CPU 2048 x 2048 and 2048 x 5632, on a GPU 4096 x 4096, 4096 x 14336 ...
    python benchmarks/layer.py --quick    under a minute; prints only

The peers are the bare matrix products, LoTA written with whole-matrix torch operations, LoTA that keeps W for the
backward, GPTQModel's layer, and PEFT's LoRA and QA-LoRA on it. The last three are left out where GPTQModel or PEFT is
not installed. Times are medians of runs that alternate.
"""
import argparse
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec

import torch
from common import peak_extra_memory, print_table, save, time_interleaved

from LoTA import ternary
from LoTA.packed import Groups, PackedLayer
from LoTA.packing import pack_rows
from LoTA.steps import Threshold
from LoTA.ternary import GridLinear, ternarize_

GROUP, RANK = 64, 64
BACKEND = import_module("LoTA.kernels" if torch.cuda.is_available() else "LoTA.ternary")


class Layer:
    """A random GPTQ layer with a random adapter. Its tensors serve all peers."""

    def __init__(self, rows: int, cols: int, bits: int, omega: float, device: str):
        generator = torch.Generator().manual_seed(0)
        self.rows, self.cols, self.bits, self.device, self.omega = rows, cols, bits, device, omega
        groups = rows // GROUP
        self.qweight = pack_rows(torch.randint(0, 2**bits, (rows, cols), generator=generator), bits).to(device)
        zeros = torch.randint(1, 2**bits, (groups, cols), generator=generator)
        self.qzeros = pack_rows(zeros.t().contiguous(), bits).t().contiguous().to(device)
        self.scales = (torch.rand(groups, cols, generator=generator) / 100).half().to(device)
        self.g_idx = (torch.arange(rows, dtype=torch.int32) // GROUP).to(device)
        self.lora_A = ternarize_(torch.randn(rows, RANK, generator=generator)).to(device).requires_grad_()
        self.lora_B = ternarize_(torch.randn(RANK, cols, generator=generator)).to(device).requires_grad_()
        self.groups = Groups(self.g_idx, groups)

    def packed(self) -> PackedLayer:
        return PackedLayer(self.qweight, self.qzeros, self.scales, self.g_idx, self.bits, "gptq_v2", self.groups)

    def lota(self, x: torch.Tensor, backend=BACKEND) -> torch.Tensor:
        """LoTA as training computes it."""
        return GridLinear.apply(x, self.lora_A, self.lora_B, self.packed, Threshold(self.omega, self.omega), backend)

    def kept(self, x: torch.Tensor) -> torch.Tensor:
        """LoTA that keeps W from the forward to the backward instead of forming it again."""
        return self.lota(x, Keeping())

    def plain(self, x: torch.Tensor) -> torch.Tensor:
        """The method with whole-matrix torch operations and autograd, as the published scripts do it."""
        packed, g = self.packed(), self.g_idx.long()
        weight_int, maxq = packed.weight_int.to(x.dtype), packed.maxq
        aux = self.lora_A.to(x.dtype) @ self.lora_B.to(x.dtype)
        up, down = (aux > self.omega) & (weight_int < maxq), (aux < -self.omega) & (weight_int > 0)
        step = up.to(x.dtype) - down.to(x.dtype)
        ternary = aux + (step - aux).detach()
        offset = (aux - self.omega * step.detach()).view(-1, GROUP, self.cols).mean(1) / self.omega
        zeros, scales = packed.zeros.to(x.dtype), packed.scales.to(x.dtype)
        return x @ (scales[g] * (weight_int - zeros[g] + ternary + offset[g]))


class Keeping:
    """A backend for GridLinear that forms W and mu in the forward and hands them out again in the backward."""

    made = None
    step_gradients = staticmethod(BACKEND.step_gradients)

    def adapted_weight(self, lora_A, lora_B, packed, rule, dtype, out):
        if self.made is None:
            self.made = BACKEND.adapted_weight(lora_A, lora_B, packed, rule, dtype)
        return self.made


def library_peers(layer: Layer, dtype: torch.dtype) -> dict[str, torch.nn.Module]:
    """{"gptq": GPTQModel's layer, "lora" and "qalora": PEFT's adapters on it}, or {} where they are not installed."""
    if not (find_spec("gptqmodel") and find_spec("peft")):
        return {}
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from peft import LoraConfig, get_peft_model

    def base():
        module = TorchLinear(bits=layer.bits, group_size=GROUP, sym=False, desc_act=False, in_features=layer.rows,
                             out_features=layer.cols, bias=False)
        for name in ("qweight", "qzeros", "scales", "g_idx"):
            setattr(module, name, getattr(layer, name))
        if dtype == torch.float32:
            module.scales = layer.scales.float()
        module.qzero_format(format=2)
        return module.eval()

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.proj = base()
            self.norm = torch.nn.Parameter(torch.ones(1))       # PEFT reads the device from a parameter

        def forward(self, x):
            return self.proj(x)

    peers = {"gptq": base()}
    for name, extra in (("lora", {}), ("qalora", {"use_qalora": True, "qalora_group_size": GROUP})):
        config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=["proj"], init_lora_weights=False, **extra)
        peers[name] = get_peft_model(Model(), config).to(layer.device)
    return peers


def bare_products(layer: Layer, dtype: torch.dtype) -> tuple[Callable, Callable]:
    """(x @ W; the same with the two products of the backward).

    LoRA's backward leaves one of them out, because it needs no gradient of W.
    """
    weight = torch.randn(layer.rows, layer.cols, device=layer.device, dtype=dtype)

    def forward(x):
        return x @ weight

    def step(x, grad):
        return x @ weight, grad @ weight.t(), x.t() @ grad
    return forward, step


def measure(rows: int, cols: int, bits: int, tokens: int, omega: float, device: str, dtype: torch.dtype,
            rounds: int) -> list[dict]:
    """One row of results for each peer."""
    layer = Layer(rows, cols, bits, omega, device)
    x = torch.randn(tokens, rows, device=device, dtype=dtype).requires_grad_()
    grad = torch.randn(tokens, cols, device=device, dtype=dtype)
    peers = {"plain": layer.plain, "lota": layer.lota, "lota, W' kept": layer.kept, **library_peers(layer, dtype)}

    def step(module):
        x.grad = layer.lora_A.grad = layer.lora_B.grad = None
        module(x).backward(grad)

    bare_forward, bare_step = bare_products(layer, dtype)
    forward = {"bare": lambda: bare_forward(x.detach()), **{n: lambda m=m: m(x) for n, m in peers.items()}}
    both = {"bare": lambda: bare_step(x.detach(), grad), **{n: lambda m=m: step(m) for n, m in peers.items()}}
    forward_s, both_s = time_interleaved(forward, rounds), time_interleaved(both, rounds)
    memory = {}
    for name, function in both.items():
        ternary._workspaces.clear()             # so that the memory LoTA keeps for the next call counts too
        memory[name] = peak_extra_memory(function)
    return [{"shape": f"{rows} x {cols}", "bits": bits, "omega": omega, "tokens": tokens, "peer": name,
             "forward_s": forward_s[name], "step_s": both_s[name], "step / bare": both_s[name] / both_s["bare"],
             "step / plain": both_s[name] / both_s["plain"],
             "step / lora": both_s[name] / both_s["lora"] if "lora" in both_s else None,
             "memory_mb": memory[name] / 1e6, "memory / plain": memory[name] / memory["plain"]} for name in both]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one shape, few rounds; prints only")
    parser.add_argument("--rounds", type=int, default=5, help="timed runs of each peer [5]")
    parser.add_argument("--omega", type=float, default=48.0, help="the threshold; the rank is 64 [48]")
    parser.add_argument("--output", default="layer", help="name of the JSON file [layer]")
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2], help="[4 3 2]")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="[bfloat16 on a GPU, else float32]")
    args = parser.parse_args()
    torch.compiler.set_stance("force_eager")        # GPTQModel's layer would be compiled, which takes long on a CPU
    if torch.cuda.is_available():
        device, dtype, tokens = "cuda", torch.bfloat16, [4096, 16384]
        shapes = [(4096, 4096), (4096, 14336), (14336, 4096)]
    else:
        device, dtype, tokens = "cpu", torch.float32, [512, 2048]
        shapes = [(2048, 2048), (2048, 5632)]
    if args.dtype:
        dtype = getattr(torch, args.dtype)
    if args.quick:
        shapes, tokens, args.bits, args.rounds = shapes[:1], tokens[:1], args.bits[:1], 3
    rows = []
    for shape in shapes:
        for bits in args.bits:
            for count in tokens:
                new = measure(*shape, bits, count, args.omega, device, dtype, args.rounds)
                print_table(f"{shape[0]} x {shape[1]}, {bits} bits, {count} tokens, {dtype}", new)
                rows += new
    save(args.output, rows, args.quick)


if __name__ == "__main__":
    main()
