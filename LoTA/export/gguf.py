"""A GGUF file for llama.cpp: every quantized weight in Q4_1 blocks, its integer unchanged.

A Q4_1 block is 32 weights of one output: d and m in float16, then 32 integers of 4 bits, w = d * integer + m. With
d = s and m = s * (mu - z) it holds the offset, which GPTQ's integer zero points cannot. Other matrices keep their
dtype.
Block layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md and block_q4_1 in ggml-common.h.
The `gguf` package names the tensors and writes the header.
"""
import math
from pathlib import Path

import gguf
import numpy as np
import torch
from tqdm import tqdm
from transformers import AutoConfig, AutoTokenizer

from LoTA import UserError
from LoTA.export.shared import NO_CODE
from LoTA.folders import LAYER_TENSORS, MergedFolder, reading
from LoTA.packed import PackedLayer
from LoTA.storage import read_json

GGUF_FILE = "model-q4_1.gguf"

BLOCK = 32                          # weights of a block
BLOCK_BYTES = 2 + 2 + BLOCK // 2
# {transformers' model_type: (llama.cpp's architecture, whether its loader wants the rows of q and k reordered)}
ARCHITECTURES = {"llama": (gguf.MODEL_ARCH.LLAMA, True), "mistral": (gguf.MODEL_ARCH.LLAMA, True),
                 "qwen2": (gguf.MODEL_ARCH.QWEN2, False), "qwen3": (gguf.MODEL_ARCH.QWEN3, False)}
# {the pattern by which a byte-level BPE cuts its text: llama.cpp's name for it}
LLAMA3_PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
                  r"\s*[\r\n]+|\s+(?!\S)|\s+")
PRE_TOKENIZERS = {None: "gpt-2", LLAMA3_PATTERN: "llama-bpe", LLAMA3_PATTERN.replace("{1,3}", ""): "qwen2"}


