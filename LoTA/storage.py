"""Files, written whole: JSON, safetensors, folders. Touches files and knows nothing of models.

JSON files and folders are renamed into place when they are complete, so a reader never finds half of one. The
safetensors functions write in place, and so belong inside whole_folder().
"""
import fcntl
import glob
import hashlib
import json
import math
import os
import re
import secrets
import shutil
import struct
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, TypeVar

import torch
from tqdm import tqdm

from LoTA import UserError

SAFETENSORS_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL"}
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
Record = TypeVar("Record")


def read_json(path: str | Path) -> dict | list:
    """The content of a JSON file. Raises UserError where the file is cut off, is nested too deeply or is not JSON."""
    try:
        return json.loads(Path(path).read_text())
    except RecursionError:
        raise UserError(f"{path} is nested too deeply to be read") from None
    except ValueError as error:
        raise UserError(f"{path} is not whole: {error}") from None


def read_record(path: str | Path, kind: type[Record], content: dict | list | None = None) -> Record:
    """A JSON object as an instance of the dataclass `kind`. Fields that `kind` does not have are left out.

    content: what read_json() made of the file, where it was read already.
    Raises UserError that names the file and the first field that has another type. A number in quotes is no number.
    """
    # Here, because benchmarks run where pydantic is not installed.
    from pydantic import TypeAdapter, ValidationError

    content = read_json(path) if content is None else content
    try:
        # As JSON, because pydantic's strict mode takes a dict for a dataclass only there.
        return TypeAdapter(kind).validate_json(json.dumps(content), strict=True)
    except RecursionError:
        raise UserError(f"{path} is nested too deeply to be read") from None
    except ValidationError as error:
        wrong = error.errors()[0]
        field = ".".join(map(str, wrong["loc"])) or "the content"
        message = wrong["msg"][0].lower() + wrong["msg"][1:]
        raise UserError(f"{path} cannot be read: {field} is {repr(wrong['input'])[:60]}; {message}") from None


