"""People's own rows: which sets a name means, and how a row of any usual form becomes turns or a text.

Touches the file of a prompt template (reading). LoTA/splits.py finds the rows, LoTA/row_files.py reads them,
and data_print_save.py makes tokens of them. docs/data.md has a table of all forms.
"""
import math
import random
import re
import string
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from LoTA import UserError
from LoTA.row_files import read_text

Messages = list[dict[str, str]]     # turns: {"role": "system", "user" or "assistant", "content": text}

# The sets whose rows are the user's: dialogues, and texts in which every token is trained.
CHAT, TEXT = "chat", "text"
HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")
ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}
# {form of a row: (the columns that it must have, those that it may have)}. Of several forms the first one counts.
FORMS = {"messages": (("messages",), ("system", "tools")),
         "conversations": (("conversations",), ("system", "tools")),
         "completion": (("prompt", "completion"), ("system", "tools")),
         "instruction": (("instruction", "output"), ("input", "system", "history")),
         "text": (("text",), ())}
COLUMNS = tuple(dict.fromkeys(column for form in FORMS.values() for columns in form for column in columns))
TEXT_TEST_SHARE = 0.2               # of a lone text, from its end


# --- which sets a name means --------------------------------------------------------------------------------------

@dataclass(frozen=True)
class DataSet:
    """One set of --training_data_name. place: a file or folder; None: the hub. weight: its share of a mixture."""
    name: str
    place: str | None = None
    weight: float | None = None


def parse_sets(text: str, data_dir: str | None = None) -> list[DataSet]:
    """The sets that a flag means by NAME[:PLACE][=WEIGHT], with commas between several.

    data_dir: the place of a single set that names none. Raises UserError where the text cannot be read so.
    """
    sets = []
    for part in text.split(","):
        head, mark, number = part.strip().rpartition("=")
        weight = _number(number) if mark else None
        name, _, place = (part.strip() if weight is None else head).partition(":")
        if not name:
            raise UserError(f"'{text}' names a set with no name: write NAME, NAME:PLACE or "
                            "NAME:PLACE=WEIGHT, with commas between several")
        if weight is not None and not 0 < weight < math.inf:
            raise UserError(f"'{text}': the weight {number} is not positive")
        sets.append(DataSet(name, place or None, weight))
    weighted = [one for one in sets if one.weight is not None]
    if weighted and (len(sets) == 1 or len(weighted) < len(sets)):
        raise UserError(f"'{text}': a weight is a share of a mixture, so give one to each of several sets, or to none")
    if data_dir is None:
        return sets
    if len(sets) > 1 or sets[0].place:
        raise UserError(f"--data_dir {data_dir} is the place of one set: write {sets[0].name}:PLACE for each set of "
                        f"{text}, without --data_dir")
    return [DataSet(sets[0].name, data_dir)]


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def without_places(text: str | None) -> str | None:
    """The names and weights in --training_data_name, as records and model cards have them: places are of a machine."""
    if text is None or not re.search("[,:=]", text):
        return text
    return ",".join(one.name + (f"={one.weight:g}" if one.weight else "") for one in parse_sets(text))


def folder_name(text: str) -> str:
    """--training_data_name as a part of a folder's name: no weights, no owners, and no sign that a path gives sense."""
    return "+".join(re.sub("[^A-Za-z0-9.-]+", "-", one.name.rpartition("/")[2]) for one in parse_sets(text))


def check_flags(sets: Sequence[DataSet], form: "RowForm") -> None:
    """Raises UserError where a flag for own rows, or for the hub, would be without effect on all of these sets."""
    names = ", ".join(one.name for one in sets)
    hub = [one for one in sets if HUB_NAME.fullmatch(one.name)]
    if form.changes and not hub and not any(one.name in (CHAT, TEXT) for one in sets):
        raise UserError(f"--data_columns and --prompt_template are for own rows, and {names} has columns of its own: "
                        f"write {CHAT}, {TEXT} or OWNER/NAME")
    if (form.split or form.config) and not any(one.place is None for one in hub):
        raise UserError(f"--data_split and --data_config choose a part of OWNER/NAME on the hub, and {names} is read "
                        "elsewhere: leave them out")


def draw_mixture(sizes: Sequence[int], weights: Sequence[float] | None, seed: int) -> list[tuple[int, int]]:
    """The rows of a mixture in their order, each as (number of its set, number of its row), both from 0.

    sizes: the rows of each set. weights: the shares of the sets, in any unit; None takes all rows of all sets.
    With weights it is the largest mixture in which the shares hold, to a row, and no row comes twice. Which rows those
    are, and their order, depends on `seed` alone.
    """
    counts = list(sizes)
    if weights is not None:
        whole = sum(weights)
        rows = min(size * whole / weight for size, weight in zip(sizes, weights, strict=True))
        # The small number is for quotients such as 100 * (0.3 / 0.3), which may be 99.999... by rounding.
        counts = [min(size, max(1, math.floor(rows * weight / whole + 1e-6)))
                  for size, weight in zip(sizes, weights, strict=True)]
    generator = random.Random(seed)
    drawn = [(number, row) for number, (size, count) in enumerate(zip(sizes, counts, strict=True))
             for row in generator.sample(range(size), count)]
    generator.shuffle(drawn)
    return drawn


