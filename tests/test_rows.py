"""Files become rows: every format gives the same rows, and nothing that a file or a folder holds is lost in silence."""
import csv
import gzip
import json
import sys
from types import SimpleNamespace

import pytest
from datasets import Dataset, DatasetDict
from test_data import EOS, by_hand, char_tokenizer, numbered, write_rows

import gptq_quantize
from data_print_save import load_rows, prepare_dataset, read_messages
from LoTA import UserError
from LoTA.row_files import kind_of, lines_of, read_rows

ROWS = [{"question": "1,5 or \"2\"?\nSay.", "answer": "#### 2"}, {"question": "Zoë\u2028\u0085?", "answer": "007"}]
BOM = b"\xef\xbb\xbf"


def encoded(kind, rows=ROWS):
    """The bytes of a file with these rows."""
    if kind == "parquet":
        import io
        buffer = io.BytesIO()
        Dataset.from_list(rows).to_parquet(buffer)
        return buffer.getvalue()
    if kind in ("csv", "tsv"):
        import io
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, rows[0], delimiter="," if kind == "csv" else "\t")
        writer.writeheader()
        writer.writerows(rows)
        return text.getvalue().encode()
    if kind == "json":
        return json.dumps(rows, indent=1, ensure_ascii=False).encode()
    return "\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode()


def put(folder, **files):
    """Writes files, named with __ for the dot. Returns the folder's path."""
    for name, content in files.items():
        path = folder / name.replace("__", ".")
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(folder)


# --- one file -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("mark", [b"", BOM], ids=["", "byte order mark"])
@pytest.mark.parametrize("suffix", ["{}", "{}.gz", "upper", "upper gz"])
@pytest.mark.parametrize("kind", ["csv", "tsv", "json", "jsonl", "parquet"])
def test_every_format_gives_the_same_rows(tmp_path, kind, suffix, mark):
    """Packed or not, in any case, with a byte order mark or without."""
    name = {"upper": kind.upper(), "upper gz": f"{kind.upper()}.GZ"}.get(suffix, suffix.format(kind))
    content = (b"" if kind == "parquet" else mark) + encoded(kind)
    path = tmp_path / f"rows.{name}"
    path.write_bytes(gzip.compress(content, mtime=0) if name.lower().endswith("gz") else content)
    assert kind_of(path) == kind
    assert read_rows(path) == ROWS


@pytest.mark.parametrize("text", [
    '{"a": "1"}\n{"a": "2"}\n', '{"data": [{"a": "1"}, {"a": "2"}]}', '\n{"a": "1"}\r\n\r\n{"a": "2"}',
    '{"version": 1, "data": [{"a": "1"}, {"a": "2"}]}', '[{"a": "1"},\n {"a": "2"}]', '{"a": "1"}\r{"a": "2"}'])
@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl"])
def test_forms_of_json(tmp_path, name, text):
    """An array, JSON Lines and a wrapper, whatever the name says."""
    (tmp_path / name).write_bytes(text.encode())
    assert read_rows(tmp_path / name) == [{"a": "1"}, {"a": "2"}]


def test_one_line_of_json(tmp_path):
    (tmp_path / "rows.json").write_text('{"a": "1", "data": "text"}\n')
    assert read_rows(tmp_path / "rows.json") == [{"a": "1", "data": "text"}]


def test_numbers_are_text_as_written(tmp_path):
    """A number keeps its digits. Nested values too. null stays, because it is no text."""
    (tmp_path / "rows.jsonl").write_text('{"a": 3.50, "b": 12345678901234567890, "c": 1e3, "d": true, "e": NaN}\n'
                                         '{"a": "x", "b": -0, "c": null, "d": [1, {"f": 2.0}], "e": "y"}\n')
    assert read_rows(tmp_path / "rows.jsonl") == [
        {"a": "3.50", "b": "12345678901234567890", "c": "1e3", "d": "true", "e": "NaN"},
        {"a": "x", "b": "-0", "c": None, "d": ["1", {"f": "2.0"}], "e": "y"}]
    Dataset.from_list([{"n": 7, "t": False, "x": 0.5, "none": None}]).to_parquet(str(tmp_path / "rows.parquet"))
    assert read_rows(tmp_path / "rows.parquet") == [{"n": "7", "t": "false", "x": "0.5", "none": None}]


