"""Data sets, prompts and tokens; printing of settings, names of runs, saving of results.

Touches data files and the Hugging Face hub (reading), the console, and result files (writing). Knows nothing of models.
LoTA/row_files.py reads the files.
A data set is one entry of TASKS. Heavy libraries are imported where they are used, because the command line needs the
names of the data sets for --help.
"""
import random
import re
import string
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import date as Date
from datetime import datetime, time
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from LoTA import IGNORE_INDEX, UserError, processes
from LoTA.row_files import READABLE, kind_of, read_rows, row_name

if TYPE_CHECKING:
    import torch
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

Messages = list[dict[str, str]]     # turns: {"role": "system", "user" or "assistant", "content": text}

# The first name that is found wins.
SPLIT_NAMES = {"train": ("train", "training"),
               "test": ("test", "testing", "validation", "valid", "val", "dev", "eval", "evaluation")}
# Files beside rows that say something about them.
ABOUT_ROWS = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
# A set without a test split is cut. A large one gets the paper's number of SQL test rows, another one a share.
LARGE_SET_TEST_ROWS = 1000
TEST_SHARE = 0.2

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

# For a tokenizer without a chat template, such as a base model's. The headings are Alpaca's.
FALLBACK_CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'system' %}{{ m.content }}\n\n"
    "{% elif m.role == 'user' %}### Instruction:\n{{ m.content }}\n\n"
    "{% else %}### Response:\n{{ m.content }}{{ eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}### Response:\n{% endif %}")

# Put before a template that writes the date: it hides transformers' own strftime_now(). transformers hands a template
# plain data only, no function, so the date comes as {code of strftime: its text}. The newline at the end is eaten by
# transformers' trim_blocks, so that the template still begins at the beginning of a line.
FIXED_DATE = (
    "{%- macro strftime_now(format) -%}{%- set written = namespace(text=format) -%}"
    "{%- for code, text in date_codes.items() -%}{%- set written.text = written.text.replace(code, text) -%}"
    "{%- endfor -%}{{ written.text }}{%- endmacro %}\n")


# --- tasks --------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class PromptStyle:
    """How prompts are written. Training and evaluation share it, because other prompts would get other answers.

    layout: where a task's instruction is. "published": where the published scripts have it, at the head of the user
        turn or, for gsm8k, nowhere. "system": in a system turn, as in the first versions of this project.
    date: the day that a chat template which writes a date takes for today, such as 2026-07-31. None: the real one.
    """
    layout: str = "published"
    date: str | None = None


PUBLISHED = PromptStyle()


@dataclass(frozen=True)
class Task:
    """One data set: where it is, how a row becomes a prompt with its answer, how an answer is scored.

    hub: (repository, configuration or None, revision or None) on the Hugging Face hub.
    splits: {"train" or "test": the name of that split on the hub}, or {"all": ...} for a set with a single split, which
        load_rows() cuts.
    read: (row) -> (the messages before the answer, without `instruction`; the answer). It may raise KeyError,
        IndexError, TypeError or ValueError where the row is of another form.
    instruction: what the model is told to do, for every row alike. None: the rows say it.
    published: whether the published scripts' prompts have an instruction. It is at the head of their user turn.
    score: (prediction, label) -> whether the prediction is right. None: the set is for training only.
    """
    hub: tuple[str, str | None, str | None]
    splits: dict[str, str]
    read: Callable[[dict], tuple[Messages, str]]
    instruction: str | None = None
    published: bool = True
    score: Callable[[str, str], bool] | None = None


def _system(text: str) -> dict[str, str]:
    return {"role": "system", "content": text}


