"""Rows that share a sequence: losses and gradients as unpacked, how rows are shared out, which models are refused."""
import copy
import inspect
import json
import random
from types import SimpleNamespace

import pytest
import torch
import transformers.modeling_flash_attention_utils as flash
from conftest import parse
from peft import LoraConfig, get_peft_model
from test_answer_loss import VOCABULARY, causal_lm, collate, gradients, make, rows
from test_distill import make_teacher
from test_resume import METHODS
from test_resume import train as train_old
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, TrainingArguments, set_seed

from LoTA import UserError, answer_loss, sequences
from LoTA.adapter_folder import LotaConfig
from LoTA.distill import Distillation
from LoTA.sequences import PackingCollator, check_packing, fill, join, make_collator, share_out, work
from LoTA.trainer import RunTrainer

# Rotary and learned positions, biases, norms of queries and keys, capped logits, windows shorter than a row, experts.
MODELS = {
    "llama": ("llama", {}), "qwen2": ("qwen2", {}), "qwen3": ("qwen3", {}), "gpt2": ("gpt2", {}),
    "gemma2": ("gemma2", {"sliding_window": 4}), "mistral": ("mistral", {"sliding_window": 4}),
    "mixtral": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2})}
CASES = [(name, attention) for name in MODELS for attention in ("eager", "sdpa") if (name, attention) != (
    "gemma2", "sdpa")]                                          # transformers offers Gemma 2 no sdpa
# What rounding may change. The test of what leaks would show tells how far above it a mistake is.
LOSS, GRADIENT = 1e-6, 2e-6
LENGTHS = (14, 5, 9, 1, 12, 3)
TEXT = {"every token": 0, "answers": None}


def build(name, attention="eager"):
    """A model of MODELS with this attention, in training mode."""
    family, more = MODELS[name]
    model = make(family, **more)
    model.set_attn_implementation(attention)
    return model


def examples(lengths=LENGTHS, prompt=None):
    """Rows of random tokens. prompt: how many tokens have no label; None: about half of a row, all of a short one."""
    generator, made = torch.Generator().manual_seed(4), []
    for length in lengths:
        ids = torch.randint(3, VOCABULARY, (length,), generator=generator).tolist()
        start = (length + 1) // 2 if prompt is None else prompt
        made.append({"input_ids": ids, "labels": [-100] * start + ids[start:]})
    return made


def packings(made):
    """{how: the rows as a batch}: all in one sequence, and as the collator shares them out into several."""
    groups = share_out([len(row["input_ids"]) for row in made], 1)
    assert 1 < len(groups) < len(made)
    return {"one": PackingCollator(0, 32, one_sequence=True)(made), "some": PackingCollator(0, 1)(made)}


def compare(model, loss, made):
    """Loss and gradients of packed rows are those of padded ones. loss: a function (model, batch) -> its scalar."""
    padded = loss(model, collate(made))
    wanted = gradients(model, padded)
    scale = max(g.abs().max().item() for g in wanted.values())
    assert padded.item() > 0.5 and scale > 1e-3
    for how, batch in packings(made).items():
        packed = loss(model, batch)
        assert packed.item() == pytest.approx(padded.item(), rel=LOSS), how
        got = gradients(model, packed)
        assert got.keys() == wanted.keys()
        for name, gradient in wanted.items():
            torch.testing.assert_close(got[name], gradient, rtol=0, atol=GRADIENT * scale, msg=f"{how} {name}")


def of_answers(model, batch):
    return answer_loss.answer_loss(model, **batch)["loss"]


@pytest.fixture(params=["one piece", "chunks"])
def pieces(request, monkeypatch):
    if request.param == "chunks":
        monkeypatch.setattr(answer_loss, "CHUNK_BYTES", 2 * 5 * 4 * VOCABULARY + 3)


# --- the same losses and gradients --------------------------------------------------------------------------------

@pytest.mark.parametrize("prompt", TEXT.values(), ids=TEXT)
@pytest.mark.parametrize("name, attention", CASES)
def test_the_loss_of_the_answers(name, attention, prompt, pieces):
    """float32. Plain text has a label at every token, and no token of a row is the target of the row before."""
    compare(build(name, attention), of_answers, examples(prompt=prompt))


@pytest.mark.parametrize("name, attention", CASES)
def test_the_models_own_loss(name, attention):
    """So a model whose loss goes another way than LoTA's has it too."""
    compare(build(name, attention), lambda model, batch: model(**batch).loss, examples(prompt=0))


