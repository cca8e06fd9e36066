"""LoTA-QAF: lossless ternary adaptation for quantization-aware fine-tuning (https://arxiv.org/abs/2505.18724)."""
import os

# GPTQModel sizes a thread pool from this when it is imported, and on few cores refuses to start without it.
os.environ.setdefault("GPTQMODEL_CPU_WORKERS", str(min(8, os.cpu_count() or 1)))


class UserError(ValueError):
    """A mistake of the user's: one line that says what is wrong and what to do. Scripts print it without traceback."""
