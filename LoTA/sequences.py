"""Several rows in one sequence, none of which sees another (--packing True).

Touches a transformers model through its input `position_ids` alone.

Without packing each row of a batch is a sequence, padded to the longest one. Here the same rows share sequences, so
there is less padding. The positions begin at 0 with each row. transformers takes that as the border of a row: it masks
the attention across it, or tells flash attention where rows begin. So the loss of a batch and its gradients stay what
they are without packing, to rounding.

A model that ignores the positions, or hands on a state from token to token, would mix the rows. check_packing() tries
each model before it trains.

Symbols: k, the sequences of a batch; W, their width in tokens.
"""
import heapq
import inspect
from collections.abc import Callable, Sequence

import torch
from transformers import DataCollatorForSeq2Seq, PreTrainedTokenizerBase

from LoTA import IGNORE_INDEX, UserError
from LoTA.answer_loss import causal_lm, has_plain_loss
from LoTA.distill import Distillation

MULTIPLE = 8            # widths are multiples of it, because a GPU multiplies such matrices faster
LEAKS = 0.1             # the most that a row may see of another, as a share of what it sees without a border
ROW_OF_CHECK = 16       # tokens of each of the two rows that check_packing() tries


def make_collator(packing: bool, tokenizer: PreTrainedTokenizerBase, model: torch.nn.Module,
                  distillation: Distillation | None = None) -> Callable[[list[dict]], dict[str, torch.Tensor]]:
    """What makes the batches of a run: rows that are padded or, with `packing`, rows that share sequences.

    model: the one that is trained. Raises UserError where it, or the teacher, cannot take several rows in a sequence.
    """
    if not packing:
        return DataCollatorForSeq2Seq(tokenizer, pad_to_multiple_of=MULTIPLE)
    models = [model, *([distillation.teacher] if distillation else [])]
    for one in models:
        check_packing(one)
    return PackingCollator(tokenizer.pad_token_id, causal_lm(model).config.get_text_config().hidden_size,
                           any(skips_masked(one) for one in models))


class PackingCollator:
    """Puts the rows of a batch into as many sequences as take the least work.

    pad: the token that fills the end of a sequence. hidden: the model's width, for the estimate of the work.
    one_sequence: put all rows of a batch into one sequence, because what is masked costs nothing.

    A call takes rows with `input_ids` and `labels`. It returns both and `position_ids`, int64 [k, W]. There is no
    attention_mask, because transformers looks for the borders of rows only where there is none.
    """

    def __init__(self, pad: int | None, hidden: int, one_sequence: bool = False):
        self.pad, self.hidden, self.one_sequence = pad or 0, hidden, one_sequence

    def __call__(self, rows: Sequence[dict]) -> dict[str, torch.Tensor]:
        lengths = [len(row["input_ids"]) for row in rows]
        groups = [range(len(rows))] if self.one_sequence else share_out(lengths, self.hidden)
        return join([[rows[number] for number in group] for group in groups], self.pad)


def join(sequences: Sequence[Sequence[dict]], pad: int) -> dict[str, torch.Tensor]:
    """A batch whose sequences are made of these rows, one behind the other: int64 tensors [k, W].

    The first label of a row is IGNORE_INDEX, because the token before it belongs to another row. Without packing no
    hidden state predicts a first token either. Every token of the padding has position 0. So it is a row of its own: it
    sees itself, and its softmax is not empty.
    """
    width = round_up(max(sum(len(row["input_ids"]) for row in rows) for rows in sequences))
    columns = {"input_ids": [], "labels": [], "position_ids": []}
    for rows in sequences:
        ids = [token for row in rows for token in row["input_ids"]]
        labels = [label for row in rows for label in (IGNORE_INDEX, *row["labels"][1:])]
        positions = [position for row in rows for position in range(len(row["input_ids"]))]
        for name, numbers, fill in (("input_ids", ids, pad), ("labels", labels, IGNORE_INDEX),
                                    ("position_ids", positions, 0)):
            columns[name].append(numbers + [fill] * (width - len(numbers)))
    return {name: torch.tensor(numbers) for name, numbers in columns.items()}


