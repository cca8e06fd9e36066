"""LoTA-QAF: lossless ternary adaptation for quantization-aware fine-tuning (https://arxiv.org/abs/2505.18724).

Imports the standard library only, because --help and refusals must answer before torch is loaded.
"""
import logging
import os
import sys
from collections.abc import Callable

# GPTQModel sizes a thread pool from this variable when it is imported. With few cores it refuses to start without it.
os.environ.setdefault("GPTQMODEL_CPU_WORKERS", str(min(8, os.cpu_count() or 1)))

SUPPORTED_BITS = (2, 3, 4, 8)       # bits of an integer weight; LoTA.packing is written for any number up to 8


class UserError(ValueError):
    """A mistake of the user's. Its text is one line: what is wrong and what to do. Scripts print it alone."""


def run_script(main: Callable[[], object]) -> None:
    """Runs a script's main(). An error that is not the program's fault ends in one line and exit status 1."""
    # These libraries warn about their own insides, and a user can act on none of it.
    for chatty in ("torch.utils._pytree", "torch.utils.cpp_extension", "tokenicer", "accelerate.utils.modeling"):
        logging.getLogger(chatty).setLevel(logging.ERROR)
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("stopped")
    except Exception as error:
        first_line = (str(error).splitlines() or [type(error).__name__])[0]
        if isinstance(error, RuntimeError) and "PytorchStreamWriter" in str(error):     # torch.save on a full disk
            sys.exit(f"error: a checkpoint could not be written: {first_line}")
        # SafetensorError is named, not imported, because this file imports the standard library only.
        if isinstance(error, UserError | OSError | FloatingPointError) or type(error).__name__ == "SafetensorError":
            sys.exit(f"error: {first_line}")
        raise