def _user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def _text(value: object) -> str:
    """A value as text: text as it is, a number or a truth value as it is written. Raises ValueError for any other."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if not isinstance(value, str | int | float):
        raise ValueError(f"no text but {str(value)[:80]}")
    return str(value)


ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}


def _read_chat(row: dict) -> tuple[Messages, str] | None:
    """A row of turns: OpenAI's messages (role, content) or ShareGPT's conversations (from, value). None without any.

    The last turn is the answer. A turn that would lose something, such as a tool call or a picture, raises ValueError.
    """
    turns = row.get("messages") if row.get("messages") is not None else row.get("conversations")
    if turns is None:
        return None
    if not isinstance(turns, list):
        raise ValueError("the dialogue is no list of turns")
    if row.get("tools") not in (None, "", "[]", []):
        raise ValueError("tools are not supported")
    messages = [_system(_text(row["system"]))] if row.get("system") else []
    for number, turn in enumerate(turns, 1):
        role = turn.get("role") or turn.get("from")
        if role not in ROLES or turn.get("tool_calls") or turn.get("function_call"):
            raise ValueError(f"turn {number} of '{role}' is or calls a tool, which is not supported"
                             if role in ROLES else f"turn {number} is of '{role}', which is not supported")
        content = turn["content"] if turn.get("content") is not None else turn.get("value")
        if isinstance(content, list):
            others = [part.get("type") for part in content if not isinstance(part, str) and part.get("type") != "text"]
            if others:
                raise ValueError(f"turn {number} has a part of type '{others[0]}', which is not supported")
            content = "".join(_text(part if isinstance(part, str) else part["text"]) for part in content)
        if content is None:
            raise ValueError(f"turn {number} of '{role}' has no content")
        messages.append({"role": ROLES[role], "content": _text(content)})
    if not messages or messages[-1]["role"] != "assistant":
        raise ValueError("the last turn must be the assistant's, because it is the answer")
    if not any(message["role"] == "user" for message in messages[:-1]):
        raise ValueError("no turn of the user stands before the answer")
    return messages[:-1], messages[-1]["content"]


def _read_alpaca(row: dict) -> tuple[Messages, str]:
    chat = _read_chat(row)
    if chat:
        return chat
    user = _text(row["instruction"])
    if row.get("input") not in (None, ""):
        user += f"\n\n{_text(row['input'])}"
    before = [_system(_text(row["system"]))] if row.get("system") else []
    for question, answer in row.get("history") or []:
        before += [_user(_text(question)), {"role": "assistant", "content": _text(answer)}]
    return [*before, _user(user)], row["output"]


def _read_gsm8k(row: dict) -> tuple[Messages, str]:
    return [_user(row["question"])], row["answer"]


def _score_gsm8k(prediction: str, label: str) -> bool:
    """The numbers after the last "####" are equal."""
    answer = _gsm8k_answer(prediction)
    return answer is not None and answer == _gsm8k_answer(label)


def _gsm8k_answer(text: str) -> float | str | None:
    """What follows the last ####, as a number where it is one; None without ####."""
    if "####" not in text:
        return None
    answer = text.rsplit("####", 1)[1].strip().split("\n")[0]
    answer = answer.replace(",", "").replace("$", "").rstrip(".").strip()
    try:
        return float(answer)
    except ValueError:
        return answer


def _read_sql(row: dict) -> tuple[Messages, str]:
    chat = _read_chat(row)
    if chat:
        return chat
    user = f"{SQL_INSTRUCTION}\n\n context: {_text(row['context'])}\n\n question: {_text(row['question'])}"
    return [_user(user)], row["answer"]


def _score_exactly(prediction: str, label: str) -> bool:
    """The texts are equal. White space around them does not count."""
    return prediction.strip() == label.strip()


def _read_viggo(row: dict) -> tuple[Messages, str]:
    # A file that mixes both publications has all four columns, and None in two of them.
    other = row.get("mr") is None and "meaning_representation" in row
    mr, ref = ("meaning_representation", "target") if other else ("mr", "ref")
    return [_user(row[ref])], row[mr]


def _score_viggo(prediction: str, label: str) -> bool:
    """The function names are equal, and so are the sorted attributes."""
    return _viggo_parts(prediction) == _viggo_parts(label)


def _viggo_parts(text: str) -> tuple[str, list[str]]:
    """(function, sorted attributes). Commas inside a value's brackets do not separate attributes."""
    function, _, rest = text.strip().partition("(")
    attributes = re.split(r",\s*(?![^\[]*\])", rest.strip().removesuffix(")"))
    return function.strip(), sorted(a.strip() for a in attributes)


