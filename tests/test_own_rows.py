"""People's own rows: every form in docs/data.md, mixtures, what is trained of them, templates, scores, perplexity."""
import gzip
import json
import math
import re
import shutil

import datasets
import pytest
import torch
from conftest import ROOT, parse, predictions
from datasets import Dataset, DatasetDict
from test_data import BOS, EOS, NO_SYSTEM, OPEN, TURNS, by_hand, char_tokenizer, write_rows
from test_eval import Stub, tiny_model
from test_rows import encoded
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from data_print_save import find_measured, get_Ada_path, holds_texts, load_rows, prepare_dataset, read_messages
from evalGSV import evalgsv, find_scorers
from LoTA import UserError
from LoTA.adapter_folder import LotaConfig
from LoTA.own_rows import (
    FORMS,
    DataSet,
    cut_text,
    draw_mixture,
    folder_name,
    form_of,
    parse_sets,
    row_form,
    without_places,
)
from LoTA.prompts import (
    PromptStyle,
    encode_prompt,
    encode_text,
    fit_dialogue,
    read_chat_template,
    render_prompt,
    text_windows,
)
from LoTA.scores import find_score, last_number

PAGE = (ROOT / "docs/data.md").read_text(encoding="utf-8")


def turns(*texts):
    """Turns of user and assistant by turns; a text that begins with "S:" is the system's."""
    roles, messages = iter(("user", "assistant") * 9), []
    for text in texts:
        system = text.startswith("S:")
        messages.append({"role": "system" if system else next(roles), "content": text.removeprefix("S:")})
    return messages


# --- every form of rows -------------------------------------------------------------------------------------------

# {form in docs/data.md: (turns before the answer, the answer)}, by hand.
FORMS_READ = {
    "OpenAI's `messages`": (turns("S:S", "Q"), "A"),
    "the same, content in parts": (turns("Q"), "A"),
    "ShareGPT's `conversations`": (turns("S:S", "Q"), "A"),
    "`prompt`, `completion`": (turns("Q"), "A"),
    "the same, both as turns": (turns("Q"), "A"),
    "`instruction`, `output`": (turns("Q"), "A"),
    "the same with `input`, `system`, `history`": (turns("S:S", "P", "B", "Q\n\nI"), "A"),
    "other names, `--data_columns prompt=ask,completion=say`": (turns("Q"), "A"),
    "other columns, `--prompt_template` with `{a} and {b}?` and `--data_columns completion=sum`":
        (turns("1 and 2?"), "3"),
    "a `text` column": ([], "Once."), "other names, `--data_columns text=body`": ([], "Once."),
    "a plain text file, `.txt`": ([], "Once.")}


def table_of_forms():
    """{form: (set, the row as it stands there, what it is read as)} of the page."""
    lines = PAGE.partition("<!-- forms -->")[2].partition("<!-- end of forms -->")[0].strip().splitlines()[2:]
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    return {form.strip(): (name.strip("`"), row.strip("`"), read) for form, name, row, read in cells}


TABLE = table_of_forms()


def form_in(text, folder):
    """The RowForm that the flags in a line of the table ask for."""
    columns, template = re.search(r"--data_columns ([\w=,]+)", text), re.search("with `(.*?)`", text)
    if "--prompt_template" in text:
        (folder / "template").write_text(template[1] + "\n")
    return row_form(columns and columns[1], str(folder / "template") if "--prompt_template" in text else None)


def files_of(row, folder):
    """Paths with this row, twice: every format of file that can hold it, packed too, and a save_to_disk folder."""
    if not row.startswith("{"):
        for suffix, content in (("txt", row.encode()), ("TXT", row.encode()), ("txt.gz", gzip.compress(row.encode()))):
            (folder / suffix).mkdir()
            (folder / suffix / f"one.{suffix}").write_bytes(content)
            (folder / suffix / f"two.{suffix}").write_bytes(content)
            yield folder / suffix
        return
    row = json.loads(row)
    kinds = ["json", "jsonl", "parquet", *(["csv", "tsv"] if all(isinstance(v, str) for v in row.values()) else [])]
    for kind in kinds:
        (folder / f"rows.{kind}").write_bytes(encoded(kind, [row, row]))
        yield folder / f"rows.{kind}"
        (folder / f"rows.{kind}.gz").write_bytes(gzip.compress(encoded(kind, [row, row])))
        yield folder / f"rows.{kind}.gz"
    DatasetDict({split: Dataset.from_list([row]) for split in ("train", "test")}).save_to_disk(str(folder / "saved"))
    yield folder / "saved"


def test_the_table_has_every_form():
    """No line of the page is without a test, and no form of the code is without a line."""
    assert list(TABLE) == list(FORMS_READ)
    rows = [json.loads(row) for _, row, _ in TABLE.values() if row.startswith("{")]
    assert {form_of(row) for row in rows if not {"ask", "sum", "body"} & row.keys()} == set(FORMS)
    with pytest.raises(ValueError, match="it has the columns ask, say, id, and a row has one of: messages; conv"):
        form_of({"ask": "Q", "say": "A", "id": 7, "prompt": None})


@pytest.mark.parametrize("form", FORMS_READ)
def test_every_form_is_read(tmp_path, form):
    """From every format of file, in training and in evaluation, as the page says it."""
    (name, row, read), (messages, answer) = TABLE[form], FORMS_READ[form]
    (tmp_path / "files").mkdir()
    flags, paths = form_in(form, tmp_path), []
    for path in files_of(row, tmp_path / "files"):
        for split in ("train", "test"):
            rows = load_rows(name, split, str(path), flags)
            assert [read_messages(name, row) for row in rows] == [(messages, answer)], path
            assert holds_texts(name, rows) is (name == "text")
        paths.append(path.name)
    flat = row.startswith("{") and all(isinstance(value, str) for value in json.loads(row).values())
    assert len(paths) == (3 if not row.startswith("{") else 11 if flat else 7)
    said = [f"{m['role']}: {m['content']}" for m in [*messages, {"role": "assistant", "content": answer}]]
    assert read == (f"text: {answer}" if name == "text" else ", ".join(said).replace("\n", "⏎"))


@pytest.mark.parametrize("form", [form for form, (_, row, _) in TABLE.items() if row.startswith("{")])
def test_every_form_is_read_from_the_hub(tmp_path, monkeypatch, form):
    """One name reads them all. The library's own loading is real, from a folder in the hub's place."""
    _, row, _ = TABLE[form]
    for split in ("train", "validation"):
        write_rows(tmp_path / f"hub/{split}.jsonl", [json.loads(row)])
    flags = form_in(form, tmp_path)
    real, names = datasets.load_dataset, datasets.get_dataset_split_names
    monkeypatch.setattr("datasets.load_dataset", lambda name, config, split: real(
        str(tmp_path / "hub"), config, split=split, cache_dir=str(tmp_path / "cache")))
    monkeypatch.setattr("datasets.get_dataset_split_names", lambda name, config: names(str(tmp_path / "hub"), config))
    for split in ("train", "test"):
        rows = load_rows("me/my.set", split, form=flags)
        assert [read_messages("me/my.set", row) for row in rows] == [FORMS_READ[form]]
        assert holds_texts("me/my.set", rows) is (FORMS_READ[form][0] == [])