# --- a row of any form --------------------------------------------------------------------------------------------

def form_of(row: dict) -> str:
    """The first of FORMS whose columns the row has. Raises ValueError where there is none."""
    for form, (needed, _) in FORMS.items():
        if all(row.get(column) is not None for column in needed):
            return form
    there = ", ".join(str(column) for column, value in row.items() if value is not None) or "none"
    forms = "; ".join(" and ".join(needed) for needed, _ in FORMS.values())
    raise ValueError(f"it has the columns {there}, and a row has one of: {forms}; --data_columns renames columns")


def is_text(name: str, row: dict) -> bool:
    """Whether a row of the set `name` is a text rather than a dialogue. Raises ValueError where it is neither."""
    return name == TEXT or HUB_NAME.fullmatch(name) is not None and form_of(row) == "text"


def read_any(row: dict) -> tuple[Messages, str]:
    """A row of any form: (turns before the answer, the answer). A text is an answer that nothing stands before."""
    return read_text_row(row) if form_of(row) == "text" else read_chat(row)


def read_text_row(row: dict) -> tuple[Messages, str]:
    return [], text_of(row["text"])


def read_chat(row: dict) -> tuple[Messages, str]:
    """A dialogue of any form but text. Raises KeyError or ValueError with what is wrong with the row."""
    form = form_of(row)
    if form == "text":
        raise ValueError(f"it has a text and no dialogue: the set '{TEXT}' reads it")
    if form == "instruction":
        return read_instruction(row)
    if form == "completion" and not isinstance(row["prompt"], list):
        prompt, completion = [user_turn(text_of(row["prompt"]))], row["completion"]
    elif form == "completion":
        prompt, completion = row["prompt"], row["completion"]
    else:
        return read_dialogue(row)
    answer = completion if isinstance(completion, list) else [assistant_turn(text_of(completion))]
    return read_dialogue({**row, "messages": [*prompt, *answer]})


def read_dialogue(row: dict) -> tuple[Messages, str] | None:
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
    messages = [system_turn(text_of(row["system"]))] if row.get("system") else []
    for number, turn in enumerate(turns, 1):
        if not isinstance(turn, dict):
            raise ValueError(f"turn {number} is no record with a role and a content")
        role = turn.get("role") or turn.get("from")
        if role not in ROLES or turn.get("tool_calls") or turn.get("function_call"):
            raise ValueError(f"turn {number} of '{role}' is or calls a tool, which is not supported"
                             if role in ROLES else f"turn {number} is of '{role}', which is not supported")
        content = turn["content"] if turn.get("content") is not None else turn.get("value")
        if isinstance(content, list):
            others = [part.get("type") for part in content if not isinstance(part, str) and part.get("type") != "text"]
            if others:
                raise ValueError(f"turn {number} has a part of type '{others[0]}', which is not supported")
            content = "".join(text_of(part if isinstance(part, str) else part["text"]) for part in content)
        if content is None:
            raise ValueError(f"turn {number} of '{role}' has no content")
        messages.append({"role": ROLES[role], "content": text_of(content)})
    if not messages or messages[-1]["role"] != "assistant":
        raise ValueError("the last turn must be the assistant's, because it is the answer")
    if not any(message["role"] == "user" for message in messages[:-1]):
        raise ValueError("no turn of the user stands before the answer")
    return messages[:-1], messages[-1]["content"]


def read_instruction(row: dict) -> tuple[Messages, str]:
    """A row of Alpaca's columns: instruction, output, and where they are there input, system and history."""
    user = text_of(row["instruction"])
    if row.get("input") not in (None, ""):
        user += f"\n\n{text_of(row['input'])}"
    before = [system_turn(text_of(row["system"]))] if row.get("system") else []
    for question, answer in row.get("history") or []:
        before += [user_turn(text_of(question)), assistant_turn(text_of(answer))]
    return [*before, user_turn(user)], row["output"]


def system_turn(text: str) -> dict[str, str]:
    return {"role": "system", "content": text}