TASKS = {
    "alpaca": Task(hub=("yahma/alpaca-cleaned", None, None), splits={"train": "train"}, read=_read_alpaca),
    "gsm8k": Task(hub=("openai/gsm8k", "main", None), splits={"train": "train", "test": "test"},
                  read=_read_gsm8k, instruction=GSM8K_INSTRUCTION, published=False, score=_score_gsm8k),
    "sql": Task(hub=("b-mc2/sql-create-context", None, None), splits={"all": "train"},
                read=_read_sql, score=_score_exactly),
    "viggo": Task(hub=("GEM/viggo", None, "refs/convert/parquet"), splits={"train": "train", "test": "test"},
                  read=_read_viggo, instruction=VIGGO_INSTRUCTION, score=_score_viggo)}


def find_task(data_name: str) -> Task:
    """The entry of TASKS. Raises UserError where there is none."""
    if data_name not in TASKS:
        raise UserError(f"unknown data set '{data_name}'; choose from {', '.join(TASKS)}")
    return TASKS[data_name]


def scored_tasks() -> list[str]:
    """The names of the data sets that can be scored."""
    return [name for name, task in TASKS.items() if task.score]


# --- rows ---------------------------------------------------------------------------------------------------------

def read_messages(data_name: str, row: dict, layout: str = "published") -> tuple[Messages, str]:
    """One row of a data set as (messages before the answer, answer).

    layout: where the task's instruction is, as in PromptStyle. The columns are those of the published sets:
    alpaca instruction, input, output; gsm8k question, answer; sql question, context, answer; viggo mr, ref, or
    meaning_representation, target. alpaca and sql also take a dialogue in messages (role, content) or conversations
    (from, value), whose last turn is the answer. A number is read as its text.
    Raises UserError where a part is missing.
    """
    task = find_task(data_name)
    try:
        messages, answer = task.read(row)
    except KeyError as missing:
        raise UserError(f"the rows do not look like '{data_name}': column {missing} is missing, found "
                        f"{', '.join(map(str, row))}") from None
    except (AttributeError, IndexError, TypeError, ValueError) as error:
        raise UserError(f"a row of '{data_name}' cannot be read ({error}): {str(dict(row))[:200]}") from None
    try:
        messages = [{**message, "content": _text(message["content"])} for message in messages]
        answer = _text(answer)
    except (KeyError, TypeError, ValueError):
        raise UserError(f"a row of '{data_name}' has no question or no answer: {str(dict(row))[:200]}") from None
    if task.instruction and layout == "system":
        messages = [_system(task.instruction), *messages]
    elif task.instruction and task.published:
        messages = [_user(f"{task.instruction}\n\n{messages[0]['content']}"), *messages[1:]]
    return messages, answer


def load_rows(data_name: str, split: str, data_dir: str | None = None) -> "Dataset":
    """The raw rows of `split` ("train" or "test").

    data_dir: None loads from the hub. Else it is a save_to_disk folder, a file that LoTA/row_files.py reads, or a
    folder of such files that are named after their split (train.csv, test.jsonl, valid.parquet ...). A single file or a
    single split is cut into fixed, disjoint train and test rows: 1,000 test rows where there are more than 10,000, else
    20 %. A set that is for training only is kept whole. A file that is named after held-out rows is never trained on.
    Every row is read once, and a row whose question or answer is blank is left out. Prints what is left out.
    Raises UserError with what to do.
    """
    task = find_task(data_name)
    source = data_dir or task.hub[0]
    splits = _local_splits(data_dir) if data_dir else _hub_splits(data_name, split)
    wanted = "all" if set(splits) == {"all"} else split
    if wanted not in splits:
        raise UserError(f"{source} has no {split} split, only {', '.join(splits)}; a file with train or test in its "
                        "name is that split")
    if isinstance(splits[wanted], list):
        rows = _rows_of_files(data_name, splits[wanted])
    else:
        rows = splits[wanted]
        if len(rows) == 0:
            raise UserError(f"the {wanted} split of '{data_name}' in {source} is empty")
        usable = _usable(data_name, rows, lambda number: f"{source}, {wanted} split, row {number}")
        rows = rows if len(usable) == len(rows) else rows.select(usable)
    if len(rows) == 0:
        raise UserError(f"the {wanted} split of '{data_name}' in {source} has no row with a question and an answer")
    if wanted == "all" and not (task.score is None and split == "train"):
        if len(rows) < 2:
            raise UserError(f"{source} has one row only: too few to be cut into train and test")
        test_size = LARGE_SET_TEST_ROWS if len(rows) > 10 * LARGE_SET_TEST_ROWS else TEST_SHARE
        cut = rows.train_test_split(test_size=test_size, seed=42)
        print(f"{source} has a single split: {len(cut['train'])} of its rows train, {len(cut['test'])} test")
        rows = cut[split]
    return rows


