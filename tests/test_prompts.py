"""Prompts that stay what they were: end of turn, templates left behind, dates, cuts, and rows that fit the model."""
import json
import shutil
from datetime import date as Date

import pytest
import torch
from conftest import parse, predictions
from test_data import (
    ALPACA,
    BOS,
    DATE_LINE,
    EOS,
    GSM8K,
    NO_SYSTEM,
    OPEN,
    TURNS,
    by_hand,
    char_tokenizer,
    numbered,
    prepared,
    write_rows,
)
from test_eval import Stub, settings_of, tiny_model
from transformers import GenerationConfig

import LoTA_QAF_main
from data_print_save import VIGGO_INSTRUCTION, load_rows, read_messages
from evalGSV import ask, end_tokens, evalgsv, generate
from LoTA import UserError
from LoTA.adapter_folder import LotaConfig
from LoTA.prompts import (
    FALLBACK_CHAT_TEMPLATE,
    FIXED_DATE,
    PromptStyle,
    check_fit,
    encode_prompt,
    fit_prompt,
    load_tokenizer,
    prepare_tokenizer,
    render_prompt,
    template_date,
)

EOT = ord("~")              # stands for a token such as <end_of_turn>
DATED = ("{{ bos_token }}{% if strftime_now is defined %}Today: {{ strftime_now('%d %b %Y') }}{% endif %}|"
         "{% for m in messages %}{{ m.content }}|{% endfor %}")


# --- the end of a turn --------------------------------------------------------------------------------------------

class Talker(Stub):
    """Ends its answer with EOT and, where nothing stops it there, goes on with an invented turn."""

    def __init__(self, answers, ends):
        super().__init__(answers)
        self.generation_config = GenerationConfig(eos_token_id=ends)

    def generate(self, input_ids, attention_mask, **settings):
        self.settings.append(settings)
        text = by_hand(self.answers) + [EOT, *by_hand("\nuser\nWhat is next?")]
        return torch.cat([input_ids, torch.tensor([text] * len(input_ids))], 1)


@pytest.mark.parametrize("ends, stops", [
    (None, [EOS]), (EOS, [EOS]), (EOT, [EOS, EOT]), ([EOT], [EOS, EOT]), ([EOS, EOT], [EOS, EOT]),
    ([BOS, EOT], [EOS, BOS, EOT])])
def test_answers_end_at_either_end_token(ends, stops):
    """The tokenizer's eos and those of generation_config, be they none, one or a list. What follows is dropped."""
    model, tokenizer = Talker("inform(name[Doom])", ends), char_tokenizer()
    assert end_tokens(model, tokenizer) == stops
    answer, = generate(model, tokenizer, ["Doom?"], 1, 40)
    assert model.settings[0]["eos_token_id"] == (stops if len(stops) > 1 else EOS)
    assert answer == ("inform(name[Doom])" if EOT in stops else "inform(name[Doom])~\nuser\nWhat is next?")


def test_a_real_model_stops_at_its_own_end_of_turn():
    """An end token that only generation_config names ends the answer, and no more forward passes are spent on it."""
    model, tokenizer = tiny_model(), char_tokenizer()
    before, = generate(model, tokenizer, ["What now?"], 1, 12)
    assert len(before) > 6
    model.generation_config.eos_token_id = [EOS, ord(before[4])]
    passes, forward = [], model.forward
    model.forward = lambda *args, **kwargs: passes.append(1) or forward(*args, **kwargs)
    place = before.index(before[4])
    assert generate(model, tokenizer, ["What now?"], 1, 12) == [before[:place].strip()]
    assert len(passes) == place + 1


def test_training_keeps_the_tokenizers_end_token(tmp_path):
    """Whatever generation_config names."""
    assert prepared(tmp_path, "alpaca")[0]["input_ids"][-5:] == [*by_hand("Red."), EOS]


# --- the template -------------------------------------------------------------------------------------------------

def test_the_template_of_the_16_bit_model(tmp_path, capsys):
    """A GPTQ folder's tokenizer without template gets that of --pretrained, token for token, and it is said."""
    gptq, dense = tmp_path / "gptq", tmp_path / "dense"
    char_tokenizer().save_pretrained(str(gptq))
    char_tokenizer(chat_template=DATE_LINE).save_pretrained(str(dense))
    messages, _ = read_messages("gsm8k", GSM8K)
    tokenizer = load_tokenizer([str(gptq), str(dense)])
    assert capsys.readouterr().out == f"{gptq} has no chat template: that of {dense} is used\n"
    assert render_prompt(tokenizer, messages) == render_prompt(load_tokenizer([str(dense)]), messages)
    char_tokenizer(chat_template="own").save_pretrained(str(gptq))
    assert load_tokenizer([str(gptq), str(dense)]).chat_template == "own"
    assert capsys.readouterr().out == ""


