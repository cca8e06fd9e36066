"""Data sets, prompts and labels, names of runs and saved results: every value against one worked by hand.

The tokenizer of these tests gives a character its ASCII number, so `ord` is the encoding by hand.
"""
import csv
import json
import os
import random
from datetime import datetime
from pathlib import Path

import numpy
import pytest
import torch
from datasets import Dataset, DatasetDict
from pairs import pairwise
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from data_print_save import (
    GSM8K_INSTRUCTION,
    VIGGO_INSTRUCTION,
    check_cuda,
    free_name,
    get_Ada_path,
    load_rows,
    params_print,
    prepare_dataset,
    read_messages,
    save_results,
    set_seed,
)
from LoTA import UserError
from LoTA.prompts import FALLBACK_CHAT_TEMPLATE, encode_prompt, load_tokenizer, prepare_tokenizer, render_prompt
from LoTA.settings import baseConfig, evalConfig, trainingConfig

PAD, BOS, EOS = 0, 1, 2

ALPACA = {"instruction": "Name a color.", "input": "Not blue.", "output": "Red."}
GSM8K = {"question": "Ann has 2 pens and buys 3. How many now?", "answer": "2 + 3 = <<2+3=5>>5 pens.\n#### 5"}
SQL = {"question": "How old is Bo?", "context": "CREATE TABLE cats (name VARCHAR, age INTEGER)",
       "answer": "SELECT age FROM cats WHERE name = \"Bo\""}
VIGGO = {"mr": "inform(name[Tin Road], genres[puzzle, racing])", "ref": "Tin Road is a puzzle and racing game."}
ROWS = {"alpaca": ALPACA, "gsm8k": GSM8K, "sql": SQL, "viggo": VIGGO}
SQL_USER = ("Write a SQL query to answer the question based on the table schema.\n\n"
            " context: CREATE TABLE cats (name VARCHAR, age INTEGER)\n\n question: How old is Bo?")
USERS = {"alpaca": "Name a color.\n\nNot blue.", "gsm8k": GSM8K["question"], "sql": SQL_USER, "viggo": VIGGO["ref"]}
ANSWERS = {"alpaca": "Red.", "gsm8k": GSM8K["answer"], "sql": SQL["answer"], "viggo": VIGGO["mr"]}
SYSTEMS = {"alpaca": None, "gsm8k": GSM8K_INSTRUCTION, "sql": None, "viggo": VIGGO_INSTRUCTION}

# Templates of the kinds that published models have.
TURNS = "{% for m in messages %}[{{ m.role }}]{{ m.content }}[end]{% endfor %}"
OPEN = "{% if add_generation_prompt %}[assistant]{% endif %}"
NO_SYSTEM = ("{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}"
             "{{ raise_exception('System role not supported') }}{% endif %}[{{ m.role }}]{{ m.content }}[end]"
             "{% endfor %}" + OPEN)
DEFAULT_SYSTEM = "{% if messages[0].role != 'system' %}[system]You help.[end]{% endif %}" + TURNS + OPEN
DATE_LINE = ("{{ bos_token }}[system]Today: 26 Jul 2024\n"
             "{% if messages[0].role == 'system' %}{{ messages[0].content }}"
             "{% set messages = messages[1:] %}{% endif %}[end]" + TURNS + OPEN)


def char_tokenizer(**kwargs):
    """Each ASCII character is the token of its own number. 0, 1 and 2 are pad, begin and end. It adds none."""
    vocab = {chr(i) if i == 10 or i >= 32 else f"<{i}>": i for i in range(128)}
    for i, name in enumerate(("<pad>", "<bos>", "<eos>")):
        vocab.pop(f"<{i}>")
        vocab[name] = i
    model = Tokenizer(models.WordLevel(vocab, unk_token="<3>"))
    model.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    model.decoder = decoders.Fuse()
    names = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>"} | kwargs
    return PreTrainedTokenizerFast(tokenizer_object=model, clean_up_tokenization_spaces=False,
                                   **{k: v for k, v in names.items() if v is not None})


def by_hand(text):
    """The encoding of a text without special tokens."""
    return [ord(c) for c in text]