def _rows_of_files(data_name: str, files: list[Path]) -> "Dataset":
    """The usable rows of files, one after the other. The columns are those of all of them."""
    from datasets import Dataset
    rows = []
    for file in files:
        read = read_rows(file)
        rows += [read[i] for i in _usable(data_name, read, lambda number, file=file: row_name(file, number))]
    columns = dict.fromkeys(column for row in rows for column in row)
    try:
        # use_json, because a column may hold text in one row and a list in the next.
        return Dataset.from_dict({column: [row.get(column) for row in rows] for column in columns},
                                 on_mixed_types="use_json")
    except (ValueError, TypeError) as error:
        raise UserError(f"{files[0]} cannot become a table: {error}") from None


def _usable(data_name: str, rows: Iterable[dict], name: Callable[[int], str]) -> list[int]:
    """The indices of the rows that have a question and an answer. Prints how many have none.

    name: (number of a row, from 1) -> how a message names it. Raises UserError where a row is of another form.
    """
    usable, blank = [], []
    for i, row in enumerate(rows):
        try:
            # In a system turn, so that the instruction does not fill an empty question.
            messages, answer = read_messages(data_name, row, "system")
        except UserError as error:
            raise UserError(f"{name(i + 1)}: {error}") from None
        asked = [message["content"] for message in messages if message["role"] == "user"]
        (usable if answer.strip() and (not asked or asked[-1].strip()) else blank).append(i)
    if blank:
        print(f"{len(blank)} of {len(usable) + len(blank)} rows of '{data_name}' have an empty question or answer and "
              f"are left out, the first is {name(blank[0] + 1)}")
    return usable


def _hub_splits(data_name: str, split: str) -> dict[str, "Dataset"]:
    from datasets import load_dataset
    task = TASKS[data_name]
    repository, config, revision = task.hub
    ours = split if split in task.splits else "all"
    if ours not in task.splits:
        raise UserError(f"'{data_name}' has no {split} split; use it for training only")
    return {ours: load_dataset(repository, config, revision=revision, split=task.splits[ours])}


def _local_splits(data_dir: str) -> "dict[str, Dataset | list[Path]]":
    """{"train": ..., "test": ...} as far as they are there, or {"all": ...} for a single source.

    The values are data sets, or files that are still to be read. Prints what of a folder is not used.
    """
    path = Path(data_dir)
    if not path.exists():
        raise UserError(f"--data_dir {data_dir} does not exist")
    there = sorted(f for f in path.iterdir() if not f.name.startswith(".")) if path.is_dir() else [path]
    names = {f.name for f in there}
    if path.is_dir() and ("dataset_dict.json" in names or {"dataset_info.json", "state.json"} <= names):
        return _saved_splits(path, there)
    files = [f for f in there if f.is_file() and kind_of(f) and f.name not in ABOUT_ROWS]
    if not files:
        raise UserError(f"--data_dir {data_dir} holds no rows: it must be {READABLE}, a folder of such files, or a "
                        "save_to_disk folder")
    splits = {ours: chosen for ours in SPLIT_NAMES if (chosen := _files_of(ours, files))}
    if len(files) == 1 and not {"test", "testing"} & set(_words(files[0])):
        splits = {"all": files}         # a lone validation file is a single source, which load_rows() cuts
    if not splits:
        raise UserError(f"{data_dir} holds several files and none is named train or test: "
                        f"{', '.join(f.name for f in files)}")
    _say_unused(path, [f for f in there if not any(f in chosen for chosen in splits.values())])
    return splits


def _saved_splits(path: Path, there: list[Path]) -> "dict[str, Dataset]":
    """The splits of a save_to_disk folder, as _local_splits() gives them. there: what lies in it."""
    from datasets import DatasetDict, load_from_disk
    try:
        loaded = load_from_disk(str(path))
    except IndexError:                              # how datasets answers to splits without rows
        raise UserError(f"the data set saved in {path} is empty") from None
    if not isinstance(loaded, DatasetDict):
        _say_unused(path, [f for f in there if f.name not in ABOUT_ROWS and f.suffix != ".arrow"])
        return {"all": loaded}
    found = {ours: next(name for name in names if name in loaded)
             for ours, names in SPLIT_NAMES.items() if set(names) & set(loaded)}
    if not found and len(loaded) > 1:
        raise UserError(f"{path} holds several splits and none is named train or test: {', '.join(loaded)}")
    found = found or {"all": next(iter(loaded))}
    _say_unused(path, [f for f in there if f.name not in (*found.values(), *ABOUT_ROWS)])
    return {ours: loaded[name] for ours, name in found.items()}


