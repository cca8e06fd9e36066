"""LoTA-QAF: lossless ternary adaptation for quantization-aware fine-tuning (https://arxiv.org/abs/2505.18724)."""
import logging
import os
import sys

# GPTQModel sizes a thread pool from this when it is imported, and on few cores refuses to start without it.
os.environ.setdefault("GPTQMODEL_CPU_WORKERS", str(min(8, os.cpu_count() or 1)))


class UserError(ValueError):
    """A mistake of the user's: one line that says what is wrong and what to do. Scripts print it without traceback."""


def run_script(main):
    """Runs a script's main(); what is not the program's fault ends in one line and status 1, without traceback."""
    from safetensors import SafetensorError
    for chatty in ("torch.utils._pytree", "torch.utils.cpp_extension", "tokenicer", "accelerate.utils.modeling"):
        logging.getLogger(chatty).setLevel(logging.ERROR)
    try:
        main()
    except (UserError, OSError, SafetensorError, FloatingPointError) as error:
        sys.exit(f"error: {str(error).splitlines()[0]}")
    except RuntimeError as error:
        if "PytorchStreamWriter" not in str(error):     # how torch.save says that the disk is full
            raise
        sys.exit(f"error: a checkpoint could not be written: {str(error).splitlines()[0]}")
    except KeyboardInterrupt:
        sys.exit("stopped")