def write_rows(path, rows):
    """Writes rows as the csv, json or jsonl file that `path` names, or as a save_to_disk folder. Returns it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".csv":
        with open(path, "w", newline="") as f:
            writer = csv.DictWriter(f, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        Dataset.from_list(rows).save_to_disk(str(path))
    return str(path)


def numbered(count):
    return [{"question": f"What is {i}?", "answer": f"It is {i}, of course.\n#### {i}"} for i in range(count)]


def prepared(tmp_path, data_name, tokenizer=None, rows=None, **kwargs):
    """prepare_dataset on a folder with these training rows."""
    write_rows(tmp_path / "train.jsonl", rows or [ROWS[data_name]])
    write_rows(tmp_path / "test.jsonl", [ROWS[data_name]])
    return prepare_dataset(data_name, tokenizer or char_tokenizer(), data_dir=str(tmp_path), **kwargs)


# --- rows and messages --------------------------------------------------------------------------------------------

@pytest.mark.parametrize("data_name", ROWS)
def test_messages_in_the_published_layout(data_name):
    """One user turn. GSM8K's is the question alone, ViGGO's has its instruction at the head."""
    user = USERS[data_name] if data_name != "viggo" else f"{VIGGO_INSTRUCTION}\n\n{VIGGO['ref']}"
    want = [{"role": "user", "content": user}], ANSWERS[data_name]
    assert read_messages(data_name, ROWS[data_name]) == read_messages(data_name, ROWS[data_name], "published") == want


@pytest.mark.parametrize("data_name", ROWS)
def test_messages_in_the_system_layout(data_name):
    """The user turn, the answer and, where the task has an instruction of its own, the system turn, word by word."""
    system = [{"role": "system", "content": SYSTEMS[data_name]}] if SYSTEMS[data_name] else []
    want = [*system, {"role": "user", "content": USERS[data_name]}]
    assert read_messages(data_name, ROWS[data_name], "system") == (want, ANSWERS[data_name])


@pytest.mark.parametrize("data_name, row", [
    ("viggo", {"meaning_representation": VIGGO["mr"], "target": VIGGO["ref"], "gem_id": "a-1", "references": []}),
    ("sql", {"messages": [{"role": "user", "content": SQL_USER}, {"role": "assistant", "content": SQL["answer"]}]})])
def test_other_columns_say_the_same(data_name, row):
    """The columns of another publication of a set give the very same messages and answer."""
    assert read_messages(data_name, row) == read_messages(data_name, ROWS[data_name])


@pytest.mark.parametrize("row", [{"instruction": "Sing.", "input": "", "output": "La."},
                                 {"instruction": "Sing.", "input": None, "output": "La."},
                                 {"instruction": "Sing.", "output": "La."}])
def test_alpaca_without_input(row):
    """An empty, null or missing input leaves the instruction alone: no blank lines behind it."""
    assert read_messages("alpaca", row) == ([{"role": "user", "content": "Sing."}], "La.")


def test_sql_messages_keep_a_system_turn():
    """Everything before the last message is the prompt."""
    system = {"role": "system", "content": "Be short."}
    row = {"messages": [system, {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]}
    assert read_messages("sql", row) == ([system, {"role": "user", "content": "Q"}], "A")


def test_viggo_instruction_names_the_whole_vocabulary():
    """ViGGO's nine functions and fourteen attributes stand in the instruction, each as a word of its own."""
    vocabulary = """
        inform request give_opinion confirm verify_attribute suggest request_explanation recommend request_attribute
        name release_year exp_release_date developer esrb rating genres player_perspective platforms has_multiplayer
        available_on_steam has_linux_release has_mac_release specifier""".split()
    words = VIGGO_INSTRUCTION.replace(",", " ").replace(".", " ").split()
    assert len(vocabulary) == 9 + 14 and not set(vocabulary) - set(words)


# --- prompts ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("template, with_system, without", [
    (None, "<bos>{s}\n\n### Instruction:\n{u}\n\n### Response:\n", "<bos>### Instruction:\n{u}\n\n### Response:\n"),
    (TURNS + OPEN, "[system]{s}[end][user]{u}[end][assistant]", "[user]{u}[end][assistant]"),
    (DEFAULT_SYSTEM, "[system]{s}[end][user]{u}[end][assistant]",
     "[system]You help.[end][user]{u}[end][assistant]"),
    (DATE_LINE, "<bos>[system]Today: 26 Jul 2024\n{s}[end][user]{u}[end][assistant]",
     "<bos>[system]Today: 26 Jul 2024\n[end][user]{u}[end][assistant]"),
    (NO_SYSTEM, "<bos>[user]{s}\n\n{u}[end][assistant]", "<bos>[user]{u}[end][assistant]")],
    ids=["no template", "plain", "default system", "date line", "no system role"])