def _files_of(split: str, files: list[Path]) -> list[Path]:
    """The files that are named after a split, in their order: one file, or all shards of one. [] where there is none.

    Raises UserError where it is not clear which file is meant.
    """
    for name in SPLIT_NAMES[split]:
        # A name that says both, such as train_dev.csv, is held out, because held-out rows must not be trained on.
        named = [f for f in files if name in _words(f) and (split == "test" or _split_in(f) == "train")]
        exact = [f for f in named if f.name.lower().partition(".")[0] == name]
        if len(named) > 1 and len(exact) == 1:
            return exact
        shards = [re.fullmatch(r"(.*?)-(\d+)-of-(\d+)(\..*)", f.name) for f in named]
        if named and all(shards):
            first = shards[0]
            whole = [f"{first[1]}-{i:0{len(first[2])}}-of-{first[3]}{first[4]}" for i in range(int(first[3]))]
            if [f.name for f in named] != whole:
                raise UserError(f"{named[0].parent} must hold {len(whole)} files {whole[0]} ... {whole[-1]}, found "
                                f"{', '.join(f.name for f in named)}")
            return named
        if len(named) > 1:
            raise UserError(f"{named[0].parent} holds several files that are named {name}: "
                            f"{', '.join(f.name for f in named)}; keep one")
        if named:
            return named
    return []


def _words(file: Path) -> list[str]:
    """The words of a file's name, in lower case. "testset" and "TestData" say test."""
    words = [word.lower() for word in re.findall("[A-Z]?[a-z]+|[A-Z]+", file.name)]
    return words + [re.sub("(set|data|split|file|rows)$", "", word) for word in words]


def _split_in(file: Path) -> str | None:
    """The split that a file's name says: "test" where any of its words does."""
    return next((ours for ours in ("test", "train") if set(SPLIT_NAMES[ours]) & set(_words(file))), None)


def _say_unused(folder: Path, unused: list[Path]) -> None:
    if unused:
        print(f"not used of {folder}: {', '.join(f.name + '/' * f.is_dir() for f in unused)}")


# --- prompts and tokens -------------------------------------------------------------------------------------------

def load_tokenizer(places: list[str | None], trust_remote_code: bool = False) -> "PreTrainedTokenizerBase":
    """The tokenizer of the first place that is a hub name, or a folder that has one.

    Where it has no chat template, it gets that of the next place that has one. prepare_tokenizer() adds what is still
    missing. Raises UserError where no place has a tokenizer, and where a file of it is damaged.
    """
    found = [place for place in dict.fromkeys(filter(None, places))
             if (Path(place) / "tokenizer_config.json").exists() or not Path(place).is_dir()]
    if not found:
        raise UserError(f"no tokenizer in {places[0]}; name the 16-bit model with --pretrained")
    tokenizer = read_tokenizer(found[0], trust_remote_code)
    for place in found[1:]:
        if tokenizer.chat_template is None:
            _take_template(tokenizer, found[0], place, trust_remote_code)
    return prepare_tokenizer(tokenizer)


def read_tokenizer(place: str, trust_remote_code: bool = False) -> "PreTrainedTokenizerBase":
    """AutoTokenizer's, with a UserError that names the file where one is damaged."""
    from tokenizers import Tokenizer
    from transformers import AutoConfig, AutoTokenizer

    from LoTA.folders import reading
    with reading(place, "tokenizer_config.json"):
        try:
            return AutoTokenizer.from_pretrained(place, trust_remote_code=trust_remote_code)
        except Exception as error:                      # tokenizers raises Exception itself
            file = Path(place) / "tokenizer.json"
            if file.exists():
                with reading(place, "tokenizer.json"):
                    Tokenizer.from_file(str(file))
            if (Path(place) / "config.json").exists():
                with reading(place, "config.json"):
                    AutoConfig.from_pretrained(place, trust_remote_code=trust_remote_code)
            raise error