def test_keys_of_all_rows(tmp_path):
    """A column that only a later row has is not lost."""
    (tmp_path / "rows.jsonl").write_text('{"a": "1"}\n{"b": "2"}\n')
    assert read_rows(tmp_path / "rows.jsonl") == [{"a": "1", "b": None}, {"a": None, "b": "2"}]


def test_a_long_cell(tmp_path):
    """The csv module's own limit is not ours, and is what it was afterwards."""
    csv.field_size_limit(131_072)                # the default
    (tmp_path / "rows.csv").write_text(f"a,b\n{'x' * 140_000},2\n")
    assert read_rows(tmp_path / "rows.csv") == [{"a": "x" * 140_000, "b": "2"}]
    assert csv.field_size_limit() == 131_072


@pytest.mark.parametrize("name, content, message", [
    ("r.csv", "q,a\n1,2\n\n3,4,5\n", r"r.csv, row 2 \(the header is not counted\) .*: 3, not 2 \(q, a\).*'5'"),
    ("r.csv", "q,a\n1,2\n3\n", r"r.csv, row 2 \(the header is not counted\) .*: 1, not 2 \(q, a\)"),
    ("r.tsv", "q\ta\n1\t2\t3\n", r"r.tsv, row 1 \(the header is not counted\) .*: 3, not 2 \(q, a\)"),
    ("r.csv", "q,a,a\n1,2,3\n", "r.csv: the column 'a' stands more than once in q, a, a"),
    ("r.csv", 'q,a\n1,2\n"3,4\n5,6\n', r"r.csv, row 2 \(the header is not counted\) cannot be read"),
    ("r.csv", 'q,a\n1,"2" or 3\n', r"r.csv, row 1 \(the header is not counted\) cannot be read"),
    ("r.csv", "q,a\n1,2\n".encode("utf-16"), "r.csv is not UTF-8"),
    ("r.csv", "q,a\n", "r.csv is empty"),
    ("r.jsonl", '{"q": "1"}\n\n{"q": \n', "r.jsonl, line 3 is not JSON"),
    ("r.json", '{"q": "1"}\n{"q": "2"\n', "r.json, line 2 is not JSON"),
    ("r.jsonl", '{"q": "1"}\n["2"]\n', "r.jsonl, line 2 is not a record"),
    ("r.jsonl", '{"q": "1"}\n{"q": "1", "q": "2"}\n', "r.jsonl, line 2 has one of the keys q twice"),
    ("r.json", '[{"q": "1"}, {"a": {"q": "1", "q": "2"}}]', "r.json, row 2 has one of the keys q twice"),
    ("r.json", '[{"q": "1"}, {"q": "\\ud83d"}]', "r.json, row 2 holds half a character"),
    ("r.json", '[{"q": "1"}, "2"]', "r.json, row 2 is not a record"),
    ("r.json", '{"data": [{"q": "1"}], "data": []}', "r.json, row 1 has one of the keys data twice"),
    ("r.json", '[{"q": "1"}, ', "r.json cannot be read as json"),
    ("r.json", '"text"', "r.json is not a list of records"),
    ("r.json", '{"data": []}', "r.json is empty"),
    ("r.parquet", "PAR?", "r.parquet cannot be read as parquet"),
    ("r.csv.gz", "q,a\n", "r.csv.gz cannot be unpacked"),
    ("r.jsonl.gz", gzip.compress(b'{"q": "1"}\n' * 99, mtime=0)[:-9], "r.jsonl.gz cannot be unpacked"),
    ("r.xlsx", "", "r.xlsx is not a csv, json or jsonl file")])
def test_what_cannot_be_read_is_named(tmp_path, name, content, message):
    """File, row or line, and what is wrong, on one line."""
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message) as error:
        read_rows(tmp_path / name)
    assert "\n" not in str(error.value)


def test_lines_end_at_newlines_only():
    """Other separators of Unicode stand inside a text."""
    assert lines_of("a\u2028b\x0cc\r\nd\ne\u0085f\rg") == ["a\u2028b\x0cc", "d", "e\u0085f", "g"]


# --- rows of a data set -------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", ["json", "jsonl"])
def test_an_input_that_only_later_rows_have(tmp_path, kind):
    """The first row lacks the optional column, and the second row's is read."""
    rows = [{"instruction": "Go.", "output": "On."}, {"instruction": "Double.", "input": 0, "output": "0"}]
    put(tmp_path, **{f"train__{kind}": encoded(kind, rows)})
    users = [read_messages("alpaca", row)[0][0]["content"] for row in load_rows("alpaca", "train", str(tmp_path))]
    assert users == ["Go.", "Double.\n\n0"]


