"""Scoring, generation and the saved results: against hand-made cases, published values and plain greedy decoding."""
import json
from dataclasses import replace
from datetime import datetime

import pytest
import torch
from conftest import parse, predictions
from pairs import pairwise
from test_data import (
    ANSWERS,
    BOS,
    EOS,
    NO_SYSTEM,
    PAD,
    ROWS,
    SYSTEMS,
    USERS,
    by_hand,
    char_tokenizer,
    numbered,
    prepared,
    write_rows,
)
from transformers import LlamaConfig, LlamaForCausalLM

import evalGSV
from data_print_save import load_rows, prepare_dataset
from evalGSV import answer_loss, confidence_interval, evalgsv, generate, is_correct
from LoTA import UserError
from LoTA.adapter_folder import LotaConfig
from LoTA.settings import baseConfig, check_evaluation, evalConfig

# --- scoring ------------------------------------------------------------------------------------------------------

MR = "inform(name[Tin Road], release_year[2011], genres[puzzle, racing])"
ESRB = "inform(name[Tin Road], esrb[E 10+ (for Everyone 10 and Older)])"


GSM8K_RIGHT = [
    ("2 + 3 = 5\n#### 5", "5 pens.\n#### 5"), ("#### 1,234", "#### 1234"), ("#### 1234", "It is so.\n#### 1,234"),
    ("#### $5.", "#### 5"), ("#### $1,234,567.50", "#### 1234567.5"), ("#### 5.0", "#### 5"), ("####5", "#### 5"),
    ("####   5  \n", "#### 5"), ("#### 6\n#### 5", "#### 5"), ("#### 5\nThat is all.", "#### 5"),
    ("#### -3", "#### -3"), ("#### 0", "#### 0"), ("# 7 ## 8 #### 5", "#### 5")]
GSM8K_WRONG = [
    ("5", "#### 5"), ("The answer is 5.", "#### 5"), ("### 5", "#### 5"), ("# # # # 5", "#### 5"), ("", "#### 5"),
    ("####", "#### 5"), ("#### 6", "#### 5"), ("#### -5", "#### 5"), ("#### 15", "#### 5"), ("#### 51", "#### 5"),
    ("#### 5\n#### 6", "#### 5"), ("#### 5.1", "#### 5"), ("#### 0.5", "#### 5"), ("#### five", "#### 5"),
    ("#### 5/2", "#### 5"), ("#### 1,234", "#### 234"), ("#### 1.234", "#### 1234"), ("####\n\n#### ", "#### 0")]
VIGGO_RIGHT = [
    (MR, MR), ("inform(genres[puzzle, racing], name[Tin Road], release_year[2011])", MR),
    ("inform(release_year[2011],genres[puzzle, racing],name[Tin Road])", MR), (f"  {MR}\n", MR),
    ("inform( name[Tin Road] ,  release_year[2011],  genres[puzzle, racing] )", MR), (ESRB, ESRB),
    ("inform(esrb[E 10+ (for Everyone 10 and Older)], name[Tin Road])", ESRB),
    ("request_attribute(esrb[], rating[])", "request_attribute(rating[], esrb[])"),
    ("request(specifier[fast], esrb)", "request(esrb, specifier[fast])")]
VIGGO_WRONG = [
    "", "inform", "inform()", "garbage", "[[[(((,,,", "name[Tin Road], release_year[2011], genres[puzzle, racing]",
    "inform(name[Tin Road], release_year[2011])", MR.replace("inform", "recommend"), MR.replace("inform", "Inform"),
    MR.replace("2011", "2012"), MR.replace("Tin Road", "tin road"), MR.replace("Tin Road", "TinRoad"),
    MR.replace("release_year", "year"), MR.replace("puzzle, racing", "puzzle"),
    MR.replace("puzzle, racing", "racing, puzzle"), MR.replace("puzzle, racing", "puzzle], genres[racing"),
    MR.replace(")", ", esrb[T])"), MR.replace("(", "(name[Tin Road], "), f"{MR} {MR}", f"It is {MR}", f"{MR} and so on",
    MR.replace("(", " "), "inform(name[racing], release_year[2011], genres[puzzle, Tin Road])"]


def test_gsm8k_right():
    """The number after the last #### counts, however it is written and whatever stands before it."""
    for pred, label in GSM8K_RIGHT:
        assert is_correct(pred, label, "gsm8k") is True, pred


