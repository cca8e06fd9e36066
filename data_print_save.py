"""Data sets, prompts and tokens; printing of settings, names of runs, saving of results.

Touches data files and the Hugging Face hub (reading), the console, and result files (writing). Knows nothing of models.
LoTA/row_files.py reads the files, and LoTA/own_rows.py people's own rows.
A published data set is one entry of TASKS. Heavy libraries are imported where they are used, because the command line
needs the names of the data sets for --help.
"""
import itertools
import random
import re
import string
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from datetime import date as Date
from datetime import datetime, time
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from LoTA import IGNORE_INDEX, UserError, own_rows, processes, scores
from LoTA.own_rows import CHAT, HUB_NAME, TEXT, Messages, RowForm, is_text, system_turn, text_of, user_turn
from LoTA.row_files import READABLE, is_plain_text, kind_of, read_rows, read_text, row_name

if TYPE_CHECKING:
    import torch
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

    from LoTA.adapter_folder import LotaConfig
    from LoTA.settings import baseConfig

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
    chat_template: the text of --chat_template, for load_tokenizer(). None: the tokenizer's own.
    """
    layout: str = "published"
    date: str | None = None
    chat_template: str | None = None


def style_of(base: "baseConfig", trained: "LotaConfig | None" = None) -> PromptStyle:
    """How prompts are written: as a flag says, else as in the training of the adapter or checkpoint.

    Raises UserError where --chat_template cannot be read.
    """
    layout, date, template = ((trained.prompt_layout, trained.template_date, trained.chat_template) if trained
                              else ("published", None, None))
    return PromptStyle(base.prompt_layout or layout, date, read_chat_template(base.chat_template) or template)


PUBLISHED = PromptStyle()
PLAIN = RowForm()


@dataclass(frozen=True)
class Task:
    """One data set: where it is, how a row becomes a prompt with its answer, how an answer is scored.

    hub: (repository, configuration or None, revision or None) on the Hugging Face hub. None: the rows are the user's.
    splits: {"train" or "test": the name of that split on the hub}, or {"all": ...} for a set with a single split, which
        load_rows() cuts.
    read: (row) -> (the messages before the answer, without `instruction`; the answer). It may raise KeyError,
        IndexError, TypeError or ValueError where the row is of another form.
    instruction: what the model is told to do, for every row alike. None: the rows say it.
    published: whether the published scripts' prompts have an instruction. It is at the head of their user turn.
    score: (prediction, label) -> whether the prediction is right. None: the set is for training only.
    """
    hub: tuple[str, str | None, str | None] | None
    splits: dict[str, str]
    read: Callable[[dict], tuple[Messages, str]]
    instruction: str | None = None
    published: bool = True
    score: Callable[[str, str], bool] | None = None


def _read_alpaca(row: dict) -> tuple[Messages, str]:
    return own_rows.read_dialogue(row) or own_rows.read_instruction(row)


def _read_gsm8k(row: dict) -> tuple[Messages, str]:
    return [user_turn(row["question"])], row["answer"]


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
    dialogue = own_rows.read_dialogue(row)
    if dialogue:
        return dialogue
    user = f"{SQL_INSTRUCTION}\n\n context: {text_of(row['context'])}\n\n question: {text_of(row['question'])}"
    return [user_turn(user)], row["answer"]


def _read_viggo(row: dict) -> tuple[Messages, str]:
    # A file that mixes both publications has all four columns, and None in two of them.
    other = row.get("mr") is None and "meaning_representation" in row
    mr, ref = ("meaning_representation", "target") if other else ("mr", "ref")
    return [user_turn(row[ref])], row[mr]


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
                read=_read_sql, score=scores.exact),
    "viggo": Task(hub=("GEM/viggo", None, "refs/convert/parquet"), splits={"train": "train", "test": "test"},
                  read=_read_viggo, instruction=VIGGO_INSTRUCTION, score=_score_viggo)}


# People's own rows. A text is not scored: its perplexity is measured.
OWN = {CHAT: Task(hub=None, splits={}, read=own_rows.read_chat, score=scores.exact),
       TEXT: Task(hub=None, splits={}, read=own_rows.read_text_row)}


def find_task(data_name: str) -> Task:
    """The entry of TASKS or OWN, or one for a hub name. Raises UserError where there is none."""
    if data_name in TASKS or data_name in OWN:
        return (TASKS | OWN)[data_name]
    if Path(data_name).exists():
        raise UserError(f"'{data_name}' is a place and no data set: write {CHAT}:{data_name} or {TEXT}:{data_name}")
    if not HUB_NAME.fullmatch(data_name):
        raise UserError(f"unknown data set '{data_name}'; choose from {', '.join([*TASKS, *OWN])}, or OWNER/NAME on "
                        "the hub")
    return Task(hub=(data_name, None, None), splits={}, read=own_rows.read_any, score=scores.exact)


def training_sets() -> list[str]:
    """What --training_data_name takes, as --help lists it."""
    return [*TASKS, *OWN, "OWNER/NAME"]


def scored_tasks() -> list[str]:
    """What --ft_dataset_name takes, as --help lists it."""
    return [*(name for name, task in TASKS.items() if task.score), *OWN, "OWNER/NAME"]


def find_measured(text: str, data_dir: str | None = None) -> own_rows.DataSet:
    """The set that --ft_dataset_name means. Raises UserError where it cannot be measured."""
    sets = own_rows.parse_sets(text, data_dir)
    if len(sets) > 1:
        raise UserError(f"--ft_dataset_name {text} names several sets: evaluate one at a time")
    if sets[0].name in TASKS and TASKS[sets[0].name].score is None:
        raise UserError(f"'{sets[0].name}' is for training only; choose from {', '.join(scored_tasks())}")
    find_task(sets[0].name)
    return sets[0]


# --- rows ---------------------------------------------------------------------------------------------------------

def read_messages(data_name: str, row: dict, layout: str = "published") -> tuple[Messages, str]:
    """One row of a data set as (messages before the answer, answer).

    layout: where the task's instruction is, as in PromptStyle. The columns are those of the published sets:
    alpaca instruction, input, output; gsm8k question, answer; sql question, context, answer; viggo mr, ref, or
    meaning_representation, target. alpaca and sql also take a dialogue in messages (role, content) or conversations
    (from, value), whose last turn is the answer. chat and hub names take every form of own_rows.FORMS. A text has no
    messages. A number is read as its text.
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
        messages = [{**message, "content": text_of(message["content"])} for message in messages]
        answer = text_of(answer)
    except (KeyError, TypeError, ValueError):
        raise UserError(f"a row of '{data_name}' has no question or no answer: {str(dict(row))[:200]}") from None
    if task.instruction and layout == "system":
        messages = [system_turn(task.instruction), *messages]
    elif task.instruction and task.published:
        messages = [user_turn(f"{task.instruction}\n\n{messages[0]['content']}"), *messages[1:]]
    return messages, answer


