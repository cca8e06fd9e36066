"""A 16-bit model becomes a GPTQ model, with GPTQModel, on the GPU or the CPU.

    python gptq_quantize.py --model meta-llama/Llama-3.1-8B --bits 4 --group_size 64 --output_dir ./gptq
    python gptq_quantize.py --model MODEL --bits 2 --group_size 32 --calibration texts.jsonl --output_dir ./gptq

The folder is named so that bits and group size can be read off it: OUTPUT_DIR/int4_64_Llama-3.1-8B. The paper's
setting is asymmetric, 1,024 samples of C4, group 64 up to 14B and 128 above.
"""
import argparse
import json
import logging
import time
from pathlib import Path

from LoTA import UserError, run_script
from LoTA.folders import check_model_name, check_output_folder, whole_folder, write_json
from LoTA.packing import SUPPORTED_BITS

PROVENANCE = "lota_quantize.json"       # what made the folder; also marks it as ours to replace
C4 = ("allenai/c4", "en/c4-train.00000-of-01024.json.gz")
GROUP_SIZES = (-1, 16, 32, 64, 128, 256, 512, 1024)        # those that GPTQModel takes
SMALL_MODEL = 400e6                     # bytes up to which packing in plain Python beats compiling the packer


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="the 16-bit model: a folder or a hub name")
    parser.add_argument("--output_dir", required=True, help="where the folder int{bits}_{group}_{name} is written")
    parser.add_argument("--bits", type=int, default=4, choices=SUPPORTED_BITS, help="bits of an integer weight [4]")
    parser.add_argument("--group_size", type=int, default=64, choices=GROUP_SIZES,
                        help="input rows that share a scale and zero; -1: all of them [64]")
    parser.add_argument("--sym", action="store_true", help="symmetric grid: a fixed zero point [asymmetric]")
    parser.add_argument("--desc_act", action="store_true", help="quantize columns by falling activation [in order]")
    parser.add_argument("--calibration", default="c4",
                        help="c4 (from the hub), a .txt (a sample a line) or .jsonl file (field 'text'), or a data set "
                             "name such as viggo, whose train split is used with its prompts [c4]")
    parser.add_argument("--data_dir", default=None, help="for --calibration with a data set name: where it is [hub]")
    parser.add_argument("--samples", type=int, default=1024, help="calibration samples [1024]")
    parser.add_argument("--max_length", type=int, default=2048, help="tokens of a sample at most [2048]")
    parser.add_argument("--batch_size", type=int, default=1, help="samples at a time [1]")
    parser.add_argument("--seed", type=int, default=42, help="[42]")
    parser.add_argument("--trust_remote_code", action="store_true", help="run code that comes with the model [no]")
    return parser.parse_args()


def calibration_texts(args, tokenizer):
    """The calibration samples as a list of strings. Raises UserError where there are none."""
    from data_print_save import DATA_NAMES, load_rows, prepare_tokenizer, read_messages, render_prompt
    source = args.calibration
    if source in DATA_NAMES:
        prepare_tokenizer(tokenizer)
        rows = load_rows(source, "train", args.data_dir).shuffle(seed=args.seed)
        pairs = (read_messages(source, row) for row in rows.select(range(min(args.samples, len(rows)))))
        texts = [render_prompt(tokenizer, messages) + answer for messages, answer in pairs]
    elif source == "c4":
        from datasets import load_dataset
        rows = load_dataset(C4[0], data_files=C4[1], split="train", streaming=True)
        texts = [row["text"] for row in rows.take(args.samples)]
    elif Path(source).is_file():
        lines = [line for line in Path(source).read_text().splitlines() if line.strip()]
        try:
            texts = [json.loads(line)["text"] for line in lines] if source.endswith(".jsonl") else lines
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"--calibration {source}: a line is no JSON object with a 'text': {error}") from None
    else:
        raise UserError(f"--calibration {source} is neither c4, a file, nor one of {', '.join(DATA_NAMES)}")
    if not texts:
        raise UserError(f"--calibration {source} holds no text")
    return texts[:args.samples]


def main():
    args = parse_args()
    name = Path(args.model).resolve().name if Path(args.model).exists() else args.model.rsplit("/", 1)[-1]
    output = Path(args.output_dir) / f"int{args.bits}_{args.group_size}_{name}"
    check_output_folder(output, PROVENANCE)
    check_model_name("--model", args.model)
    small = Path(args.model).is_dir() and sum(f.stat().st_size for f in Path(args.model).glob("*.safetensors")) \
        < SMALL_MODEL

    # Late, so that --help and mistakes answer at once.
    import torch
    from gptqmodel import GPTQModel, QuantizeConfig
    from gptqmodel.utils.backend import BACKEND
    from gptqmodel.utils.logger import setup_logger
    from transformers import AutoTokenizer

    from data_print_save import check_cuda, set_seed
    setup_logger().setLevel(logging.WARNING)
    set_seed(args.seed)
    device = check_cuda()
    tokenizer = AutoTokenizer.from_pretrained(args.model, trust_remote_code=args.trust_remote_code)
    texts = calibration_texts(args, tokenizer)
    samples = [{k: torch.tensor(v) for k, v in tokenizer(
        text, truncation=True, max_length=args.max_length, add_special_tokens=args.calibration in ("c4",)
        or Path(args.calibration).is_file(), return_token_type_ids=False).items()} for text in texts]
    print(f"{len(samples)} calibration samples, {sum(len(s['input_ids']) for s in samples)} tokens")

    config = QuantizeConfig(bits=args.bits, group_size=args.group_size, sym=args.sym, desc_act=args.desc_act,
                            device=str(device), offload_to_disk=not small, pack_impl="original" if small else "auto")
    start = time.time()
    model = GPTQModel.load(args.model, config, trust_remote_code=args.trust_remote_code)
    model.quantize(samples, batch_size=args.batch_size, tokenizer=tokenizer, backend=BACKEND.GPTQ_TORCH)
    with whole_folder(output, PROVENANCE) as folder:
        model.save(str(folder))
        tokenizer.save_pretrained(folder)
        write_json(folder / PROVENANCE, {"settings": vars(args), "samples": len(samples),
                                         "seconds": round(time.time() - start, 1)})
    print(f"saved to {output}")


if __name__ == "__main__":
    run_script(main)