def test_a_template_whose_tokens_are_not_there(tmp_path, capsys):
    """The markers would fall to pieces, so the fallback is used; both are said."""
    gptq, dense = tmp_path / "gptq", tmp_path / "dense"
    char_tokenizer().save_pretrained(str(gptq))
    other = char_tokenizer(chat_template="<|im_start|>" + TURNS)
    other.add_tokens(["<|im_start|>"], special_tokens=True)
    other.save_pretrained(str(dense))
    assert load_tokenizer([str(gptq), str(dense)]).chat_template == FALLBACK_CHAT_TEMPLATE
    said = capsys.readouterr().out.splitlines()
    assert said[0] == f"the chat template of {dense} is not used: {gptq} has no token <|im_start|>" and len(said) == 2


def test_the_fallback_is_said_once(tmp_path, capsys):
    """In one line; and a hub name that cannot be reached, as one that only says the model's size, stops nothing."""
    char_tokenizer().save_pretrained(str(tmp_path))
    tokenizer = load_tokenizer([str(tmp_path), "nobody/no-such-8B"])
    unread, fallback = capsys.readouterr().out.splitlines()
    assert tokenizer.chat_template == FALLBACK_CHAT_TEMPLATE
    assert unread.startswith("the chat template of nobody/no-such-8B could not be read: ")
    assert fallback.startswith("the tokenizer has no chat template: prompts have the headings '### Instruction:'")
    prepare_tokenizer(tokenizer)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("name, text", [
    ("tokenizer.json", '{"version": "1.0", "trunc'), ("tokenizer.json", ""), ("tokenizer.json", "{}"),
    ("tokenizer.json", "[]"), ("tokenizer.json", '{"added_tokens": []}'), ("tokenizer_config.json", "{")])
@pytest.mark.parametrize("second", [False, True])
def test_a_damaged_tokenizer(tmp_path, name, text, second):
    """One line that names the file, also where only the chat template is wanted of it."""
    damaged, whole = tmp_path / "damaged", tmp_path / "whole"
    for folder in (damaged, whole):
        char_tokenizer().save_pretrained(str(folder))
    (damaged / name).write_text(text)
    with pytest.raises(UserError) as refused:
        load_tokenizer([str(whole), str(damaged)] if second else [str(damaged)])
    assert str(damaged / name) in str(refused.value) and "\n" not in str(refused.value)


def test_no_messages():
    """A row without a question, or with a system turn alone that the template refuses, is a UserError."""
    for messages in ([], [{"role": "system", "content": "S"}]):
        with pytest.raises(UserError, match="refuses the prompt"):
            render_prompt(char_tokenizer(chat_template=NO_SYSTEM), messages)


# --- the date -----------------------------------------------------------------------------------------------------

@pytest.fixture
def today(monkeypatch):
    """A function that sets the day which Date.today() says."""
    def set_day(text):
        class Day(Date):
            @classmethod
            def today(cls):
                return Date.fromisoformat(text)
        monkeypatch.setattr("LoTA.prompts.Date", Day)
    return set_day


def test_the_date_of_a_prompt(today):
    """The given day; without one, today. A template without date has none and renders as ever."""
    tokenizer, messages = char_tokenizer(chat_template=DATED), [{"role": "user", "content": "Hi"}]
    today("2026-01-31")
    assert render_prompt(tokenizer, messages) == "<bos>Today: 31 Jan 2026|Hi|"
    assert render_prompt(tokenizer, messages, date="2024-07-06") == "<bos>Today: 06 Jul 2024|Hi|"
    assert (template_date(tokenizer), template_date(tokenizer, "2024-07-06")) == ("2026-01-31", "2024-07-06")
    plain = char_tokenizer(chat_template=DATE_LINE)
    assert template_date(plain) is template_date(plain, "2024-07-06") is None
    assert render_prompt(plain, messages, date="2026-01-31") == render_prompt(plain, messages)


@pytest.mark.parametrize("code, text", [
    ("%Y-%m-%d", "2024-07-06"), ("%B %d, %Y", "July 06, 2024"), ("%-d %b", "6 Jul"), ("%A", "Saturday"),
    ("%d%%d", "06%d"), ("%H:%M:%S", "00:00:00"), ("%q", "%q"), ("no code", "no code")])