def load_rows(data_name: str, split: str, data_dir: str | None = None, form: RowForm = PLAIN,
              check: Callable[[dict], object] | None = None) -> "Dataset":
    """The raw rows of `split` ("train" or "test").

    data_dir: None loads from the hub. Else it is a save_to_disk folder, a file that LoTA/row_files.py reads, or a
    folder of such files that are named after their split (train.csv, test.jsonl, valid.parquet ...). A single file or a
    single split is cut into fixed, disjoint train and test rows: 1,000 test rows where there are more than 10,000, else
    20 %. A published set that is for training only is kept whole, and of a lone text the end tests. A file that is
    named after held-out rows is never trained on.
    Every row is read once, and a row whose question or answer is blank is left out. Prints what is left out.
    form: how own rows are found and read; published sets do not use it. check: a function that is called with each row
    and raises UserError where it is of no use.
    Raises UserError with what to do, and with the file and the row where one cannot be read.
    """
    from datasets import Dataset
    task = find_task(data_name)
    if data_name in TASKS:
        form = PLAIN
    if data_dir:
        splits = _local_splits(data_dir, data_name == TEXT)
    elif task.hub is None:
        raise UserError(f"the rows of '{data_name}' are your own: say where they are with --data_dir PLACE, or as "
                        f"{data_name}:PLACE")
    else:
        splits = _hub_splits(data_name, split) if data_name in TASKS else _own_hub_splits(data_name, split, form)
    source = data_dir or task.hub[0]
    wanted = "all" if set(splits) == {"all"} else split
    if wanted not in splits:
        raise UserError(f"{source} has no {split} split, only {', '.join(splits)}; a file with train or test in its "
                        "name is that split")
    if isinstance(splits[wanted], list):
        rows = _rows_of_files(data_name, splits[wanted], form, check)
    else:
        def name(number: int) -> str:
            return f"{source}, {wanted} split, row {number}"

        rows = splits[wanted]
        if len(rows) == 0:
            raise UserError(f"the {wanted} split of '{data_name}' in {source} is empty")
        if form.changes:
            rows = rows.map(lambda row, i: _shaped(form, row, name(i + 1)), with_indices=True, keep_in_memory=True,
                            remove_columns=rows.column_names, desc=f"columns of {data_name}")
        usable = _usable(data_name, rows, name, check)
        rows = rows if len(usable) == len(rows) else rows.select(usable)
    if len(rows) == 0:
        raise UserError(f"the {wanted} split of '{data_name}' in {source} has no row with a question and an answer")
    if wanted == "all" and not (split == "train" and data_name in TASKS and task.score is None):
        if len(rows) == 1 and is_text(data_name, rows[0]):
            print(f"{source} holds a single text: its end, about a fifth of it, tests")
            return Dataset.from_list([{"text": own_rows.cut_text(rows[0]["text"])[split]}])
        if len(rows) < 2:
            raise UserError(f"{source} has one row only: too few to be cut into train and test")
        test_size = LARGE_SET_TEST_ROWS if len(rows) > 10 * LARGE_SET_TEST_ROWS else TEST_SHARE
        cut = rows.train_test_split(test_size=test_size, seed=42)
        print(f"{source} has a single split: {len(cut['train'])} of its rows train, {len(cut['test'])} test")
        rows = cut[split]
    return rows