def test_numbers_as_answers(tmp_path):
    """In a file as they are written, and of the hub's tables as Python writes them."""
    put(tmp_path, train__jsonl='{"question": "1+1?", "answer": 2.50}\n{"question": "1+2?", "answer": "3"}\n',
        test__jsonl='{"question": "1+1?", "answer": 2}\n')
    assert load_rows("gsm8k", "train", str(tmp_path))["answer"][:] == ["2.50", "3"]
    assert [read_messages("gsm8k", {"question": 7, "answer": answer})[1] for answer in (2, 2.5, True)] \
        == ["2", "2.5", "true"]


def test_blank_rows_are_left_out_and_said(tmp_path, capsys):
    """An empty answer trains nothing. It is counted, and the rows around it stay."""
    put(tmp_path, train__csv="question,answer\nq,\nr,#### 3\n,#### 4\ns,  \n", test__csv="question,answer\nq,#### 1\n")
    tokenizer = char_tokenizer(chat_template="{{ messages[-1].content }}>")
    data = prepare_dataset("gsm8k", tokenizer, data_dir=str(tmp_path))
    assert [row["input_ids"] for row in data] == [[*by_hand("r>#### 3"), EOS]]
    out = capsys.readouterr().out
    assert "3 of 4 rows of 'gsm8k' have an empty question or answer and are left out" in out
    assert "train.csv, row 1 (the header is not counted)" in out


def test_only_blank_rows(tmp_path):
    put(tmp_path, train__csv="question,answer\nq,\n", test__csv="question,answer\nq,\n")
    with pytest.raises(UserError, match="the train split .* has no row with a question and an answer"):
        load_rows("gsm8k", "train", str(tmp_path))


@pytest.mark.parametrize("name, rows, message", [
    ("gsm8k", [{"question": "q", "answer": "a"}, {"question": "q"}], "train.jsonl, row 2: .*no question or no answer"),
    ("alpaca", [{"instruction": None, "input": "i", "output": "o"}], "train.jsonl, row 1: .*no text but None"),
    ("alpaca", [{"instruction": "x", "output": ["a"]}], "train.jsonl, row 1"),
    ("sql", [{"question": "q", "context": None, "answer": "a"}], "train.jsonl, row 1: .*no text but None")])
def test_rows_without_text_are_named(tmp_path, name, rows, message):
    """None never becomes the word None in a prompt."""
    put(tmp_path, train__jsonl=encoded("jsonl", rows), test__jsonl=encoded("jsonl", rows[:1]))
    with pytest.raises(UserError, match=message):
        load_rows(name, "train", str(tmp_path))


# --- dialogues ----------------------------------------------------------------------------------------------------

USER, ANSWER = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
PARTS = {"role": "user", "content": [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]}


@pytest.mark.parametrize("name", ["alpaca", "sql"])
@pytest.mark.parametrize("row, before", [
    ({"messages": [USER, ANSWER]}, [USER]),
    ({"messages": [PARTS, ANSWER]}, [USER]),
    ({"messages": [USER, ANSWER, USER, ANSWER]}, [USER, ANSWER, USER]),
    ({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}], "tools": ""}, [USER]),
    ({"system": "S", "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
     [{"role": "system", "content": "S"}, USER])])
def test_dialogues_are_read(tmp_path, name, row, before):
    """The last turn is the answer and all others are the prompt. Text and parts may stand in one file."""
    rows = [{"messages": [USER, ANSWER]}, row]
    put(tmp_path, train__jsonl=encoded("jsonl", rows), test__jsonl=encoded("jsonl", rows))
    read = [read_messages(name, row) for row in load_rows(name, "train", str(tmp_path))]
    assert read == [([USER], "Hello"), (before, "Hello")]


@pytest.mark.parametrize("turns, message", [
    ([USER, ANSWER, USER], "the last turn must be the assistant's"),
    ([], "the last turn must be the assistant's"),
    ([ANSWER], "no turn of the user"),
    ([USER, {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}], "turn 2 .*tool"),
    ([USER, {"role": "tool", "content": "7"}, ANSWER], "turn 2 is of 'tool'"),
    ([USER, {"role": "assistant", "content": None}], "turn 2 of 'assistant' has no content"),
    ([{"role": "user", "content": [{"type": "image_url", "image_url": "u"}]}, ANSWER], "part of type 'image_url'"),
    ("Hi", "no list of turns")])