def write_json(path: str | Path, content: dict | list) -> None:
    """Writes JSON under a temporary name, then renames it. Makes the parent folders."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        temporary.write_text(json.dumps(content, indent=2, ensure_ascii=False, default=str) + "\n")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


# --- checksums ----------------------------------------------------------------------------------------------------

CHUNK_BYTES = 1 << 22
PENDING_CHUNKS = 16         # that rewrite_safetensors() has written and not yet hashed
CARD = "README.md"
# {what os.stat says of a file: its SHA-256}. It spares reading a large file again that this process has just hashed.
_known: dict[tuple[int, ...], str] = {}


def sha256(path: str | Path, progress: tqdm | None = None) -> str:
    """The SHA-256 of a file, in hexadecimal. progress: a bar that counts bytes."""
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while chunk := f.read(CHUNK_BYTES):
            digest.update(chunk)
            if progress is not None:
                progress.update(len(chunk))
    return digest.hexdigest()


def checksums(root: str | Path, names: Iterable[str]) -> dict[str, str]:
    """{name: SHA-256} of files, by their paths below `root`. Shows a progress bar, and reads an unchanged file once."""
    files = {name: Path(root) / name for name in names}
    found = {}
    with tqdm(total=sum(file.stat().st_size for file in files.values()), desc="checksums", unit="B", unit_scale=True,
              leave=False) as progress:
        for name, file in files.items():
            stat = file.stat()
            key = stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns
            if key in _known:
                progress.update(stat.st_size)
            found[name] = _known.get(key) or sha256(file, progress)
            # The clock of a file system is coarse: a file of this very moment may change again and look the same.
            if time.time_ns() - stat.st_ctime_ns > 10**9:
                _known[key] = found[name]
    return found


def record_checksum(content: dict, name: str, without: Iterable[str] = ()) -> str:
    """The SHA-256 of a record's own content, which stands in its "sha256" under `name`, the record's file.

    content: the record, with or without that entry. without: fields that may change.
    """
    kept = {key: value for key, value in content.items() if key not in without}
    kept["sha256"] = {file: value for file, value in content.get("sha256", {}).items() if file != name}
    return hashlib.sha256(json.dumps(kept, sort_keys=True, default=str).encode()).hexdigest()


def files_below(root: str | Path) -> list[str]:
    """The paths of all files below `root`, relative to it. Hidden ones are left out, because tools leave them there."""
    root = Path(root)
    return sorted(str(path) for path in (file.relative_to(root) for file in root.rglob("*") if file.is_file())
                  if not any(part.startswith(".") for part in path.parts))


def differences(root: str | Path, recorded: dict[str, str]) -> list[str]:
    """One line for each file of `recorded`, {name: SHA-256}, that is missing below `root` or has other bytes."""
    present = {name for name in recorded if (Path(root) / name).is_file()}
    found = checksums(root, [name for name in recorded if name in present])
    return [f"{name} is missing" if name not in present else f"{name} has other bytes than those that were written"
            for name in recorded if found.get(name) != recorded[name]]


def require_unchanged(root: str | Path, recorded: dict[str, str], remedy: str) -> None:
    """Raises UserError, which ends in `remedy`, where a recorded file is missing or has other bytes.

    An empty `recorded` passes: the folder was made before checksums were recorded. The model card may be edited,
    because nothing is loaded from it.
    """
    changed = differences(root, {name: value for name, value in recorded.items() if name != CARD})
    if changed:
        more = f" (and {len(changed) - 1} more)" if len(changed) > 1 else ""
        raise UserError(f"{root}: {changed[0]}{more}; {remedy}")


# --- safetensors --------------------------------------------------------------------------------------------------
# A safetensors file is the header's length (8 bytes, little endian), a JSON header, and the tensors' bytes:
# https://github.com/huggingface/safetensors#format. The library writes all tensors of a file at once. A large model
# would fill the memory that way, so these functions write one tensor at a time.

def create_safetensors(file: Path, tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]]) -> None:
    """Creates a safetensors file with room for `tensors`, {name: (dtype, shape)}, and zeros in it.

    Raises KeyError for a dtype that SAFETENSORS_NAMES does not have.
    """
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, (dtype, shape) in tensors.items():
        start, end = end, end + dtype.itemsize * math.prod(shape)
        header[name] = {"dtype": SAFETENSORS_NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(file, "wb") as f:
        f.write(struct.pack("<Q", len(text)) + text)
        f.truncate(8 + len(text) + end)


def overwrite_tensor(file: Path, name: str, tensor: torch.Tensor) -> None:
    """Replaces the bytes of one tensor in a safetensors file. tensor: on the CPU.

    Raises UserError where dtype or shape differ from those in the file's header, KeyError where it has no such tensor.
    """
    with open(file, "r+b") as f:
        header_size, = struct.unpack("<Q", f.read(8))
        entry = json.loads(f.read(header_size))[name]
        f.seek(8 + header_size + entry["data_offsets"][0])
        f.write(_bytes_of(tensor, file, name, entry))


def rewrite_safetensors(source: Path, target: Path, replacement: Callable[[str], torch.Tensor | None]) -> str:
    """Writes a safetensors file anew with some tensors replaced, from its first byte to its last. Returns its SHA-256.

    replacement: (name of a tensor) -> what takes its place, on the CPU, or None where it stays. It is called once for
    each tensor, in the order of the file. A thread hashes what was written while the next tensor is made.
    Raises UserError where a dtype or a shape would change, and where the file is cut off.
    """
    digest, hashed = hashlib.sha256(), deque()

    def write(data: memoryview | bytes) -> None:
        new.write(data)
        hashed.append(hashing.submit(digest.update, data))
        if len(hashed) > PENDING_CHUNKS:            # so that few tensors are alive
            hashed.popleft().result()

    with open(source, "rb") as old, open(target, "wb") as new, ThreadPoolExecutor(1) as hashing:
        length = old.read(8)
        text = old.read(struct.unpack("<Q", length)[0])
        write(length + text)
        entries = {name: entry for name, entry in json.loads(text).items() if name != "__metadata__"}
        for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
            start, end = entry["data_offsets"]
            tensor = replacement(name)
            if tensor is None:
                for place in range(start, end, CHUNK_BYTES):
                    size = min(CHUNK_BYTES, end - place)
                    data = old.read(size)
                    if len(data) < size:
                        raise UserError(f"{source} is not whole: it ends before its last tensor")
                    write(data)
                continue
            old.seek(end - start, os.SEEK_CUR)
            data = _bytes_of(tensor, source, name, entry)
            for place in range(0, len(data), CHUNK_BYTES):
                write(data[place:place + CHUNK_BYTES])
        for part in hashed:
            part.result()
    return digest.hexdigest()


def _bytes_of(tensor: torch.Tensor, file: Path, name: str, entry: dict) -> memoryview:
    """The bytes of a tensor that takes the place of `name` in `file`. entry: what the file's header says of that."""
    dtype, shape = SAFETENSORS_NAMES[tensor.dtype], list(tensor.shape)
    if entry["dtype"] != dtype or entry["shape"] != shape:
        raise UserError(f"{file}: {name} is {entry['dtype']} {entry['shape']}, expected {dtype} {shape}")
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().data