def _rows_of_files(data_name: str, files: list[Path], form: RowForm,
                   check: Callable[[dict], object] | None) -> "Dataset":
    """The usable rows of files, one after the other. The columns are those of all of them."""
    from datasets import Dataset
    rows = []
    for file in files:
        read = [_shaped(form, row, row_name(file, number)) for number, row in enumerate(read_rows(file), 1)]
        rows += [read[i] for i in _usable(data_name, read, lambda number, file=file: row_name(file, number), check)]
    columns = dict.fromkeys(column for row in rows for column in row)
    try:
        # use_json, because a column may hold text in one row and a list in the next.
        return Dataset.from_dict({column: [row.get(column) for row in rows] for column in columns},
                                 on_mixed_types="use_json")
    except (ValueError, TypeError) as error:
        raise UserError(f"{files[0]} cannot become a table: {error}") from None


def _shaped(form: RowForm, row: dict, name: str) -> dict:
    """form.shape(row). name: how a message names the row."""
    try:
        return form.shape(row)
    except ValueError as error:
        raise UserError(f"{name}: {error}: {str(dict(row))[:200]}") from None


def _usable(data_name: str, rows: Iterable[dict], name: Callable[[int], str],
            check: Callable[[dict], object] | None = None) -> list[int]:
    """The indices of the rows that have a question and an answer. Prints how many have none.

    name: (number of a row, from 1) -> how a message names it. Raises UserError where a row is of another form, or where
    `check` raises it.
    """
    usable, blank = [], []
    for i, row in enumerate(rows):
        try:
            # In a system turn, so that the instruction does not fill an empty question.
            messages, answer = read_messages(data_name, row, "system")
            asked = [message["content"] for message in messages if message["role"] == "user"]
            has_both = answer.strip() and (not asked or asked[-1].strip())
            if check and has_both:
                check(row)
        except UserError as error:
            raise UserError(f"{name(i + 1)}: {error}") from None
        (usable if has_both else blank).append(i)
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


def holds_texts(data_name: str, rows: Iterable[dict]) -> bool:
    """Whether the rows of a set are texts, which have no question. Raises UserError where only some of them are."""
    if data_name in TASKS or data_name in OWN:
        return data_name == TEXT
    kinds = {is_text(data_name, row) for row in rows}
    if len(kinds) > 1:
        raise UserError(f"'{data_name}' holds dialogues and texts: name the columns of one kind with --data_columns")
    return kinds == {True}