@pytest.mark.parametrize("tokens", ["answers", "all"])
@pytest.mark.parametrize("prompt", TEXT.values(), ids=TEXT)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_distillation(tokens, prompt, attention, pieces):
    """No distribution is compared where a row ends, nor in the padding."""
    teacher = make_teacher()
    teacher.set_attn_implementation(attention)
    distillation, made = Distillation(teacher, 0.3, tokens), examples(prompt=prompt)
    compare(build("llama", attention), lambda model, batch: distillation.loss(model, **batch)["loss"], made)
    counts = {int(distillation.count([batch])) for batch in (collate(made), *packings(made).values())}
    everywhere = sum(length - 1 for length in LENGTHS)
    assert counts == {everywhere if tokens == "all" or prompt == 0 else sum(
        sum(label != -100 for label in row["labels"][1:]) for row in made)}


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_gradient_checkpointing_and_an_adapter(attention, pieces):
    model = get_peft_model(build("llama", attention), LoraConfig(
        r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False, task_type="CAUSAL_LM"))
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    compare(model.train(), of_answers, examples())


@pytest.mark.parametrize("name, attention", CASES)
def test_what_a_mistake_would_change(name, attention):
    """The tests above see rows that see each other, and labels across the border of rows: both are far off."""
    model, made = build(name, attention), examples(prompt=0)
    wanted, batch = of_answers(model, collate(made)).item(), packings(made)["one"]
    end = sum(LENGTHS)
    mixed = {**batch, "position_ids": torch.arange(batch["input_ids"].shape[1])[None]}
    shifted = {**batch, "labels": torch.cat([batch["input_ids"][:, :end], batch["labels"][:, end:]], 1)}
    for wrong in (mixed, shifted):
        assert abs(of_answers(model, wrong).item() - wanted) > 100 * LOSS * wanted


def varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None,
           causal=False):
    """What flash_attn_varlen_func computes, row by row. Tensors are [tokens, heads, width of a head]."""
    borders = cu_seqlens_q.tolist()
    varlen.borders.append(borders)
    assert causal and borders == cu_seqlens_k.tolist() and borders[-1] == len(q)
    return torch.cat([flash_whole(q[None, a:b], k[None, a:b], v[None, a:b], softmax_scale=softmax_scale)[0]
                      for a, b in zip(borders, borders[1:], strict=False)])


def flash_whole(q, k, v, dropout_p=0.0, softmax_scale=None, causal=True):
    """What flash_attn_func computes. Tensors are [batch, tokens, heads, width of a head]."""
    q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
    return scaled_dot_product_attention(q, k, v, is_causal=causal, scale=softmax_scale,
                                        enable_gqa=True).transpose(1, 2)


@pytest.fixture
def flash_model(monkeypatch):
    """A Llama that takes transformers' own path to flash attention, whose kernels are torch's here."""
    for name, value in {"_loaded_implementation": "flash_attention_2", "_flash_fn": flash_whole,
                        "_flash_varlen_fn": varlen, "_flash_with_kvcache_fn": None, "_pad_fn": flash._pad_input,
                        "_unpad_fn": flash._unpad_input, "_process_with_kvcache_kwargs_fn": dict,
                        "_process_flash_kwargs_fn": flash._lazy_define_process_function(varlen)}.items():
        monkeypatch.setattr(flash, name, value)
    monkeypatch.setattr(varlen, "borders", [], raising=False)
    model = build("llama", "sdpa")
    model.config._attn_implementation = "flash_attention_2"
    return model


def test_flash_attention_gets_the_borders_of_rows(flash_model):
    """In one sequence, which is the only form in which it looks for them. Each token of the padding is a row."""
    check_packing(flash_model)
    collator, made = make_collator(True, SimpleNamespace(pad_token_id=0), flash_model), examples()
    assert collator.one_sequence
    batch = collator(made)
    varlen.borders.clear()
    loss = of_answers(flash_model, batch)
    assert varlen.borders == [[0, 14, 19, 28, 29, 41, 44, 45, 46, 47, 48]] * 2
    got = gradients(flash_model, loss)
    flash_model.config._attn_implementation = "sdpa"
    padded = of_answers(flash_model, collate(made))
    assert loss.item() == pytest.approx(padded.item(), rel=LOSS)
    wanted = gradients(flash_model, padded)
    scale = max(g.abs().max().item() for g in wanted.values())
    for name, gradient in wanted.items():
        torch.testing.assert_close(got[name], gradient, rtol=0, atol=GRADIENT * scale, msg=name)


def test_one_sequence_where_a_model_skips_what_is_masked():
    model = build("llama", "sdpa")
    for name, one in {"sdpa": False, "eager": False, "flash_attention_2": True, "flash_attention_3": True,
                      "kernels-community/flash-attn2": True, "flex_attention": True}.items():
        model.config._attn_implementation = name
        assert sequences.skips_masked(model) is one


