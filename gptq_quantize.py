"""Quantizes a 16-bit model with GPTQ, through GPTQModel, on the GPU or the CPU.

    python gptq_quantize.py --model meta-llama/Llama-3.1-8B --bits 4 --group_size 64 --output_dir ./gptq
    python gptq_quantize.py --model MODEL --bits 2 --group_size 32 --calibration texts.jsonl --output_dir ./gptq

The folder's name says the bits and the group size: OUTPUT_DIR/int4_64_Llama-3.1-8B. The paper takes an asymmetric grid,
1,024 calibration samples of C4, and groups of 64 rows up to 14B and of 128 above.
"""
import argparse
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from data_print_save import TASKS, check_cuda, load_rows, read_messages, set_seed
from LoTA import SUPPORTED_BITS, UserError, run_script
from LoTA.own_rows import CHAT
from LoTA.prompts import prepare_tokenizer, read_tokenizer, render_prompt
from LoTA.row_files import kind_of, lines_of, read_rows, read_text, row_name

PROVENANCE = "lota_quantize.json"       # says what made the folder, and that it is ours to replace
C4 = ("allenai/c4", "en/c4-train.00000-of-01024.json.gz")
GROUP_SIZES = (-1, 16, 32, 64, 128, 256, 512, 1024)        # those that GPTQModel takes
SHORT_SAMPLE = 10       # GPTQModel drops a sample of so many tokens or fewer
FEWEST_SAMPLES = 8      # a rule of thumb; where --samples asks for fewer, all that it asks for
SMALL_MODEL = 400e6     # bytes; a smaller model stays in memory, and is packed without compiling a packer first


@dataclass(frozen=True)
class quantizeConfig:
    """The settings of a quantization, as the flags have them.

    Raises UserError for a number of bits or a group size that does not exist.
    """
    model: str
    output_dir: str
    bits: int = 4
    group_size: int = 64
    sym: bool = False
    desc_act: bool = False
    calibration: str = "c4"
    data_dir: str | None = None
    samples: int = 1024
    max_length: int = 2048
    batch_size: int = 1
    seed: int = 42
    trust_remote_code: bool = False

    def __post_init__(self):
        for name, choices in (("bits", SUPPORTED_BITS), ("group_size", GROUP_SIZES)):
            if getattr(self, name) not in choices:
                raise UserError(f"--{name} must be one of {', '.join(map(str, choices))}, not {getattr(self, name)!r}")


def dialogues() -> tuple[str, ...]:
    """The data sets whose prompts and answers calibrate."""
    return (*TASKS, CHAT)