def test_gsm8k_wrong():
    """No ####, another number, another sign, or a right number that is not the last."""
    for pred, label in GSM8K_WRONG:
        assert is_correct(pred, label, "gsm8k") is False, pred


def test_viggo_right():
    """The order of the attributes and the white space between them do not count. Commas in a value divide nothing."""
    for pred, label in VIGGO_RIGHT:
        assert is_correct(pred, label, "viggo") is True, pred


def test_viggo_wrong():
    """Another function, a missing, additional, repeated or other attribute, another value, or text around it."""
    for pred in VIGGO_WRONG:
        assert is_correct(pred, MR, "viggo") is False, pred


def test_viggo_value_with_brackets_is_read_to_its_end():
    """A closing bracket inside a value belongs to the value. An answer without it is wrong."""
    assert is_correct(ESRB.replace("Older)", "Older"), ESRB, "viggo") is False


def test_sql():
    """The exact string: letter case, quotes, inner spaces and a semicolon all count."""
    label = "SELECT a FROM b WHERE c = \"D\""
    for pred, right in ((label, True), (f"  {label}\n", True), (label.lower(), False), (label.replace("D", "d"), False),
                        (label.replace('"', "'"), False), (f"{label};", False), (label.replace(" a", "  a"), False),
                        ("SELECT a FROM b", False), ("", False), (f"{label} SELECT", False)):
        assert is_correct(pred, label, "sql") is right, pred


@pytest.mark.parametrize("data_name", ["alpaca", "squad"])
def test_scoring_of_a_set_without_score(data_name):
    """A set that is for training only, and one that is not there: no silent score."""
    with pytest.raises(ValueError, match=f"no scoring for data set '{data_name}'"):
        is_correct("a", "a", data_name)


@pytest.mark.parametrize("correct, total, low, high", [
    (81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718),
    (29, 29, 1 - 0.1170, 1.0)])
def test_wilson_interval_of_published_examples(correct, total, low, high):
    """Newcombe (1998), method 3, to the four digits that are printed there. The last case is 1 / (1 + z^2 / n)."""
    assert confidence_interval(correct, total) == pytest.approx((low, high), abs=6e-5)


@pytest.mark.parametrize("correct, total", [(1, 3), (50, 100), (700, 1319), (1318, 1319)])
def test_wilson_interval_solves_its_equation(correct, total):
    """At both ends the share lies z standard errors away, by the definition of the score interval."""
    low, high = confidence_interval(correct, total)
    assert low < correct / total < high
    for end in (low, high):
        assert (correct / total - end)**2 == pytest.approx(1.96**2 * end * (1 - end) / total, rel=1e-9)


def test_wilson_interval_is_of_shares():
    """None and all correct give ends within 0 and 1, so that no "-0.00%" is printed."""
    for total in (1, 7, 10, 20, 50, 100, 1083, 1319):
        for correct in (0, total):
            low, high = confidence_interval(correct, total)
            assert 0 <= low < high <= 1, total


# --- generation ---------------------------------------------------------------------------------------------------

