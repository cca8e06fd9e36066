"""A Llama of random GPTQ integers on disk, as GPTQModel opens it. random_gptq.py writes its tensors.

It is a Qwen 2 where the shape has biases.
"""
from pathlib import Path

import torch
from memory import MODELS, Shape
from random_gptq import write_gptq
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, PreTrainedTokenizerFast

# The five small ones are no real model's. "wide" has one layer, as wide as those of 1B.
SHAPES = {"tiny": Shape("random", 192, 512, 4, 6, 6, 1500), "15M": Shape("random", 512, 1408, 4, 8, 8, 8000),
          "60M": Shape("random", 512, 1408, 16, 8, 8, 8000), "200M": Shape("random", 1024, 2816, 16, 16, 16, 8000),
          "wide": Shape("random", 2048, 5632, 1, 32, 8, 8000), "1B": MODELS["1B"], "8B": MODELS["8B"]}


def write_gptq_llama(folder: Path, shape: Shape, bits: int, group_size: int) -> Path:
    """Writes a model of this shape and returns its folder, which must not exist."""
    other = {name: torch.randn(size).mul_(0.02).bfloat16() if len(size) == 2 else torch.ones(size).bfloat16()
             for name, size in shape.unquantized().items()}
    family = "qwen2" if shape.qkv_bias else "llama"
    config = AutoConfig.for_model(
        family, hidden_size=shape.hidden, intermediate_size=shape.intermediate, num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads, vocab_size=shape.vocabulary,
        tie_word_embeddings=shape.tied, max_position_embeddings=4096).to_dict()
    config |= {"architectures": [f"{family.capitalize()}ForCausalLM"], "dtype": "bfloat16"}
    middle = 2 ** (bits - 1)
    write_gptq(folder, shape.quantized(), bits, group_size, checkpoint_format="gptq_v2", zeros=(middle, middle),
               scales=(0.0, 0.04 / 2**bits), other_tensors=other, config=config)
    _write_tokenizer(folder, shape.vocabulary)
    return folder


def _write_tokenizer(folder: Path, vocabulary: int) -> None:
    """Writes a tokenizer whose words are numbers, because GPTQModel does not open a model without one."""
    words = Tokenizer(models.WordLevel({str(i): i for i in range(vocabulary)}, unk_token="0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="0", pad_token="0", eos_token="2",
                            bos_token="1").save_pretrained(folder)