def test_formats_of_dates(code, text):
    """As strftime writes them, also where the template makes the format itself or calls it within a macro."""
    messages = [{"role": "user", "content": code}]
    for template in (f"{{{{ strftime_now('{code}') }}}}", "{{ strftime_now(messages[0].content) }}",
                     "{% macro day(f) %}{{ strftime_now(f) }}{% endmacro %}{{ day(messages[0].content) }}",
                     "{% for m in messages %}{% set s = strftime_now(m.content) %}{{ s.strip() }}{% endfor %}"):
        assert render_prompt(char_tokenizer(chat_template=template), messages, date="2024-07-06") == text


@pytest.mark.parametrize("template", [
    TURNS + OPEN, " \n\n" + TURNS, "  {% if true %}\n  a\n  {% endif %}\n", "\n{%- set a = 1 %}\n {{ a }}", "{{ 1 }}\n",
    NO_SYSTEM, DATE_LINE])
def test_fixing_the_date_changes_nothing_else(template):
    """Not the white space at the beginning of a template, which transformers trims in places."""
    messages = [{"role": "user", "content": "Hi"}]
    plain, fixed = (char_tokenizer(chat_template=t) for t in (template, FIXED_DATE + template))
    assert fixed.apply_chat_template(messages, tokenize=False, date_codes={}) == plain.apply_chat_template(
        messages, tokenize=False)


def test_evaluation_on_another_day(tmp_path, today):
    """It asks with the date of the training, else with today's, and its results say which."""
    tokenizer = char_tokenizer(chat_template=DATED)
    for split in ("train", "test"):
        write_rows(tmp_path / "data" / f"{split}.jsonl", numbered(1))
    base, evaluation = settings_of(tmp_path, "gsm8k", tmp_path / "data")
    today("2026-01-02")
    rows = load_rows("gsm8k", "test", str(tmp_path / "data"))
    for recorded, day in (("2026-01-01", "01"), (None, "02")):
        questions = ask(tokenizer, "gsm8k", rows, PromptStyle(date=recorded))
        stub = Stub({prompt: "x" for prompt in questions.prompts})
        results = evalgsv(stub, tokenizer, base, evaluation, questions=questions)
        assert f"Today: {day} Jan 2026|" in results["predictions"][0]["prompt"]
        saved = json.loads((tmp_path / "results" / "gsm8k.json").read_text())
        assert saved["template_date"] == results["template_date"] == f"2026-01-{day}"


# --- cuts ---------------------------------------------------------------------------------------------------------

SYSTEM, USER = {"role": "system", "content": "Be short."}, {"role": "user", "content": "abcdefghij"}


@pytest.mark.parametrize("template, head, tail", [
    (TURNS + OPEN, "[system]Be short.[end][user]", "[end][assistant]"),
    (DATE_LINE, "<bos>[system]Today: 26 Jul 2024\nBe short.[end][user]", "[end][assistant]"),
    (NO_SYSTEM, "<bos>[user]Be short.\n\n", "[end][assistant]"),
    (None, "<bos>Be short.\n\n### Instruction:\n", "\n\n### Response:\n")],
    ids=["plain", "date line", "no system role", "fallback"])
def test_a_long_prompt_stays_well_formed(template, head, tail):
    """It keeps the head, the markers and the end of the question, as much of it as fits, and says that it was cut."""
    tokenizer = prepare_tokenizer(char_tokenizer(chat_template=template))
    frame = len(encode_prompt(tokenizer, head + tail))
    for room in range(14):
        kept = "abcdefghij"[-room:] if room else ""
        want = encode_prompt(tokenizer, head + kept + tail)
        assert fit_prompt(tokenizer, [SYSTEM, USER], frame + room) == (want, room < 10)
    with pytest.raises(UserError, match=f"--source_max_len {frame - 1} has no room for a question: .* {frame} tokens"):
        fit_prompt(tokenizer, [SYSTEM, USER], frame - 1)