def tiny_model(seed=0, **config):
    """A random Llama in float64 whose answers depend on every token of the prompt."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=128, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=1024, initializer_range=0.4, pad_token_id=PAD, bos_token_id=BOS,
        eos_token_id=EOS, **config))
    return model.double().eval()


def greedy_by_hand(model, ids, max_new_tokens):
    """Plain greedy decoding: one row, no padding, no cache, the largest logit each time, until the end token."""
    new = []
    with torch.inference_mode():
        while len(new) < max_new_tokens:
            new.append(model(torch.tensor([ids + new]), use_cache=False).logits[0, -1].argmax().item())
            if new[-1] == EOS:
                break
    return new


def mixed_prompts(lengths=(5, 90, 1, 33, 2, 300, 34, 8, 61)):
    """Different prompts of very different lengths, not sorted by length."""
    generator = torch.Generator().manual_seed(3)
    return ["".join(map(chr, torch.randint(33, 127, (n,), generator=generator).tolist())) for n in lengths]


def with_early_ends(model, likely):
    """Makes the end token likely, so that answers end at different lengths."""
    with torch.no_grad():
        model.lm_head.weight[EOS] *= likely
    return model


@pytest.mark.parametrize("batch_size, max_new_tokens, likely, pad", pairwise(
    batch_size=[1, 2, 4, 100], max_new_tokens=[1, 12], likely=[1, 2.5], pad=["<pad>", "<eos>"],
    exists=lambda batch_size, max_new_tokens, likely, pad: max_new_tokens > 1 or likely == 1,
    also=[(4, 12, 2.5, "<eos>"), (2, 12, 2.5, "<pad>")]))
def test_batched_answers_are_the_plain_greedy_ones(batch_size, max_new_tokens, likely, pad):
    """Left-padded batches answer as each prompt does alone, in the order of the prompts.

    One prompt has 300 tokens. max_new_tokens are generated unless the end token comes first.
    """
    model, prompts = with_early_ends(tiny_model(), likely), mixed_prompts()
    tokenizer = char_tokenizer(pad_token=pad)
    new = [greedy_by_hand(model, by_hand(p), max_new_tokens) for p in prompts]
    want = [tokenizer.decode([t for t in ids if t > 2]).strip() for ids in new]
    assert len(set(want)) > 3                                           # an order that was lost would show
    if likely == 1:
        assert all(len(ids) == max_new_tokens for ids in new)
    else:
        assert len({len(ids) for ids in new}) > 2
    tokenizer.padding_side = "right"                                    # generate sets it itself
    assert generate(model, tokenizer, prompts, batch_size, max_new_tokens) == want


@pytest.mark.parametrize("settings", [
    {"do_sample": True, "temperature": 5.0, "top_p": 0.9, "top_k": 50}, {"max_length": 20}, {"max_new_tokens": 2},
    {"repetition_penalty": 1.5}], ids=lambda s: next(iter(s)))
def test_greedy_whatever_the_model_brings(settings):
    """The model's own generation_config changes nothing, though published models bring sampling and penalties.

    The answer is the plain greedy one, of the length that was asked for.
    """
    model, tokenizer = tiny_model(), char_tokenizer()
    for name, value in settings.items():
        setattr(model.generation_config, name, value)
    prompts = mixed_prompts((30, 4, 17))
    want = [tokenizer.decode([t for t in greedy_by_hand(model, by_hand(p), 12) if t > 2]).strip() for p in prompts]
    assert generate(model, tokenizer, prompts, 3, 12) == want


class Stub:
    """A model that knows its answers by prompt and keeps what it was given."""

    device = torch.device("cpu")

    def __init__(self, answers):
        self.answers, self.batches, self.settings, self.training = answers, [], [], True

    def eval(self):
        self.training = False
        return self

    def generate(self, input_ids, attention_mask, **settings):
        self.batches.append((input_ids, attention_mask))
        self.settings.append(settings)
        tokenizer = char_tokenizer()
        prompts = [tokenizer.decode(ids[mask == 1]) for ids, mask in zip(input_ids, attention_mask, strict=True)]
        new = [[*by_hand(self.answers[prompt]), EOS] for prompt in prompts]
        width = max(map(len, new))
        new = torch.tensor([ids + [PAD] * (width - len(ids)) for ids in new])
        return torch.cat([input_ids, new], 1)


def test_batches_by_length():
    """Prompts of similar length share a batch, and the longest come first. Padding stands on the left only."""
    prompts = ["a" * 3, "b" * 50, "c" * 4, "d" * 49, "e"]
    stub = Stub({p: p[0].upper() for p in prompts})
    assert generate(stub, char_tokenizer(), prompts, 2, 5) == ["A", "B", "C", "D", "E"]
    for (ids, mask), want in zip(stub.batches, [("b" * 50, "d" * 49), ("c" * 4, "a" * 3), ("e",)], strict=True):
        width = len(want[0])
        assert ids.tolist() == [[PAD] * (width - len(p)) + by_hand(p) for p in want]
        assert mask.tolist() == [[0] * (width - len(p)) + [1] * len(p) for p in want]


def test_generation_settings():
    """What the model is asked for: the given length, no sampling, the tokenizer's end and pad tokens."""
    stub = Stub({"ab": "c"})
    generate(stub, char_tokenizer(), ["ab"], 1, 77)
    settings, = stub.settings
    assert (settings["max_new_tokens"], settings["do_sample"]) == (77, False)
    assert (settings["eos_token_id"], settings["pad_token_id"]) == (EOS, PAD)


