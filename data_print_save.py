"""Data sets and prompts, printing of settings, names of runs, saving of results.

Touches: data files and the Hugging Face hub (reading), the console, result files (writing).
Knows nothing of models.
"""
import csv
import json
import random
from datetime import datetime
from pathlib import Path

import torch
from datasets import Dataset, DatasetDict, load_dataset, load_from_disk
from transformers import set_seed as transformers_set_seed

from LoTA import UserError
from LoTA.folders import write_json

IGNORE_INDEX = -100  # the label that torch's cross entropy leaves out

VIGGO_FUNCTIONS = ("inform", "request", "give_opinion", "confirm", "verify_attribute", "suggest",
                   "request_explanation", "recommend", "request_attribute")
VIGGO_ATTRIBUTES = ("name", "release_year", "exp_release_date", "developer", "esrb", "rating", "genres",
                    "player_perspective", "platforms", "has_multiplayer", "available_on_steam",
                    "has_linux_release", "has_mac_release", "specifier")
VIGGO_INSTRUCTION = (
    "Translate the sentence about a video game into its meaning representation: one function applied to "
    "attributes, each with its value in square brackets, as in function(attribute1[value], attribute2[value]). "
    f"The function is one of: {', '.join(VIGGO_FUNCTIONS)}. "
    f"The attributes, used as the sentence needs them, are: {', '.join(VIGGO_ATTRIBUTES)}. "
    "Answer with the meaning representation only.")
GSM8K_INSTRUCTION = "Solve the problem step by step and end with a line '#### ' followed by the number."
SQL_INSTRUCTION = "Write a SQL query to answer the question based on the table schema."

# For a tokenizer that has no chat template of its own (base models): the plain headed form that Alpaca made usual.
FALLBACK_CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'system' %}{{ m.content }}\n\n"
    "{% elif m.role == 'user' %}### Instruction:\n{{ m.content }}\n\n"
    "{% else %}### Response:\n{{ m.content }}{{ eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}### Response:\n{% endif %}")

# Where each set lives on the hub: (repository, configuration, revision, {our split: its split}).
# sql-create-context has a single split: our train and test are cut from it below.
HUB = {
    "alpaca": ("yahma/alpaca-cleaned", None, None, {"train": "train"}),
    "gsm8k": ("openai/gsm8k", "main", None, {"train": "train", "test": "test"}),
    "sql": ("b-mc2/sql-create-context", None, None, {"all": "train"}),
    "viggo": ("GEM/viggo", None, "refs/convert/parquet", {"train": "train", "test": "test"}),
}
DATA_NAMES = tuple(HUB)
SPLIT_NAMES = {"train": ("train",), "test": ("test", "validation", "valid", "val", "dev")}
SQL_TEST_ROWS = 1000    # the paper's number of SQL test rows
SINGLE_FILE_TEST_SHARE = 0.2


# --- rows ---------------------------------------------------------------------------------------------------------

def read_messages(data_name, row):
    """One row of a data set as (messages before the answer, answer). Raises UserError where a part is missing.

    The messages are a system turn where the task has an instruction of its own, and a user turn. Understands the
    columns of the published sets: alpaca instruction/input/output; gsm8k question/answer; sql messages or
    question/context/answer; viggo mr/ref or meaning_representation/target.
    """
    if data_name not in HUB:
        raise UserError(f"unknown data set '{data_name}'; choose from {', '.join(DATA_NAMES)}")
    try:
        messages, answer = READ_ROW[data_name](row)
    except KeyError as missing:
        raise UserError(f"the rows do not look like '{data_name}': column {missing} is missing, found "
                        f"{', '.join(map(str, row))}") from None
    except (IndexError, TypeError, ValueError) as error:
        raise UserError(f"a row of '{data_name}' cannot be read ({error}): {str(dict(row))[:200]}") from None
    if not isinstance(answer, str) or not all(isinstance(m["content"], str) for m in messages):
        raise UserError(f"a row of '{data_name}' has no question or no answer: {str(dict(row))[:200]}")
    return messages, answer


def _read_alpaca(row):
    user = f"{row['instruction']}\n\n{row['input']}" if row.get("input") else row["instruction"]
    return [_user(user)], row["output"]


def _read_gsm8k(row):
    return [_system(GSM8K_INSTRUCTION), _user(row["question"])], row["answer"]


def _read_sql(row):
    if "messages" in row:
        *messages, last = row["messages"]
        return messages, last["content"]
    user = f"{SQL_INSTRUCTION}\n\n context: {row['context']}\n\n question: {row['question']}"
    return [_user(user)], row["answer"]