def test_dialogues_that_would_lose_something_are_refused(tmp_path, turns, message):
    """With the row's number. The user's turn is never the answer."""
    rows = [{"messages": [USER, ANSWER]}, {"messages": turns}]
    put(tmp_path, train__jsonl=encoded("jsonl", rows), test__jsonl=encoded("jsonl", rows))
    with pytest.raises(UserError, match=f"train.jsonl, row 2: .*{message}"):
        load_rows("sql", "train", str(tmp_path))


def test_alpaca_with_system_and_history():
    """The optional columns of an Alpaca file become turns."""
    row = {"instruction": "Hi", "output": "Hello", "system": "S", "history": [["a", "b"]]}
    assert read_messages("alpaca", row) == ([
        {"role": "system", "content": "S"}, {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"},
        USER], "Hello")


# --- folders ------------------------------------------------------------------------------------------------------

def csv_of(word):
    return f"question,answer\n{word},#### 1\n"


def questions(split, folder):
    return load_rows("gsm8k", split, str(folder))["question"][:]


@pytest.mark.parametrize("train", ["train.parquet", "train.CSV", "Train.jsonl.gz", "train_data.json", "my-training.tsv",
                                   "gsm8k.train.csv", "train-00000-of-00001.parquet"])
@pytest.mark.parametrize("test", ["test.csv", "test.TSV", "test_data.parquet", "gsm8k.dev.json.gz", "testset.csv",
                                  "ValData.jsonl"])
def test_each_split_is_read_from_its_own_file(tmp_path, train, test):
    """Whatever the formats of the two files, the test rows are never trained on."""
    for name, word in ((train, "TRAIN"), (test, "TEST")):
        content = encoded(kind_of(name), [{"question": word, "answer": "#### 1"}])
        (tmp_path / name).write_bytes(gzip.compress(content, mtime=0) if name.endswith(".gz") else content)
    assert (questions("train", tmp_path), questions("test", tmp_path)) == (["TRAIN"], ["TEST"])


@pytest.mark.parametrize("name", ["test.csv", "test.jsonl", "testset.parquet", "my_test_rows.csv", "train_test.csv"])
@pytest.mark.parametrize("place", ["file", "folder"])
def test_a_file_named_test_is_never_trained_on(tmp_path, name, place):
    """Not even where it is the only one."""
    (tmp_path / name).write_bytes(encoded(kind_of(name), numbered(5)))
    source = tmp_path / name if place == "file" else tmp_path
    assert len(questions("test", source)) == 5
    with pytest.raises(UserError, match="has no train split, only test"):
        questions("train", source)


@pytest.mark.parametrize("name", ["valid.jsonl", "dev.parquet", "gsm8k_val.csv"])
def test_a_lone_validation_file_is_cut(tmp_path, name):
    """It is a single source like any other: its rows train and test, each in one of the two."""
    (tmp_path / name).write_bytes(encoded(kind_of(name), numbered(10)))
    train, test = questions("train", tmp_path), questions("test", tmp_path)
    assert (len(train), len(test)) == (8, 2) and not set(train) & set(test)


def test_words_that_only_hold_test(tmp_path):
    """"latest" and "contest" do not say test."""
    put(tmp_path, latest_contest_values__csv=encoded("csv", numbered(10)))
    assert len(questions("train", tmp_path)) == 8


def test_shards_are_joined(tmp_path):
    """All shards of a split, in their order; one that is missing is named."""
    for i, word in enumerate("abc"):
        (tmp_path / f"train-0000{i}-of-00003.csv").write_text(csv_of(word))
    put(tmp_path, test__csv=csv_of("t"))
    assert questions("train", tmp_path) == ["a", "b", "c"]
    (tmp_path / "train-00001-of-00003.csv").unlink()
    with pytest.raises(UserError, match="must hold 3 files train-00000-of-00003.csv"):
        questions("train", tmp_path)


def test_two_files_of_one_split(tmp_path):
    """Which one is meant is the user's to say."""
    put(tmp_path, train__csv=csv_of("a"), train__jsonl=encoded("jsonl", ROWS), test__csv=csv_of("t"))
    with pytest.raises(UserError, match="several files that are named train: train.csv, train.jsonl; keep one"):
        questions("train", tmp_path)


def test_what_is_not_used_is_named(tmp_path, capsys):
    """Rows, other files and folders beside the ones that are read; hidden files are nobody's rows."""
    put(tmp_path, train__csv=csv_of("a"), train_more__csv=csv_of("b"), test__csv=csv_of("t"), valid__csv=csv_of("v"),
        notes__txt="n", __hidden="h")
    (tmp_path / "old").mkdir()
    assert questions("train", tmp_path) == ["a"]
    assert capsys.readouterr().out == f"not used of {tmp_path}: notes.txt, old/, train_more.csv, valid.csv\n"


def test_dataset_info_beside_files(tmp_path, capsys):
    """LlamaFactory's list of data sets makes no save_to_disk folder, and is no rows."""
    rows = json.dumps([{"instruction": "Say hi.", "input": "", "output": "Hi."}] * 4)
    put(tmp_path, dataset_info__json=json.dumps({"mine": {"file_name": "train.json"}}), train__json=rows)
    assert len(load_rows("alpaca", "train", str(tmp_path))) == 4
    assert capsys.readouterr().out == f"not used of {tmp_path}: dataset_info.json\n"


def test_saved_splits_that_nobody_names(tmp_path, capsys):
    """Two splits of other names are not guessed at; a third beside train and test is named."""
    part = Dataset.from_list(numbered(3))
    DatasetDict({"one": part, "two": part}).save_to_disk(str(tmp_path / "unnamed"))
    with pytest.raises(UserError, match="none is named train or test: one, two"):
        questions("train", tmp_path / "unnamed")
    DatasetDict({"train": part, "test": part, "more": part}).save_to_disk(str(tmp_path / "named"))
    capsys.readouterr()
    assert len(questions("train", tmp_path / "named")) == 3
    assert capsys.readouterr().out == f"not used of {tmp_path / 'named'}: more/\n"


def test_a_single_file_says_how_it_is_cut(tmp_path, capsys):
    path = write_rows(tmp_path / "train.csv", numbered(10))
    assert len(questions("train", path)) == 8
    assert capsys.readouterr().out == f"{path} has a single split: 8 of its rows train, 2 test\n"


# --- what is cut --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("source_max, target_max, prompts, answers", [
    (9, 9, 0, 0), (8, 9, 1, 0), (3, 4, 2, 1), (9, 8, 0, 1), (2, 1, 3, 3)])