def test_prompt_of_each_template(template, with_system, without):
    """The rendered text, exactly: the instruction is never lost, and the prompt ends where the answer begins."""
    tokenizer = prepare_tokenizer(char_tokenizer(chat_template=template))
    for data_name in ROWS:
        messages, _ = read_messages(data_name, ROWS[data_name], "system")
        want = (with_system if SYSTEMS[data_name] else without).format(s=SYSTEMS[data_name], u=USERS[data_name])
        assert render_prompt(tokenizer, messages) == want, data_name


@pytest.mark.parametrize("system", [False, True])
def test_a_template_that_refuses_everything(system):
    """The template's own words reach the user, as a UserError."""
    tokenizer = char_tokenizer(chat_template="{{ raise_exception('tools only') }}")
    messages = [{"role": "system", "content": "S"}] * system + [{"role": "user", "content": "U"}]
    with pytest.raises(UserError, match="tools only"):
        render_prompt(tokenizer, messages)


def test_rendering_leaves_the_messages_alone():
    """Folding the system turn into the user turn changes a copy, so that a second rendering is the same."""
    tokenizer = char_tokenizer(chat_template=NO_SYSTEM)
    messages, _ = read_messages("gsm8k", GSM8K, "system")
    first = render_prompt(tokenizer, messages)
    assert messages == read_messages("gsm8k", GSM8K, "system")[0]
    assert render_prompt(tokenizer, messages) == first


def test_fallbacks_of_a_bare_tokenizer():
    """Pad becomes the end token and the template the documented one, and both are usable."""
    tokenizer = char_tokenizer(pad_token=None)
    assert tokenizer.pad_token is None and tokenizer.chat_template is None
    assert prepare_tokenizer(tokenizer) is tokenizer
    assert (tokenizer.pad_token, tokenizer.pad_token_id) == ("<eos>", EOS)
    assert tokenizer.chat_template == FALLBACK_CHAT_TEMPLATE


def test_fallbacks_keep_what_is_there():
    """A tokenizer's own pad token and template stay."""
    tokenizer = prepare_tokenizer(char_tokenizer(chat_template=NO_SYSTEM))
    assert tokenizer.pad_token_id == PAD and tokenizer.chat_template == NO_SYSTEM


def test_fallback_template_without_begin_token():
    """A tokenizer without begin token gets none, and no "None" either."""
    tokenizer = prepare_tokenizer(char_tokenizer(bos_token=None))
    prompt = render_prompt(tokenizer, [{"role": "user", "content": "Hi"}])
    assert prompt == "### Instruction:\nHi\n\n### Response:\n"


def test_fallback_template_of_a_whole_conversation():
    """An answered turn stands behind the same headings and ends with the end token."""
    tokenizer = prepare_tokenizer(char_tokenizer())
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    text = tokenizer.apply_chat_template(turns, tokenize=False)
    assert text == "<bos>### Instruction:\nHi\n\n### Response:\nHo<eos>"


@pytest.mark.parametrize("limit, want", [(None, "abcdef"), (10, "abcdef"), (6, "abcdef"), (5, "bcdef"), (1, "f")])
def test_encode_prompt_keeps_the_end(limit, want):
    """Over-long prompts lose their beginning only."""
    assert encode_prompt(char_tokenizer(), "abcdef", limit) == by_hand(want)


def test_encode_prompt_writes_no_second_begin_token():
    """The template wrote the begin token, so the tokenizer must not add another."""
    from tokenizers.processors import TemplateProcessing
    tokenizer = char_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", BOS)])
    assert tokenizer("ab")["input_ids"] == [BOS, 97, 98]
    assert encode_prompt(tokenizer, "<bos>ab") == [BOS, 97, 98]


# --- prepared rows ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("data_name", ROWS)
def test_prepared_row_by_hand(tmp_path, data_name):
    """Ids and labels of a row, token by token: the prompt is masked, the answer and its end token are not."""
    data = prepared(tmp_path, data_name)
    instruction = f"{VIGGO_INSTRUCTION}\n\n" if data_name == "viggo" else ""
    source = [BOS, *by_hand(f"### Instruction:\n{instruction}{USERS[data_name]}\n\n### Response:\n")]
    target = [*by_hand(ANSWERS[data_name]), EOS]
    assert data[0] == {"input_ids": source + target, "labels": [-100] * len(source) + target,
                       "length": len(source) + len(target)}
    assert len(data) == 1


def test_no_answer_token_is_added_by_the_tokenizer(tmp_path):
    """A tokenizer that begins every text with its begin token puts none between prompt and answer."""
    from tokenizers.processors import TemplateProcessing
    tokenizer = char_tokenizer(chat_template="{{ messages[-1].content }}>")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", BOS)])
    row = prepared(tmp_path, "alpaca", tokenizer)[0]
    assert row["input_ids"] == [*by_hand("Name a color.\n\nNot blue.>Red."), EOS]


