"""The memory that training and the merged model need, in exact bytes, for models of 1 to 70 billion weights.

    python benchmarks/memory.py             prints the table and writes benchmarks/results/memory.json
    python benchmarks/memory.py --check     builds small models, takes one step of each method, and compares their
                                            tensors with the formula; prints only; about a minute

The table is a function of the models' shapes. It counts the tensors that stay from step to step:

- the GPTQ model: packed integers, zero points, float16 scales and g_idx of its seven projections; in 16 bits the
  embeddings, lm_head, norms and biases; the small tables that GPTQModel's torch kernel and the rotary embedding keep;
- the adapter, in float32, because PEFT widens what it trains: A and B, in recipe `full` also mu and the change of the
  scales; for LoTA also the index of every layer's groups, which CustomLoraLinear keeps;
- one float32 gradient of each trained number;
- the optimizer. t-SignSGD as published has no state but a count for each matrix. Recipe `full` has one average for
  each entry of A and B, and AdamW's two moments for mu and the scales. LoRA has AdamW's two moments for A and B;
- the merged model: the GPTQ model, its offsets in 16 bits, and the index of the groups that LTA keeps.

It does not count activations, what a layer needs while it computes, the allocator's rounding and CUDA's own context.
The merged column is for a device with memory of its own. A model on the CPU keeps two things more, which the check
compares too: LTA's offsets in float32 with their scales, and the zero points and g_idx that GPTQModel's torch kernel
unpacks once.

Everything but the check needs the standard library only.
"""
import argparse
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path

from LoTA.settings import LARGE_MODEL

RESULT = Path(__file__).resolve().parent / "results" / "memory.json"
BITS = (4, 3, 2)
METHODS = ("published", "full", "LoRA")
GIB = 2**30
HALF, FLOAT32, INT32, INT64 = 2, 4, 4, 8       # bytes of a number
SHIFTS = {2: 16, 3: 36, 4: 8, 8: 4}             # int32 entries of GPTQModel's table of shifts for unpacking, by bits


@dataclass(frozen=True)
class Shape:
    """The shape of a Llama, or with qkv_bias of a Qwen 2. source: the model whose config.json has these numbers."""
    source: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    tied: bool = False              # whether lm_head is the embeddings' matrix
    qkv_bias: bool = False

    def quantized(self) -> dict[str, tuple[int, int]]:
        """{name: (in, out)} of the seven projections of every layer."""
        key_value = self.kv_heads * self.hidden // self.heads
        block = {"self_attn.q_proj": (self.hidden, self.hidden), "self_attn.k_proj": (self.hidden, key_value),
                 "self_attn.v_proj": (self.hidden, key_value), "self_attn.o_proj": (self.hidden, self.hidden),
                 "mlp.gate_proj": (self.hidden, self.intermediate), "mlp.up_proj": (self.hidden, self.intermediate),
                 "mlp.down_proj": (self.intermediate, self.hidden)}
        return {f"model.layers.{i}.{name}": size for i in range(self.layers) for name, size in block.items()}

    def unquantized(self) -> dict[str, tuple[int, ...]]:
        """{name: shape} of the tensors that stay in 16 bits."""
        tensors = {"model.embed_tokens.weight": (self.vocabulary, self.hidden), "model.norm.weight": (self.hidden,)}
        if not self.tied:
            tensors["lm_head.weight"] = (self.vocabulary, self.hidden)
        for i in range(self.layers):
            for name in ("input_layernorm", "post_attention_layernorm"):
                tensors[f"model.layers.{i}.{name}.weight"] = (self.hidden,)
        if self.qkv_bias:
            tensors |= {f"{name}.bias": (cols,) for name, (_, cols) in self.quantized().items()
                        if name.endswith(("q_proj", "k_proj", "v_proj"))}
        return tensors

    def parameters(self) -> int:
        """The model's weights, as its makers count them."""
        return sum(math.prod(size) for size in (*self.quantized().values(), *self.unquantized().values()))


MODELS = {"1B": Shape("meta-llama/Llama-3.2-1B", 2048, 8192, 16, 32, 8, 128256, tied=True),
          "3B": Shape("meta-llama/Llama-3.2-3B", 3072, 8192, 28, 24, 8, 128256, tied=True),
          "8B": Shape("meta-llama/Llama-3.1-8B", 4096, 14336, 32, 32, 8, 128256),
          "14B": Shape("Qwen/Qwen2.5-14B", 5120, 13824, 48, 40, 8, 152064, qkv_bias=True),
          "32B": Shape("Qwen/Qwen2.5-32B", 5120, 27648, 64, 40, 8, 152064, qkv_bias=True),
          "70B": Shape("meta-llama/Llama-3.1-70B", 8192, 28672, 80, 64, 8, 128256)}
