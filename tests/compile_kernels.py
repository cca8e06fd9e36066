"""Compiles the Triton kernels for NVIDIA GPUs, without a GPU, and prints what each uses as JSON.

test_kernels.py runs it in a process of its own, because Triton's interpreter replaces the compiler for a whole process.
"""
import itertools
import json

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from LoTA import kernels

TYPES = {"lora_A": "*fp32", "lora_B": "*fp32", "qweight": "*i32", "qzeros": "*i32", "scales": "*fp16",
         "order": "*i64", "scaled_sum": "*fp32", "weight_sum": "*fp32", "starts": "*i32", "omega_floor": "fp32",
         "omega": "fp32", "kappa": "fp32"}      # of the kernels' arguments; those not named here are i32
TILE = {"ROWS": 64, "COLS": kernels.BLOCK_COLS}


def compile_for(capability: int, function: triton.JITFunction, types: dict, constants: dict) -> dict:
    """Compiles a kernel for a compute capability (80, 90). Returns its shared memory in bytes and its constants.

    types: {argument: Triton's name of its type}, beside TYPES. constants: {argument: value at compile time}.
    """
    names = function.arg_names
    signature = {n: "constexpr" if n in constants else {**TYPES, **types}.get(n, "i32") for n in names}
    source = ASTSource(fn=function, signature=signature,
                       constexprs={(names.index(n),): value for n, value in constants.items()})
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=kernels.OPTIONS)
    return {"kernel": function.__name__, "capability": capability, "shared_bytes": compiled.metadata.shared,
            "tensor_cores": "mma" in compiled.asm["ptx"], **constants}


def main():
    rows = []
    for capability, bits in itertools.product((80, 90), (3, 4)):
        dtype, pieces = ("bf16", 1) if bits % 2 == 0 else ("fp16", 3)
        for merging in (False, True):
            types = {"out": "*u8" if merging else f"*{dtype}", "offset": "*fp32"}
            rows.append(compile_for(capability, kernels._step_kernel, types, {
                "BITS": bits, "ONE_LESS": True, "OFFSET": True, "SHUFFLED": pieces > 1, "MERGING": merging,
                "LEARNED": not merging, "PIECES": pieces, "RANK": 64, "RANK_PIECES": pieces, **TILE}))
        types = {"gradient": f"*{dtype}", "weight": f"*{dtype}"}
        rows.append(compile_for(capability, kernels._gradient_kernel, types, {
            "OFFSET": True, "WEIGHTED": pieces > 1, "SHUFFLED": pieces > 1, "PIECES": pieces, **TILE}))
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