@pytest.mark.parametrize("source_max, target_max, source, target", [
    (100, 100, "Name a color.\n\nNot blue.>", "Red.$"), (6, 5, "blue.>", "Red.$"), (25, 4, None, "Red."),
    (24, 1, "ame a color.\n\nNot blue.>", "R"), (1, 2, ">", "Re")])
def test_limits_in_tokens(tmp_path, source_max, target_max, source, target):
    """The prompt loses its beginning, the answer its end. The end token ($) is last unless it was cut off."""
    tokenizer = char_tokenizer(chat_template="{{ messages[-1].content }}>")
    row = prepared(tmp_path, "alpaca", tokenizer, source_max_len=source_max, target_max_len=target_max)[0]
    source = by_hand(source or "Name a color.\n\nNot blue.>")
    target = [EOS if c == "$" else ord(c) for c in target]
    assert row == {"input_ids": source + target, "labels": [-100] * len(source) + target,
                   "length": len(source) + len(target)}


def test_labels_keep_the_end_token_where_it_is_also_the_pad(tmp_path):
    """With pad = end, a collated batch still trains on the end of each answer and on no padding."""
    from transformers import DataCollatorForSeq2Seq
    tokenizer = char_tokenizer(pad_token=None, chat_template="{{ messages[-1].content }}>")
    rows = [ALPACA, {"instruction": "Go", "input": "", "output": "On and on."}]
    data = prepared(tmp_path, "alpaca", tokenizer, rows)
    batch = DataCollatorForSeq2Seq(tokenizer)([{k: row[k] for k in ("input_ids", "labels")} for row in data])
    for labels, mask, text in zip(batch["labels"], batch["attention_mask"], ("Red.", "On and on."), strict=True):
        assert labels[labels != -100].tolist() == [*by_hand(text), EOS]
        assert not (labels[mask == 0] != -100).any()


@pytest.mark.parametrize("ratio, debug, want", [(1.0, -1, 10), (0.5, -1, 5), (0.29, -1, 2), (0.01, -1, 1), (1.0, 3, 3),
                                                (0.2, 5, 2), (1.0, 99, 10), (1.0, 0, 10)])
def test_share_and_number_of_rows(tmp_path, ratio, debug, want):
    """The first rows are kept in their order. The smaller of the two limits counts, and at least one row stays."""
    tokenizer = char_tokenizer(chat_template="{{ messages[-1].content }}>")
    data = prepared(tmp_path, "gsm8k", tokenizer, numbered(10), train_ratio=ratio, debug_number=debug)
    texts = [tokenizer.decode(row["input_ids"]) for row in data]
    assert texts == [f"What is {i}?>It is {i}, of course.\n#### {i}<eos>" for i in range(want)]


@pytest.mark.parametrize("ratio", [0, -0.5, 1.01])
def test_share_outside_its_range(tmp_path, ratio):
    """A share that keeps no rows or more than all is refused by its flag's name."""
    with pytest.raises(UserError, match="--train_ratio"):
        prepared(tmp_path, "alpaca", train_ratio=ratio)


def test_preparing_twice_gives_the_same(tmp_path):
    """The file is read anew each time, so other rows are seen once it has changed."""
    first = prepared(tmp_path, "gsm8k", rows=numbered(4))[:]
    assert prepared(tmp_path, "gsm8k", rows=numbered(4))[:] == first
    assert prepared(tmp_path, "gsm8k", rows=numbered(5)[1:])[0]["input_ids"] == first["input_ids"][1]


# --- where rows come from -----------------------------------------------------------------------------------------

def write_splits(folder, kind, splits):
    """Writes {name of a split: its rows} as files of one kind, or as one save_to_disk folder (kind "saved")."""
    if kind == "saved":
        DatasetDict({name: Dataset.from_list(rows) for name, rows in splits.items()}).save_to_disk(str(folder))
    else:
        for name, rows in splits.items():
            write_rows(folder / f"{name}{kind}", rows)


@pytest.mark.parametrize("kind, data_name, name", pairwise(
    kind=[".csv", ".json", ".jsonl", "saved"], data_name=ROWS, name=["test", "validation", "valid", "val", "dev"]))