def _own_hub_splits(data_name: str, split: str, form: RowForm) -> dict[str, "Dataset"]:
    """The split of a set that no entry of TASKS describes, as _local_splits() gives it: by its name, or form.split."""
    from datasets import get_dataset_split_names, load_dataset
    try:
        names = [form.split] if form.split else get_dataset_split_names(data_name, form.config)
        if form.split:
            ours, theirs = split, form.split
        elif len(names) == 1 and names[0] not in ("test", "testing"):
            ours, theirs = "all", names[0]          # a single source, which load_rows() cuts
        else:
            ours, theirs = split, next((name for name in SPLIT_NAMES[split] if name in names), None)
        rows = load_dataset(data_name, form.config, split=theirs) if theirs else None
    except (ValueError, OSError, RuntimeError) as error:
        raise UserError(f"{data_name} cannot be loaded from the hub: {' '.join(str(error).split())[:300]}; "
                        "--data_config and --data_split choose a part, and --data_dir reads a copy on disk") from None
    if rows is None:
        raise UserError(f"{data_name} has no {split} split, only {', '.join(names)}: --data_split names one")
    return {ours: rows}


def _local_splits(data_dir: str, with_texts: bool = False) -> "dict[str, Dataset | list[Path]]":
    """{"train": ..., "test": ...} as far as they are there, or {"all": ...} for a single source.

    The values are data sets, or files that are still to be read. Prints what of a folder is not used.
    with_texts: plain texts count too. Where none of them is named after a split, they are one source together.
    """
    path = Path(data_dir)
    if not path.exists():
        raise UserError(f"--data_dir {data_dir} does not exist")
    there = sorted(f for f in path.iterdir() if not f.name.startswith(".")) if path.is_dir() else [path]
    names = {f.name for f in there}
    if path.is_dir() and ("dataset_dict.json" in names or {"dataset_info.json", "state.json"} <= names):
        return _saved_splits(path, there)
    files = [f for f in there if f.is_file() and f.name not in ABOUT_ROWS
             and (kind_of(f) or with_texts and is_plain_text(f))]
    if not files:
        raise UserError(f"--data_dir {data_dir} holds no rows: it must be {READABLE}, a folder of such files, or a "
                        f"save_to_disk folder{', or a plain text, .txt' * with_texts}")
    splits = {ours: chosen for ours in SPLIT_NAMES if (chosen := _files_of(ours, files))}
    if len(files) == 1 and not {"test", "testing"} & set(_words(files[0])):
        splits = {"all": files}         # a lone validation file is a single source, which load_rows() cuts
    if not splits and all(is_plain_text(f) for f in files):
        splits = {"all": files}
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

def load_tokenizer(places: list[str | None], trust_remote_code: bool = False,
                   chat_template: str | None = None) -> "PreTrainedTokenizerBase":
    """The tokenizer of the first place that is a hub name, or a folder that has one.

    Its chat template is `chat_template`. Where that is None and it has none of its own, it gets that of the next place
    that has one. prepare_tokenizer() adds what is still missing. Raises UserError where no place has a tokenizer, and
    where a file of it is damaged.
    """
    found = [place for place in dict.fromkeys(filter(None, places))
             if (Path(place) / "tokenizer_config.json").exists() or not Path(place).is_dir()]
    if not found:
        raise UserError(f"no tokenizer in {places[0]}; name the 16-bit model with --pretrained")
    tokenizer = read_tokenizer(found[0], trust_remote_code)
    if chat_template is not None:
        tokenizer.chat_template = chat_template
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


def read_chat_template(file: str | None) -> str | None:
    """The text of --chat_template. Raises UserError where it is no file, or no template in Jinja."""
    if file is None:
        return None
    from jinja2 import Environment, TemplateError
    if not Path(file).is_file():
        raise UserError(f"--chat_template {file} is not a file")
    text = read_text(file)
    try:
        # The extension knows break and continue, and the tag is transformers' own. Neither is run here.
        Environment(extensions=["jinja2.ext.loopcontrols"]).parse(re.sub(r"\{%-?\s*(end)?generation\s*-?%\}", "", text))
    except TemplateError as error:
        raise UserError(f"--chat_template {file} is no Jinja template: {error}") from None
    if "messages" not in text:
        raise UserError(f"--chat_template {file} does not use 'messages', which holds the turns: docs/data.md has an "
                        "example")
    return text