def test_forms_in_one_file(tmp_path):
    """Each row has its own. The first form counts where a row has two."""
    rows = [{"prompt": "Q", "completion": "A"}, {"instruction": "Q", "output": "B"},
            {"messages": turns("Q", "C"), "prompt": "no", "completion": "no", "text": "no"}]
    for split in ("train", "test"):
        write_rows(tmp_path / f"{split}.jsonl", rows)
    read = [read_messages("chat", row) for row in load_rows("chat", "train", str(tmp_path))]
    assert read == [(turns("Q"), answer) for answer in "ABC"]


# --- rows that are refused ----------------------------------------------------------------------------------------

GOOD = {"prompt": "Q", "completion": "A"}
BAD_ROWS = [
    ("chat", {"messages": turns("Q")}, "the last turn must be the assistant's"),
    ("chat", {"messages": turns("Q", "A") + [{"role": "tool", "content": "7"}]}, "turn 3 is of 'tool'"),
    ("chat", {"messages": "Q"}, "the dialogue is no list of turns"),
    ("chat", {"conversations": [{"from": "gpt", "value": "A"}]}, "no turn of the user stands before the answer"),
    ("chat", {"prompt": "Q", "completion": None}, "it has the columns prompt, and a row has one of"),
    ("chat", {"prompt": ["Q"], "completion": "A"}, "turn 1 is no record with a role and a content"),
    ("chat", {"prompt": "Q", "completion": {"a": "b"}}, "no text but"),
    ("chat", {"instruction": "Q", "output": ["A"]}, "no question or no answer"),
    ("chat", {"text": "Once."}, "it has a text and no dialogue: the set 'text' reads it"),
    ("chat", {"question": "Q", "answer": "A"}, "it has the columns question, answer, .*--data_columns renames"),
    ("chat", {"messages": turns("Q", "A"), "tools": "[{}]"}, "tools are not supported"),
    ("text", {"text": None}, "no text but None"), ("text", {"text": ["a"]}, "no text but"),
    ("text", {"body": "Once."}, "no text but None")]


@pytest.mark.parametrize("name, bad, message", BAD_ROWS)
@pytest.mark.parametrize("kind", ["jsonl", "json"])
def test_bad_rows_are_refused_with_file_and_row(tmp_path, name, bad, message, kind):
    good = GOOD if name == "chat" else {"text": "Good."}
    (tmp_path / f"train.{kind}").write_bytes(encoded(kind, [good, bad]))
    write_rows(tmp_path / "test.jsonl", [good])
    with pytest.raises(UserError, match=rf"train.{kind}, row 2: .*{message}") as refused:
        load_rows(name, "train", str(tmp_path))
    assert "\n" not in str(refused.value)


def test_bad_rows_of_csv_and_parquet(tmp_path):
    (tmp_path / "train.csv").write_text("prompt,completion\nQ,A\nQ,A,B\n")
    write_rows(tmp_path / "test.jsonl", [GOOD])
    with pytest.raises(UserError, match=r"train.csv, row 2 \(the header is not counted\) .*3, not 2"):
        load_rows("chat", "train", str(tmp_path))
    (tmp_path / "train.csv").unlink()
    (tmp_path / "train.parquet").write_bytes(encoded("parquet", [GOOD, {"prompt": "Q", "completion": None}]))
    with pytest.raises(UserError, match="train.parquet, row 2: .*it has the columns prompt, and"):
        load_rows("chat", "train", str(tmp_path))


@pytest.mark.parametrize("train_turns", ["all", "last"])
def test_a_row_that_the_template_refuses(tmp_path, train_turns):
    """The place is that of the file, also behind rows that were left out."""
    picky = ("{% for m in messages %}{% if 'bad' in m.content %}{{ raise_exception('no bad words') }}{% endif %}"
             "{{ m.content }}>{% endfor %}")
    write_rows(tmp_path / "train.jsonl", [{"prompt": "", "completion": "A"}, GOOD, {**GOOD, "prompt": "bad"}])
    write_rows(tmp_path / "test.jsonl", [GOOD])
    with pytest.raises(UserError, match="train.jsonl, row 3: .*refuses the prompt: no bad words"):
        prepare_dataset("chat", char_tokenizer(chat_template=picky), data_dir=str(tmp_path), train_turns=train_turns)


def test_blank_rows_are_left_out(tmp_path, capsys):
    rows = [{"messages": turns("Q", "A")}, {"messages": turns(" ", "A")}, {"messages": turns("Q", " ")}]
    texts = [{"text": "Once."}, {"text": " \n"}]
    for split in ("train", "test"):
        write_rows(tmp_path / f"chat/{split}.jsonl", rows)
        write_rows(tmp_path / f"text/{split}.jsonl", texts)
    assert len(load_rows("chat", "train", str(tmp_path / "chat"))) == 1
    assert load_rows("text", "train", str(tmp_path / "text")).to_list() == [{"text": "Once."}]
    out = capsys.readouterr().out
    assert "2 of 3 rows of 'chat' have an empty" in out and "1 of 2 rows of 'text' have an empty" in out


@pytest.mark.parametrize("name, message", [
    ("chat", "the rows of 'chat' are your own: say where they are with --data_dir PLACE, or as chat:PLACE"),
    ("squad", "unknown data set 'squad'; choose from alpaca, gsm8k, sql, viggo, chat, text, or OWNER/NAME on the hub"),
    ("a/b/c", "unknown data set 'a/b/c'"), ("./x", "unknown data set './x'"), ("../x", "unknown data set '../x'")])
def test_names_that_are_refused(tmp_path, monkeypatch, name, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=re.escape(message)):
        load_rows(name, "train")


def test_a_place_for_a_name(tmp_path, monkeypatch):
    """Someone who gives the file alone is told how."""
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "my/rows.jsonl", [GOOD])
    with pytest.raises(UserError, match="'my/rows.jsonl' is a place and no data set: write chat:my/rows.jsonl or"):
        load_rows("my/rows.jsonl", "train")


# --- several sets -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("text, data_dir, sets", [
    ("viggo", None, [DataSet("viggo")]), ("viggo", "d", [DataSet("viggo", "d")]),
    ("chat:a/b.jsonl", None, [DataSet("chat", "a/b.jsonl")]),
    ("me/set=0.5,chat:x=y.csv=2", None, [DataSet("me/set", None, 0.5), DataSet("chat", "x=y.csv", 2.0)]),
    ("chat:a, chat:b", None, [DataSet("chat", "a"), DataSet("chat", "b")])])
def test_sets_of_a_name(text, data_dir, sets):
    assert parse_sets(text, data_dir) == sets


