"""Files with rows become lists of dicts: csv, tsv, json, jsonl and parquet, each also with .gz, in any case.

A plain text, .txt, is one row with the column text.

Touches files (reading) and knows nothing of tasks. A value is text, None, or a list or dict of such values, because the
same row must be the same whatever its format: a number is the text that stands in the file. Nothing that a file holds
is left out in silence. What cannot be read raises UserError with the file and the row, counted from 1.
"""
import csv
import gzip
import io
import json
import re
import sys
import zlib
from pathlib import Path

from LoTA import UserError

KINDS = ("csv", "tsv", "json", "jsonl", "parquet")
READABLE = "a csv, json or jsonl file (also tsv, parquet, and any of these with .gz)"


def kind_of(file: str | Path) -> str | None:
    """The format that a file's name says, one of KINDS. None for any other name."""
    kind = Path(file).name.lower().removesuffix(".gz").rpartition(".")[2]
    return kind if kind in KINDS else None


def is_plain_text(file: str | Path) -> bool:
    """Whether a file's name says that it is a plain text, packed or not."""
    return Path(file).name.lower().removesuffix(".gz").endswith(".txt")


def row_name(file: str | Path, number: int) -> str:
    """How a message names a row. number: counted from 1."""
    header = " (the header is not counted)" if kind_of(file) in ("csv", "tsv") else ""
    return f"{file}, row {number}{header}"


def read_rows(file: str | Path) -> list[dict]:
    """The rows of a file. All of them have the same keys: where a row lacks one, its value is None.

    Raises UserError where the file holds no rows, or cannot be read whole.
    """
    kind = kind_of(file)
    if is_plain_text(file):
        return [{"text": read_text(file)}]
    if kind is None:
        raise UserError(f"{file} is not {READABLE}")
    if kind == "parquet":
        rows = _read_parquet(file)
    elif kind in ("csv", "tsv"):
        rows = _read_csv(file, "," if kind == "csv" else "\t")
    else:
        rows = _read_json(file, kind)
    if not rows:
        raise UserError(f"{file} is empty")
    columns = dict.fromkeys(column for row in rows for column in row)
    return [{column: row.get(column) for column in columns} for row in rows]


def read_text(file: str | Path) -> str:
    """The text of a UTF-8 file, without a byte order mark. Unpacks .gz. Line ends stay as they are."""
    try:
        return _read_bytes(file).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not UTF-8 ({error}); save it as UTF-8") from None


def lines_of(text: str) -> list[str]:
    """The lines of a text, without their ends.

    str.splitlines() would also split at U+2028, U+0085, form feeds and others, which stand inside texts.
    """
    return re.split(r"\r\n|\n|\r", text)


def _read_bytes(file: str | Path) -> bytes:
    data = Path(file).read_bytes()
    if not Path(file).name.lower().endswith(".gz"):
        return data
    try:
        return gzip.decompress(data)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{file} cannot be unpacked: {error}") from None


def _read_csv(file: str | Path, delimiter: str) -> list[dict]:
    rows, header = [], None
    limit = csv.field_size_limit(sys.maxsize)       # of the whole process, hence restored below
    try:
        # strict, because a quote that never closes would swallow all rows behind it.
        reader = csv.reader(io.StringIO(read_text(file), newline=""), delimiter=delimiter, strict=True)
        for fields in reader:
            if not fields:                          # a blank line
                continue
            if header is None:
                header = fields
                _refuse_equal_columns(file, header)
                continue
            if len(fields) != len(header):
                raise UserError(f"{row_name(file, len(rows) + 1)} has not as many fields as the "
                                f"header: {len(fields)}, not {len(header)} ({', '.join(header)}); quote a field that "
                                f"holds a separator: {str(fields)[:200]}")
            rows.append(dict(zip(header, fields, strict=True)))
    except csv.Error as error:
        place = row_name(file, len(rows) + 1) if header else f"{file}, the header"
        raise UserError(f"{place} cannot be read: {error}; a quote inside a quoted field is written twice") from None
    finally:
        csv.field_size_limit(limit)
    return rows


def _refuse_equal_columns(file: str | Path, columns: list[str]) -> None:
    twice = sorted({column for column in columns if columns.count(column) > 1})
    if twice:
        raise UserError(f"{file}: the column '{twice[0]}' stands more than once in {', '.join(columns)}; rename one")


def _read_json(file: str | Path, kind: str) -> list[dict]:
    """An array of objects, {"data": an array of objects}, or JSON Lines, whatever the file's name says."""
    text = read_text(file)
    try:
        content = _parse(text) if text.strip() else []
    except (ValueError, RecursionError) as error:
        if text.lstrip().startswith("["):
            raise UserError(f"{file} cannot be read as {kind}: {error}") from None
        return _read_json_lines(file, text)
    if isinstance(content, dict):
        wraps = isinstance(content.get("data"), list) and not isinstance(content, _EqualKeys)
        content = content["data"] if wraps else [content]
    if not isinstance(content, list):
        raise UserError(f"{file} is not a list of records")
    rows = []
    for number, row in enumerate(content, 1):
        try:
            rows.append(_record(row))
        except ValueError as error:
            raise UserError(f"{row_name(file, number)} {error}: {str(row)[:200]!r}") from None
    return rows


def _read_json_lines(file: str | Path, text: str) -> list[dict]:
    rows = []
    for number, line in enumerate(lines_of(text), 1):
        if not line.strip():
            continue
        try:
            row = _parse(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{file}, line {number} is not JSON ({error}): {line[:200]!r}") from None
        try:
            rows.append(_record(row))
        except ValueError as error:
            raise UserError(f"{file}, line {number} {error}: {line[:200]!r}") from None
    return rows


class _EqualKeys(dict):
    """A JSON object in which a key stands twice. _as_text() refuses it, because there the row's number is known."""


def _parse(text: str) -> object:
    """JSON, its numbers as they are written."""
    return json.loads(text, parse_int=str, parse_float=str, parse_constant=str,
                      object_pairs_hook=lambda pairs: (dict if len(dict(pairs)) == len(pairs) else _EqualKeys)(pairs))


def _record(row: object) -> dict:
    """A row with text in place of numbers. Raises ValueError with what is wrong with it."""
    if not isinstance(row, dict):
        raise ValueError("is not a record with keys")
    return _as_text(row)


def _as_text(value: object) -> object:
    """A value, with text in place of its numbers, truth values and dates. Bytes stay."""
    if isinstance(value, _EqualKeys):
        raise ValueError(f"has one of the keys {', '.join(value)} twice")
    if isinstance(value, dict):
        return {key: _as_text(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_as_text(inner) for inner in value]
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str) and not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            raise ValueError("holds half a character (a lone surrogate)") from None
    return value if value is None or isinstance(value, str | bytes) else str(value)


def _read_parquet(file: str | Path) -> list[dict]:
    import pyarrow
    from pyarrow import parquet
    try:
        table = parquet.read_table(io.BytesIO(_read_bytes(file)))
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{file} cannot be read as parquet: {error}") from None
    _refuse_equal_columns(file, table.column_names)
    return _as_text(table.to_pylist())