def test_cut_prompts_and_answers_are_counted(tmp_path, capsys, source_max, target_max, prompts, answers):
    """One line with both numbers. A cut answer has no end token in its labels, and nothing in its place."""
    rows = [{"instruction": "a" * n, "input": "", "output": "b" * m} for n, m in ((2, 1), (3, 2), (8, 8))]
    put(tmp_path, train__jsonl=encoded("jsonl", rows))
    tokenizer = char_tokenizer(chat_template="{{ messages[-1].content }}>")
    data = prepare_dataset("alpaca", tokenizer, data_dir=str(tmp_path), source_max_len=source_max,
                           target_max_len=target_max)
    line, = [line for line in capsys.readouterr().out.splitlines() if "cut" in line]
    assert line == (f"alpaca: 3 rows; {prompts} prompts are cut to --source_max_len {source_max} tokens, "
                    f"{answers} answers to --target_max_len {target_max}"
                    + "; a cut answer trains without its end token" * bool(answers))
    assert data.column_names == ["input_ids", "labels", "length"]
    for row, example in zip(rows, data, strict=True):
        whole = [*by_hand(row["output"]), EOS]
        assert [label for label in example["labels"] if label != -100] == whole[:target_max]
        assert len(example["labels"]) == min(source_max, len(row["instruction"]) + 1) + min(target_max, len(whole))


# --- calibration samples ------------------------------------------------------------------------------------------

def calibration(path, samples=64, max_length=99):
    return SimpleNamespace(calibration=str(path), samples=samples, max_length=max_length, seed=1, data_dir=None)