@pytest.mark.parametrize("text, data_dir, message", [
    ("chat=0.5,text", None, "a weight is a share of a mixture"), ("chat=0.5", None, "a weight is a share of a mixture"),
    ("chat=0,text=1", None, "the weight 0 is not positive"), ("chat=-1,text=1", None, "the weight -1 is not positive"),
    ("chat=nan,text=1", None, "the weight nan is not positive"), ("chat,,text", None, "names a set with no name"),
    (":a", None, "names a set with no name"),
    ("chat:a,text:b", "d", "--data_dir d is the place of one set: write chat:PLACE for each set"),
    ("chat:a", "d", "--data_dir d is the place of one set")])
def test_sets_that_are_refused(text, data_dir, message):
    with pytest.raises(UserError, match=message):
        parse_sets(text, data_dir)


def test_names_in_folders_and_records():
    """A path never becomes a part of a folder's name, and a record has no place of this machine."""
    assert [folder_name(name) for name in ("viggo", "chat:a/b=1,me/my_set:c=2", "text:../x")] == [
        "viggo", "chat+my-set", "text"]
    assert [without_places(name) for name in (None, "viggo", "chat:a/b=1,me/my_set:c=2.50", "text:../x")] == [
        None, "viggo", "chat=1,me/my_set=2.5", "text"]
    name = get_Ada_path("8B", 4, "LoTA", 48, 0.95, 0.999, "chat:/tmp/a.jsonl=0.5,me/my_set=0.5", when="05_101112")
    assert name == "8B_int4_LoTA_48_0.950_0.999_chat+my-set_05_101112"


@pytest.mark.parametrize("sizes, weights, counts", [
    ([100, 100], [0.7, 0.3], [100, 42]), ([100, 30], [0.7, 0.3], [70, 30]), ([100, 30], [7, 3], [70, 30]),
    ([10, 1000], [0.5, 0.5], [10, 10]), ([3, 3, 3], [1, 1, 1], [3, 3, 3]), ([5, 7], None, [5, 7]),
    ([1, 1000], [0.001, 0.999], [1, 999]), ([1000, 2], [0.999, 0.001], [1000, 1]), ([10, 10], [0.1, 0.9], [1, 10])])
def test_the_shares_of_a_mixture(sizes, weights, counts):
    """The largest mixture with these shares, to a row. Every row is there once at most."""
    drawn = draw_mixture(sizes, weights, 42)
    assert [sum(number == i for number, _ in drawn) for i in range(len(sizes))] == counts
    assert len(set(drawn)) == len(drawn) and all(0 <= row < sizes[number] for number, row in drawn)


def test_a_mixture_depends_on_the_seed_alone():
    """Another seed draws other rows in another order. The sets are mixed from the first rows on."""
    first = draw_mixture([500, 300], [0.5, 0.5], 1)
    torch.manual_seed(9)
    assert draw_mixture([500, 300], [0.5, 0.5], 1) == first != draw_mixture([500, 300], [0.5, 0.5], 2)
    assert len(first) == 600 and 30 < sum(number for number, _ in first[:100]) < 70
    assert {row for number, row in first if number == 0} != set(range(300))


def test_a_mixture_of_all_kinds(tmp_path, capsys):
    """Own dialogues, a text and a published set. Each row is what it is alone; --debug_number cuts the mixture."""
    tokenizer = char_tokenizer(chat_template="{{ messages[-1].content }}>")
    write_rows(tmp_path / "chat.jsonl", [{"prompt": f"Q{i}", "completion": f"A{i}"} for i in range(10)])
    (tmp_path / "book.txt").write_text("".join(f"line {i}\n" for i in range(20)))
    write_rows(tmp_path / "gsm.jsonl", [{"question": f"What is {i}?", "answer": f"#### {i}"} for i in range(10)])
    places = {"chat": "chat.jsonl", "text": "book.txt", "gsm8k": "gsm.jsonl"}
    alone = {name: prepare_dataset(name, tokenizer, 1.0, 12, 5, data_dir=str(tmp_path / place))
             for name, place in places.items()}
    sizes = [len(alone[name]) for name in places]
    assert sizes == [8, 8, 8]
    name = ",".join(f"{name}:{tmp_path / place}={weight}" for (name, place), weight in zip(
        places.items(), (0.5, 0.25, 0.25), strict=True))
    capsys.readouterr()
    data = prepare_dataset(name, tokenizer, 1.0, 12, 5, seed=3)
    assert "mixture: 8 of 8 rows of chat, 4 of 8 rows of text, 4 of 8 rows of gsm8k" in capsys.readouterr().out
    want = [alone[list(places)[number]][row] for number, row in draw_mixture(sizes, [0.5, 0.25, 0.25], 3)]
    assert data.to_list() == want and len(want) == 16
    assert prepare_dataset(name, tokenizer, 1.0, 12, 5, 5, seed=3).to_list() == want[:5]
    assert prepare_dataset(name, tokenizer, 0.5, 12, 5, seed=3).to_list() == want[:8]
    assert prepare_dataset(name, tokenizer, 1.0, 12, 5, seed=4).to_list() != want


def test_columns_in_a_mixture(tmp_path):
    """They apply to the rows that have them. Alone, a set that lacks them is refused."""
    write_rows(tmp_path / "own.jsonl", [{"ask": f"q{i}", "say": "a"} for i in range(5)])
    write_rows(tmp_path / "plain.jsonl", [{"prompt": f"p{i}", "completion": "a"} for i in range(5)])
    tokenizer = char_tokenizer(chat_template="{{ messages[-1].content }}>")
    form = row_form("prompt=ask,completion=say", None)
    data = prepare_dataset(f"chat:{tmp_path}/own.jsonl,chat:{tmp_path}/plain.jsonl", tokenizer, form=form)
    texts = [tokenizer.decode(row["input_ids"]) for row in data]
    assert sorted(text[0] for text in texts) == list("ppppqqqq") and all(text.endswith(">a<eos>") for text in texts)
    with pytest.raises(UserError, match="plain.jsonl, row 1: --data_columns names the column 'ask', and it has prompt"):
        prepare_dataset("chat", tokenizer, data_dir=str(tmp_path / "plain.jsonl"), form=form)


# --- which turns are trained --------------------------------------------------------------------------------------

CHATML = ("{% for m in messages %}<|{{ m.role }}\n{{ m.content }}<eos>\n{% endfor %}"
          "{% if add_generation_prompt %}<|assistant\n{% endif %}")
# Llama 2's: nothing but a space stands before an answer.
INST = ("{% for m in messages %}{% if m.role == 'user' %}[I]{{ m.content | trim }}[/I]"
        "{% else %} {{ m.content | trim }} {{ eos_token }}{% endif %}{% endfor %}")
# Qwen3's: thoughts stand in the last answer alone, and an empty one is written there where it has none.
THINK = ("{% for m in messages %}<|{{ m.role }}\n{% if m.role == 'assistant' %}"
         "{% if loop.last %}<think></think>{% endif %}{{ m.content.split('</think>')[-1] }}"
         "{% else %}{{ m.content }}{% endif %}<eos>\n{% endfor %}"
         "{% if add_generation_prompt %}<|assistant\n{% endif %}")
TALK = turns("S:Be kind.", "Hi", "Hello", "And?", "Well", "Bye")