GROUP_SIZE = {"1B": 64, "3B": 64, "8B": 64, "14B": 64, "32B": 128, "70B": 128}     # rows


# --- the formula --------------------------------------------------------------------------------------------------

def weight_bytes(shape: Shape, bits: int, group_size: int) -> dict[str, int]:
    """{part: bytes} of the GPTQ model, loaded for GPTQModel's torch kernel. Every group is whole."""
    layers = shape.quantized().values()
    groups = [(rows // group_size, cols) for rows, cols in layers]
    rotary_tables = 2 * FLOAT32 * (shape.hidden // shape.heads // 2)
    return {"integers": sum(INT32 * (rows * bits // 32) * cols for rows, cols in layers),
            "zero points": sum(INT32 * count * (cols * bits // 32) for count, cols in groups),
            "scales": sum(HALF * count * cols for count, cols in groups),
            "g_idx": sum(INT32 * rows for rows, _ in layers),
            "16 bits": sum(HALF * math.prod(size) for size in shape.unquantized().values()),
            "tables": INT32 * SHIFTS[bits] * len(layers) + rotary_tables}


def training_bytes(shape: Shape, group_size: int, rank: int, method: str) -> dict[str, int]:
    """{part: bytes} of what training adds to the GPTQ model. method: one of METHODS."""
    layers = shape.quantized().values()
    pair = sum(rank * (rows + cols) for rows, cols in layers)                   # entries of A and B
    vectors = 2 * _per_group(shape, group_size) if method == "full" else 0      # entries of mu and the scales' change
    matrices, trained = 2 * len(layers), pair + vectors
    # AdamW holds a float32 step count for each tensor, tSignSGD an int64 count of the entries that moved.
    optimizer = {"published": INT64 * matrices,
                 "full": FLOAT32 * pair + INT64 * matrices + 2 * FLOAT32 * vectors + FLOAT32 * matrices,
                 "LoRA": 2 * FLOAT32 * pair + FLOAT32 * matrices}[method]
    return {"A and B": FLOAT32 * pair, "mu and scales": FLOAT32 * vectors, "gradients": FLOAT32 * trained,
            "optimizer": optimizer, "index of the groups": 0 if method == "LoRA" else _index_bytes(shape, group_size)}


def merged_bytes(shape: Shape, group_size: int) -> dict[str, int]:
    """{part: bytes} of what the offsets add to the GPTQ model on a device with memory of its own."""
    return {"offsets": HALF * _per_group(shape, group_size), "index of the groups": _index_bytes(shape, group_size)}


def merged_bytes_on_cpu(shape: Shape, bits: int, group_size: int) -> dict[str, int]:
    """{part: bytes} of what a merged model on the CPU keeps beside merged_bytes().

    GPTQModel's torch kernel keeps int8 zero points and an int64 g_idx from its first call on, but not at 3 bits.
    """
    per_group, rows = _per_group(shape, group_size), sum(rows for rows, _ in shape.quantized().values())
    return {"float32 offsets, scales": (FLOAT32 + HALF) * per_group,
            "kernel": 0 if bits == 3 else per_group + INT64 * rows}


def _per_group(shape: Shape, group_size: int) -> int:
    """The entries of one number for each group and output: of all scales, or of all mu."""
    return sum(rows // group_size * cols for rows, cols in shape.quantized().values())


def _index_bytes(shape: Shape, group_size: int) -> int:
    """LoTA.packed.Groups of every layer: g_idx and sizes in int64, starts in int32."""
    return sum(INT64 * (rows + rows // group_size) + INT32 * (rows // group_size + 1)
               for rows, _ in shape.quantized().values())


def compute() -> list[dict]:
    """The rows of memory.json: one for each model and number of bits."""
    rows = []
    for name, shape in MODELS.items():
        group_size, rank = GROUP_SIZE[name], 64 if shape.parameters() < LARGE_MODEL else 32
        for bits in BITS:
            rows.append({"model": name, "source": shape.source, "bits": bits, "group_size": group_size, "rank": rank,
                         "weights": weight_bytes(shape, bits, group_size),
                         "training": {method: training_bytes(shape, group_size, rank, method) for method in METHODS},
                         "merged": merged_bytes(shape, group_size)})
    return rows


# --- tables -------------------------------------------------------------------------------------------------------

def table() -> str:
    """All of memory.json as a Markdown table with a note below it."""
    rows, recipes = _read(), ("published", "`full`", "LoRA")
    names = ["model", "bits", "GPTQ model", "A and B", "`full`: mu and scales",
             *(f"{recipe}: gradients, optimizer" for recipe in recipes),
             *(f"{recipe}: training in all" for recipe in recipes), "merged"]
    lines = []
    for row in rows:
        added = row["training"]
        sizes = (sum(row["weights"].values()), added["full"]["A and B"], added["full"]["mu and scales"],
                 *(added[method]["gradients"] + added[method]["optimizer"] for method in METHODS),
                 *(_training_total(row, method) for method in METHODS), _merged_total(row))
        lines.append([row["model"], row["bits"], *map(_gib, sizes)])
    sources = ", ".join(dict.fromkeys(f"{row['model']}: {row['source']}" for row in rows))
    return f"{_markdown(names, lines)}\n\n{_note(rows)} {sources}."


def short_table() -> str:
    """A row for each model, "training / merged" of the published recipe at each number of bits, with a note below."""
    rows, cells = _read(), {}
    for row in rows:
        size = f"{_gib(_training_total(row, 'published'))} / {_gib(_merged_total(row))}"
        cells.setdefault(row["source"].split("/")[1], {})[row["bits"]] = size
    names = ["training / merged", *(f"{bits} bits" for bits in BITS)]
    lines = [[model, *(sizes[bits] for bits in BITS)] for model, sizes in cells.items()]
    return f"{_markdown(names, lines)}\n\n{_note(rows)}"


def sent_table() -> str:
    """What a process holds of each model, and what it sends in a step of 8 processes, as Markdown.

    Of n processes each sends 2 (n - 1) / n times the bytes of the gradients, as a ring does. benchmarks/processes.py
    measured that. torch's default would send the buffers too, which are all but the tensors in 16 bits.
    """
    rows, share = _read(), 2 * 7 / 8
    names = ["model", "rank", *(f"GPTQ model at {bits} bits, GiB" for bits in BITS),
             "sent: `published`, LR-QAT, LoRA, MB", "sent: `full`, MB", "torch's default at 4 bits: MB more"]
    lines = []
    for row in (row for row in rows if row["bits"] == 4):
        models = [_gib(sum(one["weights"].values())) for bits in BITS for one in rows
                  if (one["model"], one["bits"]) == (row["model"], bits)]
        buffers = sum(size for part, size in row["weights"].items() if part != "16 bits")
        sent = *(share * row["training"][method]["gradients"] for method in ("published", "full")), buffers
        lines.append([row["model"], row["rank"], *models, *(f"{size / 1e6:,.0f}" for size in sent)])
    return _markdown(names, lines)


def _read() -> list[dict]:
    return json.loads(RESULT.read_text())["rows"]


def _training_total(row: dict, method: str) -> int:
    return sum(row["weights"].values()) + sum(row["training"][method].values())


def _merged_total(row: dict) -> int:
    return sum(row["weights"].values()) + sum(row["merged"].values())


def _gib(size: int) -> str:
    return f"{size / GIB:.1f}"


def _markdown(names: list[str], lines: list[list]) -> str:
    return "\n".join("| " + " | ".join(map(str, cells)) + " |" for cells in (names, ["---"] * len(names), *lines))


def _note(rows: list[dict]) -> str:
    models = {}         # {setting: {model: None}}
    for row in rows:
        models.setdefault(f"groups of {row['group_size']} and rank {row['rank']}", {})[row["model"]] = None
    settings = "; ".join(f"{setting} for {', '.join(names)}" for setting, names in models.items())
    return f"In GiB, with {settings}. Activations are not counted."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare the formula with small models; prints only")
    if parser.parse_args().check:
        from memory_check import check
        sys.exit(0 if check() else "error: the formula is not what the models hold")
    RESULT.write_text(json.dumps({"benchmark": "memory", "unit": "bytes", "rows": compute()}, indent=2) + "\n")
    print(f"{table()}\n\n{short_table()}\n\nsaved to benchmarks/results/{RESULT.name}")


if __name__ == "__main__":
    main()