def test_a_long_conversation_loses_its_oldest_words():
    """The roles stay in turn; the last question is the last to be cut."""
    tokenizer = char_tokenizer(chat_template=TURNS + OPEN)
    turns = [SYSTEM, {"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}, USER]
    frame = len("[system]Be short.[end][user][end][assistant][end][user][end][assistant]")
    for room, texts in ((15, ("ne", "two", "abcdefghij")), (12, ("", "wo", "abcdefghij")), (10, ("", "", "abcdefghij")),
                        (3, ("", "", "hij"))):
        ids, cut = fit_prompt(tokenizer, turns, frame + room)
        want = "[system]Be short.[end][user]{}[end][assistant]{}[end][user]{}[end][assistant]".format(*texts)
        assert (tokenizer.decode(ids), cut) == (want, True)


def test_training_on_a_long_prompt(tmp_path):
    """prepare_dataset cuts so; an answer that is cut has no end token."""
    tokenizer = char_tokenizer(chat_template=NO_SYSTEM)
    row = prepared(tmp_path, "alpaca", tokenizer, source_max_len=28, target_max_len=3)[0]
    assert row["input_ids"] == [BOS, *by_hand("[user]blue.[end][assistant]"), *by_hand("Red")]
    assert prepared(tmp_path, "alpaca", tokenizer)[0]["input_ids"] == [
        BOS, *by_hand(f"[user]{ALPACA['instruction']}\n\nNot blue.[end][assistant]Red."), EOS]


# --- rows that fit the model --------------------------------------------------------------------------------------

def config_folder(path, **settings):
    """A folder with the config.json of a Llama."""
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps({"model_type": "llama", **settings}))
    return str(path)


def test_check_fit(tmp_path):
    """The room that the longest row leaves; beyond it, and beyond the embeddings, the row and the limit are named."""
    place, tokenizer = config_folder(tmp_path / "m", vocab_size=100, max_position_embeddings=6), char_tokenizer()
    rows = [[5, 99], [7] * 4, [8]]
    assert check_fit(place, tokenizer, rows) == check_fit(place, tokenizer, rows, 2) == 2
    for bad, new, message in (
            (rows, 3, "row 2 has 4 tokens before 3 new ones, but .* takes 6 .*: lower --max_new_tokens to 2 or less"),
            ([[1], [7] * 6], 1, "row 2 has 6 tokens before 1 new ones, .* takes 6 .*: leave the row out"),
            ([[1], [7] * 7], 0, "row 2 has 7 tokens, but .* takes 6 .* lower --source_max_len"),
            ([*rows, [4, 100, 4]], 0, "row 4 has token 100 .'d'., but .* has 100 embeddings")):
        with pytest.raises(UserError, match=message):
            check_fit(place, tokenizer, bad, new)
    tokenizer.pad_token = "z"
    with pytest.raises(UserError, match="the padding has token 122 .'z'., but .* has 100 embeddings"):
        check_fit(place, tokenizer, rows)


@pytest.fixture
def changed(gptq_2bit, tmp_path):
    """A function (template=None, **config) -> a copy of the tiny GPTQ model with another template or other limits."""
    def change(template=None, **config):
        folder = tmp_path / "changed"
        shutil.copytree(gptq_2bit, folder)
        content = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(content | config))
        if template:
            (folder / "chat_template.jinja").write_text(template)
        return folder
    return change


def never(*args, **kwargs):
    pytest.fail("a model was loaded")


@pytest.mark.parametrize("config, message", [
    ({"vocab_size": 5}, "row 1 has token .* has 5 embeddings"),
    ({"max_position_embeddings": 20}, "row .* takes 20 .max_position_embeddings")])
def test_rows_are_checked_before_a_model_is_loaded(changed, train, evaluate, tmp_path, monkeypatch, config, message):
    """In both modes."""
    folder = changed(**config)
    monkeypatch.setattr("LoTA.adapter.load_for_training", never)
    monkeypatch.setattr("LoTA.adapter.load_gptq", never)
    with pytest.raises(UserError, match=message):
        train(tmp_path / "a", "--quantized_model_dir", folder)
    with pytest.raises(UserError, match=message):
        evaluate(tmp_path, "--quantized_model_dir", folder)
    assert not (tmp_path / "a").exists() and not list(tmp_path.glob("*.json"))


def test_new_tokens_must_fit_too(changed, evaluate, demo_data, tmp_path, monkeypatch, capsys):
    """A --max_new_tokens that is given is refused where it does not fit. Its default takes what room there is."""
    folder = changed(max_position_embeddings=100)
    results = evaluate(tmp_path, "--quantized_model_dir", folder, "--max_new_tokens", 20, "--limit", 4)
    longest = max(len(encode_prompt(load_tokenizer([str(folder)]), p["prompt"])) for p in results["predictions"])
    base, _, evaluation = parse("--mode", 2, "--quantized_model_dir", folder, "--ft_dataset_name", "viggo",
                                "--data_dir", demo_data, "--dtype", "float32", "--limit", 4, "--output_path",
                                tmp_path / "default")
    assert evaluation.max_new_tokens is None
    LoTA_QAF_main.evaluate(base, evaluation)
    assert f"answers have at most {100 - longest} tokens" in capsys.readouterr().out
    saved, = (tmp_path / "default").glob("*.json")
    assert json.loads(saved.read_text())["settings"]["evalConfig"]["max_new_tokens"] == 100 - longest
    monkeypatch.setattr("LoTA.adapter.load_gptq", never)
    with pytest.raises(UserError, match=f"{longest} tokens before {101 - longest} .*: lower .* to {100 - longest} or"):
        evaluate(tmp_path, "--quantized_model_dir", folder, "--max_new_tokens", 101 - longest, "--limit", 4)