def render_prompt(tokenizer: "PreTrainedTokenizerBase", messages: Messages, date: str | None = None,
                  answered: bool = False) -> str:
    """The text before the answer. Training and evaluation both call this, so their prompts never differ.

    answered: the last turn is an answer, so that nothing asks for another one.
    date: the day that a template which writes a date takes for today, such as 2026-07-31. None: the real one.
    A template that knows no system turn gets its text at the head of the user turn. Raises UserError where the template
    refuses the prompt.
    """
    options, date = {}, template_date(tokenizer, date)
    if date:
        options = {"chat_template": FIXED_DATE + tokenizer.get_chat_template(), "date_codes": _date_codes(date)}
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=not answered, **options)
    except Exception as refused:
        if len(messages) < 2 or messages[0]["role"] != "system":
            raise UserError(f"the tokenizer's chat template refuses the prompt: {refused}") from refused
        user = {"role": "user", "content": messages[0]["content"] + "\n\n" + messages[1]["content"]}
        return render_prompt(tokenizer, [user, *messages[2:]], date, answered)


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


def fit_dialogue(tokenizer: "PreTrainedTokenizerBase", messages: Messages, max_len: int,
                 date: str | None = None) -> tuple[list[int], list[int], bool]:
    """(the token ids of a prompt, at most `max_len`; their labels; whether turns or text were cut). date: as above.

    messages: the turns before the last answer. The answers among them are trained: each has its tokens as labels, with
    the mark behind it that ends a turn, and all other tokens have IGNORE_INDEX. A dialogue that is too long loses its
    oldest turns whole, because half an answer would train as a whole one. Where the last question alone is too long,
    fit_prompt() cuts it. Raises UserError where the answers cannot be found in the prompt.
    """
    system = [message for message in messages if message["role"] == "system"]
    turns = [message for message in messages if message["role"] != "system"]
    later = [i for i, message in enumerate(turns) if i and message["role"] == "user"]
    for start in (None, *later):
        shorter = messages if start is None else system + turns[start:]
        ids, labels = _label_answers(tokenizer, shorter, date)
        if len(ids) <= max_len:
            return ids, labels, start is not None
    ids, _ = fit_prompt(tokenizer, shorter, max_len, date)
    return ids, [IGNORE_INDEX] * len(ids), True


def _label_answers(tokenizer: "PreTrainedTokenizerBase", messages: Messages,
                   date: str | None) -> tuple[list[int], list[int]]:
    """(the token ids of a prompt, their labels as in fit_dialogue()). The ids are those of encode_prompt()."""
    text = render_prompt(tokenizer, messages, date)
    roles = [message["role"] for message in messages]
    # An answer before the first question is no answer, and templates refuse an empty dialogue. A blank one would train
    # to say nothing.
    spans = [_find_answer(tokenizer, messages[:i + 1], text, date) for i, role in enumerate(roles)
             if role == "assistant" and "user" in roles[:i] and messages[i]["content"].strip()]
    if not spans:
        ids = encode_prompt(tokenizer, text)
        return ids, [IGNORE_INDEX] * len(ids)
    if not tokenizer.is_fast:
        raise UserError("this tokenizer does not say where in a text its tokens are: give --train_turns last")
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids = encoded["input_ids"]
    # A token that is partly of the prompt is not trained, because nothing generates it.
    trained = [any(begin <= first < last <= end for begin, end in spans) for first, last in encoded["offset_mapping"]]
    return ids, [token if train else IGNORE_INDEX for token, train in zip(ids, trained, strict=True)]


