"""Trains a tiny Llama from scratch, with its own tokenizer, on the train split of one data set.

    python experiments/tiny_base.py --data_name viggo --data_dir DATA --output MODEL

It makes the 16-bit base model of the demo and of the experiments, so that they need no model hub. The chat template
leaves the system turn out, because the model knows one task only and short sequences train fast on a CPU.
"""
import argparse
import json
from collections.abc import Iterable

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    DataCollatorForSeq2Seq,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)

from data_print_save import find_task, load_rows, prepare_dataset, read_messages, set_seed
from LoTA import run_script

SPECIAL = {"pad_token": "<|pad|>", "bos_token": "<|begin|>", "eos_token": "<|end|>"}
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}<|answer|>"
    "{% elif m.role == 'assistant' %}{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}")


def chat_template(data_name: str) -> str:
    """CHAT_TEMPLATE without the task's instruction, in every layout of prompts. Its tokens would only cost time."""
    instruction = find_task(data_name).instruction
    without = f"m.content.replace({json.dumps(instruction)} ~ '\\n\\n', '')" if instruction else "m.content"
    return CHAT_TEMPLATE.replace("m.content", without, 1)


def train_tokenizer(data_name: str, data_dir: str, vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer, trained on the questions and answers of the train split."""
    return tokenizer_of(data_name, load_rows(data_name, "train", data_dir), vocab_size)


def tokenizer_of(data_name: str, rows: Iterable[dict], vocab_size: int) -> PreTrainedTokenizerFast:
    """The same of these rows."""
    texts = []
    for row in rows:
        messages, answer = read_messages(data_name, row, "system")
        texts += [messages[-1]["content"], answer]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[*SPECIAL.values(), "<|answer|>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return PreTrainedTokenizerFast(tokenizer_object=bpe, chat_template=chat_template(data_name), padding_side="left",
                                   clean_up_tokenization_spaces=False, **SPECIAL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_name", default="viggo", help="the data set, an entry of TASKS [viggo]")
    parser.add_argument("--data_dir", required=True, help="the data on disk, as --data_dir of LoTA_QAF_main.py")
    parser.add_argument("--output", required=True, help="the folder for the model and its tokenizer")
    parser.add_argument("--hidden_size", type=int, default=192)
    parser.add_argument("--intermediate_size", type=int, default=512)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--heads", type=int, default=6)
    parser.add_argument("--vocab_size", type=int, default=1500)
    parser.add_argument("--epochs", type=float, default=12)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--learning_rate", type=float, default=6e-4)
    parser.add_argument("--weight_decay", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=42)
    args = parser.parse_args()

    set_seed(args.seed)
    tokenizer = train_tokenizer(args.data_name, args.data_dir, args.vocab_size)
    data = prepare_dataset(args.data_name, tokenizer, data_dir=args.data_dir)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=args.hidden_size, intermediate_size=args.intermediate_size,
        num_hidden_layers=args.layers, num_attention_heads=args.heads, num_key_value_heads=args.heads,
        max_position_embeddings=512, tie_word_embeddings=True, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id))
    print(f"{model.num_parameters() / 1e6:.2f} M parameters, {len(tokenizer)} tokens, {len(data)} rows, "
          f"{sum(data['length']) / len(data):.0f} tokens a row")
    settings = TrainingArguments(
        output_dir=args.output, num_train_epochs=args.epochs, per_device_train_batch_size=args.batch_size,
        learning_rate=args.learning_rate, lr_scheduler_type="cosine", warmup_steps=0.05,
        weight_decay=args.weight_decay, adam_beta2=0.98, max_grad_norm=1.0, logging_steps=50, save_strategy="no",
        train_sampling_strategy="group_by_length", report_to="none", seed=args.seed,
        dataloader_pin_memory=torch.cuda.is_available())
    collator = DataCollatorForSeq2Seq(tokenizer, pad_to_multiple_of=8)
    Trainer(model=model, train_dataset=data, data_collator=collator, args=settings).train()
    model.to(torch.bfloat16).save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)
    print(f"saved to {args.output}")


if __name__ == "__main__":
    run_script(main)
