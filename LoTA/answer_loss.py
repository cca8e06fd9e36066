"""The loss of a causal LM, with logits for the answers' tokens alone.

Touches a transformers model through hooks on its output embeddings (the head) and on its body, the part before them.

A model forms logits for every token, and its loss then ignores those of prompts and padding. They are most of the
logits, and at a large vocabulary the logits are most of the memory. Here a hook hands the head only the hidden states
that predict an answer token. The model's own forward does everything else, because models scale or cap the logits after
their head.

Where even the answers' logits are many, they are formed in chunks. Each chunk goes through the model's own forward once
more, with the body's output put in place of the body, so that the body runs once.

Symbols: n, the answer tokens of a batch; S, its width.
"""
from collections.abc import Iterator
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
    total, count = sum_answer_losses(model, labels, **inputs)
    if torch.is_tensor(num_items_in_batch):
        return {"loss": total / num_items_in_batch.to(total.device).clamp(min=1)}
    return {"loss": total / max(1, count if num_items_in_batch is None else num_items_in_batch)}


def sum_answer_losses(model: torch.nn.Module, labels: torch.Tensor, **inputs) -> tuple[torch.Tensor, int]:
    """(the sum of the answer tokens' cross entropies, a float32 scalar; n). The arguments are as in answer_loss()."""
    inner = causal_lm(model)
    following = pad(labels, (0, 1), value=IGNORE_INDEX)[:, 1:].flatten()     # the token that each hidden state predicts
    places = (following != IGNORE_INDEX).nonzero().squeeze(1)
    count = len(places)
    if count == 0:                      # one ignored token, so that the loss has a graph and its gradients are 0
        places = places.new_zeros(1)
    targets = following[places]
    chunk = max(1, CHUNK_BYTES // (4 * inner.config.get_text_config().vocab_size))

    with _Selection(inner, labels.shape, places, chunk) as selection:
        logits = model(**inputs).logits
    if selection.rows is None:          # this model does not call its head with all hidden states
        logits = logits.flatten(0, 1).index_select(0, places.to(logits.device))
    if not selection.chunked:
        return _sum_of_losses(logits, targets), count

    def sum_of_chunk(rows: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        with _returning(selection.body, selection.body_output), _taking(selection.head, rows[None]):
            return _sum_of_losses(inner(**inputs).logits, targets)

    pieces = zip(selection.rows.split(chunk), targets.split(chunk), strict=True)
    if torch.is_grad_enabled():         # the backward forms a chunk's logits again, so that those of one are alive
        return sum(checkpoint(sum_of_chunk, *piece, use_reentrant=False) for piece in pieces), count
    return sum(sum_of_chunk(*piece) for piece in pieces), count


def causal_lm(model: torch.nn.Module) -> PreTrainedModel:
    """The transformers model itself, without what PEFT and accelerate put around it."""
    model = extract_model_from_parallel(model)
    return model.get_base_model() if isinstance(model, PeftModel) else model


def _sum_of_losses(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The sum of cross entropies in float32. logits: [..., vocabulary], one row for each of targets [n]."""
    logits = logits.reshape(len(targets), -1).float()
    return cross_entropy(logits, targets.to(logits.device), ignore_index=IGNORE_INDEX, reduction="sum")


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
