"""The loss with logits for answers alone, against the models' own loss: in one piece, in chunks, and in a Trainer."""
import copy
from unittest.mock import patch

import pytest
import torch
from accelerate import dispatch_model
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten
from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainingArguments, set_seed

from LoTA import answer_loss as module
from LoTA.adapter_folder import LotaConfig
from LoTA.answer_loss import answer_loss, causal_lm, has_plain_loss, sum_answer_losses
from LoTA.trainer import RunTrainer

VOCABULARY, BATCH, WIDTH = 211, 3, 12
SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
         "num_key_value_heads": 2, "head_dim": 16}
# Logits are used as they are, capped, multiplied and divided. GPT-2's head is tied, and OPT calls its inner decoder.
FAMILIES = {
    "llama": SMALL,
    "gemma2": {**SMALL, "final_logit_softcapping": 2.0},
    "cohere": {**SMALL, "logit_scale": 0.3},
    "granite": {**SMALL, "logits_scaling": 0.2},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2, "tie_word_embeddings": True},
    "opt": {"hidden_size": 32, "word_embed_proj_dim": 16, "ffn_dim": 48, "num_hidden_layers": 2,
            "num_attention_heads": 2, "do_layer_norm_before": True}}


def make(family, **more):
    """A tiny model with random weights, without dropout, in training mode."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, vocab_size=VOCABULARY, use_cache=False, pad_token_id=0, bos_token_id=1,
                                  eos_token_id=2, **{**FAMILIES.get(family, SMALL), **more})
    for name in ("attn_pdrop", "embd_pdrop", "resid_pdrop", "dropout"):
        if hasattr(config, name):
            setattr(config, name, 0.0)
    model = AutoModelForCausalLM.from_config(config)
    head = model.get_output_embeddings()
    torch.nn.init.normal_(head.weight, std=1.0)         # so large that a softcap bends the logits
    return model.train()


def batch(answers=((7, 11), (3, 4), (5, 12))):
    """Inputs with labels. answers: (where an answer begins, where it ends) in each row; padding follows."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCABULARY, (len(answers), WIDTH), generator=generator)
    labels, mask = torch.full_like(ids, -100), torch.ones_like(ids)
    for row, (start, end) in enumerate(answers):
        labels[row, start:end] = ids[row, start:end]
        mask[row, end:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def gradients(model, loss):
    """{parameter: its gradient} of a loss."""
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}


@pytest.fixture(params=["one piece", "chunks"])
def pieces(request, monkeypatch):
    """All answers in one piece, or in chunks of 5 tokens."""
    if request.param == "chunks":
        monkeypatch.setattr(module, "CHUNK_BYTES", 5 * 4 * VOCABULARY + 3)
    return request.param


def compare(model, inputs, expected=None, **kwargs):
    """Loss and all gradients are those of the model's own loss, to rounding."""
    own = model(**inputs, **kwargs).loss if expected is None else expected
    wanted = gradients(model, own)
    loss = answer_loss(model, **inputs, **kwargs)["loss"]
    torch.testing.assert_close(loss, own, rtol=1e-6, atol=0)
    assert loss.dtype == torch.float32
    got = gradients(model, loss)
    assert got.keys() == wanted.keys() and any(g.abs().max() > 1e-3 for g in wanted.values())
    scale = max(g.abs().max() for g in wanted.values())
    for name, gradient in wanted.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-4, atol=1e-6 * scale.item(), msg=name)


# --- against the model's own loss ---------------------------------------------------------------------------------

@pytest.mark.parametrize("items", [None, 23, torch.tensor(23.0)], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_are_the_models_own(family, items, pieces):
    compare(make(family), batch(), **({} if items is None else {"num_items_in_batch": items}))


@pytest.mark.parametrize("family", ["gemma2", "cohere", "granite"])
def test_the_changes_after_the_head_matter_here(family):
    """So the test above would see a model whose logits are left as its head returns them."""
    model, inputs = make(family), batch()
    plain = {"gemma2": {"final_logit_softcapping": None}, "cohere": {"logit_scale": 1.0},
             "granite": {"logits_scaling": 1.0}}
    other = make(family, **plain[family])
    other.load_state_dict(model.state_dict())
    assert abs(model(**inputs).loss - other(**inputs).loss) > 0.1


@pytest.mark.parametrize("checkpointing", [False, True])
def test_with_an_adapter_on_every_layer_and_the_head(checkpointing, pieces):
    """PEFT's own wrapper, gradient checkpointing in the body, and a head that is trained."""
    model = make("llama")
    model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "down_proj", "lm_head"],
                                             init_lora_weights=False, task_type="CAUSAL_LM"))
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    compare(model.train(), batch())


