"""LoTA-QAF: lossless ternary adaptation for quantization-aware fine-tuning (https://arxiv.org/abs/2505.18724).

Imports the standard library only, because --help and refusals must answer before torch is loaded.
"""
import logging
import os
import re
import sys
from collections.abc import Callable

# GPTQModel sizes a thread pool from this variable when it is imported. With few cores it refuses to start without it.
os.environ.setdefault("GPTQMODEL_CPU_WORKERS", str(min(8, os.cpu_count() or 1)))

SUPPORTED_BITS = (2, 3, 4, 8)       # bits of an integer weight; LoTA.packing is written for any number up to 8
IGNORE_INDEX = -100         # the label of tokens that are no answer: torch's cross entropy leaves them out
# What --recipe's values were called before. Flags and the files of old runs still have these names.
OLD_RECIPE_NAMES = {"steps": "ternary", "grid": "scales", "learned": "full"}


class UserError(ValueError):
    """A mistake of the user's. Its text is one line: what is wrong and what to do. Scripts print it alone."""


# What libraries say when memory or the disk has run out. torch, safetensors and tokenizers have no common error for
# either, and torch.save does not even say why it could not write.
OUT_OF_MEMORY = re.compile(r"out of memory|(can't|cannot) allocate memory|CUBLAS_STATUS_ALLOC_FAILED", re.IGNORECASE)
DISK_FULL = re.compile(r"no space left on device|disk quota exceeded|\d+ requested and \d+ written", re.IGNORECASE)
TORCH_SAVE_FAILED = re.compile(r"PytorchStreamWriter|unexpected pos \d+ vs \d+|basic_ios::clear: iostream error")
RUST_OS_ERROR = re.compile(r"\(os error \d+\)")


def explain(error: BaseException, memory_help: str = "") -> str | None:
    """One line for an error that is not the program's fault, None for any other.

    memory_help: what to lower where memory has run out.
    """
    if isinstance(error, UserError):
        return _first_line(error)
    cause = error
    while cause:                        # a library may wrap the error that says what ran out
        if ran_out := _ran_out(cause, memory_help):
            return f"{ran_out} ({_first_line(cause)[:200]})"
        cause = cause.__cause__
    of_the_system = isinstance(error, OSError) or _of_a_library(error) and RUST_OS_ERROR.search(str(error))
    if of_the_system or isinstance(error, FloatingPointError) or type(error).__name__ == "SafetensorError":
        return _first_line(error)
    return None


def _ran_out(error: BaseException, memory_help: str) -> str | None:
    text = str(error) if _of_a_library(error) else ""
    if isinstance(error, MemoryError) or OUT_OF_MEMORY.search(text):
        return f"out of memory: {memory_help or 'free some, or take a machine with more'}"
    if DISK_FULL.search(text):
        return "the disk is full, or a quota is reached: free space, or write to another disk"
    if TORCH_SAVE_FAILED.search(text):
        return "a checkpoint could not be written: look whether the disk is full"
    return None


def _of_a_library(error: BaseException) -> bool:
    """Whether an error is of a class that libraries raise for memory and files.

    SafetensorError is named, not imported, because this file imports the standard library only. tokenizers raises a
    bare Exception.
    """
    return (isinstance(error, RuntimeError | OSError) or type(error) is Exception
            or type(error).__name__ == "SafetensorError")


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def quiet_libraries() -> None:
    """Silences libraries that log their own insides, because a user can act on none of it."""
    for chatty in ("torch.utils._pytree", "torch.utils.cpp_extension", "tokenicer", "accelerate.utils.modeling",
                   "gguf"):
        logging.getLogger(chatty).setLevel(logging.ERROR)


def run_script(main: Callable[[], object], memory_help: str = "") -> None:
    """Runs a script's main(). An error that is not the program's fault ends in one line and exit status 1.

    memory_help: what the script's user can lower where memory has run out.
    """
    quiet_libraries()
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("stopped")
    except Exception as error:
        line = explain(error, memory_help)
        if line is None:
            raise
        rank = os.environ.get("RANK", "0")          # torchrun and accelerate launch set it, see LoTA/processes.py
        sys.exit(f"error: {line}" if rank == "0" else f"error in process {rank}: {line}")