def test_rows_of_every_format(tmp_path, kind, data_name, name):
    """Each format gives back the rows that were written, with their newlines, quotes and commas.

    Each usual name of held-out rows serves as the test split.
    """
    other = {column: f"{value} \n\"more\", then" for column, value in ROWS[data_name].items()}
    write_splits(tmp_path, kind, {"train": [ROWS[data_name], other], name: [other]})
    assert load_rows(data_name, "train", str(tmp_path)).to_list() == [ROWS[data_name], other]
    assert load_rows(data_name, "test", str(tmp_path)).to_list() == [other]


@pytest.mark.parametrize("kind", [".csv", ".jsonl"])
def test_text_stays_text(tmp_path, kind):
    """An answer that looks like a missing value, a number, a truth value or a date is trained on as it is written."""
    texts = ["None", "N/A", "null", "7", "3.50", "true", "2012-05-06"]
    tokenizer = char_tokenizer(chat_template="{{ messages[-1].content }}>")
    for text in texts:              # each in a file of its own: no other answer says what the column holds
        folder = tmp_path / text.replace("/", "")
        write_splits(folder, kind, {"train": [{"instruction": "Say.", "input": "", "output": text}], "test": [ALPACA]})
        row = prepare_dataset("alpaca", tokenizer, data_dir=str(folder))[0]
        assert row["input_ids"] == [*by_hand(f"Say.>{text}"), EOS]


@pytest.mark.parametrize("kind", [".json", "saved"])
def test_test_goes_before_validation(tmp_path, kind):
    """Where both are there, the test rows are the test rows."""
    parts = {"validation": numbered(3)[:1], "test": numbered(3)[1:2], "train": numbered(3)[2:]}
    write_splits(tmp_path, kind, parts)
    assert load_rows("gsm8k", "test", str(tmp_path)).to_list() == parts["test"]


@pytest.mark.parametrize("place", ["all.csv", "all.json", "all.jsonl", "folder/rows.jsonl", "saved"])
def test_single_source_is_cut_the_same_every_time(tmp_path, place):
    """80:20, disjoint, and nothing lost. The cut depends neither on the random generators nor on the format."""
    rows = numbered(50)
    path = write_rows(tmp_path / place, rows)
    source = str(Path(path).parent) if place.startswith("folder") else path
    train, test = (load_rows("gsm8k", split, source)["question"][:] for split in ("train", "test"))
    assert (len(train), len(test)) == (40, 10)
    assert sorted(train + test) == sorted(row["question"] for row in rows)
    set_seed(3)
    assert load_rows("gsm8k", "test", source)["question"][:] == test
    assert load_rows("gsm8k", "train", source)["question"][:] == train
    other = Dataset.from_list(rows).train_test_split(test_size=0.2, seed=42)
    assert other["test"]["question"][:] == test


def test_single_alpaca_file_is_kept_whole(tmp_path):
    """Alpaca is for training only: no row is held back."""
    rows = [{"instruction": f"Do {i}.", "input": "", "output": f"Done {i}."} for i in range(10)]
    assert load_rows("alpaca", "train", write_rows(tmp_path / "a.json", rows)).to_list() == rows


@pytest.fixture
def hub(monkeypatch):
    """Stands for the hub: answers with sql rows of `hub.count` and keeps the calls."""
    def load_dataset(*args, **kwargs):
        load_dataset.calls.append((args, kwargs))
        row = {**ALPACA, **GSM8K, **SQL, **VIGGO}
        return Dataset.from_list([{**row, "question": f"Q{i}"} for i in range(load_dataset.count)])
    load_dataset.calls, load_dataset.count = [], 20
    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    return load_dataset


@pytest.mark.parametrize("data_name, split, repository, config, revision, its_split", [
    ("alpaca", "train", "yahma/alpaca-cleaned", None, None, "train"),
    ("gsm8k", "train", "openai/gsm8k", "main", None, "train"),
    ("gsm8k", "test", "openai/gsm8k", "main", None, "test"),
    ("sql", "train", "b-mc2/sql-create-context", None, None, "train"),
    ("sql", "test", "b-mc2/sql-create-context", None, None, "train"),
    ("viggo", "train", "GEM/viggo", None, "refs/convert/parquet", "train"),
    ("viggo", "test", "GEM/viggo", None, "refs/convert/parquet", "test")])
def test_what_the_hub_is_asked_for(hub, data_name, split, repository, config, revision, its_split):
    """Repository, configuration, revision and split of each published set, in one call."""
    rows = load_rows(data_name, split)
    assert hub.calls == [((repository, config), {"revision": revision, "split": its_split})]
    assert len(rows) == (20 if data_name != "sql" else 16 if split == "train" else 4)


def test_hub_alpaca_has_no_test(hub):
    """Said at once, before anything is loaded."""
    with pytest.raises(UserError, match="'alpaca' has no test split; use it for training"):
        load_rows("alpaca", "test")
    assert hub.calls == []