def user_turn(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant_turn(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def text_of(value: object) -> str:
    """A value as text: text as it is, a number or a truth value as it is written. Raises ValueError for any other."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if not isinstance(value, str | int | float):
        raise ValueError(f"no text but {str(value)[:80]}")
    return str(value)


def cut_text(text: str) -> dict[str, str]:
    """A lone text as {"train": ..., "test": ...}. The test part is about a fifth, and begins a line or else a word."""
    place = round(len(text) * (1 - TEXT_TEST_SHARE))
    for mark in ("\n", " "):
        end = text.rfind(mark, 0, place) + 1
        if text[:end].strip():
            return {"train": text[:end], "test": text[end:]}
    return {"train": text[:place], "test": text[place:]}


# --- columns and prompt templates of one's own --------------------------------------------------------------------

@dataclass(frozen=True)
class RowForm:
    """How own rows are found on the hub, and how their columns become ours.

    columns: {ours, one of COLUMNS: theirs}. template: of the user's turn, as read_prompt_template() gives it.
    split, config: of a hub set; None: by the usual names, and the default configuration.
    partly: a row that lacks these columns keeps its own, because it may be of another set of a mixture.
    """
    columns: dict[str, str] = field(default_factory=dict)
    template: list[tuple[str, str | None]] | None = None
    split: str | None = None
    config: str | None = None
    partly: bool = False

    @property
    def changes(self) -> bool:
        """Whether a row becomes another one."""
        return bool(self.columns) or self.template is not None

    def shape(self, row: dict) -> dict:
        """The row with our columns, those of one of FORMS alone. Raises ValueError where it lacks a column."""
        if not self.changes:
            return row
        wanted = {**{theirs: "--data_columns" for theirs in self.columns.values()},
                  **{name: "--prompt_template" for _, name in self.template or [] if name}}
        missing = next((name for name in wanted if name not in row), None)
        if missing is not None:
            if self.partly:
                return row
            raise ValueError(f"{wanted[missing]} names the column '{missing}', and it has {', '.join(map(str, row))}")
        given = {ours: row[theirs] for ours, theirs in self.columns.items()}
        if self.template is not None:
            given["prompt"] = fill(self.template, row)
        for needed, more in FORMS.values():
            shaped = {**{name: row.get(name) for name in (*needed, *more)}, **given}
            if set(given) <= {*needed, *more} and all(shaped[name] is not None for name in needed):
                return shaped
        empty = next((theirs for ours, theirs in self.columns.items() if row[theirs] is None), None)
        if empty is not None:
            raise ValueError(f"its column '{empty}' has no value")
        answer = ", and completion=COLUMN the answer" if "prompt" in given else ""
        raise ValueError(f"with {' and '.join(given)} alone it has no form that is known: --data_columns names the "
                         f"other columns{answer}")


def row_form(columns: str | None, template: str | None, split: str | None = None, config: str | None = None,
             partly: bool = False) -> RowForm:
    """The RowForm that the flags ask for. columns: "ours=theirs,...". template: a file.

    Raises UserError where the columns are of no form, or the template cannot be read.
    """
    pairs = [pair.partition("=") for pair in (columns or "").split(",") if pair.strip()]
    named = {ours.strip(): theirs.strip() for ours, _, theirs in pairs}
    for ours, theirs in named.items():
        if ours not in COLUMNS or not theirs:
            raise UserError(f"--data_columns {columns}: write OURS=THEIRS, with one of {', '.join(COLUMNS)} for OURS")
    given = set(named) | ({"prompt"} if template else set())
    if len(named) < len(pairs) or template and "prompt" in named or not any(
            given <= {*needed, *more} for needed, more in FORMS.values()):
        forms = "; ".join(", ".join((*needed, *more)) for needed, more in FORMS.values())
        raise UserError(f"--data_columns {columns}: the columns of one form go together, each once, and "
                        f"--prompt_template is the prompt: {forms}")
    return RowForm(named, read_prompt_template(template) if template else None, split, config, partly)


def read_prompt_template(file: str) -> list[tuple[str, str | None]]:
    """A template of the user's turn as [(text, the column behind it or None)]. White space at its end is left out.

    A column stands in braces, {question}. A brace of the text is written twice. Raises UserError where it has no
    column.
    """
    if not Path(file).is_file():
        raise UserError(f"--prompt_template {file} is not a file")
    try:
        parts = list(string.Formatter().parse(read_text(file).rstrip()))
    except ValueError as error:
        raise UserError(f"--prompt_template {file} cannot be read ({error}): a column stands in braces, and a brace of "
                        "the text is written twice") from None
    if not any(name for _, name, _, _ in parts) or any(name == "" or spec or conversion
                                                       for _, name, spec, conversion in parts):
        raise UserError(f"--prompt_template {file} must name at least one column, as in {{question}}, and nothing but "
                        "its name stands in the braces; a brace of the text is written twice")
    return [(text, name) for text, name, _, _ in parts]


def fill(template: list[tuple[str, str | None]], row: dict) -> str:
    """The user's turn. A column without value is empty. Where all columns are blank the turn is, too.

    Raises ValueError where a column holds no text.
    """
    values = {name: "" if row[name] is None else text_of(row[name]) for _, name in template if name}
    if not any(value.strip() for value in values.values()):
        return ""
    return "".join(text + (values[name] if name else "") for text, name in template)