# --- the batches --------------------------------------------------------------------------------------------------

def test_a_batch_by_hand():
    made = [{"input_ids": [5, 6, 7], "labels": [5, 6, 7]}, {"input_ids": [8], "labels": [8]},
            {"input_ids": [9, 10], "labels": [-100, 10]}]
    batch = join([made[:2], made[2:]], pad=2)
    assert {name: tensor.tolist() for name, tensor in batch.items()} == {
        "input_ids": [[5, 6, 7, 8, 2, 2, 2, 2], [9, 10, 2, 2, 2, 2, 2, 2]],
        "labels": [[-100, 6, 7, -100] + [-100] * 4, [-100, 10] + [-100] * 6],
        "position_ids": [[0, 1, 2, 0, 0, 0, 0, 0], [0, 1, 0, 0, 0, 0, 0, 0]]}
    assert all(tensor.dtype == torch.int64 for tensor in batch.values())


@pytest.mark.parametrize("hidden", [1, 16, 4096])
def test_rows_are_shared_out_with_the_least_work(hidden):
    """Of all numbers of sequences, each filled as fill() does. Every row is in one sequence."""
    generator = random.Random(5)
    counts = set()
    for _ in range(40):
        lengths = [generator.randint(1, 300) for _ in range(generator.randint(1, 24))]
        groups = share_out(lengths, hidden)
        assert sorted(row for group in groups for row in group) == list(range(len(lengths)))
        assert all(groups)

        def took(groups, lengths=lengths):
            return work(len(groups), max(sum(lengths[row] for row in group) for group in groups), hidden)
        every = [took(fill(lengths, count)) for count in range(1, len(lengths) + 1)]
        assert took(groups) == min(every) <= every[-1] == work(len(lengths), max(lengths), hidden)
        counts.add(len(groups))
    assert len(counts) > (5 if hidden < 4096 else 1)


def test_the_work_by_hand():
    """Two sequences of 16 tokens, of which 11 are there: each meets 6 * 8 and 16."""
    assert work(2, 11, 8) == 2 * 16 * (48 + 16)


def test_without_packing_rows_are_padded_as_ever():
    tokenizer = SimpleNamespace(pad=None)
    collator = make_collator(False, tokenizer, None)
    assert type(collator).__name__ == "DataCollatorForSeq2Seq" and collator.pad_to_multiple_of == 8


# --- which models -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name, attention", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_these_models_keep_rows_apart(name, attention, dtype):
    model = build(name, attention).to(dtype)
    check_packing(model)
    assert model.training
    seen, leaked = sequences.borders(model.eval())
    assert seen > 1 and leaked < 0.02 * seen


STATES = {
    "mamba": {}, "bamba": {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1,
                           "mamba_expand": 2}, "lfm2": {"layer_types": ["conv", "full_attention"]}}


@pytest.mark.parametrize("family", STATES)
def test_a_model_with_a_state_is_refused(family):
    with pytest.raises(UserError, match="ForCausalLM hands on a state or a convolution from token to token: leave "
                                        "--packing out$"):
        check_packing(make(family, **STATES[family]))


def test_a_model_without_positions_is_refused():
    with pytest.raises(UserError, match="BloomForCausalLM takes none: leave --packing out$"):
        check_packing(make("bloom", n_head=2))


@pytest.mark.parametrize("family, more", [
    ("opt", {}), ("gpt_oss", {"num_local_experts": 4, "num_experts_per_tok": 2})])
def test_a_model_whose_mask_does_not_know_the_positions_is_refused(family, more):
    """Both take positions and form their mask without them."""
    model = make(family, **more)
    assert "position_ids" in inspect.signature(model.forward).parameters
    with pytest.raises(UserError, match="does not keep them apart .*: leave --packing out, or try another --flash"):
        check_packing(model)
    assert model.training


def test_a_model_with_a_cache_is_refused():
    """transformers looks for the borders of rows only where there is no cache."""
    model = make("llama")
    check_packing(model)
    model.config.use_cache = True
    with pytest.raises(UserError, match="does not keep them apart"):
        check_packing(model)


def test_an_attention_without_masks_is_refused():
    def blind(module, query, key, value, attention_mask, **kwargs):
        return scaled_dot_product_attention(query, key, value, is_causal=True).transpose(1, 2), None
    AttentionInterface.register("blind", blind)
    model = make("llama")
    model.set_attn_implementation("blind")
    with pytest.raises(UserError, match=r"does not keep them apart \(attention blind\)"):
        check_packing(model)