def _find_answer(tokenizer: "PreTrainedTokenizerBase", messages: Messages, text: str,
                 date: str | None) -> tuple[int, int]:
    """Where in `text`, a rendered dialogue that goes on, the answer of the last of `messages` stands: (begin, end).

    It begins where a prompt ends, and ends with the end token, or else with what the template writes behind an answer.
    Raises UserError where a template writes an earlier turn otherwise once others follow.
    """
    before, answer = render_prompt(tokenizer, messages[:-1], date), messages[-1]["content"].strip()
    found = text.startswith(before) and re.compile(rf"\s*{re.escape(answer)}").match(text, len(before))
    if found:
        end = re.compile(rf"\s*{re.escape(tokenizer.eos_token)}").match(text, found.end())
        if end:
            return len(before), end.end()
        whole = render_prompt(tokenizer, messages, date, answered=True).rstrip()
        if text.startswith(whole) and len(whole) >= found.end():
            return len(before), len(whole)
    number = sum(message["role"] == "assistant" for message in messages)
    raise UserError(f"the chat template writes answer {number} of the dialogue otherwise once more turns follow, so it "
                    "cannot be trained: give --train_turns last")


def encode_text(tokenizer: "PreTrainedTokenizerBase", text: str) -> list[int]:
    """The token ids of a text, with what the tokenizer puts before it, and with the end token."""
    ids = tokenizer(text, verbose=False)["input_ids"]
    return ids if ids[-1:] == [tokenizer.eos_token_id] else [*ids, tokenizer.eos_token_id]


def text_windows(ids: list[int], length: int) -> list[list[int]]:
    """A text's tokens in windows of at most `length`. Each begins with the last token of the one before.

    So every token but the text's first is predicted once, and none twice. length: 2 at least.
    """
    return [ids[start:start + length] for start in range(0, len(ids) - 1, length - 1)]


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
                    data_dir: str | None = None, style: PromptStyle = PUBLISHED, form: RowForm = PLAIN,
                    train_turns: str = "all", seed: int = 42) -> "Dataset":
    """The training rows, tokenized: columns input_ids, labels, length.

    data_name: one set or a mixture, as own_rows.parse_sets() reads it.
    Prompt tokens have the label IGNORE_INDEX. A prompt has at most `source_max_len` tokens: fit_prompt() cuts a longer
    one. An answer with its end token has at most `target_max_len`: a longer one loses its end and its end token, so the
    loss says nothing about what follows its last token. Prints how many of both are cut.
    Of own dialogues all answers are trained, or with `train_turns` "last" the last one, as in published sets. A text is
    cut into rows of at most source_max_len + target_max_len tokens. All of them but the first of a row are trained.
    train_ratio: the share of the rows to keep, from the first on. debug_number: where it is positive, keep at most so
    many rows. style: how the prompts are written. form: how own rows are read. seed: of a mixture's order.
    """
    prepare_tokenizer(tokenizer)
    if not 0 < train_ratio <= 1:
        raise UserError(f"--train_ratio must be in (0, 1], not {train_ratio}")
    sets = own_rows.parse_sets(data_name, data_dir)
    own_rows.check_flags(sets, form)
    form = replace(form, partly=len(sets) > 1)

    def kept(rows: "Dataset") -> "Dataset":
        keep = max(1, int(len(rows) * train_ratio))
        return rows.select(range(min(keep, debug_number) if debug_number > 0 else keep))

    parts = []
    for one in sets:
        rows = load_rows(one.name, "train", one.place, form)
        if holds_texts(one.name, rows):
            part = _tokenize_texts(one.name, rows, tokenizer, source_max_len + target_max_len)
            parts.append(kept(part) if len(sets) == 1 else part)
            continue

        def encode(row: dict, name: str = one.name) -> dict:
            return _encode_row(name, row, tokenizer, source_max_len, target_max_len, style, train_turns)

        try:
            parts.append(_tokenize(one.name, kept(rows) if len(sets) == 1 else rows, encode, source_max_len,
                                   target_max_len))
        except UserError:
            load_rows(one.name, "train", one.place, form, check=encode)     # raises it again, with the row's place
            raise
    if len(parts) == 1:
        return parts[0]
    return kept(_mix(sets, parts, seed))