def _take_template(tokenizer: "PreTrainedTokenizerBase", its_place: str, place: str, trust_remote_code: bool) -> None:
    """Gives `tokenizer` the chat template of the tokenizer at `place`, where that has one, and says so.

    A template that writes added tokens which `tokenizer` lacks is not taken, because they would fall to pieces.
    """
    try:
        other = read_tokenizer(place, trust_remote_code)
    except (OSError, UserError) as error:
        if Path(place).is_dir():
            raise
        # A hub name may be there only to say the model's size, on a machine that does not reach the hub.
        print(f"the chat template of {place} could not be read: {(str(error).splitlines() or ['no reason given'])[0]}")
        return
    if other.chat_template is None:
        return
    vocabulary, template = tokenizer.get_vocab(), other.get_chat_template()
    lacking = [token for token in other.get_added_vocab() if token in template and token not in vocabulary]
    if lacking:
        print(f"the chat template of {place} is not used: {its_place} has no token {lacking[0]}")
    else:
        tokenizer.chat_template = other.chat_template
        print(f"{its_place} has no chat template: that of {place} is used")


def prepare_tokenizer(tokenizer: "PreTrainedTokenizerBase") -> "PreTrainedTokenizerBase":
    """Gives a tokenizer what it lacks: a pad token (its eos token) and a chat template (FALLBACK_CHAT_TEMPLATE).

    Changes it in place, says it where the fallback is used, and returns it. Raises UserError where it has no eos token.
    """
    if tokenizer.eos_token is None:
        place = tokenizer.name_or_path
        raise UserError(f"the tokenizer{' of ' * bool(place)}{place} has no eos token, which ends every answer; its "
                        "tokenizer_config.json says it")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.chat_template is None:
        tokenizer.chat_template = FALLBACK_CHAT_TEMPLATE
        print("the tokenizer has no chat template: prompts have the headings '### Instruction:' and '### Response:'")
    return tokenizer


def template_date(tokenizer: "PreTrainedTokenizerBase", recorded: str | None = None) -> str | None:
    """The date that prompts are rendered with, such as 2026-07-31: `recorded`, else today's.

    None where the chat template writes no date.
    """
    if "strftime_now" not in tokenizer.get_chat_template():
        return None
    return recorded or Date.today().isoformat()


@cache
def _date_codes(date: str) -> dict[str, str]:
    """{code of strftime, such as "%d" or "%-d": its text at the beginning of that day}."""
    day = datetime.combine(Date.fromisoformat(date), time.min)
    codes = [f"%{flag}{letter}" for flag in ("", *"-_0^#") for letter in string.ascii_letters]
    texts = {code: day.strftime(code) for code in codes}
    known = {code: text for code, text in texts.items() if text != code}
    return {"%%": "\0", **known, "\0": "%"}            # replaced in this order, so "%%d" is "%d" and no day


def render_prompt(tokenizer: "PreTrainedTokenizerBase", messages: Messages, date: str | None = None) -> str:
    """The text before the answer. Training and evaluation both call this, so their prompts never differ.

    date: the day that a template which writes a date takes for today, such as 2026-07-31. None: the real one.
    A template that knows no system turn gets its text at the head of the user turn. Raises UserError where the template
    refuses the prompt.
    """
    options, date = {}, template_date(tokenizer, date)
    if date:
        options = {"chat_template": FIXED_DATE + tokenizer.get_chat_template(), "date_codes": _date_codes(date)}
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **options)
    except Exception as refused:
        if len(messages) < 2 or messages[0]["role"] != "system":
            raise UserError(f"the tokenizer's chat template refuses the prompt: {refused}") from refused
        user = {"role": "user", "content": messages[0]["content"] + "\n\n" + messages[1]["content"]}
        return render_prompt(tokenizer, [user, *messages[2:]], date)


def encode_prompt(tokenizer: "PreTrainedTokenizerBase", prompt: str, max_len: int | None = None) -> list[int]:
    """The token ids of a rendered prompt. With `max_len` the last so many of them; fit_prompt() cuts with more care.

    No special tokens are added, because the template wrote them.
    """
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    return ids[-max_len:] if max_len else ids