def test_a_loss_with_further_terms_is_refused():
    """A router's balance counts the padding, which is another one here."""
    with pytest.raises(UserError, match="loss is the cross entropy alone, and that of MixtralForCausalLM has more"):
        check_packing(make("mixtral", num_local_experts=2, num_experts_per_tok=1, output_router_logits=True))


def test_the_teacher_is_tried_too():
    tokenizer, teacher = SimpleNamespace(pad_token_id=0), make_teacher("opt")
    assert isinstance(make_collator(True, tokenizer, make("llama")), PackingCollator)
    with pytest.raises(UserError, match="OPTForCausalLM"):
        make_collator(True, tokenizer, make("llama"), Distillation(teacher, 0.5, "all"))


# --- runs ---------------------------------------------------------------------------------------------------------

def run(folder, model, collator, accumulation=1, tokens="none"):
    """(every logged loss, the trained parameters) of five steps, whose rows are those of the same batches."""
    set_seed(3)
    arguments = TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=4, max_steps=5, logging_steps=1, learning_rate=1e-2,
        save_strategy="no", report_to="none", use_cpu=True, dataloader_pin_memory=False, disable_tqdm=True,
        gradient_accumulation_steps=accumulation, train_sampling_strategy="group_by_length", data_seed=3)
    distillation = None if tokens == "none" else Distillation(make_teacher(), 0.3, tokens)
    data = rows()
    data = data.add_column("length", [len(ids) for ids in data["input_ids"]])
    trainer = RunTrainer(model=model, args=arguments, train_dataset=data, data_collator=collator,
                         config=LotaConfig(method="LoRA", residual=False), distillation=distillation)
    trainer.train()
    return ([row["loss"] for row in trainer.state.log_history if "loss" in row],
            {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad})


@pytest.mark.parametrize("tokens", ["none", "all"])
@pytest.mark.parametrize("accepts", [True, False], ids=["tokens", "means"])
@pytest.mark.parametrize("accumulation", [1, 3])
def test_a_run_has_the_losses_of_padded_rows(tmp_path, accumulation, accepts, tokens):
    """The rows of each step are the same, and so is what its sum is divided by."""
    model = get_peft_model(make("llama"), LoraConfig(r=4, target_modules=["q_proj", "down_proj"],
                                                     init_lora_weights=False, task_type="CAUSAL_LM"))
    causal_lm(model).accepts_loss_kwargs = accepts
    seen = []

    def packing(batch):
        made = PackingCollator(0, 1)(batch)
        seen.append((len(batch), *made["input_ids"].shape))
        return made
    losses, weights = run(tmp_path, copy.deepcopy(model), collate, accumulation, tokens)
    packed, packed_weights = run(tmp_path, model, packing, accumulation, tokens)
    assert any(sequences < rows for rows, sequences, _ in seen)
    assert len(losses) == 5 and len(set(losses)) == 5 and packed == pytest.approx(losses, rel=1e-4)
    for name, weight in weights.items():
        torch.testing.assert_close(packed_weights[name], weight, rtol=1e-3, atol=1e-4, msg=name)


def losses_of(folder):
    return [row["loss"] for row in json.loads((folder / "log_history.json").read_text()) if "loss" in row]


@pytest.mark.parametrize("method", ["published", "lrqat", "qalora"])
def test_mode_1_trains_alike_and_records_it(tmp_path, monkeypatch, method):
    """Also where a run goes on with packing from a checkpoint that was made without, and back."""
    widths = []
    collate_rows = PackingCollator.__call__

    def noting(self, made):
        batch = collate_rows(self, made)
        widths.append((len(made), len(batch["input_ids"])))
        return batch
    monkeypatch.setattr(PackingCollator, "__call__", noting)
    flags = (*METHODS[method], "--logging_steps", 1, "--max_steps", 6)
    plain = train_old(tmp_path / "plain", *flags)
    assert not widths
    packed = train_old(tmp_path / "packed", *flags, "--packing", True)
    assert any(sequences < rows for rows, sequences in widths)
    assert losses_of(packed) == pytest.approx(losses_of(plain), rel=1e-4)
    assert len(set(losses_of(plain))) == 6
    assert [LotaConfig.load(folder).settings["packing"] for folder in (plain, packed)] == [False, True]
    for start, flag in ((plain, True), (packed, False)):
        resumed = train_old(tmp_path / f"resumed {flag}", *flags, "--packing", flag, "--adapter_ckpt",
                            start / "checkpoint-3")
        assert losses_of(resumed) == pytest.approx(losses_of(plain), rel=1e-4)


def test_the_flag():
    assert parse()[1].packing is False and parse("--packing")[1].packing is True
    assert parse("--packing", False)[1].packing is False