def test_empty_split_of_the_hub(hub):
    """A split without rows is named as empty, with its repository."""
    hub.count = 0
    with pytest.raises(UserError, match="the test split of 'gsm8k' in openai/gsm8k is empty"):
        load_rows("gsm8k", "test")


@pytest.mark.parametrize("count, test_rows", [(10_000, 2000), (10_001, 1000), (12_345, 1000)])
def test_sql_keeps_a_thousand_test_rows(hub, count, test_rows):
    """More than 10,000 rows give the paper's 1,000 test rows, fewer a fifth. No row is in both parts."""
    hub.count = count
    train, test = (set(load_rows("sql", split)["question"]) for split in ("train", "test"))
    assert (len(train), len(test)) == (count - test_rows, test_rows)
    assert not train & test


# --- bad input ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("call", [lambda: load_rows("squad", "train"), lambda: load_rows("squad", "test", "nowhere"),
                                  lambda: prepare_dataset("squad", char_tokenizer()),
                                  lambda: read_messages("squad", {})])
def test_unknown_data_set(call):
    """The known ones are listed."""
    with pytest.raises(UserError, match="unknown data set 'squad'; choose from alpaca, gsm8k, sql, viggo"):
        call()


BAD_FILES = {          # files in the folder, what the message must name
    "no folder": (None, "does not exist"),
    "empty folder": ({}, "csv, json or jsonl"),
    "only other files": ({"train.txt": "hello", "README.md": "# Data"}, "csv, json or jsonl"),
    "no bytes, csv": ({"train.csv": "", "test.csv": "question,answer\nQ,#### 1\n"}, "train.csv is empty"),
    "no bytes, jsonl": ({"train.jsonl": ""}, "train.jsonl is empty"),
    "header alone": ({"train.csv": "question,answer\n", "test.csv": "question,answer\nQ,#### 1\n"}, "empty"),
    "blank line alone": ({"train.jsonl": "\n", "test.jsonl": '{"question": "Q", "answer": "#### 1"}\n'}, "train.jsonl"),
    "empty list": ({"train.json": "[]", "test.json": "[]"}, "empty|train.json"),
    "empty list, alone": ({"train.json": "[]"}, "empty|train.json"),
    "header alone, single": ({"rows.csv": "question,answer\n"}, "empty|rows.csv"),
    "one row to cut": ({"rows.jsonl": '{"question": "Q", "answer": "#### 1"}\n'}, "rows.jsonl|row"),
    "not json": ({"train.json": "{question: Q", "test.json": "[]"}, "train.json"),
    "half a line": ({"train.jsonl": '{"question": "Q", "ans', "test.jsonl": "{}"}, "train.jsonl"),
    "wrong columns": ({"train.jsonl": '{"text": "Q", "label": "A"}\n', "test.jsonl": '{"text": "Q"}\n'},
                      "question.*text, label"),
    "one column missing": ({"train.csv": "question,result\nQ,1\n", "test.csv": "q\n1\n"}, "answer.*question, result"),
    "unnamed files": ({"a.csv": "question,answer\nQ,#### 1\n", "b.csv": "question,answer\nQ,#### 1\n"},
                      "none is named train or test.*a.csv, b.csv"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_files(tmp_path, case):
    """Each mistake is a UserError that names the file, the column, or what the folder should hold."""
    files, message = BAD_FILES[case]
    folder = tmp_path / "data"
    if files is not None:
        folder.mkdir()
        for name, text in files.items():
            (folder / name).write_text(text)
    with pytest.raises(UserError, match=message):
        load_rows("gsm8k", "train", str(folder))


@pytest.mark.parametrize("suffix", ["txt", "csv.gz"])
def test_a_file_of_another_kind(tmp_path, suffix):
    """A single file that is neither csv nor json is refused by a UserError that names it."""
    path = tmp_path / f"rows.{suffix}"
    path.write_text("Once upon a time\n")
    with pytest.raises(UserError, match=f"rows.{suffix}"):
        load_rows("gsm8k", "train", str(path))


@pytest.mark.parametrize("saved", [False, True])
def test_folder_without_test_split(tmp_path, saved):
    """The message names the splits that are there. Training rows never serve as test rows."""
    if saved:
        DatasetDict({"train": Dataset.from_list(numbered(9))}).save_to_disk(str(tmp_path))
    else:
        write_rows(tmp_path / "train.jsonl", numbered(9))
        write_rows(tmp_path / "notes.jsonl", numbered(9))
    assert len(load_rows("gsm8k", "train", str(tmp_path))) == 9
    with pytest.raises(UserError, match="no test split, only train"):
        load_rows("gsm8k", "test", str(tmp_path))


def test_empty_saved_data_set(tmp_path):
    """A saved split with columns and no rows is said to be empty."""
    empty = Dataset.from_dict({"question": [], "answer": []})
    DatasetDict({"train": empty, "test": empty}).save_to_disk(str(tmp_path))
    for split in ("train", "test"):
        with pytest.raises(UserError, match="is empty"):
            load_rows("gsm8k", split, str(tmp_path))


def test_a_row_without_an_answer(tmp_path):
    """A null answer further down is a mistake in the data, not a traceback of ours."""
    rows = [GSM8K, {"question": "And then?", "answer": None}]
    with pytest.raises(UserError, match="answer|row"):
        prepared(tmp_path, "gsm8k", rows=rows)


# --- the tokenizer of a run ---------------------------------------------------------------------------------------

def test_load_tokenizer_takes_the_first_place_that_has_one(tmp_path):
    """The GPTQ folder's own tokenizer, else the 16-bit model's. It gets the fallbacks."""
    gptq, dense, bare = tmp_path / "gptq", tmp_path / "dense", tmp_path / "bare"
    bare.mkdir()
    char_tokenizer(pad_token=None, chat_template="gptq {{ messages[0].content }}").save_pretrained(str(gptq))
    char_tokenizer(pad_token=None).save_pretrained(str(dense))
    first = load_tokenizer([str(gptq), str(dense)])
    assert (first.pad_token_id, first.chat_template) == (EOS, "gptq {{ messages[0].content }}")
    for places in ([str(bare), str(dense)], [None, str(dense)]):
        second = load_tokenizer(places)
        assert (second.pad_token_id, second.chat_template) == (EOS, FALLBACK_CHAT_TEMPLATE)
        assert encode_prompt(second, "ab\n<eos>") == [97, 98, 10, EOS]
    for places in ([str(bare)], [str(bare), None]):
        with pytest.raises(UserError, match=f"no tokenizer in {bare}; name the 16-bit model with --pretrained"):
            load_tokenizer(places)


def test_tiny_tokenizer_loses_nothing(tmp_path):
    """The demo's own tokenizer gives every training row back, character by character, between its marks."""
    from tiny_base import train_tokenizer
    rows = [{"mr": f"inform(name[Zoë {i}], genres[a, b])", "ref": f"Zoë {i}  is\ta puzzle."} for i in range(9)]
    write_rows(tmp_path / "train.csv", rows)
    write_rows(tmp_path / "test.csv", rows[:1])
    tokenizer = train_tokenizer("viggo", str(tmp_path), 300)
    texts = [tokenizer.decode(row["input_ids"]) for row in prepare_dataset("viggo", tokenizer, data_dir=str(tmp_path))]
    assert texts == [f"<|begin|>{row['ref']}<|answer|>{row['mr']}<|end|>" for row in rows]


# --- settings, names, results -------------------------------------------------------------------------------------

def draws():
    return random.random(), numpy.random.random(3).tolist(), torch.rand(3).tolist(), torch.randperm(9).tolist()


def test_set_seed():
    """One seed gives the same numbers of all three generators. Another seed gives others of all three."""
    set_seed(7)
    first = draws()
    second = draws()
    set_seed(7)
    assert draws() == first
    set_seed(8)
    other = draws()
    assert all(a != b and a != c for a, b, c in zip(first[:3], other, second, strict=False))


def test_check_cuda_without_gpu(monkeypatch, capsys):
    """Without a GPU the run computes on the CPU and says so."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert check_cuda() == torch.device("cpu")
    assert capsys.readouterr().out == f"no GPU: running on the CPU with {torch.get_num_threads()} threads\n"


def test_check_cuda_names_every_gpu(monkeypatch, capsys):
    """Each GPU with its name and memory in GiB."""
    class Properties:
        name, total_memory = "Card", 80 * 2**30
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: Properties)
    assert check_cuda() == torch.device("cuda")
    assert capsys.readouterr().out == "GPU 0: Card, 80 GiB\nGPU 1: Card, 80 GiB\n"


def test_params_print_shows_every_setting(capsys):
    """A line for each field of each group, with its value."""
    base, training = baseConfig(seed=1234, data_dir="rows.csv"), trainingConfig(min_grad=0.5)
    params_print(base, training)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(maxsplit=1)[0] for line in lines] == ["---", *vars(base), "---", *vars(training)]
    shown = [line.split() for line in lines]
    assert ["seed", "1234"] in shown and ["data_dir", "rows.csv"] in shown and ["min_grad", "0.5"] in shown
    assert lines[0] == "--- baseConfig" and lines[len(vars(base)) + 1] == "--- trainingConfig"


@pytest.mark.parametrize("args, ended, want", [
    (("8B", 4, "LoTA", 48.0, 0.95, 0.999, "alpaca"), (3600.4, 20480.2),
     "8B_int4_LoTA_48_0.950_0.999_alpaca_3600s_20480MB_05_101112"),
    (("70B", 2, "LoTA", 24, 0.9, 0.9995, "viggo"), (59.5, 7), "70B_int2_LoTA_24_0.900_1.000_viggo_60s_7MB_05_101112"),
    (("1M", 3, "LoTA", 6.5, 0.95, 0.999, "sql"), (None, None), "1M_int3_LoTA_6.5_0.950_0.999_sql_05_101112"),
    (("14B", 4, "LoRA", 1e-5, 64, 128, "gsm8k"), (1.0, 1.0), "14B_int4_LoRA_1e-05_64_128_gsm8k_1s_1MB_05_101112"),
    (("14B", 4, "LoRA", 0.0002, 64, 128, "gsm8k"), (None, None), "14B_int4_LoRA_0.0002_64_128_gsm8k_05_101112")])
def test_adapter_names(args, ended, want):
    """The folder names, character by character. While a run goes on, its name has neither time nor memory."""
    runtime, peak = ended
    assert get_Ada_path(*args, runtime=runtime, peak_mb=peak, when="05_101112") == want


def test_adapter_name_of_now():
    """Without a time it is the present one, as day_hourminutesecond."""
    before = datetime.now().replace(microsecond=0)
    name = get_Ada_path("8B", 4, "LoTA", 48, 0.95, 0.999, "alpaca")
    assert name.startswith("8B_int4_LoTA_48_0.950_0.999_alpaca_")
    written = datetime.strptime(f"{before.year} {before.month} " + name[-9:], "%Y %m %d_%H%M%S")
    assert before <= written <= datetime.now()


def test_save_results(tmp_path, capsys):
    """One JSON file: the date, every setting by its group, and the results. Every letter is readable in it."""
    base, evaluation = baseConfig(seed=5, data_dir="d"), evalConfig(limit=3)
    before = datetime.now().replace(microsecond=0)
    path = save_results(tmp_path / "new" / "folder", "run_1.5", {"accuracy": 0.5, "text": "Zoë"}, base, evaluation)
    assert path == tmp_path / "new" / "folder" / "run_1.5.json"
    assert [p.name for p in path.parent.iterdir()] == ["run_1.5.json"]
    saved = json.loads(path.read_text())
    assert before <= datetime.fromisoformat(saved.pop("date")) <= datetime.now()
    assert saved == {"settings": {"baseConfig": vars(base), "evalConfig": vars(evaluation)},
                     "accuracy": 0.5, "text": "Zoë"}
    assert "Zoë" in path.read_text(encoding="utf-8")
    assert capsys.readouterr().out == f"results saved to {path}\n"


def test_results_of_the_same_second_have_other_names(tmp_path):
    assert free_name(tmp_path / "new", "r_26_120000") == "r_26_120000"
    for name in ("r_26_120000", "r_26_120000-2"):
        save_results(tmp_path, name, {})
    assert free_name(tmp_path, "r_26_120000") == "r_26_120000-3"


@pytest.mark.parametrize("broken", ["write", "rename"])
def test_a_failing_write_leaves_the_old_file(tmp_path, monkeypatch, broken):
    """A full disk half-way, or a rename that fails: the old results stay, and no other file lies beside them."""
    path = save_results(tmp_path, "r", {"accuracy": 1.0})
    old, write_text = path.read_bytes(), Path.write_text

    def half(self, text, *args, **kwargs):
        write_text(self, text[:len(text) // 2], *args, **kwargs)
        raise OSError("no space left")

    def refuse(*args, **kwargs):
        raise OSError("no space left")
    with monkeypatch.context() as patch:
        if broken == "write":
            patch.setattr(Path, "write_text", half)
        else:
            patch.setattr(os, "replace", refuse)
        with pytest.raises(OSError, match="no space left"):
            save_results(tmp_path, "r", {"accuracy": 0.0})
    assert path.read_bytes() == old
    assert list(tmp_path.iterdir()) == [path]
    save_results(tmp_path, "r", {"accuracy": 0.0})
    assert json.loads(path.read_text())["accuracy"] == 0.0