def _read_viggo(row):
    mr, ref = ("mr", "ref") if "mr" in row else ("meaning_representation", "target")
    return [_system(VIGGO_INSTRUCTION), _user(row[ref])], row[mr]


READ_ROW = {"alpaca": _read_alpaca, "gsm8k": _read_gsm8k, "sql": _read_sql, "viggo": _read_viggo}


def _system(text):
    return {"role": "system", "content": text}


def _user(text):
    return {"role": "user", "content": text}


def load_rows(data_name, split, data_dir=None):
    """The raw rows of `split` ("train" or "test") as a `datasets.Dataset`.

    data_dir: None loads from the hub. Else a `save_to_disk` folder, a csv/json/jsonl file, or a folder of such files
    named after their split (train.csv, test.jsonl, valid.jsonl ...). A folder with a single file, or a single-split
    source, is cut into fixed, disjoint train and test rows (80:20; alpaca, which has no test, is kept whole).
    Raises UserError with what to do.
    """
    if data_name not in HUB:
        raise UserError(f"unknown data set '{data_name}'; choose from {', '.join(DATA_NAMES)}")
    source = data_dir or HUB[data_name][0]
    splits = _local_splits(data_dir) if data_dir else _hub_splits(data_name, split)
    wanted = "all" if set(splits) == {"all"} else split
    if wanted not in splits:
        raise UserError(f"{source} has no {split} split, only {', '.join(splits)}")
    rows = _read_file(splits[wanted]) if isinstance(splits[wanted], Path) else splits[wanted]
    if len(rows) == 0:
        raise UserError(f"the {wanted} split of '{data_name}' in {source} is empty")
    try:
        read_messages(data_name, rows[0])
    except UserError as error:
        raise UserError(f"{source}: {error}") from None
    if wanted == "all" and not (data_name == "alpaca" and split == "train"):
        if len(rows) < 2:
            raise UserError(f"{source} has one row only: too few to be cut into train and test")
        test_size = SQL_TEST_ROWS if len(rows) > 10 * SQL_TEST_ROWS else SINGLE_FILE_TEST_SHARE
        rows = rows.train_test_split(test_size=test_size, seed=42)[split]
    return rows


def _hub_splits(data_name, split):
    repository, config, revision, names = HUB[data_name]
    ours = split if split in names else "all"
    if ours not in names:
        raise UserError(f"'{data_name}' has no {split} split; use it for training only")
    return {ours: load_dataset(repository, config, revision=revision, split=names[ours])}


def _local_splits(data_dir):
    """{"train": ..., "test": ...} as far as they are there, or {"all": ...} for a single unsplit source; the values
    are data sets, or files still to be read."""
    path = Path(data_dir)
    if not path.exists():
        raise UserError(f"--data_dir {data_dir} does not exist")
    if path.is_dir() and any((path / f).exists() for f in ("dataset_dict.json", "dataset_info.json")):
        try:
            loaded = load_from_disk(str(path))
        except IndexError:                              # how datasets answers to splits without rows
            raise UserError(f"the data set saved in {data_dir} is empty") from None
        if not isinstance(loaded, DatasetDict):
            return {"all": loaded}
        return _by_split(loaded) or {"all": next(iter(loaded.values()))}
    files = [f for f in ([path] if path.is_file() else sorted(path.iterdir())) if f.suffix in READERS]
    if not files:
        raise UserError(f"--data_dir {data_dir} holds no csv, json or jsonl file and no save_to_disk folder")
    if len(files) == 1:
        return {"all": files[0]}
    named = _by_split({f.stem: f for f in reversed(files)})
    if not named:
        raise UserError(f"{data_dir} holds several files and none is named train or test: "
                        f"{', '.join(f.name for f in files)}")
    return named


def _by_split(found):
    """{"train": ..., "test": ...} out of {name: ...}; the first known name of a split wins."""
    return {ours: found[name] for ours, names in SPLIT_NAMES.items() for name in reversed(names) if name in found}


# Plain readers, for they leave text as it is: "None", "7" or a date in an answer is not a null, a number, a time.
READERS = {".csv": lambda f: list(csv.DictReader(f)), ".json": json.load,
           ".jsonl": lambda f: [json.loads(line) for line in f if line.strip()]}


def _read_file(file):
    try:
        with open(file, newline="", encoding="utf-8") as f:
            rows = READERS[file.suffix](f)
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise UserError(f"{file} is not a list of records")
        if not rows:
            raise UserError(f"{file} is empty")
        return Dataset.from_list(rows)
    except UserError:
        raise
    except (ValueError, TypeError, csv.Error) as error:     # what json, the decoding and mixed columns raise
        raise UserError(f"{file} cannot be read as {file.suffix[1:]}: {error}") from None


