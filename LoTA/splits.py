"""Where the train and the test rows of a data set are: in files, in a saved data set, or on the hub.

Touches the names of files, folders that datasets saved, and the Hugging Face hub (reading), and the console. It reads
no file of rows: LoTA/row_files.py does.
"""
import re
from pathlib import Path
from typing import TYPE_CHECKING

from LoTA import UserError
from LoTA.own_rows import RowForm
from LoTA.row_files import READABLE, is_plain_text, kind_of

if TYPE_CHECKING:
    from datasets import Dataset

# The first name that is found wins.
SPLIT_NAMES = {"train": ("train", "training"),
               "test": ("test", "testing", "validation", "valid", "val", "dev", "eval", "evaluation")}
# Files beside rows that say something about them.
ABOUT_ROWS = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")


def hub_splits(data_name: str, split: str, form: RowForm) -> dict[str, "Dataset"]:
    """The split of a set of own rows on the hub, as local_splits() gives it: the one of that name, or form.split.

    Raises UserError where it cannot be loaded.
    """
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


def local_splits(data_dir: str, with_texts: bool = False) -> "dict[str, Dataset | list[Path]]":
    """{"train": ..., "test": ...} as far as they are there, or {"all": ...} for a single source.

    The values are data sets, or files that are still to be read. Prints what of a folder is not used.
    with_texts: plain texts count too. Where none of them is named after a split, they are one source together.
    Raises UserError where there are no rows, or where it is not clear which file is meant.
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
    """The splits of a save_to_disk folder, as local_splits() gives them. there: what lies in it."""
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
