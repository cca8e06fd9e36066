"""The loss of a causal LM, with logits for the answers' tokens alone.

Touches a transformers model through hooks on its output embeddings (the head) and on its body, the part before them.

A model forms logits for every token, and its loss then ignores those of prompts and padding. They are most of the
logits, and at a large vocabulary the logits are most of the memory. Here a hook hands the head only the hidden states
that predict an answer token. The model's own forward does everything else, because models scale or cap the logits after
their head.

Where even the answers' logits are many, they are formed in chunks. Each chunk goes through the model's own forward once
more, with the body's output put in place of the body, so that the body runs once.

sum_over_tokens() takes any loss of single tokens, also one of the logits of several models (LoTA/distill.py).

Symbols: n, the answer tokens of a batch, or the other tokens that a loss is about; S, the batch's width.
"""
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from accelerate.utils import extract_model_from_parallel
from peft import PeftModel
from torch.nn.functional import cross_entropy, pad
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss

from LoTA import IGNORE_INDEX

# The float32 logits of one chunk take at most so many bytes. The cross entropy and its gradient need a few tensors of
# this size, so that about 1 GB is needed at once. At a vocabulary of 128,256 a chunk has 523 tokens, which still keep
# a GPU busy.
CHUNK_BYTES = 256 * 2**20


def has_plain_loss(model: torch.nn.Module) -> bool:
    """Whether the model's own loss is the cross entropy of the answers and nothing else.

    A mixture of experts may add the balance of its router, and Bamba may add a term over all logits.
    """
    inner = causal_lm(model)
    config = inner.config.get_text_config()
    more = getattr(config, "output_router_logits", False) or getattr(config, "z_loss_coefficient", 0)
    return inner.loss_function is ForCausalLMLoss and not more


def answer_loss(model: torch.nn.Module, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None = None,
                **inputs) -> dict[str, torch.Tensor]:
    """{"loss": the loss that `model` returns for these inputs and labels}. For models with has_plain_loss().

    labels: [batch, S], the input's tokens, or IGNORE_INDEX. num_items_in_batch: what the sum over the answer tokens is
    divided by, as transformers does it; None: their number in this batch.
    The loss is a float32 scalar, equal to the model's own to rounding. Without an answer token it is 0, with a graph.
    """
    answers = next_tokens(labels) != IGNORE_INDEX
    return {"loss": mean_loss(sum_answer_losses(model, labels, **inputs)[0], answers, num_items_in_batch)}


def mean_loss(total: torch.Tensor, tokens: torch.Tensor, num_items: torch.Tensor | int | None) -> torch.Tensor:
    """A sum over tokens, divided by num_items. Where that is None, by the number of the bool `tokens` that are True."""
    if num_items is None:
        num_items = tokens.sum()
    return total / (num_items.to(total.device).clamp(min=1) if torch.is_tensor(num_items) else max(1, num_items))


def sum_answer_losses(model: torch.nn.Module, labels: torch.Tensor, **inputs) -> tuple[torch.Tensor, int]:
    """(the sum of the answer tokens' cross entropies, a float32 scalar; n). The arguments are as in answer_loss()."""
    targets = next_tokens(labels)
    answers = targets != IGNORE_INDEX
    return sum_over_tokens(_sum_of_losses, [model], answers, [targets], inputs), int(answers.sum())


def next_tokens(labels: torch.Tensor) -> torch.Tensor:
    """The label that each hidden state predicts, [batch, S]: labels [batch, S] moved by one, with IGNORE_INDEX last."""
    return pad(labels, (0, 1), value=IGNORE_INDEX)[:, 1:]


