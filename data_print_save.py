"""Data sets and their rows, and what training reads of them; printing of settings, names of runs, saving of results.

Touches the Hugging Face hub (reading), the console, and result files (writing). Knows nothing of models.
LoTA/splits.py finds the train and test rows, LoTA/row_files.py reads files, LoTA/own_rows.py people's own rows, and
LoTA/prompts.py makes prompts and tokens of them.
A published data set is one entry of TASKS. Heavy libraries are imported where they are used, because the command line
needs the names of the data sets for --help.
"""
import itertools
import random
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from LoTA import IGNORE_INDEX, UserError, own_rows, processes, scores
from LoTA.own_rows import CHAT, HUB_NAME, TEXT, Messages, RowForm, is_text, system_turn, text_of, user_turn
from LoTA.prompts import (
    PUBLISHED,
    PromptStyle,
    encode_answer,
    encode_text,
    fit_dialogue,
    fit_prompt,
    prepare_tokenizer,
    text_windows,
)
from LoTA.row_files import read_rows, row_name
from LoTA.splits import hub_splits, local_splits

if TYPE_CHECKING:
    import torch
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

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

PLAIN = RowForm()


# --- tasks --------------------------------------------------------------------------------------------------------

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
        splits = local_splits(data_dir, data_name == TEXT)
    elif task.hub is None:
        raise UserError(f"the rows of '{data_name}' are your own: say where they are with --data_dir PLACE, or as "
                        f"{data_name}:PLACE")
    else:
        splits = _published_splits(data_name, split) if data_name in TASKS else hub_splits(data_name, split, form)
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


def _published_splits(data_name: str, split: str) -> dict[str, "Dataset"]:
    """The split of an entry of TASKS on the hub, as splits.local_splits() gives it."""
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


# --- tokens -------------------------------------------------------------------------------------------------------

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