def test_a_saved_copy_of_the_head(pieces):
    """PEFT's modules_to_save puts another wrapper around the head."""
    compare(get_peft_model(make("llama"), LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"],
                                                     task_type="CAUSAL_LM")), batch())


def test_dropout_on_the_head_is_the_same_in_the_backward(monkeypatch):
    """A chunk's logits are formed twice. With another mask the second time, the gradient would be another loss's."""
    monkeypatch.setattr(module, "CHUNK_BYTES", 5 * 4 * VOCABULARY)
    model = get_peft_model(make("llama").double(), LoraConfig(
        r=2, target_modules=["lm_head"], lora_dropout=0.3, init_lora_weights=False, task_type="CAUSAL_LM"))
    A = model.get_output_embeddings().lora_A.default.weight

    def loss():
        torch.manual_seed(3)
        return sum_answer_losses(model, **batch())[0]
    gradient, step = gradients(model, loss())["base_model.model.lm_head.lora_A.default.weight"], 1e-2
    direction = gradient / gradient.norm()
    with torch.no_grad():
        A.add_(step * direction)
        above = loss()
        A.sub_(2 * step * direction)
        below = loss()
    assert (above - below).item() / (2 * step) == pytest.approx(gradient.norm().item(), rel=2e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_cross_entropy_is_float32(dtype, pieces):
    """Of low precision logits, as transformers' own. The sum of chunks in 16 bits would be off by a percent."""
    model, inputs = make("llama").to(dtype), batch()
    own, loss = model(**inputs).loss, answer_loss(model, **inputs)["loss"]
    assert own.dtype == loss.dtype == torch.float32
    torch.testing.assert_close(loss, own, rtol=1e-3, atol=0)


def test_under_autocast(pieces):
    model, inputs = make("llama"), batch()
    with torch.autocast("cpu", torch.bfloat16):
        own = model(**inputs).loss
        loss = answer_loss(model, **inputs)["loss"]
    torch.testing.assert_close(loss, own, rtol=1e-3, atol=0)
    wanted, got = gradients(model, own), gradients(model, loss)
    for name, gradient in wanted.items():
        assert (got[name] - gradient).norm() <= 0.02 * gradient.norm(), name


def test_no_answer_is_a_zero_loss_with_a_graph(pieces):
    """Also where no batch of the step has one. transformers' own loss is not a number then."""
    model, inputs = make("llama"), batch(((4, 4), (0, 1), (9, 9)))       # a first token is nobody's next one
    assert (inputs["labels"] != -100).sum() == 1
    for items in (None, 0, torch.tensor(0.0), 7):
        loss = answer_loss(model, **inputs, num_items_in_batch=items)["loss"]
        assert loss.item() == 0
        got = gradients(model, loss)
        assert got and all((g == 0).all() for g in got.values())


def test_every_token_an_answer(pieces):
    compare(make("llama"), batch(((0, WIDTH),) * 3))


def test_evaluation_needs_no_graph(pieces):
    model = make("llama").eval()
    with torch.inference_mode():
        total, count = sum_answer_losses(model, **batch())
        assert count == 12 and total.item() / count == pytest.approx(model(**batch()).loss.item(), rel=1e-6)


def test_a_model_with_accelerates_hooks(pieces):
    """A model on several GPUs has them. They give its body and its head a forward of their own, which stays theirs."""
    model = make("gemma2")
    wanted = model(**batch()).loss
    model = dispatch_model(model, {"model": "cpu", "lm_head": "cpu"}, force_hooks=True)
    own = vars(model.model)["forward"]
    compare(model, batch(), expected=wanted)
    assert vars(model.model)["forward"] is own


# --- models of another build --------------------------------------------------------------------------------------

def test_a_head_that_is_no_module(pieces):
    """Its logits are formed as ever, and the answers are taken from them."""
    model = make("llama")
    own_head = model.lm_head
    with patch.object(type(model), "get_output_embeddings", lambda self: None):
        compare(model, batch())
    model.lm_head = torch.nn.Module()
    model.lm_head.forward = lambda x: x @ own_head.weight.T
    compare(model, batch(), expected=model(**batch()).loss)


def test_a_body_that_is_not_found_runs_once_and_in_one_piece(monkeypatch):
    monkeypatch.setattr(module, "CHUNK_BYTES", 5 * 4 * VOCABULARY)
    model = make("llama")
    with patch.object(type(model), "base_model", model), patch.object(type(model), "get_decoder", lambda self: self):
        compare(model, batch())


def test_what_a_model_is_left_with(monkeypatch):
    """No hook stays, an own forward of the body stays, and a failure changes nothing either."""
    monkeypatch.setattr(module, "CHUNK_BYTES", 5 * 4 * VOCABULARY)
    model = make("llama")
    whole = model(**batch()).logits

    def same():
        assert not model.lm_head._forward_pre_hooks and not model.model._forward_hooks
        assert torch.equal(model(**batch()).logits, whole)
    answer_loss(model, **batch())["loss"].backward()
    assert "forward" not in vars(model.model)
    same()
    model.model.forward = own = model.model.forward
    answer_loss(model, **batch())["loss"].backward()
    assert vars(model.model)["forward"] is own
    same()
    for place in ("first", "chunk"):
        hook = model.lm_head.register_forward_hook(
            lambda head, args, out, place=place: 1 / 0 if (out.shape[1] == 1) == (place == "first") else None)
        with pytest.raises(ZeroDivisionError):
            answer_loss(model, **batch())
        hook.remove()
        assert vars(model.model)["forward"] is own
        same()


def test_a_loss_with_further_terms_stays_the_models_own():
    """A router's balance is part of the loss only where the config asks for it."""
    experts = {"num_local_experts": 2, "num_experts_per_tok": 1}
    assert has_plain_loss(make("mixtral", **experts))
    assert not has_plain_loss(make("mixtral", **experts, output_router_logits=True))
    assert all(has_plain_loss(make(family)) for family in FAMILIES)
    other = make("llama")
    other.loss_function = lambda *args, **kwargs: torch.tensor(0.0)
    assert not has_plain_loss(other)


def test_experts(pieces):
    compare(make("mixtral", num_local_experts=2, num_experts_per_tok=1), batch())


# --- what is formed -----------------------------------------------------------------------------------------------

class Sizes(TorchDispatchMode):
    """Records how many rows of logits the largest tensor has that an operation returns; a row is VOCABULARY long."""

    def __init__(self):
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_flatten(out)[0]:
            # A product takes the head's own weight transposed, [hidden, VOCABULARY].
            if isinstance(tensor, torch.Tensor) and tensor.shape[-1:] == (VOCABULARY,) and len(tensor) != 32:
                self.largest = max(self.largest, tensor.numel() // VOCABULARY)
        return out


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
@pytest.mark.parametrize("grad", [True, False], ids=["training", "evaluation"])
def test_no_tensor_holds_more_logits_than_a_chunk(family, grad, monkeypatch):
    """In the forward and the backward. The body runs once, and the head sees at most a chunk."""
    monkeypatch.setattr(module, "CHUNK_BYTES", 5 * 4 * VOCABULARY)
    model, inputs = make(family), batch()
    model.requires_grad_(False)         # as in training, where only adapters have gradients
    next(p for p in model.base_model.parameters() if p.shape != (VOCABULARY, 32)).requires_grad_()
    seen, runs = [], []
    model.get_output_embeddings().register_forward_hook(lambda head, args, out: seen.append(out.shape[:-1].numel()))
    layer = next(m for name, m in model.named_modules() if name.endswith(("layers.0", "h.0")))
    layer.register_forward_hook(lambda layer, args, out: runs.append(1))
    with Sizes() as sizes, torch.set_grad_enabled(grad):
        loss = answer_loss(model, **inputs)["loss"]
        if grad:
            loss.backward()
    assert sizes.largest == 5 and len(runs) == 1
    assert seen == ([1, 5, 5, 2] + ([2, 5, 5] if grad else []))
    with Sizes() as sizes:
        model(**inputs).loss.backward()
    assert sizes.largest >= BATCH * WIDTH                # the recorder sees whole logits where they are formed


def test_one_piece_forms_the_answers_alone():
    model, inputs, seen = make("llama"), batch(), []
    model.lm_head.register_forward_hook(lambda head, args, out: seen.append(out.shape[:-1].numel()))
    answer_loss(model, **inputs)["loss"].backward()
    assert seen == [4 + 1 + 7]


def test_a_chunk_has_at_least_one_token(monkeypatch):
    monkeypatch.setattr(module, "CHUNK_BYTES", 1)
    compare(make("llama"), batch())


# --- in a Trainer -------------------------------------------------------------------------------------------------

def rows():
    """24 rows with prompts and answers of different lengths. Two have no answer."""
    generator = torch.Generator().manual_seed(2)
    made = []
    for i in range(24):
        prompt, answer = 3 + i % 7, (0 if i % 11 == 5 else 1 + i % 5)
        ids = torch.randint(3, VOCABULARY, (prompt + answer,), generator=generator).tolist()
        made.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]})
    return Dataset.from_list(made)


