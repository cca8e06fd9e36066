"""Knowledge distillation: an adapter learns from the 16-bit model's distributions beside the reference answers.

Touches transformers models through LoTA.answer_loss, and loads the 16-bit model, the teacher. The teacher is no part of
the model that is trained, and no gradient reaches it.

    loss = (1 - w) * CE + w * KL        each is a mean over its own tokens
    KL   = sum over the vocabulary of p_T * (log p_T - log p_S)         p_T: the teacher's; p_S: the trained model's

The gradient of both terms by the logits is p_S - [(1 - w) * onehot(label) + w * p_T], where a token has both. So up to
w = 0.5 the label is the most probable token of what the model is drawn to, whatever the teacher says.
"""
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import xxhash
from torch.nn.functional import kl_div, log_softmax, nll_loss
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from LoTA import IGNORE_INDEX, UserError
from LoTA.adapter import load_16bit
from LoTA.answer_loss import mean_loss, next_tokens, sum_over_tokens
from LoTA.folders import reading
from LoTA.settings import baseConfig, trainingConfig

SAMPLE = 4096       # entries of a tensor that the fingerprint of a teacher reads at most


@dataclass(frozen=True)
class Distillation:
    """The teacher, and how it takes part in the loss.

    teacher: frozen, in evaluation mode, with the logits' width of the trained model. weight: w, in [0, 1].
    tokens: "answers" compares the distributions where an answer's token is predicted, "all" where any token is
    predicted that is not padding.
    """
    teacher: PreTrainedModel
    weight: float
    tokens: Literal["answers", "all"]

    def selected(self, labels: torch.Tensor, attention_mask: torch.Tensor | None = None,
                 position_ids: torch.Tensor | None = None, **inputs) -> torch.Tensor:
        """Whose distributions are compared: bool [batch, S].

        labels: [batch, S], the input's tokens, or IGNORE_INDEX. attention_mask: [batch, S], 0 for padding; None: there
        is none. position_ids: [batch, S], where rows share a sequence (LoTA/sequences.py); the positions of a row count
        on, so the last token of a row and the padding predict nothing. The other inputs have no effect.
        """
        if self.tokens == "answers":
            return next_tokens(labels) != IGNORE_INDEX
        there = torch.ones_like(labels, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
        predicts = there & (next_tokens(torch.where(there, 1, IGNORE_INDEX)) != IGNORE_INDEX)
        return predicts if position_ids is None else predicts & (next_tokens(position_ids) == position_ids + 1)

    def count(self, batches: Iterable[dict]) -> torch.Tensor | int:
        """How many tokens of these batches are compared."""
        return sum(self.selected(**batch).sum() for batch in batches)

    def loss(self, model: torch.nn.Module, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None = None,
             num_distilled: torch.Tensor | int | None = None, **inputs) -> dict[str, torch.Tensor]:
        """{"loss": (1 - w) * CE + w * KL}, a float32 scalar with a graph through `model`. No model forms other logits.

        model, labels and num_items_in_batch: as in answer_loss(). num_distilled: what the sum of the KL is divided by;
        None: the number of compared tokens in this batch. A mean over no token is 0.
        """
        targets, distilled = next_tokens(labels), self.selected(labels, **inputs)
        answers = targets != IGNORE_INDEX
        cross_entropy, divergence = sum_over_tokens(_sums, [model, self.teacher], answers | distilled,
                                                    [targets, distilled], inputs)
        return {"loss": (1 - self.weight) * mean_loss(cross_entropy, answers, num_items_in_batch)
                + self.weight * mean_loss(divergence, distilled, num_distilled)}

    def fingerprint(self) -> str:
        """xxh3-128 over the names, shapes and SAMPLE entries of all of the teacher's parameters, evenly spaced.

        It tells models apart. It does not notice every changed entry, as a checksum of the files would.
        """
        digest = xxhash.xxh3_128()
        for name, parameter in sorted(self.teacher.named_parameters()):
            entries = parameter.detach().flatten()
            entries = entries[::-(-len(entries) // SAMPLE) or 1].float().cpu()
            digest.update(f"{name} {list(parameter.shape)}".encode())
            digest.update(entries.contiguous().numpy().tobytes())
        return digest.hexdigest()


def _sums(targets: torch.Tensor, distilled: torch.Tensor, student: torch.Tensor,
          teacher: torch.Tensor) -> torch.Tensor:
    """[2]: the sums of the cross entropies of targets [m] and of the divergences where distilled [m] is True.

    student, teacher: float32 logits [m, vocabulary].
    """
    device = student.device
    student, teacher = log_softmax(student, -1), log_softmax(teacher.detach().to(device), -1)
    divergences = kl_div(student, teacher, reduction="none", log_target=True).sum(-1)
    return torch.stack([nll_loss(student, targets.to(device), ignore_index=IGNORE_INDEX, reduction="sum"),
                        divergences.masked_fill(~distilled.to(device), 0).sum()])


def load_distillation(base: baseConfig, training: trainingConfig,
                      tokenizer: PreTrainedTokenizerBase) -> Distillation | None:
    """The Distillation that completed settings ask for, or None where they ask for none. It loads the teacher.

    tokenizer: the one that the rows are written with. Raises UserError where the teacher has another vocabulary.
    """
    if training.distill == "none":
        return None
    name = training.distill_model
    check_vocabulary(name, base.quantized_model_dir, tokenizer, base.trust_remote_code)
    teacher = load_16bit(name, base.device_map, getattr(torch, base.dtype), base.flash_attn, base.trust_remote_code)
    teacher.config.use_cache = False            # a cache would keep the keys and values of every token
    print(f"--distill {training.distill}: the teacher is {name}, in {base.dtype}")
    return Distillation(teacher.requires_grad_(False).eval(), training.distill_weight, training.distill)


def check_vocabulary(teacher: str, gptq: str | Path, tokenizer: PreTrainedTokenizerBase,
                     trust_remote_code: bool = False) -> None:
    """Raises UserError unless the logits of both models have the same width, and the same tokens for the same ids.

    teacher: a folder or a hub name. A folder without a tokenizer is compared by the width alone. gptq: the GPTQ folder.
    tokenizer: the one that the rows are written with. Ids that only one tokenizer knows are not compared.
    """
    configs = {}
    for place in (teacher, str(gptq)):
        with reading(place, "config.json"):
            configs[place] = AutoConfig.from_pretrained(place, trust_remote_code=trust_remote_code)
    if getattr(configs[teacher], "quantization_config", None):
        raise UserError(f"--distill_model {teacher} is quantized: name the 16-bit model")
    widths = [config.get_text_config().vocab_size for config in configs.values()]
    if len(set(widths)) > 1:
        raise UserError(f"--distill_model {teacher} has {widths[0]} logits for a token, and {gptq} has {widths[1]}: "
                        "take a teacher with the vocabulary of the GPTQ model")
    if Path(teacher).is_dir() and not (Path(teacher) / "tokenizer_config.json").exists():
        return
    with reading(teacher, "tokenizer_config.json"):
        theirs = AutoTokenizer.from_pretrained(teacher, trust_remote_code=trust_remote_code).get_vocab()
    own = {number: token for token, number in tokenizer.get_vocab().items()}
    other = min((number for token, number in theirs.items() if own.get(number, token) != token), default=None)
    if other is not None:
        token = next(token for token, number in theirs.items() if number == other)
        raise UserError(f"--distill_model {teacher} has another tokenizer than {gptq}: its token {other} is {token!r}, "
                        f"not {own[other]!r}; take a teacher with the vocabulary of the GPTQ model")