def require_safetensors(folder: Path, wanted: str, stems: tuple[str, ...]) -> None:
    """Raises UserError where `folder` has pickles instead of the files that the pattern `wanted` matches.

    stems: how the names of pickled weights begin. Others, such as training_args.bin, hold no weights.
    """
    pickles = [f for stem in stems for f in sorted(folder.glob(f"{stem}*")) if f.suffix in PICKLES]
    if pickles and not any(folder.glob(wanted)):
        raise UserError(f"{pickles[0]} is a pickle, which can run code and is not read; save the weights again with "
                        "save_pretrained() of transformers or PEFT, which writes safetensors")


# --- folders ------------------------------------------------------------------------------------------------------

# What is in the temporary folder of a process: the new folder, the one that it replaces, and the lock of the process.
NEW, OLD, LOCK = "new", "old", "lock"
TEMPORARY = "lota_qaf."             # how those in TMPDIR begin
DAY = 24 * 3600 * 10**9             # nanoseconds


@contextmanager
def whole_folder(path: str | Path, marker: str) -> Iterator[Path]:
    """Yields a temporary folder beside `path`. It becomes `path` when the block ends, and vanishes when it fails.

    An existing folder is replaced only if it is empty or holds the file `marker`, because the marker says that this
    project made it. Raises UserError for any other. A symbolic link is written through.
    What killed processes left beside `path` is removed first.
    """
    check_output_folder(path, marker)
    path = Path(path).resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    clear_leftovers(path)
    # Both folders are inside, because a folder by mkdtemp() is for its owner's eyes only.
    with _locked_folder(path.parent, f".{path.name}.") as outer:
        whole, old = outer / NEW, outer / OLD
        yield whole
        if path.exists():
            os.rename(path, old)
        try:
            os.rename(whole, path)
        except BaseException:
            if old.exists():
                os.rename(old, path)
            raise


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """Yields an empty folder in TMPDIR, which vanishes when the block ends.

    What killed processes of this user left there is removed first, because a merged model is large.
    """
    place = Path(tempfile.gettempdir())
    _clear_unlocked(place, TEMPORARY)
    with _locked_folder(place, TEMPORARY) as outer:
        yield outer / NEW


@contextmanager
def _locked_folder(place: Path, prefix: str) -> Iterator[Path]:
    """Yields a new folder in `place` with an empty folder NEW in it. It vanishes when the block ends.

    Its lock says that its process lives. A process id would not, because containers have equal ones.
    """
    outer, lock = _claimed_folder(place, prefix)
    try:
        yield outer
    finally:
        _remove(outer)
        lock.close()


def _claimed_folder(place: Path, prefix: str) -> tuple[Path, IO]:
    """(a new folder in `place`, with the empty folder NEW in it; its lock, which is held)."""
    while True:
        outer = Path(tempfile.mkdtemp(prefix=prefix, suffix=".tmp", dir=place))
        try:
            lock = open(outer / LOCK, "w")                  # a file, because NFS locks no folders
            with suppress(OSError):         # a file system without locks has no leftovers that can be told
                fcntl.flock(lock, fcntl.LOCK_EX)
            (outer / NEW).mkdir()
            return outer, lock
        except FileNotFoundError:           # before it had its lock, another process took it for a leftover
            continue
        except BaseException:
            shutil.rmtree(outer, ignore_errors=True)
            raise


