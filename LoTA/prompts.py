"""Prompts: a tokenizer with its chat template, dialogues as texts, and both as tokens that fit a model.

Touches tokenizers, chat templates and a model's config.json (reading), on disk or the hub, and the console. Knows
nothing of data sets: a dialogue is a list of messages. Training, evaluation and quantization make their prompts here.
"""
import re
import string
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import date as Date
from datetime import datetime, time
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from LoTA import IGNORE_INDEX, UserError
from LoTA.own_rows import Messages
from LoTA.row_files import read_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from LoTA.adapter_folder import LotaConfig
    from LoTA.settings import baseConfig

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


# --- tokenizers ---------------------------------------------------------------------------------------------------

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


# --- texts and tokens ---------------------------------------------------------------------------------------------

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