def _encode_row(data_name: str, row: dict, tokenizer: "PreTrainedTokenizerBase", source_max_len: int,
                target_max_len: int, style: PromptStyle, train_turns: str) -> dict:
    """One dialogue as prepare_dataset() has it, and whether its prompt and its answer are cut."""
    messages, answer = read_messages(data_name, row, style.layout)
    if train_turns == "all" and data_name not in TASKS:
        source, labels, prompt_cut = fit_dialogue(tokenizer, messages, source_max_len, style.date)
    else:
        source, prompt_cut = fit_prompt(tokenizer, messages, source_max_len, style.date)
        labels = [IGNORE_INDEX] * len(source)
    whole_target = encode_answer(tokenizer, answer)
    target = whole_target[:target_max_len]
    return {"input_ids": source + target, "labels": labels + target, "length": len(source) + len(target),
            "prompt_cut": prompt_cut, "answer_cut": len(target) < len(whole_target)}


def _tokenize(data_name: str, rows: "Dataset", encode: Callable[[dict], dict], source_max_len: int,
              target_max_len: int) -> "Dataset":
    """The rows as encode() makes them. Prints how many are cut."""
    data = rows.map(encode, remove_columns=rows.column_names, desc=f"tokenizing {data_name}", keep_in_memory=True)
    prompts, answers = sum(data["prompt_cut"]), sum(data["answer_cut"])
    print(f"{data_name}: {len(data)} rows; {prompts} prompts are cut to --source_max_len {source_max_len} tokens, "
          f"{answers} answers to --target_max_len {target_max_len}" + (
              "; a cut answer trains without its end token" if answers else ""))
    return data.remove_columns(["prompt_cut", "answer_cut"])


def _tokenize_texts(data_name: str, rows: "Dataset", tokenizer: "PreTrainedTokenizerBase", length: int) -> "Dataset":
    """The texts in windows of at most `length` tokens."""
    from datasets import Dataset
    windows = [window for row in rows
               for window in text_windows(encode_text(tokenizer, read_messages(data_name, row)[1]), length)]
    print(f"{data_name}: {len(rows)} texts are {len(windows)} rows of at most {length} tokens, which is "
          "--source_max_len and --target_max_len together")
    return Dataset.from_dict({"input_ids": windows, "labels": [[IGNORE_INDEX, *window[1:]] for window in windows],
                              "length": [len(window) for window in windows]})


def _mix(sets: list[own_rows.DataSet], parts: "list[Dataset]", seed: int) -> "Dataset":
    """The mixture of tokenized sets, as own_rows.draw_mixture() draws it. Prints how much of each is in it."""
    from datasets import concatenate_datasets
    sizes = [len(part) for part in parts]
    weights = None if sets[0].weight is None else [one.weight for one in sets]
    drawn = own_rows.draw_mixture(sizes, weights, seed)
    print("mixture: " + ", ".join(f"{sum(number == i for number, _ in drawn)} of {sizes[i]} rows of {one.name}"
                                  for i, one in enumerate(sets)))
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return concatenate_datasets(parts).select([starts[number] + row for number, row in drawn])


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
    parts = [size, f"int{bits}", method, head, number(second), number(third), own_rows.folder_name(data_name)]
    if runtime is not None:
        parts += [f"{runtime:.0f}s", f"{peak_mb:.0f}MB"]
    return "_".join([*parts, when or datetime.now().strftime("%d_%H%M%S")])


def free_name(output_path: str | Path, name: str) -> str:
    """`name`, with a number behind it where `output_path` has results of that name, from the same second."""
    numbered = (name if number == 1 else f"{name}-{number}" for number in itertools.count(1))
    return next(one for one in numbered if not (Path(output_path) / f"{one}.json").exists())


def save_results(output_path: str | Path, name: str, results: dict, *settings, keep: bool = False) -> Path:
    """Saves `results` with every setting and the date as `output_path`/`name`.json. Returns the path.

    keep: whether results of that name stay, see free_name(). Of several processes the first one saves.
    """
    from LoTA.storage import write_json
    name = free_name(output_path, name) if keep else name
    path = Path(output_path) / f"{name}.json"
    if processes.is_first():
        write_json(path, {"date": datetime.now().isoformat(timespec="seconds"),
                          "settings": {type(s).__name__: dict(vars(s)) for s in settings}, **results})
    print(f"results saved to {path}")
    return path