def test_answers_are_stripped_of_white_space_and_special_tokens():
    """The end token, padding and surrounding white space are no part of an answer. Inner newlines are."""
    stub = Stub({"p": " x\ny \n", "q": "a longer one"})
    assert generate(stub, char_tokenizer(), ["p", "q"], 2, 20) == ["x\ny", "a longer one"]


def test_progress_bar_counts_rows(capsys):
    """The bar runs over all rows, though batches are taken at a time."""
    prompts = ["a", "bb", "ccc", "dddd", "eeeee"]
    generate(Stub({p: "x" for p in prompts}), char_tokenizer(), prompts, 2, 5)
    shown = capsys.readouterr().err
    assert "generating: 100%" in shown and "5/5" in shown


@pytest.mark.parametrize("batch_size", [1, 3, 9])
def test_loss_of_answers_is_the_mean_over_their_tokens(batch_size):
    """Each row alone, without padding: minus the log-probability of every answer token and of the end token."""
    model, prompts = tiny_model(seed=2), mixed_prompts()
    labels = [p[::-1][:n] for p, n in zip(prompts, (1, 7, 1, 20, 2, 50, 3, 5, 9), strict=True)]
    total = count = 0
    for prompt, label in zip(prompts, labels, strict=True):
        ids, answer = by_hand(prompt), [*by_hand(label), EOS]
        with torch.inference_mode():
            logs = model(torch.tensor([ids + answer])).logits[0].log_softmax(-1)
        total -= sum(logs[len(ids) + i - 1, token].item() for i, token in enumerate(answer))
        count += len(answer)
    got = answer_loss(model, char_tokenizer(), prompts, labels, batch_size)
    assert got == pytest.approx(total / count, rel=1e-6)


# --- the whole evaluation -----------------------------------------------------------------------------------------

def prompt_of(data_name, user):
    """The fallback template's prompt, by hand."""
    instruction = f"{SYSTEMS[data_name]}\n\n" if data_name == "viggo" else ""
    return f"<bos>### Instruction:\n{instruction}{user}\n\n### Response:\n"


def settings_of(tmp_path, data_name, data_dir, **kwargs):
    return (baseConfig(mode=2, data_dir=str(data_dir), seed=77),
            evalConfig(ft_dataset_name=data_name, output_path=str(tmp_path / "results"), **kwargs))


def test_evalgsv_end_to_end(tmp_path, capsys):
    """The returned results and the JSON file, field by field: settings, counts, interval and each prediction."""
    rows = numbered(4)
    write_rows(tmp_path / "data" / "test.jsonl", rows)
    write_rows(tmp_path / "data" / "train.jsonl", numbered(9)[5:])
    given = ["#### 0", "No idea.", "A thought.\n#### 2.0", "#### 2\n#### 1"]
    prompts = [prompt_of("gsm8k", f"What is {i}?") for i in range(4)]
    stub = Stub(dict(zip(prompts, given, strict=True)))
    base, evaluation = settings_of(tmp_path, "gsm8k", tmp_path / "data", max_new_tokens=31, eval_batch_size=3)
    before = datetime.now().replace(microsecond=0)
    results = evalgsv(stub, char_tokenizer(), base, evaluation, name="run_gsm8k", extra={"moved": {"q_proj": [1, 2]}})

    items = [{"prompt": prompt, "label": row["answer"], "prediction": text, "correct": right}
             for prompt, row, text, right in zip(prompts, rows, given, [True, False, True, False], strict=True)]
    low, high = confidence_interval(2, 4)
    assert (low, high) == pytest.approx((0.15004, 0.84996), abs=1e-5)
    want = {"data_set": "gsm8k", "rows": 4, "correct": 2, "accuracy": 0.5, "interval_95": [low, high],
            "moved": {"q_proj": [1, 2]}, "prompt_layout": "published", "predictions": items}
    assert {**results, "interval_95": list(results["interval_95"])} == want
    assert [p.name for p in (tmp_path / "results").iterdir()] == ["run_gsm8k.json"]
    saved = json.loads((tmp_path / "results" / "run_gsm8k.json").read_text())
    assert before <= datetime.fromisoformat(saved.pop("date")) <= datetime.now()
    assert saved.pop("settings") == {"baseConfig": vars(base), "evalConfig": vars(evaluation)}
    assert saved == want
    assert not stub.training
    assert [s["max_new_tokens"] for s in stub.settings] == [31, 31]
    assert [len(ids) for ids, _ in stub.batches] == [3, 1]
    assert "gsm8k: 2 of 4 correct, accuracy 50.00% (95 % interval 15.00% to 85.00%)" in capsys.readouterr().out