def collate(batch):
    width = max(len(row["input_ids"]) for row in batch)
    ids, labels = (torch.tensor([row[name] + [fill] * (width - len(row[name])) for row in batch])
                   for name, fill in (("input_ids", 0), ("labels", -100)))
    return {"input_ids": ids, "labels": labels, "attention_mask": (ids != 0).long()}


def run(folder, kind, model, **arguments):
    """(every logged loss, the trained parameters) of five steps."""
    set_seed(3)
    arguments = TrainingArguments(output_dir=str(folder), per_device_train_batch_size=4, max_steps=5, logging_steps=1,
                                  learning_rate=1e-2, save_strategy="no", report_to="none", use_cpu=True, seed=3,
                                  dataloader_pin_memory=False, disable_tqdm=True, **arguments)
    config = {"config": LotaConfig(method="LoRA", residual=False)} if (
        kind is RunTrainer) else {}
    trainer = kind(model=model, args=arguments, train_dataset=rows(), data_collator=collate, **config)
    trainer.get_train_dataloader = lambda: torch.utils.data.DataLoader(rows(), 4, collate_fn=collate)
    trainer.train()
    return ([row["loss"] for row in trainer.state.log_history if "loss" in row],
            {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad})


@pytest.mark.parametrize("accepts", [True, False], ids=["tokens", "means"])
@pytest.mark.parametrize("accumulation", [1, 3])
def test_a_run_has_the_losses_of_a_plain_trainer(tmp_path, accumulation, accepts, pieces):
    """Also where the model takes no number of items, so that each batch has its own mean."""
    model = get_peft_model(make("llama"), LoraConfig(r=4, target_modules=["q_proj", "down_proj"],
                                                     init_lora_weights=False, task_type="CAUSAL_LM"))
    causal_lm(model).accepts_loss_kwargs = accepts
    losses, weights = run(tmp_path, Trainer, copy.deepcopy(model), gradient_accumulation_steps=accumulation)
    seen = []
    causal_lm(model).lm_head.register_forward_hook(lambda head, args, out: seen.append(out.shape[:-1].numel()))
    own_losses, own_weights = run(tmp_path, RunTrainer, model, gradient_accumulation_steps=accumulation)
    assert max(seen) <= (5 if pieces == "chunks" else 4 * 5)        # no row has more than 5 answer tokens
    assert len(losses) == 5 and own_losses == pytest.approx(losses, rel=2e-4)
    for name, weight in weights.items():
        torch.testing.assert_close(own_weights[name], weight, rtol=1e-3, atol=2e-4, msg=name)


def test_a_trainer_keeps_a_loss_with_further_terms(tmp_path, monkeypatch):
    """The model's forward gets the labels then."""
    model = make("mixtral", num_local_experts=2, num_experts_per_tok=1, output_router_logits=True)
    monkeypatch.setattr("LoTA.trainer.answer_loss", None)
    losses = [run(tmp_path, kind, copy.deepcopy(model))[0] for kind in (Trainer, RunTrainer)]
    assert losses[0] == losses[1]