def share_out(lengths: Sequence[int], hidden: int) -> list[list[int]]:
    """The rows of each sequence, by their numbers: as many sequences as take the least work().

    lengths: the tokens of each row. One sequence has the least padding. Many short ones have the least attention.
    """
    longest, total = max(lengths), sum(lengths)

    def least(count: int) -> int:
        """No way to fill `count` sequences takes less work."""
        return work(count, max(longest, -(-total // count)), hidden)

    best, best_work = [], float("inf")
    for count in sorted(range(1, len(lengths) + 1), key=least):
        if least(count) >= best_work:
            break
        groups = fill(lengths, count)
        took = work(count, max(sum(lengths[number] for number in group) for group in groups), hidden)
        if took < best_work:
            best, best_work = groups, took
    return best


def fill(lengths: Sequence[int], count: int) -> list[list[int]]:
    """The rows of `count` sequences of nearly the same length: each row, the longest first, goes to the shortest."""
    sequences = [(0, number, []) for number in range(count)]
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        length, number, group = sequences[0]
        group.append(row)
        heapq.heapreplace(sequences, (length + lengths[row], number, group))
    return [group for _, _, group in sorted(sequences, key=lambda sequence: sequence[1])]


def work(count: int, width: int, hidden: int) -> int:
    """The work of a forward on `count` sequences, but for a factor.

    A token meets about 12 hidden**2 weights in a layer. In the attention it meets W keys and W values of `hidden`
    entries, masked or not.
    """
    width = round_up(width)
    return count * width * (6 * hidden + width)


def round_up(width: int) -> int:
    """The next multiple of MULTIPLE."""
    return -(-width // MULTIPLE) * MULTIPLE


def skips_masked(model: torch.nn.Module) -> bool:
    """Whether the model's attention spends no time on other rows, as flash attention and flex attention do.

    Flash attention finds the borders in a batch of one sequence only.
    """
    name = causal_lm(model).config.get_text_config()._attn_implementation or ""
    return "flash" in name or "flex" in name


def check_packing(model: torch.nn.Module) -> None:
    """Raises UserError where rows that share a sequence are not what they are alone.

    It runs the model on a row behind another one. Where the row's logits differ from those that it has alone, by more
    than LEAKS of what they differ by without a border, the rows are not apart. Rounding is far below that.
    """
    inner = causal_lm(model)
    name, remedy = type(inner).__name__, "leave --packing out"
    if not has_plain_loss(inner):
        raise UserError(f"--packing needs a model whose loss is the cross entropy alone, and that of {name} has more "
                        f"terms: {remedy}, or look at output_router_logits in its config.json")
    # A short convolution reaches back over two or three tokens only, which is too little for the trial below to notice.
    if inner._is_stateful or any(isinstance(module, torch.nn.Conv1d) for module in inner.modules()):
        raise UserError(f"--packing would mix the rows, because {name} hands on a state or a convolution from token to "
                        f"token: {remedy}")
    if "position_ids" not in inspect.signature(inner.forward).parameters:
        raise UserError(f"--packing needs positions that begin anew with each row, and {name} takes none: {remedy}")
    training = model.training
    model.eval()
    try:
        seen, leaked = borders(model)
    finally:
        model.train(training)
    if not leaked <= LEAKS * seen:
        raise UserError(f"--packing would mix the rows, because {name} does not keep them apart (attention "
                        f"{inner.config.get_text_config()._attn_implementation}): {remedy}, or try another "
                        "--flash_attn")


@torch.no_grad()
def borders(model: torch.nn.Module) -> tuple[float, float]:
    """How far the logits of a row behind another one are from those that it has alone: (without a border, with one).

    Both are Euclidean norms.
    """
    device, size = model.get_input_embeddings().weight.device, model.get_input_embeddings().num_embeddings
    tokens = [(7 + 13 * i) % size for i in range(2 * ROW_OF_CHECK)]
    rows = [{"input_ids": ids, "labels": ids} for ids in (tokens, tokens[:ROW_OF_CHECK], tokens[ROW_OF_CHECK:])]

    def logits(*rows: dict) -> torch.Tensor:
        """Of the last ROW_OF_CHECK tokens before the padding, float32 [ROW_OF_CHECK, vocabulary]."""
        batch = join([rows], pad=0)
        end = sum(len(row["input_ids"]) for row in rows)
        inputs = {name: batch[name].to(device) for name in ("input_ids", "position_ids")}
        return model(**inputs).logits[0, end - ROW_OF_CHECK:end].float()
    alone = logits(rows[2])
    return (logits(rows[0]) - alone).norm().item(), (logits(rows[1], rows[2]) - alone).norm().item()