def write(model: MergedFolder, folder: Path, dtype: torch.dtype | None = None) -> None:
    """Writes the file GGUF_FILE into `folder`. Raises UserError where GGUF or llama.cpp cannot hold the model."""
    with reading(model.path, "config.json", NO_CODE):
        config = AutoConfig.from_pretrained(model.path, trust_remote_code=False)
    if config.model_type not in ARCHITECTURES:
        raise UserError(f"GGUF export knows {', '.join(ARCHITECTURES)}, not {config.model_type}; --format dense keeps "
                        "the model for llama.cpp's own converter")
    if model.bits > 4:
        raise UserError(f"Q4_1 holds integers of up to 4 bits, {model.path} has {model.bits}: --format dense or peft")
    architecture, permuted = ARCHITECTURES[config.model_type]
    writer = gguf.GGUFWriter(folder / GGUF_FILE, gguf.MODEL_ARCH_NAMES[architecture])
    add_shape(writer, model, config)
    add_tokenizer(writer, model, config)
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    tensors = []
    for name in sorted(model.file_of):
        module, _, role = name.rpartition(".")
        heads = heads_of(module, config) if permuted else None
        if module in model.modules and role in LAYER_TENSORS:
            if role != "qweight":
                continue
            check_blocks(model, module)
            cols, rows = model.shape(f"{module}.scales")[1], model.shape(f"{module}.g_idx")[0]
            size = cols * rows // BLOCK * BLOCK_BYTES
            writer.add_tensor_info(named(names, f"{module}.weight"), (cols, size // cols), np.uint8, size,
                                   gguf.GGMLQuantizationType.Q4_1)
            tensors.append(lambda m=module, h=heads: permute(blocks(model, m), h).numpy())
        else:
            values, stored = other_tensor(model, name)
            writer.add_tensor_info(named(names, name), tuple(values.shape), np.float32, values.nbytes, stored)
            tensors.append(lambda n=name, h=heads: as_numpy(permute(other_tensor(model, n)[0], h)))
    factors = rope_factors(config)
    if factors is not None:
        writer.add_tensor_info("rope_freqs.weight", factors.shape, np.float32, factors.nbytes)
        tensors.append(lambda: factors)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for make in tqdm(tensors, desc="writing GGUF", unit="tensor"):
        writer.write_tensor_data(make())
    writer.close()


def check(model: MergedFolder, folder: Path, dtype: torch.dtype | None = None) -> None:
    """Reads the file back.

    Raises RuntimeError unless the integers are the merged ones, d and m are s and s * (mu - z) in float16, and all
    other tensors are what other_tensor() makes of the model's own.
    """
    file = folder / GGUF_FILE
    config = AutoConfig.from_pretrained(model.path)
    architecture, permuted = ARCHITECTURES[config.model_type]
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    written = {t.name: t for t in gguf.GGUFReader(file).tensors}
    expected = {named(names, f"{m}.weight") for m in model.modules}
    expected |= {named(names, name) for name in model.file_of
                 if name.rpartition(".")[0] not in model.modules or name.rpartition(".")[2] not in LAYER_TENSORS}
    if set(written) - {"rope_freqs.weight"} != expected:
        raise RuntimeError(f"{file} does not hold the merged model's tensors")
    for module in tqdm(model.modules, desc="verifying GGUF", unit="layer"):
        tensor = written[named(names, f"{module}.weight")]
        rows, heads = model.shape(f"{module}.g_idx")[0], heads_of(module, config) if permuted else None
        stored = permute(torch.from_numpy(np.array(tensor.data)), heads, inverse=True).view(-1, rows // BLOCK,
                                                                                            BLOCK_BYTES)
        integers = torch.cat([stored[..., 4:] & 15, stored[..., 4:] >> 4], -1).reshape(-1, rows)
        d, m = stored[..., :4].contiguous().view(torch.float16).unbind(-1)
        packed = model.packed(module)
        scale, minimum = block_values(packed, model.offset(module))
        if not (torch.equal(integers, packed.weight_int.t()) and torch.equal(d, scale) and torch.equal(m, minimum)):
            raise RuntimeError(f"{module}: what was written differs from the merged model")
    for name in model.file_of:
        module, _, role = name.rpartition(".")
        if module in model.modules and role in LAYER_TENSORS:
            continue
        heads = heads_of(module, config) if permuted else None
        values, stored = other_tensor(model, name)
        tensor = written[named(names, name)]
        if tensor.tensor_type != stored or not np.array_equal(
                np.array(tensor.data).reshape(-1).view(np.uint8), as_numpy(permute(values, heads)).reshape(-1).view(
                    np.uint8)):
            raise RuntimeError(f"{name}: what was written differs from the merged model")


# --- tensors ------------------------------------------------------------------------------------------------------

def check_blocks(model: MergedFolder, module: str) -> None:
    """Raises UserError unless every block of 32 inputs lies in one group."""
    g_idx = model.tensor(f"{module}.g_idx")
    if len(g_idx) % BLOCK or not bool((g_idx.view(-1, BLOCK) == g_idx.view(-1, BLOCK)[:, :1]).all()):
        raise UserError(f"{module}: a Q4_1 block is {BLOCK} inputs that follow each other, and here they lie in "
                        "different groups (desc_act, or a group size that 32 does not divide): --format peft or dense")


def block_values(packed: PackedLayer, offset: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """(d, m) float16 [out, in / 32]: s and s * (mu - z) of every block. Raises UserError where one exceeds float16."""
    scales, shift = packed.scales.float(), -packed.zeros.float()
    shift = scales * (shift if offset is None else shift + offset)
    if float(torch.stack([scales.abs().max(), shift.abs().max()]).max()) > torch.finfo(torch.float16).max:
        raise UserError("a scale or an offset is too large for GGUF's float16")
    of_block = packed.groups.g_idx[::BLOCK]
    return scales[of_block].t().half(), shift[of_block].t().half()


def blocks(model: MergedFolder, module: str) -> torch.Tensor:
    """The Q4_1 blocks of one layer, uint8 [out, in / 32 * 20]."""
    packed = model.packed(module)
    d, m = block_values(packed, model.offset(module))
    integers = packed.weight_int.t().reshape(*d.shape, 2, BLOCK // 2)
    halves = integers[:, :, 0] | integers[:, :, 1] << 4         # weights 0 ... 15 in the low halves, 16 ... 31 above
    head = torch.stack([d, m], -1).view(torch.uint8)
    return torch.cat([head, halves], -1).view(d.shape[0], -1)


def other_tensor(model: MergedFolder, name: str) -> tuple[torch.Tensor, gguf.GGMLQuantizationType]:
    """(a tensor that is not quantized, its GGML type). Vectors become float32, because llama.cpp wants them so."""
    tensor = model.tensor(name)
    if tensor.dim() == 1 or tensor.dtype == torch.float32:
        return tensor.float(), gguf.GGMLQuantizationType.F32
    return tensor, {torch.float16: gguf.GGMLQuantizationType.F16,
                    torch.bfloat16: gguf.GGMLQuantizationType.BF16}[tensor.dtype]


def as_numpy(tensor: torch.Tensor) -> np.ndarray:
    """The tensor as numpy holds it. bfloat16, which numpy does not have, becomes int16 with the same bits."""
    return (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).contiguous().numpy()


def named(names: gguf.TensorNameMap, name: str) -> str:
    """llama.cpp's name of a tensor. Raises UserError where it has none."""
    found = names.get_name(name, try_suffixes=(".weight", ".bias"))
    if found is None:
        raise UserError(f"llama.cpp has no place for the tensor {name}")
    return found


def heads_of(module: str, config) -> int | None:
    """The number of heads in the rows of q_proj or k_proj, which llama.cpp wants reordered; None for other layers."""
    return {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(module.rsplit(".", 1)[-1])


def permute(rows: torch.Tensor, heads: int | None, inverse: bool = False) -> torch.Tensor:
    """Reorders dim 0 within each head, from transformers' order of the rotary rows to llama.cpp's.

    Of the two rows that rotate together, transformers puts one into the first half of the head and the other into the
    second. llama.cpp wants them side by side. heads None leaves the rows as they are.
    """
    if heads is None:
        return rows
    half = rows.shape[0] // heads // 2
    shape = (heads, half, 2) if inverse else (heads, 2, half)
    return rows.view(*shape, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


def rope_factors(config) -> np.ndarray | None:
    """Llama 3.1's divisors of the rotary frequencies, float32 [head_dim / 2]; None for plain rotary embeddings.

    Source: the "llama3" rope type of transformers and Llama 3.1's model card.
    """
    rope = config.rope_parameters
    role = rope.get("rope_type", "default")
    if role == "default":
        return None
    if role != "llama3":
        raise UserError(f"GGUF export knows plain and llama3 rotary embeddings, not {role}")
    dim = head_dim(config)
    wavelength = 2 * math.pi * rope["rope_theta"] ** (np.arange(0, dim, 2) / dim)
    old, low, high = rope["original_max_position_embeddings"], rope["low_freq_factor"], rope["high_freq_factor"]
    smooth = np.clip((old / wavelength - low) / (high - low), 0, 1)
    return (1 / ((1 - smooth) / rope["factor"] + smooth)).astype(np.float32)


def head_dim(config) -> int:
    """Rows of one attention head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


# --- metadata -----------------------------------------------------------------------------------------------------

def add_shape(writer: gguf.GGUFWriter, model: MergedFolder, config) -> None:
    """The model's dimensions, as metadata."""
    writer.add_name(model.path.resolve().name)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim(config))
    writer.add_value_length(head_dim(config))
    writer.add_rope_dimension_count(head_dim(config))
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_1)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def add_tokenizer(writer: gguf.GGUFWriter, model: MergedFolder, config) -> None:
    """The model's byte-level BPE, its special tokens and its chat template, as metadata."""
    with reading(model.path, "tokenizer_config.json", NO_CODE):
        tokenizer = AutoTokenizer.from_pretrained(model.path, trust_remote_code=False)
    content = read_json(model.path / "tokenizer.json")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre_tokenizer_name(content))
    added = {t["id"]: t for t in content["added_tokens"]}
    words = {i: word for word, i in tokenizer.get_vocab().items()}
    tokens, types = [], []
    for i in range(config.vocab_size):
        tokens.append(words.get(i, f"[PAD{i}]"))
        types.append(gguf.TokenType.UNUSED if i not in words else gguf.TokenType.NORMAL if i not in added
                     else gguf.TokenType.CONTROL if added[i]["special"] else gguf.TokenType.USER_DEFINED)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in content["model"]["merges"]])
    for add, token in ((writer.add_bos_token_id, tokenizer.bos_token_id),
                       (writer.add_eos_token_id, tokenizer.eos_token_id),
                       (writer.add_pad_token_id, tokenizer.pad_token_id)):
        if token is not None:
            add(token)
    ids = tokenizer("a")["input_ids"]
    writer.add_add_bos_token(tokenizer.bos_token_id is not None and ids[:1] == [tokenizer.bos_token_id])
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)


def pre_tokenizer_name(content: dict) -> str:
    """llama.cpp's name for the way in which a tokenizer.json cuts its text. Raises UserError where it has none."""
    steps = content.get("pre_tokenizer") or {}
    steps = steps.get("pretokenizers", [steps])
    byte_level = [s for s in steps if s.get("type") == "ByteLevel"]
    patterns = [s["pattern"].get("Regex") for s in steps if s.get("type") == "Split"]
    if content["model"]["type"] == "BPE" and len(byte_level) == 1 and not byte_level[0]["add_prefix_space"]:
        if byte_level[0].get("use_regex", True) and not patterns:
            patterns = [None]
        if len(patterns) == 1 and patterns[0] in PRE_TOKENIZERS and len(steps) <= 2:
            return PRE_TOKENIZERS[patterns[0]]
    raise UserError("GGUF export knows the byte-level BPE tokenizers of GPT-2, Llama 3 and Qwen 2, not this model's; "
                    "--format dense keeps the model for llama.cpp's own converter")