def fit_prompt(tokenizer: "PreTrainedTokenizerBase", messages: Messages, max_len: int,
               date: str | None = None) -> tuple[list[int], bool]:
    """(the token ids of the prompt, at most `max_len`; whether text was cut). date: as in render_prompt().

    A prompt that is too long stays well formed: what the template writes and the system turns are kept. The text of the
    other turns loses its beginning, never the end that asks for the answer. Raises UserError where `max_len` has no
    room for what must be kept.
    """
    def encode(kept: int) -> list[int]:
        """The prompt with the last `kept` characters of those texts."""
        turns = []
        for message in reversed(messages):
            text = message["content"]
            if message["role"] != "system":
                text = text[max(0, len(text) - kept):]
                kept -= len(text)
            turns.insert(0, {**message, "content": text})
        return encode_prompt(tokenizer, render_prompt(tokenizer, turns, date))

    ids = encode_prompt(tokenizer, render_prompt(tokenizer, messages, date))
    if len(ids) <= max_len:
        return ids, False
    most = encode(0)
    if len(most) > max_len:
        raise UserError(f"--source_max_len {max_len} has no room for a question: the chat template and the system turn "
                        f"take {len(most)} tokens of every prompt")
    fits, too_many = 0, sum(len(m["content"]) for m in messages if m["role"] != "system")
    while too_many - fits > 1:                          # bisection: the number of characters that just fits
        middle = (fits + too_many) // 2
        ids = encode(middle)
        fits, too_many, most = (middle, too_many, ids) if len(ids) <= max_len else (fits, middle, most)
    return most, True


def encode_answer(tokenizer: "PreTrainedTokenizerBase", answer: str) -> list[int]:
    """The token ids of an answer with its end token."""
    return tokenizer(answer + tokenizer.eos_token, add_special_tokens=False)["input_ids"]


def check_fit(place: str, tokenizer: "PreTrainedTokenizerBase", rows: Iterable[list[int]], new_tokens: int = 0,
              trust_remote_code: bool = False) -> int | None:
    """Checks that rows fit the model at `place`, a folder or a hub name. Reads its config only.

    rows: their token ids. new_tokens: how many more may be generated after each. Returns how many new tokens fit after
    the longest row; None where the model's config sets no limit. Raises UserError where a row does not fit.
    A row must have a token, every id must have a row of the embeddings, and a row with its new tokens must fit
    max_position_embeddings.
    """
    from transformers import AutoConfig

    from LoTA.folders import reading
    with reading(place, "config.json"):
        config = AutoConfig.from_pretrained(place, trust_remote_code=trust_remote_code).get_text_config()
    embeddings, positions = (getattr(config, name, None) for name in ("vocab_size", "max_position_embeddings"))
    longest, its_number = 0, 0
    for number, ids in enumerate(rows, 1):
        if not len(ids):
            raise UserError(f"row {number} has no token: look whether the tokenizer's chat template is whole")
        if len(ids) > longest:
            longest, its_number = len(ids), number
        # Shorter rows of a batch are padded, so the pad token must be there as well.
        for largest, where in ((max(ids, default=0), f"row {number}"), (tokenizer.pad_token_id, "the padding")):
            if embeddings and largest >= embeddings:
                token = tokenizer.convert_ids_to_tokens(largest)
                raise UserError(f"{where} has token {largest} ({token!r}), but {place} has {embeddings} embeddings "
                                "(vocab_size in config.json): it needs the tokenizer of its own model")
    if positions and longest + new_tokens > positions:
        if not new_tokens:
            remedy = "shorten the row, or lower --source_max_len or --target_max_len where it trains"
        elif longest < positions:
            remedy = f"lower --max_new_tokens to {positions - longest} or less"
        else:
            remedy = "leave the row out"
        more = f" before {new_tokens} new ones" if new_tokens else ""
        raise UserError(f"row {its_number} has {longest} tokens{more}, but {place} takes {positions} "
                        f"(max_position_embeddings): {remedy}")
    return positions - longest if positions else None