# --- a whole run --------------------------------------------------------------------------------------------------

def test_the_date_of_the_training_is_kept(changed, train, evaluate, tmp_path, today):
    """Training writes it, a resumed run keeps it, and evaluation the next day asks with it, live and merged."""
    folder = changed(template="{{ strftime_now('%d %b') }}:{{ messages[-1].content[-60:] }}<|answer|>")
    today("2026-03-04")
    flags = ("--quantized_model_dir", folder, "--max_steps", 2, "--gradient_checkpointing", False)
    adapter = train(tmp_path / "a", *flags)
    assert LotaConfig.load(adapter).template_date == "2026-03-04"
    today("2026-03-05")
    resumed = train(tmp_path / "b", *flags, "--adapter_ckpt", adapter / "checkpoint-1")
    assert LotaConfig.load(resumed).template_date == "2026-03-04"
    for arguments, day in ((("--load_adapter", adapter, "--no_merge"), "04"), (("--load_adapter", adapter), "04"),
                           (("--quantized_model_dir", folder), "05")):
        results = evaluate(tmp_path, *arguments, "--limit", 2, "--max_new_tokens", 4)
        assert results["template_date"] == f"2026-03-{day}"
        assert all(item["prompt"].startswith(f"{day} Mar:") for item in results["predictions"])
        assert len(predictions(results)) == 2


def test_the_layout_of_the_training_is_kept(changed, train, evaluate, tmp_path):
    """A resumed run and mode 2 write prompts as in the training, unless a flag says otherwise. It is recorded.

    A record without a layout is of a version that had the instruction in a system turn.
    """
    folder = changed(template="{% for m in messages %}{{ m.role[0] }}:{{ m.content[:9] }}|{% endfor %}")
    flags = ("--quantized_model_dir", folder, "--max_steps", 2, "--gradient_checkpointing", False)
    begins = {"published": f"u:{VIGGO_INSTRUCTION[:9]}|", "system": f"s:{VIGGO_INSTRUCTION[:9]}|u:"}

    def prompts(layout, *arguments):
        results = evaluate(tmp_path, *arguments, "--limit", 2, "--max_new_tokens", 4)
        assert results["prompt_layout"] == layout
        return {item["prompt"].startswith(begins[layout]) for item in results["predictions"]} == {True}

    adapter = train(tmp_path / "system", *flags, "--prompt_layout", "system")
    assert prompts("system", "--load_adapter", adapter) and prompts("system", "--load_adapter", adapter, "--no_merge")
    assert prompts("published", "--load_adapter", adapter, "--prompt_layout", "published")
    assert prompts("published", "--quantized_model_dir", folder)
    with pytest.raises(UserError, match="its prompt_layout is system, not published"):
        train(tmp_path / "refused", *flags, "--adapter_ckpt", adapter / "checkpoint-1", "--prompt_layout", "published")
    resumed = train(tmp_path / "resumed", *flags, "--adapter_ckpt", adapter / "checkpoint-1")
    assert LotaConfig.load(resumed).settings["prompt_layout"] == "system"
    assert LotaConfig.load(train(tmp_path / "new", *flags)).settings["prompt_layout"] == "published"
    assert LotaConfig().prompt_layout == "published" and LotaConfig(settings={"seed": 1}).prompt_layout == "system"


def test_a_merged_model_finds_the_template_of_its_training(changed, train, evaluate, base_model, tmp_path, capsys):
    """A GPTQ folder without template: the adapter and the merged model name the 16-bit model, which has one."""
    folder = changed()
    (folder / "chat_template.jinja").unlink()
    adapter = train(tmp_path / "a", "--quantized_model_dir", folder, "--max_steps", 1, "--save_strategy", "no")
    flags = ("--limit", 2, "--max_new_tokens", 4)
    first = evaluate(tmp_path, "--load_adapter", adapter, "--merged_path", tmp_path / "merged", *flags)
    again = evaluate(tmp_path, "--load_adapter", tmp_path / "merged", *flags)
    for results in (first, again):
        assert all(item["prompt"].startswith("<|begin|>") and item["prompt"].endswith("<|answer|>")
                   for item in results["predictions"])
    assert capsys.readouterr().out.count(f"has no chat template: that of {base_model} is used") == 3