def _remove(outer: Path) -> None:
    """Removes a temporary folder, its lock last, because what has no lock cannot be told to be a leftover."""
    for name in (NEW, OLD):
        shutil.rmtree(outer / name, ignore_errors=True)
    shutil.rmtree(outer, ignore_errors=True)


def clear_leftovers(path: Path) -> None:
    """Removes what killed processes left beside `path`, and says so.

    Where one was killed between its two renames, only it has the folder that was at `path`. It is brought back.
    """
    _clear_unlocked(path.parent, f".{path.name}.", path)
    _clear_old_names(path)


def _clear_unlocked(place: Path, prefix: str, path: Path | None = None) -> None:
    """Removes the folders of _locked_folder() whose processes were killed. Brings the one that was at `path` back.

    Without a path they are in a place of many users, so only this user's are removed.
    """
    random = "[a-z0-9_]" * 8        # as mkdtemp() makes it; a * would find those of path.more too
    for outer in place.glob(f"{glob.escape(prefix)}{random}.tmp"):
        try:
            if path is None and outer.lstat().st_uid != os.getuid():
                continue
            if not any(outer.iterdir()):        # of a killed process, or made just now: its process makes another
                outer.rmdir()
                continue
            with open(outer / LOCK, "r+") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if path and (outer / OLD).exists() and not path.exists():
                    _bring_back(outer / OLD, path)
                _remove(outer)
        except OSError:                         # its process lives, or it has no lock, or none that can be asked
            continue
        print(f"removed {outer}: the process that wrote it was killed")


def _clear_old_names(path: Path) -> None:
    """Removes what processes of older versions left beside `path` when they were killed. Brings the old output back.

    Older versions wrote `.NAME.PID.tmp` and renamed the old output to `.NAME.PID.old`, without a lock. So two things
    must hold. No process may have that id here. And nothing may have changed for a day, because the process may live in
    another container or on another machine, which has ids of its own and the same disk.
    """
    found = [item for item in path.parent.glob(f".{glob.escape(path.name)}.*") if not item.is_symlink()]
    # The latest first, because an earlier .old may be one that was already half removed.
    for item in sorted(found, key=_last_change, reverse=True):
        known = re.fullmatch(r"([1-9]\d{0,6})\.(tmp|old)", item.name.removeprefix(f".{path.name}."))
        try:
            if not known or _lives(int(known[1])) or time.time_ns() - _last_change(item) < DAY:
                continue
            if known[2] == "old" and not path.exists():
                _bring_back(item, path)
                continue
            shutil.rmtree(item) if item.is_dir() else item.unlink()
            print(f"removed {item}: the process that wrote it was killed")
        except OSError:                         # another process was faster, or it is another user's
            continue


def _bring_back(old: Path, path: Path) -> None:
    os.rename(old, path)
    print(f"{path} was brought back: a process that replaced it was killed")


def _lives(process: int) -> bool:
    """Whether a process of this id runs here."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:                             # it is another user's
        pass
    return True


def _last_change(item: Path) -> int:
    """When a file or folder, or anything below it, was last written or renamed, in ns. Now, where it is just going."""
    try:
        return max(each.lstat().st_ctime_ns for each in (item, *item.rglob("*")))
    except OSError:
        return time.time_ns()


def check_output_folder(path: str | Path, marker: str) -> None:
    """Raises UserError where `path` exists and this project may not replace it."""
    path = Path(path)
    if path.resolve() == Path.cwd():
        raise UserError(f"the output folder {path} is the current one, which would be replaced; name another")
    if path.exists() and (not path.is_dir() or (any(path.iterdir()) and not (path / marker).exists())):
        raise UserError(f"{path} exists and was not made by this project; choose another output folder or remove it")