@pytest.mark.parametrize("subsample, want", [(None, 5), (2, 2), (5, 5), (99, 5)])
def test_evalgsv_subsample(tmp_path, subsample, want):
    """The first rows, at most all. Without a name the file is called after the data set."""
    write_rows(tmp_path / "data" / "test.jsonl", numbered(5))
    write_rows(tmp_path / "data" / "train.jsonl", numbered(5))
    stub = Stub({prompt_of("gsm8k", f"What is {i}?"): f"#### {i}" for i in range(5)})
    base, evaluation = settings_of(tmp_path, "gsm8k", tmp_path / "data")
    results = evalgsv(stub, char_tokenizer(), base, evaluation, subsample=subsample)
    assert predictions(results) == [f"#### {i}" for i in range(want)]
    assert (results["rows"], results["correct"], results["accuracy"]) == (want, want, 1.0)
    assert json.loads((tmp_path / "results" / "gsm8k.json").read_text())["rows"] == want


def test_evalgsv_of_rows_that_were_read_already(tmp_path):
    """The rows that the caller passes are evaluated, and no data is read."""
    write_rows(tmp_path / "data" / "test.jsonl", numbered(5))
    write_rows(tmp_path / "data" / "train.jsonl", numbered(5))
    rows = load_rows("gsm8k", "test", str(tmp_path / "data")).select([3, 1])
    stub = Stub({prompt_of("gsm8k", f"What is {i}?"): f"#### {i}" for i in (1, 3)})
    results = evalgsv(stub, char_tokenizer(), *settings_of(tmp_path, "gsm8k", "nowhere"), rows=rows)
    assert predictions(results) == ["#### 3", "#### 1"]


@pytest.mark.parametrize("template, data_name", [(None, "gsm8k"), (None, "sql"), (NO_SYSTEM, "gsm8k"),
                                                 (NO_SYSTEM, "viggo")])
def test_training_and_evaluation_ask_alike(tmp_path, data_name, template):
    """The tokens that the model sees in evaluation are the masked ones of the same row in training.

    The answer that it was trained on counts as correct.
    """
    tokenizer = char_tokenizer(chat_template=template)
    row = prepared(tmp_path / "data", data_name, tokenizer, source_max_len=4096)[0]
    source = [token for token, label in zip(row["input_ids"], row["labels"], strict=True) if label == -100]
    assert source[0] == BOS and tokenizer.decode(row["input_ids"]).endswith(ANSWERS[data_name] + "<eos>")
    stub = Stub({tokenizer.decode(source): ANSWERS[data_name]})
    base, evaluation = settings_of(tmp_path, data_name, tmp_path / "data")
    results = evalgsv(stub, char_tokenizer(chat_template=template), base, evaluation)
    assert stub.batches[0][0].tolist() == [source]
    item, = results["predictions"]
    assert item == {"prompt": tokenizer.decode(source), "label": ANSWERS[data_name], "prediction": ANSWERS[data_name],
                    "correct": True}
    assert USERS[data_name] in item["prompt"]


@pytest.mark.parametrize("data_name", ["gsm8k", "viggo"])
def test_single_file_trains_and_tests_on_other_rows(tmp_path, data_name):
    """No prompt of the evaluation is among those of the training, and together they are the whole file."""
    columns = {"gsm8k": ("question", "answer"), "viggo": ("ref", "mr")}[data_name]
    rows = [{columns[0]: f"Text {i}", columns[1]: f"inform(name[{i}])"} for i in range(20)]
    path = write_rows(tmp_path / "all.csv", rows)
    prompts = [prompt_of(data_name, f"Text {i}") for i in range(20)]
    stub = Stub({prompt: "x" for prompt in prompts})
    tokenizer = char_tokenizer()
    results = evalgsv(stub, tokenizer, *settings_of(tmp_path, data_name, path))
    tested = [item["prompt"] for item in results["predictions"]]
    data = prepare_dataset(data_name, tokenizer, source_max_len=4096, data_dir=path)
    trained = [tokenizer.decode([t for t, label in zip(r["input_ids"], r["labels"], strict=True) if label == -100])
               for r in data]
    assert len(tested) == 4 and sorted(tested + trained) == sorted(prompts)
    assert (results["correct"], results["accuracy"]) == (0, 0.0)


