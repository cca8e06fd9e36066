"""Compiles the Triton kernels for NVIDIA GPUs, without a GPU, and prints what each uses as JSON.

test_kernels.py runs it in a process of its own, because Triton's interpreter replaces the compiler for a whole process.
"""
import itertools
import json
import re
import subprocess
import tempfile

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from LoTA import kernels

TYPES = {"lora_A": "*fp32", "lora_B": "*fp32", "qweight": "*i32", "qzeros": "*i32", "scales": "*fp16",
         "order": "*i64", "sums": "*fp32", "starts": "*i32", "omega_floor": "fp32", "unit": "*fp32",
         "divisors": "*fp32", "means": "*fp32", "dithers": "*i8"}
TERNARY = {"ROUNDING": False, "NOISE": False, "DITHER": False}
# {rows of a group: (rows of a piece, its pieces, whether the rows are shuffled)}. -1: one group of 4,096 rows.
GROUPS = {32: (32, 1, False), 64: (64, 1, False), 128: (64, 2, True), -1: (64, 64, False)}


def compile_for(capability: int, function: triton.JITFunction, types: dict, constants: dict) -> dict:
    """Compiles a kernel for a compute capability (80, 90). Returns what it uses, and its constants.

    types: {argument: Triton's name of its type}, beside TYPES; those in neither are i32. constants: {argument: value at
    compile time}. shared_bytes: shared memory. registers: of a thread. spills: bytes that a thread spills.
    """
    names = function.arg_names
    signature = {n: "constexpr" if n in constants else {**TYPES, **types}.get(n, "i32") for n in names}
    # A multiple of 16, as Triton finds most pointers, strides and sizes of real layers to be.
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names)
               if signature[n].startswith("*") or n in ("width", "a_rank", "b_col", "q_row", "z_row", "rank")}
    source = ASTSource(fn=function, signature=signature, attrs=aligned,
                       constexprs={(names.index(n),): value for n, value in constants.items()})
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32),
                              options=kernels.options(constants["ROWS"]))
    return {"kernel": function.__name__, "capability": capability, "shared_bytes": compiled.metadata.shared,
            "tensor_cores": "mma" in compiled.asm["ptx"], **registers(compiled.asm["ptx"], capability), **constants}


def registers(ptx: str, capability: int) -> dict[str, int]:
    """What ptxas says of a kernel."""
    arch = f"sm_{capability}a" if capability == 90 else f"sm_{capability}"
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        said = subprocess.run([get_ptxas(capability).path, "-v", f"--gpu-name={arch}", file.name, "-o", "/dev/null"],
                              capture_output=True, text=True, check=True).stderr
    return {"registers": int(re.search(r"Used (\d+) registers", said)[1]),
            "spills": sum(map(int, re.findall(r"(\d+) bytes spill", said)))}


def main():
    rows = []
    for capability, bits, (size, pieces, shuffled) in itertools.product((80, 90), (2, 3, 4, 8), GROUPS.values()):
        common = {"SHUFFLED": shuffled, "WIDE": False, "PIECES": pieces, "ROWS": size, "COLS": kernels.BLOCK_COLS}
        for counting in (False, True) if bits == 3 else (False,):
            types = {"out": "*i32" if counting else "*bf16"}
            rows.append(compile_for(capability, kernels._step_kernel, types, {
                "BITS": bits, "ONE_LESS": True, "OFFSET": True, "COUNTING": counting, "RANK": 32, "RANK_PIECES": 2,
                **TERNARY, **common}))
        if bits in (3, 4):          # --method lrqat, with every dither, and with the mean in mu
            dithered = {"NOISE": True}
            for own in (dithered, {"DITHER": True}, {}, {**dithered, "OFFSET": True}) if bits == 4 else (dithered,):
                rows.append(compile_for(capability, kernels._step_kernel, {
                    "out": "*bf16", "lora_A": "*i8", "lora_B": "*i8"}, {
                        "BITS": bits, "ONE_LESS": True, "OFFSET": False, "COUNTING": False, "RANK": 32,
                        "RANK_PIECES": 2, **TERNARY, "ROUNDING": True, **own, **common}))
        if bits == 4:               # the other kernel does not know the bits
            types = {"gradient": "*bf16", "weight": "*bf16"}
            rows.append(compile_for(capability, kernels._gradient_kernel, types, {**common, "WEIGHTED": True}))
        if bits == 3 and size > 32:         # a rank of several pieces, and indices of 64 bits where rows are in order
            rows.append(compile_for(capability, kernels._step_kernel, {"out": "*fp16"}, {
                "BITS": bits, "ONE_LESS": True, "OFFSET": False, "COUNTING": False, "RANK": 32, "RANK_PIECES": 6,
                **TERNARY, **common, "WIDE": not shuffled}))
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