def parse_args(argv: Sequence[str] | None = None) -> quantizeConfig:
    """The settings that the arguments `argv` ask for. Where it is None, sys.argv is read."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", "--pretrained", required=True, help="the 16-bit model: a folder or a hub name")
    parser.add_argument("--output_dir", "--quantized_model_save", required=True,
                        help="where the folder int{bits}_{group}_{name} is written")
    parser.add_argument("--bits", "--w_bits", type=int, default=4, choices=SUPPORTED_BITS,
                        help="bits of an integer weight [4]")
    parser.add_argument("--group_size", type=int, default=64, choices=GROUP_SIZES,
                        help="input rows that share a scale and zero; -1: all of them [64]")
    parser.add_argument("--sym", action="store_true", help="a symmetric grid, with a fixed zero point [asymmetric]")
    parser.add_argument("--desc_act", action="store_true",
                        help="quantize inputs by decreasing activation, so that groups are out of order [in order]")
    parser.add_argument("--calibration", default="c4",
                        help="c4 (from the hub); a .txt file with a sample in each line; a .jsonl, .json, .csv or "
                             ".parquet file with the field 'text'; or the train split of a data set with its prompts: "
                             f"{', '.join(dialogues())} [c4]")
    parser.add_argument("--data_dir", default=None, help="where the data set of --calibration is [the hub]")
    parser.add_argument("--samples", type=int, default=1024, help="calibration samples [1024]")
    parser.add_argument("--max_length", type=int, default=2048, help="tokens of a sample at most [2048]")
    parser.add_argument("--batch_size", type=int, default=1, help="calibration samples in one forward pass [1]")
    parser.add_argument("--seed", type=int, default=42, help="random seed [42]")
    parser.add_argument("--trust_remote_code", action="store_true", help="run code that comes with the model [no]")
    return quantizeConfig(**vars(parser.parse_args(argv)))


def calibration_texts(args: quantizeConfig, tokenizer) -> list[str]:
    """The calibration samples. Raises UserError where there are none."""
    source = args.calibration
    if source in dialogues():
        prepare_tokenizer(tokenizer)
        rows = load_rows(source, "train", args.data_dir).shuffle(seed=args.seed)
        pairs = (read_messages(source, row) for row in rows.select(range(min(args.samples, len(rows)))))
        texts = [render_prompt(tokenizer, messages) + answer for messages, answer in pairs]
    elif source == "c4":
        from datasets import load_dataset
        rows = load_dataset(C4[0], data_files=C4[1], split="train", streaming=True)
        texts = [row["text"] for row in rows.take(args.samples)]
    elif Path(source).is_file() and kind_of(source):
        texts = [row.get("text") for row in read_rows(source)]
        for number, text in enumerate(texts, 1):
            if not isinstance(text, str):
                raise UserError(f"--calibration {row_name(source, number)} has no text in the field 'text'")
    elif Path(source).is_file():
        texts = [line for line in lines_of(read_text(source)) if line.strip()]
    else:
        raise UserError(f"--calibration {source} is neither c4, a file, nor one of {', '.join(dialogues())}")
    if not texts:
        raise UserError(f"--calibration {source} holds no text")
    return texts[:args.samples]


def calibration_samples(args: quantizeConfig, tokenizer) -> tuple[list[dict], int]:
    """(the samples that GPTQModel will use, how many it would drop because they are short).

    A sample is {"input_ids": (tokens,) int64, "attention_mask": (tokens,) int64}. Prints both numbers.
    Raises UserError where there are too few.
    """
    import torch
    texts = calibration_texts(args, tokenizer)
    has_special_tokens = args.calibration in dialogues()    # the chat template wrote them
    encoded = [tokenizer(text, truncation=True, max_length=args.max_length, add_special_tokens=not has_special_tokens,
                         return_token_type_ids=False) for text in texts]
    samples = [{key: torch.tensor(value) for key, value in sample.items()}
               for sample in encoded if len(sample["input_ids"]) > SHORT_SAMPLE]
    short = len(texts) - len(samples)
    print(f"{len(samples)} calibration samples, {sum(len(sample['input_ids']) for sample in samples)} tokens"
          + (f"; {short} others have {SHORT_SAMPLE} tokens or fewer and are left out" if short else ""))
    fewest = min(FEWEST_SAMPLES, args.samples)
    if len(samples) < fewest:
        raise UserError(f"--calibration {args.calibration} gives {len(samples)} samples of more than {SHORT_SAMPLE} "
                        f"tokens, and {fewest} is the least; give longer texts or more of them")
    return samples, short


def quantize(args: quantizeConfig) -> Path:
    """Quantizes a model. Returns the folder that it wrote."""
    # Torch and GPTQModel are imported late, so that --help and mistakes answer at once.
    from LoTA.folders import check_model_name, reading
    from LoTA.storage import check_output_folder, whole_folder, write_json
    name = Path(args.model).resolve().name if Path(args.model).exists() else args.model.rsplit("/", 1)[-1]
    output = Path(args.output_dir) / f"int{args.bits}_{args.group_size}_{name}"
    check_output_folder(output, PROVENANCE)
    check_model_name("--model", args.model)
    small = Path(args.model).is_dir() and sum(f.stat().st_size for f in Path(args.model).glob("*.safetensors")) \
        < SMALL_MODEL

    from gptqmodel import GPTQModel, QuantizeConfig
    from gptqmodel.utils.backend import BACKEND
    from gptqmodel.utils.logger import setup_logger

    from LoTA.adapter import check_described
    setup_logger().setLevel(logging.WARNING)
    set_seed(args.seed)
    device = check_cuda()
    tokenizer = read_tokenizer(args.model, args.trust_remote_code)
    samples, short = calibration_samples(args, tokenizer)

    # By default GPTQModel orders inputs by groups, and so refuses a single group.
    one_group = {"act_group_aware": False} if args.group_size == -1 else {}
    config = QuantizeConfig(bits=args.bits, group_size=args.group_size, sym=args.sym, desc_act=args.desc_act,
                            device=str(device), offload_to_disk=not small,
                            pack_impl="original" if small else "auto", **one_group)
    start = time.time()
    if Path(args.model).is_dir():
        check_described(Path(args.model), args.trust_remote_code)
    with reading(args.model, "config.json"):
        model = GPTQModel.load(args.model, config, trust_remote_code=args.trust_remote_code)
    model.quantize(samples, batch_size=args.batch_size, tokenizer=tokenizer, backend=BACKEND.GPTQ_TORCH,
                   calibration_data_min_length=SHORT_SAMPLE)
    with whole_folder(output, PROVENANCE) as folder:
        model.save(str(folder))
        tokenizer.save_pretrained(folder)
        write_json(folder / PROVENANCE, {"settings": vars(args), "samples": len(samples),
                                         "short_samples_left_out": short,
                                         "seconds": round(time.time() - start, 1)})
    print(f"saved to {output}")
    return output


def main(argv: Sequence[str] | None = None) -> Path:
    """quantize() as the arguments `argv` ask for; None: sys.argv."""
    return quantize(parse_args(argv))


def cli() -> None:
    """The console command lota-quantize."""
    run_script(main)


if __name__ == "__main__":
    cli()