def test_evalgsv_with_a_real_model(tmp_path):
    """Each answer is the plain greedy one to the prompt that is saved beside it."""
    model, tokenizer = tiny_model(seed=5), char_tokenizer()
    for split in ("train", "test"):
        write_rows(tmp_path / "data" / f"{split}.csv", [ROWS["sql"], {**ROWS["sql"], "question": "Is it?"}])
    base, evaluation = settings_of(tmp_path, "sql", tmp_path / "data", max_new_tokens=9)
    model.train()
    results = evalgsv(model, tokenizer, base, evaluation)
    assert not model.training and "loss" not in results
    evaluation, items = replace(evaluation, answer_loss=True), results["predictions"]
    assert evalgsv(model, tokenizer, base, evaluation)["loss"] == answer_loss(
        model, tokenizer, [item["prompt"] for item in items], [item["label"] for item in items], 16)
    alone = evalgsv(model, tokenizer, base, replace(evaluation, generate=False))
    assert alone["loss"] == answer_loss(model, tokenizer, [item["prompt"] for item in items],
                                        [item["label"] for item in items], 16)
    assert alone["rows"] == 2 and not {"accuracy", "predictions", "interval_95"} & alone.keys()
    assert len(results["predictions"]) == 2
    for item in results["predictions"]:
        ids = [BOS, *by_hand(item["prompt"].removeprefix("<bos>"))]
        assert item["prediction"] == tokenizer.decode(greedy_by_hand(model, ids, 9), skip_special_tokens=True).strip()


@pytest.mark.parametrize("data_name, files, message", [
    ("squad", None, "unknown data set 'squad'; choose from"), ("gsm8k", None, "does not exist"),
    ("gsm8k", {"train.csv": "question,answer\nQ,A\n", "more.csv": "question,answer\nQ,A\n"}, "no test split"),
    ("viggo", {"train.csv": "mr,ref\na,b\n", "test.csv": "question,answer\nQ,A\n"}, "do not look like 'viggo'")])
def test_evalgsv_with_bad_data(tmp_path, monkeypatch, data_name, files, message):
    """A UserError before anything is generated, and no results file."""
    monkeypatch.setattr(evalGSV, "generate", lambda *args: pytest.fail("generated on bad data"))
    for name, text in (files or {}).items():
        (tmp_path / "data").mkdir(exist_ok=True)
        (tmp_path / "data" / name).write_text(text)
    with pytest.raises(UserError, match=message):
        evalgsv(Stub({}), char_tokenizer(), *settings_of(tmp_path, data_name, tmp_path / "data"))
    assert not (tmp_path / "results").exists()


# --- the command line ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("given", [("a,b",), ("a", "b"), ("a,", "b"), ("a b",)])
def test_several_names(given):
    """With commas or as words: the same setting, and nothing is left over."""
    assert parse("--tasks", *given, "--limit", 3)[2] == evalConfig(tasks="a,b", limit=3)
    assert parse("--report-to", *given)[0] == baseConfig(report_to="a,b")


def test_none_is_not_a_name():
    """A script says none for a flag that has no default; --report_to none stays the text that it is."""
    assert parse("--adapter_ckpt", "none", "--tasks", "none", "--data_dir", "none", "--pretrained", "None",
                 "--merged_path", "none", "--report_to", "none") == parse()


@pytest.mark.parametrize("limit", [0, -1])
def test_limits_that_are_refused(limit):
    """Neither stands for all rows, and the message says what does."""
    with pytest.raises(UserError, match=f"--limit must be at least 1, not {limit}; leave it out to evaluate all rows"):
        check_evaluation(parse("--mode", 2, "--ft_dataset_name", "viggo", "--limit", limit)[2])


@pytest.mark.parametrize("flags, said", [
    (("--num_train_epochs", 1.5), "--max_steps 1 decides; --num_train_epochs 1.5 has no effect\n"), ((), "")])
def test_steps_and_epochs(train, tmp_path, capsys, flags, said):
    """Where both are given, one line says which decides."""
    adapter = train(tmp_path, "--max_steps", 1, "--save_strategy", "no", *flags)
    lines = [line for line in capsys.readouterr().out.splitlines(True) if "decides" in line]
    assert "".join(lines) == said
    assert LotaConfig.load(adapter).training["steps"] == 1