@pytest.mark.parametrize("name, content, texts", [
    ("c.txt", "one\u2028still one\r\n\ntwo\x0cstill two\u0085\n  \nthree",
     ["one\u2028still one", "two\x0cstill two\u0085", "three"]),
    ("c.jsonl", '{"text": "one\u2028"}\r\n\n{"text": "two", "n": 1}\n', ["one\u2028", "two"]),
    ("c.JSONL", '{"text": "one"}\n', ["one"]), ("c.json", '[{"text": "one\\n"}]', ["one\n"]),
    ("c.csv", 'n,text\n1,"one\ntwo"\n', ["one\ntwo"])])
@pytest.mark.parametrize("mark", [b"", BOM], ids=["", "byte order mark"])
def test_calibration_texts(tmp_path, mark, name, content, texts):
    """A text file has a sample in each line. Newlines alone end a line. A byte order mark is no text."""
    (tmp_path / name).write_bytes(mark + content.encode())
    assert gptq_quantize.calibration_texts(calibration(tmp_path / name), None) == texts
    assert gptq_quantize.calibration_texts(calibration(tmp_path / name, 1), None) == texts[:1]


@pytest.mark.parametrize("name, content, message", [
    ("c.jsonl", '{"text": "one"}\n\n{"text": \n', "c.jsonl, line 3 is not JSON"),
    ("c.jsonl", '{"text": "one"}\n"two"\n', "c.jsonl, line 2 is not a record"),
    ("c.jsonl", '{"text": "one"}\n{"words": "two"}\n', "c.jsonl, row 2 has no text in the field 'text'"),
    ("c.csv", "words\ntwo\n", r"c.csv, row 1 \(the header is not counted\) has no text in the field 'text'"),
    ("c.txt", "one".encode("utf-16"), "c.txt is not UTF-8"), ("c.txt", "\n \n", "holds no text")])
def test_calibration_files_that_cannot_be_read(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message):
        gptq_quantize.calibration_texts(calibration(tmp_path / name), None)


def test_the_samples_are_those_that_gptqmodel_uses(tmp_path, capsys):
    """A sample of 10 tokens is dropped and one of 11 is not. GPTQModel drops none of those that are left."""
    from gptqmodel.utils.calibration import prepare_calibration_dataset
    path = tmp_path / "c.txt"
    path.write_text("".join("x" * n + "\n" for n in [10, 11, 3, *range(12, 20), 200]))
    tokenizer = char_tokenizer()
    capsys.readouterr()                         # what GPTQModel says when it is imported
    samples, short = gptq_quantize.calibration_samples(calibration(path), tokenizer)
    assert [len(sample["input_ids"]) for sample in samples] == [11, *range(12, 20), 99] and short == 2
    assert samples[0]["input_ids"].tolist() == by_hand("x" * 11)
    assert capsys.readouterr().out == ("10 calibration samples, 234 tokens; 2 others have 10 tokens or fewer and are "
                                       "left out\n")
    used = prepare_calibration_dataset(SimpleNamespace(tokenizer=tokenizer, model=None), samples,
                                       calibration_data_min_length=gptq_quantize.SHORT_SAMPLE)
    assert len(used) == 10
    everything = [{key: [value] for key, value in tokenizer("x" * n).items()} for n in (10, 11)]
    by_default = prepare_calibration_dataset(SimpleNamespace(tokenizer=tokenizer, model=None), everything)
    assert len(by_default) == 1                 # the library's own limit is ours


@pytest.mark.parametrize("long, asked, enough", [(8, 64, True), (7, 64, False), (1, 64, False), (0, 64, False),
                                                 (2, 2, True), (1, 2, False)])
def test_too_few_samples_are_an_error(tmp_path, long, asked, enough):
    """The number that is really used counts, not that of the lines."""
    path = tmp_path / "c.txt"
    path.write_text(("x" * 20 + "\n") * long + "short\n" * 60)
    if enough:
        assert len(gptq_quantize.calibration_samples(calibration(path, asked), char_tokenizer())[0]) == long
    else:
        with pytest.raises(UserError, match=f"gives {long} samples of more than 10 tokens, and {min(8, asked)} is the"):
            gptq_quantize.calibration_samples(calibration(path, asked), char_tokenizer())


def test_quantize_takes_the_published_flags(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["gptq_quantize.py", "--pretrained", "base", "--w_bits", "2",
                                      "--quantized_model_save", "out"])
    args = gptq_quantize.parse_args()
    assert (args.model, args.bits, args.output_dir) == ("base", 2, "out")