def marked(ids, labels):
    """The text of a row with its trained parts in double braces. The labels are the tokens themselves."""
    text, on = "", False
    for token, label in zip(ids, labels, strict=True):
        assert label in (-100, token)
        if (label != -100) != on:
            text, on = text + ("}}" if on else "{{"), not on
        text += "$" if token == EOS else "^" if token == BOS else chr(token)
    return text + "}}" * on


@pytest.mark.parametrize("template, want", [
    (TURNS + OPEN, "[system]Be kind.[end][user]Hi[end][assistant]{{Hello[end]}}[user]And?[end][assistant]{{Well[end]}}"
                   "[user]Bye[end][assistant]{{Ciao$}}"),
    (CHATML, "<|system\nBe kind.$\n<|user\nHi$\n<|assistant\n{{Hello$}}\n<|user\nAnd?$\n<|assistant\n{{Well$}}\n"
             "<|user\nBye$\n<|assistant\n{{Ciao$}}"),
    (INST, "[I]Hi[/I]{{ Hello $}}[I]And?[/I]{{ Well $}}[I]Bye[/I]{{Ciao$}}"),
    (THINK, "<|system\nBe kind.$\n<|user\nHi$\n<|assistant\n{{Hello$}}\n<|user\nAnd?$\n<|assistant\n{{Well$}}\n"
            "<|user\nBye$\n<|assistant\n{{Ciao$}}"),
    (NO_SYSTEM, "^[user]Be kind.\n\nHi[end][assistant]{{Hello[end]}}[user]And?[end][assistant]{{Well[end]}}"
                "[user]Bye[end][assistant]{{Ciao$}}"),
    (None, "^Be kind.\n\n### Instruction:\nHi\n\n### Response:\n{{Hello$}}### Instruction:\nAnd?\n\n### Response:\n"
           "{{Well$}}### Instruction:\nBye\n\n### Response:\n{{Ciao$}}")],
    ids=["plain", "ChatML", "Llama 2", "thoughts", "no system role", "fallback"])
def test_all_answers_are_trained(tmp_path, template, want):
    """Each with its end. With --train_turns last the tokens are the same, and the last answer alone is trained."""
    messages = TALK[1:] if template == INST else TALK
    for split in ("train", "test"):
        write_rows(tmp_path / f"{split}.jsonl", [{"messages": [*messages, {"role": "assistant", "content": "Ciao"}]}])
    every, last, default = (
        prepare_dataset("chat", char_tokenizer(chat_template=template), data_dir=str(tmp_path), **flags)[0]
        for flags in ({"train_turns": "all"}, {"train_turns": "last"}, {}))
    assert marked(every["input_ids"], every["labels"]) == want and default == every
    before, _, after = want.rpartition("{{")
    assert marked(last["input_ids"], last["labels"]) == re.sub("{{|}}", "", before) + "{{" + after
    assert every["length"] == len(every["input_ids"]) == len(last["input_ids"])


@pytest.mark.parametrize("name", ["sql", "alpaca"])
def test_published_sets_train_the_last_answer(tmp_path, name):
    """Whatever --train_turns says, because a checkpoint's rows must stay what they were."""
    for split in ("train", "test"):
        write_rows(tmp_path / f"{split}.jsonl", [{"messages": turns("Hi", "Hello", "Bye", "Ciao")}])
    tokenizer = char_tokenizer(chat_template=TURNS + OPEN)
    row = prepare_dataset(name, tokenizer, data_dir=str(tmp_path), train_turns="all")[0]
    assert marked(row["input_ids"], row["labels"]) == (
        "[user]Hi[end][assistant]Hello[end][user]Bye[end][assistant]{{Ciao$}}")


@pytest.mark.parametrize("template", [
    "{% for m in messages %}{{ m.content | upper }}>{% endfor %}",                          # writes it otherwise
    "{{ messages[-1].content }}>", "{{ messages | length }}{% for m in messages %}{{ m.content }}>{% endfor %}",
    "{% for m in messages %}{{ m.content }}{{ '|' if loop.last else '>' }}{% endfor %}"])
def test_answers_that_cannot_be_found(tmp_path, template):
    """One line says which one, in which row, and what to do. The last answer alone can be trained."""
    for split in ("train", "test"):
        write_rows(tmp_path / f"{split}.jsonl", [{"messages": turns("Q", "A")},
                                                 {"messages": turns("Hi", "Hello", "Bye", "Ciao")}])
    tokenizer = char_tokenizer(chat_template=template)
    with pytest.raises(UserError, match="train.jsonl, row 2: the chat template writes answer 1 of the dialogue "
                                        "otherwise once .*give --train_turns last$"):
        prepare_dataset("chat", tokenizer, data_dir=str(tmp_path))
    row = prepare_dataset("chat", tokenizer, data_dir=str(tmp_path), train_turns="last")[1]
    assert marked(row["input_ids"], row["labels"]).endswith("{{Ciao$}}")


def test_an_answer_before_the_first_question_is_not_trained():
    ids, labels, _ = fit_dialogue(char_tokenizer(chat_template=CHATML), [
        {"role": "assistant", "content": "Welcome"}, *turns("Hi", "Hello", "Bye")], 999)
    assert marked(ids, labels) == ("<|assistant\nWelcome$\n<|user\nHi$\n<|assistant\n{{Hello$}}\n<|user\nBye$\n"
                                   "<|assistant\n")


def test_a_blank_answer_is_not_trained():
    ids, labels, _ = fit_dialogue(char_tokenizer(chat_template=CHATML), turns("Hi", " ", "Hi?", "Yes", "Bye"), 999)
    assert marked(ids, labels) == ("<|user\nHi$\n<|assistant\n $\n<|user\nHi?$\n<|assistant\n{{Yes$}}\n"
                                   "<|user\nBye$\n<|assistant\n")


def test_a_token_that_begins_in_the_prompt_is_not_trained():
    """Nothing generates it. The next one is trained."""
    words = ["u:Hi", "a:Well", "then", "<eos>", "u:Bye", "a:", "<unk>"]
    model = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=model, eos_token="<eos>", chat_template=(
        "{% for m in messages %}{{ m.role[0] }}:{{ m.content }} "
        "{% if m.role == 'assistant' %}<eos> {% endif %}{% endfor %}"
        "{% if add_generation_prompt %}a:{% endif %}"))
    ids, labels, cut = fit_dialogue(tokenizer, turns("Hi", "Well then", "Bye"), 99)
    assert ids == [0, 1, 2, 3, 4, 5] and labels == [-100, -100, 2, 3, -100, -100] and not cut
    slow = type("Slow", (), {"is_fast": False, "eos_token": "<eos>", "get_chat_template": lambda self: "",
                             "apply_chat_template": tokenizer.apply_chat_template})()
    with pytest.raises(UserError, match="give --train_turns last"):
        fit_dialogue(slow, turns("Hi", "Well then", "Bye"), 99)