def prepare_dataset(data_name: str, tokenizer: "PreTrainedTokenizerBase", train_ratio: float = 1.0,
                    source_max_len: int = 1024, target_max_len: int = 256, debug_number: int = -1,
                    data_dir: str | None = None, style: PromptStyle = PUBLISHED) -> "Dataset":
    """The training split, tokenized: columns input_ids, labels, length.

    Prompt tokens have the label IGNORE_INDEX. A prompt has at most `source_max_len` tokens: fit_prompt() cuts a longer
    one. An answer with its end token has at most `target_max_len`: a longer one loses its end and its end token, so the
    loss says nothing about what follows its last token. Prints how many of both are cut.
    train_ratio: the share of the rows to keep, from the first on. debug_number: where it is positive, keep at most so
    many rows. style: how the prompts are written.
    """
    prepare_tokenizer(tokenizer)
    rows = load_rows(data_name, "train", data_dir)
    if not 0 < train_ratio <= 1:
        raise UserError(f"--train_ratio must be in (0, 1], not {train_ratio}")
    keep = max(1, int(len(rows) * train_ratio))
    if debug_number > 0:
        keep = min(keep, debug_number)

    def encode(row: dict) -> dict:
        messages, answer = read_messages(data_name, row, style.layout)
        source, prompt_cut = fit_prompt(tokenizer, messages, source_max_len, style.date)
        whole_target = encode_answer(tokenizer, answer)
        target = whole_target[:target_max_len]
        return {"input_ids": source + target, "labels": [IGNORE_INDEX] * len(source) + target,
                "length": len(source) + len(target),
                "prompt_cut": prompt_cut, "answer_cut": len(target) < len(whole_target)}

    data = rows.select(range(keep)).map(encode, remove_columns=rows.column_names, desc=f"tokenizing {data_name}",
                                        keep_in_memory=True)
    prompts, answers = sum(data["prompt_cut"]), sum(data["answer_cut"])
    print(f"{data_name}: {len(data)} rows; {prompts} prompts are cut to --source_max_len {source_max_len} tokens, "
          f"{answers} answers to --target_max_len {target_max_len}" + (
              "; a cut answer trains without its end token" if answers else ""))
    return data.remove_columns(["prompt_cut", "answer_cut"])


# --- settings, names, results -------------------------------------------------------------------------------------

def set_seed(seed: int) -> None:
    """Seeds random, numpy and torch."""
    from transformers import set_seed as transformers_set_seed
    random.seed(seed)
    transformers_set_seed(seed)


def check_cuda() -> "torch.device":
    """Prints what the run will compute on. Returns its torch.device."""
    import torch
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(i)
            print(f"GPU {i}: {properties.name}, {properties.total_memory / 2**30:.0f} GiB")
        return torch.device("cuda")
    print(f"no GPU: running on the CPU with {torch.get_num_threads()} threads")
    return torch.device("cpu")


def params_print(*settings) -> None:
    """Prints dataclasses of settings, a line for each field."""
    for group in settings:
        print(f"--- {type(group).__name__}")
        for name, value in vars(group).items():
            print(f"  {name:<28} {value}")


def get_Ada_path(size: str, bits: int, method: str, first: float, second: float, third: float, data_name: str,
                 runtime: float | None = None, peak_mb: float | None = None, when: str | None = None) -> str:
    """The name of an adapter folder, as users of the published scripts know it:

        8B_int4_LoTA_48_0.950_0.999_alpaca_<runtime>_<peak MB>_<day_time>

    first, second, third: omega, filter_ratio and min_grad for LoTA; learning rate, rank and alpha for the others.
    runtime (s) and peak_mb (MiB): None while the run goes on; the name leaves them out then.
    """
    number = "{:.3f}".format if method == "LoTA" else str
    head = f"{first:g}" if method == "LoTA" else str(first)
    parts = [size, f"int{bits}", method, head, number(second), number(third), data_name]
    if runtime is not None:
        parts += [f"{runtime:.0f}s", f"{peak_mb:.0f}MB"]
    return "_".join([*parts, when or datetime.now().strftime("%d_%H%M%S")])


def save_results(output_path: str | Path, name: str, results: dict, *settings) -> Path:
    """Saves `results` with every setting and the date as `output_path`/`name`.json. Returns the path.

    Of several processes the first one saves.
    """
    from LoTA.storage import write_json
    path = Path(output_path) / f"{name}.json"
    if processes.is_first():
        write_json(path, {"date": datetime.now().isoformat(timespec="seconds"),
                          "settings": {type(s).__name__: dict(vars(s)) for s in settings}, **results})
    print(f"results saved to {path}")
    return path