# --- prompts and tokens -------------------------------------------------------------------------------------------

def prepare_tokenizer(tokenizer):
    """Gives a tokenizer what it lacks: a pad token (its eos token) and a chat template (FALLBACK_CHAT_TEMPLATE)."""
    if tokenizer.eos_token is None:
        raise UserError("the tokenizer has no eos token, which ends every answer")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.chat_template is None:
        tokenizer.chat_template = FALLBACK_CHAT_TEMPLATE
    return tokenizer


def render_prompt(tokenizer, messages):
    """The text before the answer. Training and evaluation both come through here, so that the two never differ.

    Templates that know no system turn get it as the head of the user turn.
    """
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except Exception as refused:
        if messages[0]["role"] != "system":
            raise UserError(f"the tokenizer's chat template refuses the prompt: {refused}") from refused
        user = {"role": "user", "content": messages[0]["content"] + "\n\n" + messages[1]["content"]}
        return render_prompt(tokenizer, [user, *messages[2:]])


def encode_prompt(tokenizer, prompt, max_len=None):
    """Token ids of a rendered prompt; the template wrote the special tokens. Over-long prompts lose their beginning,
    never the end that asks for the answer."""
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    return ids[-max_len:] if max_len else ids


def prepare_dataset(data_name, tokenizer, train_ratio=1.0, source_max_len=1024, target_max_len=256, debug_number=-1,
                    data_dir=None):
    """The training split, tokenized: columns input_ids, labels, length.

    Prompt tokens carry label IGNORE_INDEX. The prompt has at most `source_max_len` tokens, answer and eos together at
    most `target_max_len`. `train_ratio` keeps the first share of the rows, `debug_number` > 0 that many rows.
    """
    prepare_tokenizer(tokenizer)
    rows = load_rows(data_name, "train", data_dir)
    if not 0 < train_ratio <= 1:
        raise UserError(f"--train_ratio must be in (0, 1], not {train_ratio}")
    keep = max(1, int(len(rows) * train_ratio))
    if debug_number > 0:
        keep = min(keep, debug_number)

    def encode(row):
        messages, answer = read_messages(data_name, row)
        source = encode_prompt(tokenizer, render_prompt(tokenizer, messages), source_max_len)
        target = tokenizer(answer + tokenizer.eos_token, add_special_tokens=False)["input_ids"][:target_max_len]
        return {"input_ids": source + target, "labels": [IGNORE_INDEX] * len(source) + target,
                "length": len(source) + len(target)}

    return rows.select(range(keep)).map(encode, remove_columns=rows.column_names, desc=f"tokenizing {data_name}",
                                        keep_in_memory=True)


# --- settings, names, results -------------------------------------------------------------------------------------

def set_seed(seed):
    """Seeds random, numpy and torch."""
    random.seed(seed)
    transformers_set_seed(seed)


def check_cuda():
    """Prints what the run will compute on, and returns its torch.device."""
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(i)
            print(f"GPU {i}: {properties.name}, {properties.total_memory / 2**30:.0f} GiB")
        return torch.device("cuda")
    print(f"no GPU: running on the CPU with {torch.get_num_threads()} threads")
    return torch.device("cpu")


def params_print(*settings):
    """Prints dataclasses of settings, a line for each field."""
    for group in settings:
        print(f"--- {type(group).__name__}")
        for name, value in vars(group).items():
            print(f"  {name:<28} {value}")


def get_Ada_path(size, bits, method, first, second, third, data_name, runtime=None, peak_mb=None, when=None):
    """The name of an adapter folder, as users of the published scripts know it:

        8B_int4_LoTA_48_0.950_0.999_alpaca_<runtime>_<peak MB>_<day_time>

    For LoTA first, second, third are omega, filter_ratio and min_grad; for the baselines learning rate, rank, alpha.
    A run that has not ended has no runtime and peak yet: its folder's name goes without.
    """
    number = "{:.3f}".format if method == "LoTA" else str
    head = f"{first:g}" if method == "LoTA" else str(first)
    parts = [size, f"int{bits}", method, head, number(second), number(third), data_name]
    if runtime is not None:
        parts += [f"{runtime:.0f}s", f"{peak_mb:.0f}MB"]
    return "_".join([*parts, when or datetime.now().strftime("%d_%H%M%S")])


def save_results(output_path, name, results, *settings):
    """Saves `results` with every setting and the date in `output_path`/`name`.json; returns the path."""
    path = Path(output_path) / f"{name}.json"
    write_json(path, {"date": datetime.now().isoformat(timespec="seconds"),
                      "settings": {type(s).__name__: dict(vars(s)) for s in settings}, **results})
    print(f"results saved to {path}")
    return path