def test_answers_of_many_bytes_are_trained_whole(tmp_path):
    """In a byte-level vocabulary, where a character is several tokens. The ids are those that evaluation reads."""
    from tiny_base import train_tokenizer
    for split in ("train", "test"):
        write_rows(tmp_path / f"{split}.csv", [{"mr": f"inform(a[{i}])", "ref": f"Doom {i}."} for i in range(9)])
    tokenizer = train_tokenizer("viggo", str(tmp_path), 300)
    tokenizer.chat_template = CHATML.replace("<eos>", "{{ eos_token }}")
    messages = turns("Hi \U0001f600?", "Zo\u00eb \U0001f600\n\n  42 \u65e5\u672c", "Bye")
    ids, labels, _ = fit_dialogue(tokenizer, messages, 999)
    assert ids == encode_prompt(tokenizer, render_prompt(tokenizer, messages)) and len(ids) > 40
    trained = [label for label in labels if label != -100]
    assert tokenizer.decode(trained) == f"{messages[1]['content']}{tokenizer.eos_token}"


def test_a_long_dialogue_loses_its_oldest_turns(tmp_path, capsys):
    """Whole, and never the system turn. Where the last question is too long, it is cut as in other sets."""
    tokenizer = char_tokenizer(chat_template=TURNS + OPEN)
    system, last = "[system]Be kind.[end]", "[user]Bye[end][assistant]"
    middle = "[user]And?[end][assistant]{{Well[end]}}"
    first = "[user]Hi[end][assistant]{{Hello[end]}}"
    sizes = [len(re.sub("{{|}}", "", text)) for text in (system + first + middle + last, system + middle + last,
                                                         system + last)]
    for limit, want in ((sizes[0], system + first + middle + last), (sizes[0] - 1, system + middle + last),
                        (sizes[1], system + middle + last), (sizes[1] - 1, system + last),
                        (sizes[2] - 1, system + last.replace("Bye", "ye"))):
        ids, labels, cut = fit_dialogue(tokenizer, TALK, limit)
        assert (marked(ids, labels), cut) == (want, limit != sizes[0])
    for split in ("train", "test"):
        write_rows(tmp_path / f"{split}.jsonl", [{"messages": [*TALK, {"role": "assistant", "content": "Ciao"}]},
                                                 {"messages": turns("Q", "A")}])
    prepare_dataset("chat", tokenizer, 1.0, sizes[1], 4, data_dir=str(tmp_path))
    assert ("chat: 2 rows; 1 prompts are cut to --source_max_len 81 tokens, 1 answers to --target_max_len 4"
            in capsys.readouterr().out) and sizes[1] == 81


# --- texts --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("count, length, windows", [
    (2, 2, [[0, 1]]), (5, 5, [[0, 1, 2, 3, 4]]), (5, 9, [[0, 1, 2, 3, 4]]), (5, 4, [[0, 1, 2, 3], [3, 4]]),
    (7, 3, [[0, 1, 2], [2, 3, 4], [4, 5, 6]]), (4, 2, [[0, 1], [1, 2], [2, 3]]), (1, 4, [])])
def test_windows_by_hand(count, length, windows):
    assert text_windows(list(range(count)), length) == windows


def test_every_token_of_a_text_is_trained(tmp_path, capsys):
    """Once, but for the first. The begin token that the tokenizer puts before a text is there, and the end token."""
    from tokenizers.processors import TemplateProcessing
    tokenizer, text = char_tokenizer(), "Once upon a time, there was a cat.\n"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", BOS)])
    whole = [BOS, *by_hand(text), EOS]
    assert encode_text(tokenizer, text) == encode_text(tokenizer, text + "<eos>") == whole
    for split in ("train", "test"):
        (tmp_path / f"{split}.txt").write_text(text)
    data = prepare_dataset("text", tokenizer, 1.0, 6, 4, data_dir=str(tmp_path))
    assert [row["input_ids"] for row in data] == [whole[i:i + 10] for i in (0, 9, 18, 27)]
    assert all(row["labels"] == [-100, *row["input_ids"][1:]] for row in data)
    assert data["length"][:] == [10, 10, 10, 10]
    assert [label for row in data for label in row["labels"] if label != -100] == whole[1:]
    assert "text: 1 texts are 4 rows of at most 10 tokens" in capsys.readouterr().out
    assert len(prepare_dataset("text", tokenizer, 0.5, 6, 4, data_dir=str(tmp_path))) == 2
    assert prepare_dataset("text", tokenizer, 1.0, 6, 4, 3, data_dir=str(tmp_path)).to_list() == data.to_list()[:3]


def test_a_lone_text_is_cut(tmp_path, capsys):
    """Nothing is lost, and both parts are always the same. The test part begins a line, or else a word."""
    assert cut_text("abcdefgh\nij") == {"train": "abcdefgh\n", "test": "ij"}
    assert cut_text("aaa bbb ccc dd") == {"train": "aaa bbb ", "test": "ccc dd"}
    assert cut_text("abcdefghij") == {"train": "abcdefgh", "test": "ij"}
    text = "".join(f"line {i}\n" for i in range(100))
    (tmp_path / "book.txt").write_text(text)
    train, test = (load_rows("text", split, str(tmp_path / "book.txt"))["text"][:] for split in ("train", "test"))
    assert train[0] + test[0] == text and test[0].startswith("line ") and len(train) == len(test) == 1
    assert 0.18 < len(test[0]) / len(text) < 0.23
    assert "holds a single text: its end, about a fifth of it, tests" in capsys.readouterr().out


def test_a_folder_of_texts(tmp_path):
    """Each file is a text. Ten of them are cut into eight and two, as other rows are."""
    for i in range(10):
        (tmp_path / f"story{i}.txt").write_text(f"Story {i}.\r\n")
    train, test = (load_rows("text", split, str(tmp_path))["text"][:] for split in ("train", "test"))
    assert (len(train), len(test)) == (8, 2) and sorted(train + test) == [f"Story {i}.\r\n" for i in range(10)]
    with pytest.raises(UserError, match="holds no rows"):
        load_rows("chat", "train", str(tmp_path))


# --- the hub ------------------------------------------------------------------------------------------------------

@pytest.fixture
def hub(monkeypatch):
    """Stands for the hub: a set with hub.splits, which answers with five rows. Keeps what it was asked for."""
    class Hub:
        splits, calls = ["train", "test"], []

        def load_dataset(self, *args, **kwargs):
            self.calls.append((args, kwargs))
            return Dataset.from_list([{"ask": f"Q{i}", "say": f"A{i}"} for i in range(5)])
    hub = Hub()
    hub.calls = []
    monkeypatch.setattr("datasets.load_dataset", hub.load_dataset)
    monkeypatch.setattr("datasets.get_dataset_split_names", lambda name, config: hub.splits)
    return hub


@pytest.mark.parametrize("splits, given, split, asked, count", [
    (["train", "test"], None, "train", "train", 5), (["train", "validation"], None, "test", "validation", 5),
    (["train"], None, "train", "train", 4), (["train"], None, "test", "train", 1), (["all"], None, "train", "all", 4),
    (["train_sft", "test_sft"], "test_sft", "test", "test_sft", 5),
    (["train"], "train[:50%]", "train", "train[:50%]", 5)])
