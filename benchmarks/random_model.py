"""A GPTQ Llama of any shape with random integers, on disk as GPTQModel opens it, and a random LoTA adapter for it."""
import json
from pathlib import Path

import torch
from common import ROOT  # noqa: F401  puts the repository on the path
from safetensors.torch import save_file
from transformers import LlamaConfig

from LoTA.folders import GPTQFolder, LotaConfig
from LoTA.packing import pack_rows

SHAPES = {"tiny": (192, 512, 4, 6, 1500), "60M": (512, 1408, 16, 8, 8000), "200M": (1024, 2816, 16, 16, 8000),
          "1B": (2048, 8192, 16, 32, 32000), "8B": (4096, 14336, 32, 32, 128256)}
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def projections(hidden, intermediate, layers):
    for i in range(layers):
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            yield f"model.layers.{i}.self_attn.{name}", hidden, hidden
        for name in ("gate_proj", "up_proj"):
            yield f"model.layers.{i}.mlp.{name}", hidden, intermediate
        yield f"model.layers.{i}.mlp.down_proj", intermediate, hidden


def write_gptq_llama(folder, shape, bits, group_size):
    """Writes the model and returns its folder."""
    hidden, intermediate, layers, heads, vocabulary = SHAPES[shape]
    tensors = {"model.embed_tokens.weight": torch.randn(vocabulary, hidden).bfloat16() * 0.02,
               "model.norm.weight": torch.ones(hidden).bfloat16(),
               "lm_head.weight": torch.randn(vocabulary, hidden).bfloat16() * 0.02}
    for i in range(layers):
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{i}.{name}.weight"] = torch.ones(hidden).bfloat16()
    for name, rows, cols in projections(hidden, intermediate, layers):
        groups, middle = rows // group_size, 2 ** (bits - 1)
        tensors[f"{name}.qweight"] = pack_rows(torch.randint(0, 2**bits, (rows, cols)), bits)
        tensors[f"{name}.qzeros"] = pack_rows(torch.full((cols, groups), middle), bits).t().contiguous()
        tensors[f"{name}.scales"] = (torch.rand(groups, cols) * 0.04 / 2**bits).half()
        tensors[f"{name}.g_idx"] = (torch.arange(rows) // group_size).int()
    folder = Path(folder)
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    quantization = {"bits": bits, "group_size": group_size, "desc_act": False, "sym": False, "quant_method": "gptq",
                    "checkpoint_format": "gptq_v2", "pack_dtype": "int32", "lm_head": False}
    config = LlamaConfig(hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers,
                         num_attention_heads=heads, num_key_value_heads=heads, vocab_size=vocabulary,
                         tie_word_embeddings=False, max_position_embeddings=4096).to_dict()
    config |= {"architectures": ["LlamaForCausalLM"], "quantization_config": quantization, "dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "quantize_config.json").write_text(json.dumps(quantization))
    write_tokenizer(folder, vocabulary)
    return folder


def write_tokenizer(folder, vocabulary):
    """GPTQModel asks for one; words are numbers."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    words = Tokenizer(models.WordLevel({str(i): i for i in range(vocabulary)}, unk_token="0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="0", pad_token="0", eos_token="2",
                            bos_token="1").save_pretrained(folder)


def write_lota_adapter(folder, gptq, layers, rank, omega):
    """A random ternary adapter on `layers`, (name, in, out) each, of the GPTQ folder; returns its folder."""
    tensors = {}
    for name, rows, cols in layers:
        tensors[f"base_model.model.{name}.lora_A.weight"] = torch.randint(-1, 2, (rank, rows)).float()
        tensors[f"base_model.model.{name}.lora_B.weight"] = torch.randint(-1, 2, (cols, rank)).float()
    folder = Path(folder)
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"r": rank, "peft_type": "LORA"}))
    source = GPTQFolder(gptq)
    LotaConfig(omega=omega, rank=rank, bits=source.bits, group_size=source.group_size,
               quantized_model_dir=str(gptq), fingerprint=source.fingerprint()).save(folder)
    return folder