def sum_over_tokens(loss: Callable[..., torch.Tensor], models: Sequence[torch.nn.Module], selected: torch.Tensor,
                    columns: Sequence[torch.Tensor], inputs: dict) -> torch.Tensor:
    """The sum of `loss` over the selected tokens, whose logits alone are formed.

    loss: a function (the entries [m] of each of `columns`, the float32 logits [m, vocabulary] of each model) -> the sum
    over m tokens, of any shape. It is called for all n tokens at once, or for chunks of them.
    selected: [batch, S], which hidden states the heads take. Where none is selected, it is the first one, so that the
    sum has a graph; the loss must leave it out by what the columns say of it.
    columns: tensors [batch, S]. inputs: what each model's forward gets; no labels are among them.
    """
    places = selected.flatten().nonzero().squeeze(1)
    if len(places) == 0:
        places = places.new_zeros(1)
    vocabulary = causal_lm(models[0]).config.get_text_config().vocab_size
    chunk = max(1, CHUNK_BYTES // (4 * vocabulary * len(models)))
    tokens = [_Tokens(model, selected.shape, places, chunk, inputs) for model in models]
    parts = [column.flatten()[places] for column in columns] + [one.rows for one in tokens]

    def sum_of_chunk(*parts: torch.Tensor) -> torch.Tensor:
        own, rows = parts[:len(columns)], parts[len(columns):]
        return loss(*own, *(one.logits(piece) for one, piece in zip(tokens, rows, strict=True)))

    if not any(one.chunked for one in tokens):
        return sum_of_chunk(*parts)
    pieces = zip(*(part.split(chunk) for part in parts), strict=True)
    if torch.is_grad_enabled():         # the backward forms a chunk's logits again, so that those of one are alive
        return sum(checkpoint(sum_of_chunk, *piece, use_reentrant=False) for piece in pieces)
    return sum(sum_of_chunk(*piece) for piece in pieces)


def causal_lm(model: torch.nn.Module) -> PreTrainedModel:
    """The transformers model itself, without what PEFT and accelerate put around it."""
    model = extract_model_from_parallel(model)
    return model.get_base_model() if isinstance(model, PeftModel) else model


def _sum_of_losses(targets: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """The sum of cross entropies. targets: [m]. logits: float32 [m, vocabulary]."""
    return cross_entropy(logits, targets.to(logits.device), ignore_index=IGNORE_INDEX, reduction="sum")


class _Tokens:
    """A model that has run up to its head, and forms the logits of some tokens, all at once or in chunks.

    shape, places, chunk: as in _Selection. inputs: what the model's forward gets.
    rows: [n, hidden] where `chunked`, else the logits themselves, [n, vocabulary]. Their chunks go to logits().
    """

    def __init__(self, model: torch.nn.Module, shape: torch.Size, places: torch.Tensor, chunk: int, inputs: dict):
        self.inner, self.inputs = causal_lm(model), inputs
        with _Selection(self.inner, shape, places, chunk) as selection:
            logits = model(**inputs).logits
        if selection.rows is None:      # this model does not call its head with all hidden states
            logits = logits.flatten(0, 1).index_select(0, places.to(logits.device))
        self.selection, self.chunked = selection, selection.chunked
        self.rows = selection.rows if self.chunked else logits.reshape(len(places), -1)

    def logits(self, rows: torch.Tensor) -> torch.Tensor:
        """The float32 logits [m, vocabulary] of m of the rows."""
        if self.chunked:
            body, output = self.selection.body, self.selection.body_output
            with _returning(body, output), _taking(self.selection.head, rows[None]):
                rows = self.inner(**self.inputs).logits.reshape(len(rows), -1)
        return rows.float()


class _Selection:
    """While the block runs, the head of `inner` takes the hidden states of `places` only: a context manager.

    shape: (batch, S). places: [n], indices into batch * S. chunk: the most hidden states that the head takes at once.
    rows: what was selected, [n, hidden]; None where the head did not take [batch, S, hidden].
    chunked: whether there are more than one chunk. The head has taken the first row alone then.
    body, body_output: the module that made the hidden states, and what it returned. Where none is known, all rows
        are one chunk, because a second chunk would need a second run.
    """

    def __init__(self, inner: PreTrainedModel, shape: torch.Size, places: torch.Tensor, chunk: int):
        self.shape, self.places, self.chunk = shape, places, chunk
        self.head = inner.get_output_embeddings()
        # Some models call only the decoder inside their body. Of those that are called the outer one returns last.
        self.bodies = {module for module in (inner.base_model, inner.get_decoder()) if module is not inner}
        self.rows = self.body = self.body_output = None
        self.chunked = False

    def __enter__(self) -> "_Selection":
        self.hooks = [body.register_forward_hook(self._keep) for body in self.bodies]
        if self.head is not None:
            self.hooks.append(self.head.register_forward_pre_hook(self._select))
        return self

    def __exit__(self, *exception) -> None:
        for hook in self.hooks:
            hook.remove()

    def _keep(self, module: torch.nn.Module, args: tuple, output) -> None:
        if self.rows is None:
            self.body, self.body_output = module, output

    def _select(self, module: torch.nn.Module, args: tuple) -> tuple | None:
        if not args or args[0].shape[:-1] != self.shape:
            return None
        self.rows = args[0].flatten(0, 1).index_select(0, self.places.to(args[0].device))
        self.chunked = len(self.rows) > self.chunk and self.body is not None
        return (self.rows[None, :1] if self.chunked else self.rows[None], *args[1:])


@contextmanager
def _taking(module: torch.nn.Module, given: torch.Tensor) -> Iterator[None]:
    """While the block runs, `module` takes `given` in place of its first argument."""
    hook = module.register_forward_pre_hook(lambda module, args: (given, *args[1:]))
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def _returning(module: torch.nn.Module, output: object) -> Iterator[None]:
    """While the block runs, `module` returns `output` and computes nothing."""
    own = vars(module).get("forward")           # accelerate puts one there for models on several GPUs
    module.forward = lambda *args, **kwargs: output
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own