def test_which_split_of_the_hub(hub, splits, given, split, asked, count):
    """By its usual names. A single split is cut; one that --data_split names is taken whole."""
    hub.splits = splits
    rows = load_rows("me/set", split, form=row_form("prompt=ask,completion=say", None, given, "conf"))
    assert hub.calls == [(("me/set", "conf"), {"split": asked})] and len(rows) == count
    assert rows.column_names == ["prompt", "completion", "system", "tools"]


@pytest.mark.parametrize("splits, split, message", [
    (["train_sft", "test_sft"], "train", "me/set has no train split, only train_sft, test_sft: --data_split names one"),
    (["test"], "train", "me/set has no train split, only test")])
def test_splits_that_are_not_there(hub, splits, split, message):
    hub.splits = splits
    with pytest.raises(UserError, match=message):
        load_rows("me/set", split)


def test_what_the_hub_says_is_one_line(hub, monkeypatch):
    def refuse(name, config):
        raise ValueError("Config name is missing.\nPlease pick one: ['a', 'b']")
    monkeypatch.setattr("datasets.get_dataset_split_names", refuse)
    with pytest.raises(UserError, match="me/set cannot be loaded from the hub: Config name is missing. Please pick "
                                        r"one: \['a', 'b'\]; --data_config"):
        load_rows("me/set", "train")


def test_bad_rows_of_the_hub(hub):
    """The split and the row are named, before and behind the renaming."""
    with pytest.raises(UserError, match="me/set, train split, row 1: .*it has the columns ask, say"):
        load_rows("me/set", "train")
    with pytest.raises(UserError, match="me/set, train split, row 1: --data_columns names the column 'q', and it"):
        load_rows("me/set", "train", form=row_form("prompt=q,completion=say", None))
    mixed = Dataset.from_list([{"text": "Once.", "prompt": None, "completion": None}, {"text": None, **GOOD}])
    with pytest.raises(UserError, match="'me/set' holds dialogues and texts: name the columns"):
        holds_texts("me/set", mixed)


def test_a_copy_of_a_hub_set_on_disk(tmp_path):
    """--data_dir reads it, in any form."""
    for split in ("train", "test"):
        write_rows(tmp_path / f"{split}.csv", [{"text": "Once."}])
    rows = load_rows("me/set", "train", str(tmp_path))
    assert rows.to_list() == [{"text": "Once."}] and holds_texts("me/set", rows)


# --- columns and templates ----------------------------------------------------------------------------------------

def template_file(tmp_path, text):
    (tmp_path / "template.txt").write_text(text)
    return str(tmp_path / "template.txt")


@pytest.mark.parametrize("text, row, want", [
    ("{a}", {"a": "x", "completion": "y"}, "x"), ("Say {a b}, {{not}} {a b}.\n\n", {"a b": 7, "completion": "y"},
                                                 "Say 7, {not} 7."),
    ("{a}-{b}", {"a": None, "b": "x", "completion": "y"}, "-x"),
    ("{a}-{b}", {"a": None, "b": " ", "completion": "y"}, ""),
    ("\nQ: {a}", {"a": "{b}", "completion": "y", "prompt": "other"}, "\nQ: {b}")])
def test_a_prompt_template(tmp_path, text, row, want):
    """Word by word. A null column is empty; a row in which all are blank has no question."""
    shaped = row_form(None, template_file(tmp_path, text)).shape(row)
    assert shaped == {"prompt": want, "completion": "y", "system": None, "tools": None}


@pytest.mark.parametrize("text, message", [
    ("no column", "must name at least one column"), ("{}", "nothing but its name stands in the braces"),
    ("{a!r}", "nothing but its name"), ("{a:>9}", "nothing but its name"), ("{a", "cannot be read .*braces"),
    ("a}", "cannot be read .*braces")])
def test_prompt_templates_that_are_refused(tmp_path, text, message):
    with pytest.raises(UserError, match=message) as refused:
        row_form(None, template_file(tmp_path, text))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("columns, with_template, message", [
    ("prompt", False, "write OURS=THEIRS"), ("prompt=", False, "write OURS=THEIRS"),
    ("ask=q", False, "write OURS=THEIRS, with one of messages, system, tools, conv"),
    ("prompt=a,prompt=b", False, "each once"), ("prompt=a,output=b", False, "the columns of one form go together"),
    ("text=a,completion=b", False, "the columns of one form"), ("prompt=a", True, "--prompt_template is the prompt"),
    ("output=a", True, "the columns of one form")])
def test_columns_that_are_refused(tmp_path, columns, with_template, message):
    with pytest.raises(UserError, match=message):
        row_form(columns, template_file(tmp_path, "{a}") if with_template else None)


@pytest.mark.parametrize("row, message", [
    ({"a": "x"}, "--prompt_template names the column 'b', and it has a"),
    ({"a": "x", "b": "y"}, "with prompt alone it has no form .*completion=COLUMN the answer"),
    ({"a": ["x"], "b": "y", "completion": "z"}, "no text but")])
def test_rows_that_a_template_does_not_fit(tmp_path, row, message):
    with pytest.raises(ValueError, match=message):
        row_form(None, template_file(tmp_path, "{a}{b}")).shape(row)
    with pytest.raises(ValueError, match="its column 's' has no value"):
        row_form("completion=s", template_file(tmp_path, "{a}{b}")).shape({"a": "x", "b": "y", "s": None})


def test_a_prompt_template_that_is_no_file():
    with pytest.raises(UserError, match="--prompt_template nowhere.txt is not a file"):
        row_form(None, "nowhere.txt")


def test_a_chat_template(tmp_path):
    """Its text; what is no template is refused."""
    (tmp_path / "own.jinja").write_text(TURNS + "{% generation %}{% endgeneration %}" + OPEN)
    assert read_chat_template(str(tmp_path / "own.jinja")) == TURNS + "{% generation %}{% endgeneration %}" + OPEN
    assert read_chat_template(None) is None
    for text, message in (("{% for m in messages %}", "is no Jinja template"), ("Hi {q}", "does not use 'messages'")):
        (tmp_path / "own.jinja").write_text(text)
        with pytest.raises(UserError, match=message):
            read_chat_template(str(tmp_path / "own.jinja"))
    with pytest.raises(UserError, match="--chat_template nowhere is not a file"):
        read_chat_template("nowhere")


def test_the_chat_template_of_the_page_trains_all_turns():
    """The example is usable as it stands."""
    example = re.search(r"```\n({% for m in messages %}.*)\n```", PAGE)[1]
    ids, labels, _ = fit_dialogue(char_tokenizer(chat_template=example), turns("Hi", "Hello", "Bye"), 99)
    assert marked(ids, labels) == "<user>Hi$<assistant>{{Hello$}}<user>Bye$<assistant>"


# --- scores -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("text, number", [
    ("5", "5"), ("It is -5.", "-5"), ("5-3", "3"), ("1,234.50", "1234.50"), ("$1,000,000.", "1000000"), ("x .5", "0.5"),
    ("1e3", "1000"), ("12,34", "34"), ("#### 7\nDone", "7"), ("007", "7"), ("1,234,56", "56"), ("no", None),
    ("2e-1", "0.2"), ("1e" + "9" * 30, "9" * 30), ("9" * 99, "9" * 99), ("3 .", "3"),
    ("", None)])
def test_the_last_number(text, number):
    found = last_number(text)
    assert str(found) == "None" if number is None else found == type(found)(number)


@pytest.mark.parametrize("score, prediction, label, right", [
    ("exact", " A\n", "A", True), ("exact", "a", "A", False), ("exact", "A.", "A", False),
    ("number", "So 2+3 = 5.0", "5", True), ("number", "5 or 6", "5", False), ("number", "1,000", "it is 1000.00", True),
    ("number", "none", "5", False), ("number", "-5", "5", False), ("number", "0.1", "0.10000000001", False)])
def test_scores_by_name(score, prediction, label, right):
    assert find_score(score)(prediction, label) is right


@pytest.fixture
def my_scores(tmp_path, monkeypatch):
    """A module in the working folder."""
    (tmp_path / "my_scores.py").write_text(
        "def starts(prediction, reference):\n    return reference.startswith(prediction)\n\n\n"
        "def fails(prediction, reference):\n    return prediction['x']\n\n\n"
        "def says_nothing(prediction, reference):\n    pass\n\n\nvalue = 3\n")
    (tmp_path / "broken_scores.py").write_text("import no_such_module\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_score_of_ones_own(my_scores):
    score = find_score("my_scores:starts")
    assert score("Ab", "Abc") is True and score("b", "Abc") is False
    for name, message in (("fails", "my_scores:fails failed .TypeError: .* on the prediction 'Ab' and the label 'c'"),
                          ("says_nothing", "must return True or False, not None")):
        with pytest.raises(UserError, match=message):
            find_score(f"my_scores:{name}")("Ab", "c")


@pytest.mark.parametrize("name, message", [
    ("my_scores:value", "my_scores has no function value"), ("my_scores:other", "my_scores has no function other"),
    ("no_such_scores:f", "the module cannot be imported .ModuleNotFoundError"),
    ("broken_scores:f", "the module cannot be imported .*no_such_module"),
    ("bleu", "is none of exact, number, and not"),
    ("my_scores:", "is none of exact, number")])
def test_scores_that_are_refused(my_scores, name, message):
    with pytest.raises(UserError, match=message):
        find_score(name)


def measured(tmp_path, name, *flags):
    """The settings of mode 2 on this set."""
    base, _, evaluation = parse("--mode", 2, "--ft_dataset_name", name, "--output_path", tmp_path / "results", *flags)
    return base, evaluation


@pytest.mark.parametrize("flags, correct", [((), 1), (("--score", "number"), 2), (("--score", "my_scores:starts"), 3)])
def test_own_rows_are_scored(my_scores, flags, correct):
    """The prompt is all that stands before the last answer; the score is the one that is asked for."""
    rows = [{"messages": turns("Q", "B", f"What is {i}?", f"It is {i}")} for i in range(3)]
    write_rows(my_scores / "test.jsonl", rows)
    tokenizer = char_tokenizer(chat_template=TURNS + OPEN)
    prompts = [f"[user]Q[end][assistant]B[end][user]What is {i}?[end][assistant]" for i in range(3)]
    said = ("It is 0", "I think 1" if "number" in flags else "It is", "It")
    stub = Stub(dict(zip(prompts, said, strict=True)))
    base, evaluation = measured(my_scores, f"chat:{my_scores}/test.jsonl", *flags)
    results = evalgsv(stub, tokenizer, base, evaluation)
    assert [item["prompt"] for item in results["predictions"]] == prompts
    assert [item["label"] for item in results["predictions"]] == [f"It is {i}" for i in range(3)]
    assert results["correct"] == correct and results["data_set"] == "chat"
    saved = json.loads((my_scores / "results/chat.json").read_text())
    assert saved["correct"] == correct and saved["settings"]["evalConfig"]["score"] == (flags[1] if flags else None)


def test_a_label_without_a_number(tmp_path):
    """No answer could be right, so it is said before a model is loaded."""
    for split in ("train", "test"):
        write_rows(tmp_path / f"{split}.jsonl", [{**GOOD, "completion": answer} for answer in ("1", "one")])
    char_tokenizer().save_pretrained(str(tmp_path / "model"))
    (tmp_path / "model/config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 128}))
    base, evaluation = measured(tmp_path, "chat", "--score", "number", "--data_dir", tmp_path)
    label, prepare = find_scorers(evaluation, base)["chat"]
    assert label == "chat"
    with pytest.raises(UserError, match="--score number: the answer of row 2 has no number: 'one'"):
        prepare(char_tokenizer(chat_template=TURNS), str(tmp_path / "model"), PromptStyle(), False)


@pytest.mark.parametrize("name, flags, message", [
    ("text", ("--score", "exact"), "--score is without effect on text, whose rows are texts: leave it out"),
    ("chat", ("--text_window", 8), "--text_window is without effect on chat, whose rows are no texts"),
    ("chat", ("--data_split", "test"), "--data_split and --data_config choose a part of OWNER/NAME on the hub, and c"),
    ("me/set", ("--data_config", "a"), "--data_split and --data_config choose a part of OWNER/NAME on the hub, "),
    ("gsm8k", ("--data_columns", "prompt=a"), "--data_columns and --prompt_template are for own rows, and gsm8k has")])
def test_flags_without_effect(tmp_path, name, flags, message):
    """They are refused, because the user meant something by them."""
    row = {"text": "Once."} if name == "text" else GOOD
    write_rows(tmp_path / "test.jsonl", [row])
    base, evaluation = measured(tmp_path, name, "--data_dir", tmp_path, *flags)
    with pytest.raises(UserError, match=message):
        find_scorers(evaluation, base)
    if flags[0].startswith("--data"):
        form = row_form(base.data_columns, None, base.data_split, base.data_config)
        with pytest.raises(UserError, match=message):
            prepare_dataset(name, char_tokenizer(), data_dir=str(tmp_path), form=form)


def test_one_set_at_a_time():
    with pytest.raises(UserError, match="--ft_dataset_name chat:a,text:b names several sets: evaluate one at a time"):
        find_measured("chat:a,text:b")


# --- perplexity ---------------------------------------------------------------------------------------------------

TEXTS = ["Once upon a time, there was a cat.\n", "The end? No, and on it goes.", "x"]


@pytest.mark.parametrize("flags, config, length", [
    (("--text_window", 7), {}, 7), ((), {"max_position_embeddings": 20}, 20), ((), {}, 2048)])
def test_perplexity_by_hand(tmp_path, flags, config, length):
    """Each window alone through the model, in float64: the mean over all tokens but the first of each text."""
    model, tokenizer = tiny_model(seed=3), char_tokenizer()
    write_rows(tmp_path / "test.jsonl", [{"text": text} for text in TEXTS])
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text(json.dumps(
        {"model_type": "llama", "vocab_size": 128, "max_position_embeddings": 4096, **config}))
    base, evaluation = measured(tmp_path, "text", "--data_dir", tmp_path, "--eval_batch_size", 2, *flags)
    label, prepare = find_scorers(evaluation, base)["text"]
    results = prepare(tokenizer, str(tmp_path / "model"))(
        model, tokenizer, base_args=base, eval_args=evaluation, name="ppl", extra={"moved": None})
    losses = []
    for text in TEXTS:
        ids = [*by_hand(text), EOS]
        for start in range(0, len(ids) - 1, length - 1):
            window = torch.tensor(ids[start:start + length])
            with torch.no_grad():
                logits = model(window[None]).logits[0].log_softmax(-1)
            losses += [-logits[i, window[i + 1]].item() for i in range(len(window) - 1)]
    assert len(losses) == results["tokens"] == sum(map(len, TEXTS))
    assert results["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-6)
    assert results["perplexity"] == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-5)
    assert (label, results["window"], results["rows"], results["data_set"]) == ("text", length, 3, "text")
    saved = json.loads((tmp_path / "results/ppl.json").read_text())
    assert saved["perplexity"] == results["perplexity"] and saved["moved"] is None and "accuracy" not in saved


def test_a_window_that_is_longer_than_the_model(tmp_path):
    write_rows(tmp_path / "test.jsonl", [{"text": text} for text in TEXTS])
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text(json.dumps(
        {"model_type": "llama", "vocab_size": 128, "max_position_embeddings": 20}))
    base, evaluation = measured(tmp_path, "text", "--data_dir", tmp_path, "--text_window", 21)
    with pytest.raises(UserError, match="--text_window 21 is too long: .*model takes 20 tokens"):
        find_scorers(evaluation, base)["text"][1](char_tokenizer(), str(tmp_path / "model"))


# --- whole runs ---------------------------------------------------------------------------------------------------

def talks(folder, demo_data):
    """The demo's rows as a file of dialogues with two answers each, and as a text."""
    rows = [row for row in datasets.load_dataset("csv", data_files=str(demo_data / "train.csv"), split="train",
                                                 cache_dir=str(folder / "cache"))][:40]
    write_rows(folder / "talks.jsonl", [{"messages": turns(a["ref"], a["mr"], b["ref"], b["mr"])}
                                        for a, b in zip(rows[::2], rows[1::2], strict=True)])
    (folder / "book.txt").write_text("".join(f"{row['ref']} {row['mr']}\n" for row in rows))


OWN_TEMPLATE = ("{% for m in messages %}{% if m.role == 'user' %}<|begin|>{{ m.content }}{% else %}<|answer|>"
                "{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
                "{% if add_generation_prompt %}<|answer|>{% endif %}")


@pytest.fixture(scope="module")
def own_run(tmp_path_factory, train, demo_data):
    """(the folder with the rows, the flags, an adapter that was trained on a mixture with a template of its own)."""
    folder = tmp_path_factory.mktemp("own")
    talks(folder, demo_data)
    (folder / "own.jinja").write_text(OWN_TEMPLATE)
    flags = ("--data_dir", "none", "--max_steps", 4, "--save_number", 2, "--gradient_checkpointing", False,
             "--train_batch_size", 4, "--source_max_len", 200, "--target_max_len", 80)
    name = f"chat:{folder}/talks.jsonl=0.5,text:{folder}/book.txt=0.5"
    adapter = train(folder / "adapters", *flags, "--training_data_name", name, "--chat_template", folder / "own.jinja")
    return folder, flags, adapter


def test_a_run_on_a_mixture(own_run):
    """Its folder and its card have names and no places. Its record has the template itself."""
    folder, _, adapter = own_run
    config = LotaConfig.load(adapter)
    assert "_chat+text_" in adapter.name and config.data_set == "chat=0.5,text=0.5"
    assert config.chat_template == OWN_TEMPLATE and config.settings["train_turns"] == "all"
    assert str(folder) not in (adapter / "README.md").read_text() and config.training["steps"] == 4


def test_resuming_on_a_mixture(own_run, train, tmp_path):
    """The rows may lie elsewhere, and the file of the template may be gone. The adapter is the same, bit for bit.

    Another share, another template and one other word are refused by name.
    """
    folder, flags, adapter = own_run
    for name in ("talks.jsonl", "book.txt"):
        shutil.copy(folder / name, tmp_path / name)
    checkpoint = ("--adapter_ckpt", adapter / "checkpoint-2")
    name = f"chat:{tmp_path}/talks.jsonl=0.5,text:{tmp_path}/book.txt=0.5"
    resumed = train(tmp_path / "a", *flags, *checkpoint, "--training_data_name", name)
    assert (resumed / "adapter_model.safetensors").read_bytes() == (adapter / "adapter_model.safetensors").read_bytes()
    with pytest.raises(UserError, match="its --training_data_name is chat=0.5,text=0.5, not chat=0.6,text=0.4"):
        train(tmp_path / "b", *flags, *checkpoint, "--training_data_name",
              name.replace("jsonl=0.5", "jsonl=0.6").replace("txt=0.5", "txt=0.4"))
    (tmp_path / "other.jinja").write_text("{# other #}" + OWN_TEMPLATE)
    with pytest.raises(UserError, match="its --chat_template is one with SHA-256 .{12}, not one with SHA-256 .{12}$"):
        train(tmp_path / "c", *flags, *checkpoint, "--training_data_name", name, "--chat_template",
              tmp_path / "other.jinja")
    (tmp_path / "book.txt").write_text((folder / "book.txt").read_text().replace("game", "Game", 1))
    with pytest.raises(UserError, match="the tokenized rows of --training_data_name chat=0.5,text=0.5 are others"):
        train(tmp_path / "d", *flags, *checkpoint, "--training_data_name", name)
    assert not any((tmp_path / folder).exists() for folder in "bcd")


def test_evaluating_own_rows(own_run, evaluate, tmp_path):
    """Prompts are written as in the training; a text has a perplexity, and so has the loss of the same tokens."""
    folder, _, adapter = own_run
    common = ("--load_adapter", adapter, "--data_dir", "none", "--limit", 3, "--max_new_tokens", 5)
    results = evaluate(tmp_path, *common, "--ft_dataset_name", f"chat:{folder}/talks.jsonl")
    assert results["data_set"] == "chat" and len(predictions(results)) == 3
    for item in results["predictions"]:
        assert re.fullmatch(r"<\|begin\|>.*<\|answer\|>.*<\|end\|><\|begin\|>.*<\|answer\|>", item["prompt"], re.DOTALL)
    assert next(tmp_path.glob("*.json")).name.startswith(f"{adapter.name}_merged_chat_")
    one, two = (evaluate(tmp_path, *common, "--ft_dataset_name", f"text:{folder}/book.txt", "--text_window", window)
                for window in (16, 64))
    assert one["tokens"] == two["tokens"] and one["windows"] > two["windows"] and one["window"] == 16
    assert 1 < two["perplexity"] < one["perplexity"] and one["perplexity"] == pytest.approx(math.exp(one["loss"]))
