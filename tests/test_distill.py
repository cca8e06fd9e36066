"""Distillation against the plain definition in float64, of full logits: values, gradients, chunks, runs, refusals."""
import copy
import json
import math
import shutil
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from conftest import parse
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from test_answer_loss import BATCH, FAMILIES, SMALL, VOCABULARY, WIDTH, batch, causal_lm, collate, gradients, make, rows
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments, set_seed

from data_print_save import prepare_dataset
from LoTA import UserError
from LoTA import answer_loss as module
from LoTA.adapter import load_gptq
from LoTA.adapter_folder import LotaConfig
from LoTA.answer_loss import answer_loss
from LoTA.distill import Distillation, check_vocabulary, load_distillation
from LoTA.trainer import RunTrainer

WEIGHT = 0.3


def distil(model, teacher, inputs, tokens="answers", weight=WEIGHT, **numbers):
    return Distillation(teacher, weight, tokens).loss(model, **inputs, **numbers)["loss"]


def make_teacher(family="llama", **more):
    """Another random model with the same vocabulary, narrower than make()'s, frozen."""
    with torch.random.fork_rng():
        model = make(family, **more)
        torch.manual_seed(7)
        for p in model.parameters():
            p.data += 0.05 * torch.randn_like(p)
    return model.eval().requires_grad_(False)


def padded(left=False):
    """A batch whose rows have 12, 7 and 10 tokens, and answers of 5, 3 and 4. One answer is the whole row's end."""
    inputs = batch(((7, 12), (4, 7), (6, 10)))
    if left:
        for row, width in enumerate((12, 7, 10)):
            for name, tensor in inputs.items():
                inputs[name][row] = torch.cat([tensor[row, width:], tensor[row, :width]])
    return inputs


def oracle(model, teacher, inputs, tokens, weight=WEIGHT, answers=None, compared=None):
    """The loss by its definition: token by token, of the full logits of float64 copies. It has a graph.

    answers, compared: what the two sums are divided by; None: the tokens of this batch.
    """
    labels, mask = inputs["labels"].tolist(), inputs["attention_mask"].tolist()
    asked = {name: tensor for name, tensor in inputs.items() if name != "labels"}
    student, target = model(**asked).logits, teacher(**asked).logits
    cross_entropies, divergences = [], []
    for row in range(len(labels)):
        for t in range(len(labels[row]) - 1):
            q = student[row, t].exp() / student[row, t].exp().sum()
            p = target[row, t].exp() / target[row, t].exp().sum()
            is_answer = labels[row][t + 1] != -100
            if is_answer:
                cross_entropies.append(-q[labels[row][t + 1]].log())
            if is_answer if tokens == "answers" else mask[row][t] and mask[row][t + 1]:
                divergences.append((p * (p.log() - q.log())).sum())
    cross_entropy = sum(cross_entropies) / (answers or len(cross_entropies))
    return (1 - weight) * cross_entropy + weight * sum(divergences) / (compared or len(divergences))


@pytest.fixture(params=["one piece", "chunks"])
def pieces(request, monkeypatch):
    """All tokens in one piece, or in chunks of 5 tokens; a chunk has the logits of both models."""
    if request.param == "chunks":
        monkeypatch.setattr(module, "CHUNK_BYTES", 2 * 5 * 4 * VOCABULARY + 3)
    return request.param


def compare(model, teacher, inputs, tokens, expected=None, **numbers):
    """Loss and all gradients are the oracle's, to rounding."""
    wanted_model = copy.deepcopy(model).double()
    divisors = {"answers": numbers.get("num_items_in_batch"), "compared": numbers.get("num_distilled")}
    wanted = oracle(wanted_model, copy.deepcopy(teacher).double(), inputs, tokens, **divisors)
    loss = distil(model, teacher, inputs, tokens, **numbers)
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(wanted.item(), rel=1e-5)
    wanted, got = gradients(wanted_model, wanted), gradients(model, loss)
    assert got.keys() == wanted.keys()
    scale = max(g.abs().max().item() for g in wanted.values())
    assert scale > 1e-3
    for name, gradient in wanted.items():
        torch.testing.assert_close(got[name].double(), gradient, rtol=1e-3, atol=1e-5 * scale, msg=name)
    assert all(p.grad is None for p in teacher.parameters())


# --- against the definition ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("tokens", ["answers", "all"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_loss_and_gradients_are_the_oracles(family, tokens, pieces):
    """The logits are the models' own: Gemma's are capped behind the head."""
    compare(make(family), make_teacher(family), padded(), tokens)


@pytest.mark.parametrize("tokens", ["answers", "all"])
def test_padding_on_the_left(tokens, pieces):
    compare(make("llama"), make_teacher(), padded(left=True), tokens)


@pytest.mark.parametrize("tokens", ["answers", "all"])
@pytest.mark.parametrize("number", [int, torch.tensor], ids=["int", "tensor"])
def test_the_sums_are_divided_by_the_numbers_of_the_whole_step(tokens, number, pieces):
    compare(make("llama"), make_teacher(), padded(), tokens, num_items_in_batch=number(23), num_distilled=number(61))


@pytest.mark.parametrize("tokens", ["answers", "all"])
def test_a_teacher_of_another_size_and_an_adapter(tokens, pieces):
    """PEFT around the student, with gradient checkpointing, and a teacher that is wider and deeper."""
    teacher = make_teacher(hidden_size=48, num_hidden_layers=3, intermediate_size=64)
    model = get_peft_model(make("llama"), LoraConfig(r=4, target_modules=["q_proj", "down_proj", "lm_head"],
                                                     init_lora_weights=False, task_type="CAUSAL_LM"))
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    compare(model.train(), teacher, padded(), tokens)


def test_the_oracle_is_torchs_divergence():
    """And the gradient by the student's logits is p_S - [(1 - w) onehot + w p_T], over the number of tokens."""
    model, teacher, inputs = make("llama").double(), make_teacher().double(), padded()
    answers = ((7, 12), (4, 7), (6, 10))
    places = [(row, t) for row, (start, end) in enumerate(answers) for t in range(start - 1, end - 1)]
    logits, target = model(inputs["input_ids"], inputs["attention_mask"]).logits, teacher(
        inputs["input_ids"], inputs["attention_mask"]).logits
    logits.retain_grad()
    kl = sum(torch.nn.functional.kl_div(logits[p].log_softmax(-1), target[p].softmax(-1), reduction="sum")
             for p in places)
    ce = sum(-logits[row, t].log_softmax(-1)[inputs["labels"][row, t + 1]] for row, t in places)
    loss = (1 - WEIGHT) * ce / len(places) + WEIGHT * kl / len(places)
    assert loss.item() == pytest.approx(oracle(model, teacher, inputs, "answers").item(), rel=1e-12)
    loss.backward()
    row, t = places[2]
    wanted = logits[row, t].softmax(-1) - WEIGHT * target[row, t].softmax(-1)
    wanted[inputs["labels"][row, t + 1]] -= 1 - WEIGHT
    torch.testing.assert_close(logits.grad[row, t], wanted.detach() / len(places))


@pytest.mark.parametrize("tokens", ["answers", "all"])
def test_weight_zero_is_the_plain_loss(tokens):
    """With its gradients, to rounding."""
    model, inputs = make("llama"), padded()
    plain, loss = answer_loss(model, **inputs)["loss"], distil(model, make_teacher(), inputs, tokens, 0.0)
    torch.testing.assert_close(loss, plain, rtol=1e-6, atol=0)
    wanted, got = gradients(model, plain), gradients(model, loss)
    for name, gradient in wanted.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-5, atol=1e-7, msg=name)


@pytest.mark.parametrize("tokens", ["answers", "all"])
def test_a_teacher_that_is_the_student(tokens, pieces):
    """The divergence is 0, and so is its gradient."""
    model, inputs = make("llama").eval(), padded()
    teacher = copy.deepcopy(model).requires_grad_(False)
    loss = distil(model, teacher, inputs, tokens, 1.0)
    assert abs(loss.item()) < 1e-9
    half, plain = distil(model, teacher, inputs, tokens, 0.5), answer_loss(model, **inputs)["loss"]
    assert half.item() == pytest.approx(plain.item() / 2, rel=1e-6)
    wanted, got = gradients(model, plain), gradients(model, loss)
    assert all(gradient.norm() < 1e-5 * wanted[name].norm() for name, gradient in got.items())


def test_weight_one_needs_no_answer(pieces):
    """A batch without answers: with "answers" the loss is 0 with a graph, with "all" it is the divergence."""
    model, teacher, inputs = make("llama"), make_teacher(), padded()
    inputs["labels"].fill_(-100)
    for items in (None, 0, torch.tensor(0)):
        loss = distil(model, teacher, inputs, "answers", num_items_in_batch=items, num_distilled=items)
        assert loss.item() == 0 and all((g == 0).all() for g in gradients(model, loss).values())
    compared = distil(model, teacher, inputs, "all", 1.0)
    wanted = oracle(copy.deepcopy(model).double(), copy.deepcopy(teacher).double(), padded(), "all", 1.0)
    assert compared.item() == pytest.approx(wanted.item(), rel=1e-5)
    assert distil(model, teacher, inputs, "all").item() == pytest.approx(WEIGHT * wanted.item(), rel=1e-5)


def test_which_tokens_are_compared():
    """Counted by hand: rows of 12, 7 and 10 tokens predict 11, 6 and 9; their answers have 5, 3 and 4."""
    for left in (False, True):
        inputs = padded(left)
        of = {tokens: Distillation(None, 0.5, tokens) for tokens in ("answers", "all")}
        assert of["answers"].count([inputs, inputs]) == 2 * (5 + 3 + 4)
        assert of["all"].count([inputs, inputs]) == 2 * (11 + 6 + 9)
    whole = {name: tensor for name, tensor in padded().items() if name != "attention_mask"}
    assert of["all"].count([whole]) == BATCH * (WIDTH - 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_loss_of_16_bit_logits_is_float32(dtype, pieces):
    model, teacher, inputs = make("llama").to(dtype), make_teacher().to(dtype), padded()
    loss = distil(model, teacher, inputs, "all")
    wanted = oracle(copy.deepcopy(model).double(), copy.deepcopy(teacher).double(), inputs, "all")
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(wanted.item(), rel=2e-2)


# --- models of another build, and what is formed -------------------------------------------------------------------

@pytest.mark.parametrize("which", ["student", "teacher", "both"])
def test_a_head_that_is_not_found(which, pieces):
    """Its logits are formed as ever, and the tokens are taken from them. The other model still has chunks."""
    model, teacher, seen = make("llama"), make_teacher(), []
    teacher.lm_head.register_forward_hook(lambda head, args, out: seen.append(out.shape[:-1].numel()))
    hidden = {"student": [model], "teacher": [teacher], "both": [model, teacher]}[which]
    own = type(model).get_output_embeddings

    def found(self):
        return None if any(self is one for one in hidden) else own(self)
    with patch.object(type(model), "get_output_embeddings", found):
        for tokens in ("answers", "all"):
            for weight in (WEIGHT, 1.0):
                wanted = oracle(copy.deepcopy(model).double(), copy.deepcopy(teacher).double(), padded(), tokens,
                                weight)
                seen.clear()            # the oracle's copy has the hook too
                loss = distil(model, teacher, padded(), tokens, weight)
                if which == "student":
                    assert max(seen) == (5 if pieces == "chunks" else {"answers": 12, "all": 26}[tokens])
                assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)
                assert gradients(model, loss)["lm_head.weight"].abs().max() > 0


@pytest.mark.parametrize("tokens, selected", [("answers", 12), ("all", 26)])
def test_what_the_heads_take(tokens, selected, pieces):
    """Neither model forms logits of other tokens, each body runs once, and the teacher stays as it was."""
    model, teacher, inputs = make("llama"), make_teacher(), padded()
    teacher_before = copy.deepcopy(teacher.state_dict())
    seen, runs = {"student": [], "teacher": []}, []
    for name, one in (("student", model), ("teacher", teacher)):
        one.lm_head.register_forward_hook(lambda head, args, out, name=name: seen[name].append(len(out[0])))
        one.model.layers[0].register_forward_hook(lambda *args, name=name: runs.append(name))
    loss = distil(model, teacher, inputs, tokens)
    chunks = [5] * (selected // 5) + [selected % 5]
    for numbers in seen.values():
        assert numbers == ([selected] if pieces == "one piece" else [1, *chunks])
    loss.backward()
    assert sorted(runs) == ["student", "teacher"] and max(map(max, seen.values())) <= selected
    assert all(torch.equal(tensor, teacher_before[name]) for name, tensor in teacher.state_dict().items())
    assert not teacher.lm_head._forward_pre_hooks and "forward" not in vars(teacher.model)


# --- in a Trainer -------------------------------------------------------------------------------------------------

def run(folder, model, distillation, batch_size, accumulation, steps=1):
    """(logged losses, trained parameters, the trainer) of a RunTrainer that takes the first rows in their order."""
    set_seed(3)
    arguments = TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=batch_size, gradient_accumulation_steps=accumulation,
        max_steps=steps, logging_steps=1, learning_rate=1e-2, save_strategy="no", report_to="none", use_cpu=True,
        seed=3, dataloader_pin_memory=False, disable_tqdm=True)
    trainer = RunTrainer(model=model, args=arguments, train_dataset=rows(), data_collator=collate,
                         config=LotaConfig(method="LoRA", residual=False), distillation=distillation)
    trainer.get_train_dataloader = lambda: torch.utils.data.DataLoader(rows(), batch_size, collate_fn=collate)
    trainer.train()
    return ([row["loss"] for row in trainer.state.log_history if "loss" in row],
            {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}, trainer)


@pytest.fixture
def student():
    return get_peft_model(make("llama"), LoraConfig(r=4, target_modules=["q_proj", "down_proj"],
                                                    init_lora_weights=False, task_type="CAUSAL_LM"))


@pytest.mark.parametrize("tokens", ["answers", "all"])
def test_accumulated_batches_are_one_batch(tmp_path, student, tokens, pieces):
    """Three batches of 4 rows of other lengths give the loss and the step of one of 12. The loss is the oracle's."""
    teacher = make_teacher()
    wanted = oracle(copy.deepcopy(causal_lm(student)).double(), copy.deepcopy(teacher).double(),
                    collate(rows().select(range(12)).to_list()), tokens)
    results = [run(tmp_path, copy.deepcopy(student), Distillation(teacher, WEIGHT, tokens), *sizes)
               for sizes in ((12, 1), (4, 3))]
    for losses, _, _ in results:
        assert losses == pytest.approx([wanted.item()], rel=1e-4)
    for name, weight in results[0][1].items():
        torch.testing.assert_close(results[1][1][name], weight, rtol=1e-4, atol=1e-5, msg=name)
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters()) and not teacher.training


def test_where_a_model_takes_no_number_of_tokens_each_batch_has_its_means(tmp_path, student):
    causal_lm(student).accepts_loss_kwargs = False
    teacher = make_teacher()
    wanted = [oracle(copy.deepcopy(causal_lm(student)).double(), copy.deepcopy(teacher).double(),
                     collate(rows().select(range(i, i + 4)).to_list()), "all").item() for i in (0, 4, 8)]
    losses, _, _ = run(tmp_path, student, Distillation(teacher, WEIGHT, "all"), 4, 3)
    assert losses == pytest.approx([sum(wanted) / 3], rel=1e-4)


def test_the_teacher_is_no_part_of_the_model(tmp_path, student):
    teacher = make_teacher()
    _, _, trainer = run(tmp_path, student, Distillation(teacher, WEIGHT, "answers"), 4, 1, steps=2)
    assert not any(m is teacher for m in trainer.model.modules())
    assert trainer.config.training["teacher"] == Distillation(teacher, 0.1, "all").fingerprint()
    assert trainer.record().training["teacher"] == trainer.config.training["teacher"]


def test_a_loss_with_further_terms_is_refused(tmp_path):
    model = make("mixtral", num_local_experts=2, num_experts_per_tok=1, output_router_logits=True)
    with pytest.raises(UserError, match="output_router_logits"):
        run(tmp_path, model, Distillation(make_teacher(), WEIGHT, "answers"), 4, 1)


def test_the_fingerprint_of_a_teacher():
    """Of its weights and their names. Where it lies has no part in it."""
    def of(model):
        return Distillation(model, 0.5, "all").fingerprint()
    teacher = make_teacher()
    assert of(teacher) == of(copy.deepcopy(teacher)) != of(make("llama"))
    other = copy.deepcopy(teacher)
    other.model.norm.weight.data[3] += 1e-3
    assert of(other) != of(teacher)
    assert of(torch.nn.ParameterDict({"a": torch.nn.Parameter(torch.zeros(0))})) == of(
        torch.nn.ParameterDict({"a": torch.nn.Parameter(torch.ones(0))}))


# --- the whole script ---------------------------------------------------------------------------------------------

DISTIL = ("--max_steps", 4, "--distill", "answers")
METHODS = {"lota": (), "lora": ("--lota_qaf", False, "--learning_rate", 1e-2),
           "lrqat": ("--lota_qaf", False, "--method", "lrqat", "--recipe", "scales")}


@pytest.fixture(scope="module")
def distilled(train, tmp_path_factory):
    """{method: an adapter folder of four distilled steps, with checkpoints at 2 and 4}."""
    return {method: train(tmp_path_factory.mktemp(method), *flags, *DISTIL, "--save_number", 2)
            for method, flags in METHODS.items()}


def adapter_bytes(folder):
    return (folder / "adapter_model.safetensors").read_bytes()


@pytest.mark.parametrize("method", METHODS)
def test_training_with_a_teacher(distilled, train, base_model, tmp_path, method):
    """It trains something else than without. The record and the card name the teacher. Weight 0 is no teacher."""
    plain = train(tmp_path / "plain", *METHODS[method], "--max_steps", 4, "--save_strategy", "no")
    nothing = train(tmp_path / "zero", *METHODS[method], *DISTIL, "--distill_weight", 0, "--save_strategy", "no")
    assert adapter_bytes(distilled[method]) != adapter_bytes(plain)
    wanted, got = (load_file(folder / "adapter_model.safetensors") for folder in (plain, nothing))
    for name, tensor in wanted.items():
        if method != "lota":
            torch.testing.assert_close(got[name], tensor, rtol=1e-3, atol=1e-4)
        else:
            assert (got[name] != tensor).float().mean() < 1e-3
    config = LotaConfig.load(distilled[method])
    assert {name: config.settings[name] for name in ("distill", "distill_weight", "distill_model")} == {
        "distill": "answers", "distill_weight": 0.5, "distill_model": str(base_model)}
    assert len(config.training["teacher"]) == 32
    assert f"| Teacher | {base_model.name}, answers, weight 0.5 |" in (distilled[method] / "README.md").read_text()
    assert "Teacher" not in (plain / "README.md").read_text() and "teacher" not in LotaConfig.load(plain).training


@pytest.mark.parametrize("method", METHODS)
def test_resuming_with_a_teacher(distilled, train, base_model, tmp_path, method):
    """Exact, also where the teacher was moved. Another weight, other tokens and another teacher are refused."""
    checkpoint, moved = distilled[method] / "checkpoint-2", shutil.copytree(base_model, tmp_path / "moved")
    again = (*METHODS[method], *DISTIL, "--adapter_ckpt", checkpoint, "--save_strategy", "no", "--distill_model", moved)
    assert adapter_bytes(train(tmp_path / "a", *again)) == adapter_bytes(distilled[method])
    with pytest.raises(UserError, match="its --distill_weight is 0.5, not 0.25"):
        train(tmp_path / "b", *again, "--distill_weight", 0.25)
    with pytest.raises(UserError, match="its --distill is answers, not all"):
        train(tmp_path / "b", *again, "--distill", "all")
    file = moved / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"] = tensors["model.norm.weight"] * 1.5
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(UserError, match="cannot be resumed with this teacher") as error:
        train(tmp_path / "b", *again)
    assert "\n" not in str(error.value) and not (tmp_path / "b").exists()


def test_a_checkpoint_of_before_had_no_teacher(trained, train, tmp_path):
    """Its settings do not say so, and --distill would train something else."""
    checkpoint = shutil.copytree(trained / "checkpoint-4", tmp_path / "checkpoint-4")
    record = json.loads((checkpoint / "lota_config.json").read_text())
    for name in ("distill", "distill_weight", "distill_model"):
        record["settings"].pop(name)
    record["sha256"].pop("lota_config.json")
    (checkpoint / "lota_config.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match="its --distill is none, not all"):
        train(tmp_path / "a", "--distill", "all", "--adapter_ckpt", checkpoint)


@pytest.mark.parametrize("method, tokens, weight", [("lota", "all", 0.5), ("lora", "answers", 0.8),
                                                    ("qalora", "all", 1)])
def test_the_first_loss_is_the_oracles(train, gptq_2bit, base_model, demo_data, tmp_path, method, tokens, weight):
    """Of the GPTQ model and the 16-bit model: an adapter begins at 0. A step takes all 12 rows, in two batches."""
    flags = ("--lota_qaf", method == "lota", "--method", method, "--debug_number", 12, "--train_batch_size", 6,
             "--gradient_accumulation_steps", 2, "--max_steps", 1, "--logging_steps", 1, "--save_strategy", "no")
    adapter = train(tmp_path, *flags, "--distill", tokens, "--distill_weight", weight)
    first = json.loads((adapter / "log_history.json").read_text())[0]["loss"]
    tokenizer = AutoTokenizer.from_pretrained(gptq_2bit)
    data = prepare_dataset("viggo", tokenizer, debug_number=12, data_dir=str(demo_data))
    student = load_gptq(gptq_2bit, torch.float32).model
    teacher = AutoModelForCausalLM.from_pretrained(base_model, dtype=torch.float32)
    sums, counts = [0.0, 0.0], [0, 0]
    for row in data:
        ids = torch.tensor([row["input_ids"]])
        with torch.no_grad():
            q, p = (model(input_ids=ids).logits[0].double().log_softmax(-1) for model in (student, teacher))
        for t in range(ids.shape[1] - 1):
            is_answer = row["labels"][t + 1] != -100
            if is_answer:
                sums[0] -= q[t, row["labels"][t + 1]].item()
                counts[0] += 1
            if is_answer or tokens == "all":
                sums[1] += (p[t].exp() * (p[t] - q[t])).sum().item()
                counts[1] += 1
    wanted = (1 - weight) * sums[0] / counts[0] + weight * sums[1] / counts[1]
    assert math.isfinite(wanted) and first == pytest.approx(wanted, rel=2e-4)


# --- refusals -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("flags, message", [
    (("--pretrained", "none", "--distill", "answers"), "--distill answers needs the 16-bit model: name it with"),
    (("--distill_model", "somewhere"), "--distill_model somewhere teaches nothing: give --distill answers or all"),
    (("--distill", "all", "--distill_weight", 1.5), r"--distill_weight must lie in \[0, 1\], not 1.5"),
    (("--distill_weight", "nan"), r"--distill_weight must lie in \[0, 1\], not nan"),
    (("--distill", "all", "--distill_model", "./nowhere"), "--distill_model ./nowhere does not exist"),
    (("--distill", "all", "--distill_model", "{gptq}"), "is quantized: name the 16-bit model"),
    (("--distill", "all", "--distill_model", "{wide}"), "has 401 logits for a token, and .* has 400"),
    (("--distill", "all", "--distill_model", "{renamed}"), "has another tokenizer than .*: its token 398 is")])
@pytest.mark.parametrize("method", METHODS)
def test_refusals(train, gptq_2bit, base_model, tmp_path, monkeypatch, flags, message, method):
    """One line, and no model is loaded."""
    monkeypatch.setattr("LoTA.adapter.load_for_training", None)
    monkeypatch.setattr("LoTA.distill.load_16bit", None)
    wide, renamed = (shutil.copytree(base_model, tmp_path / name) for name in ("wide", "renamed"))
    config = json.loads((wide / "config.json").read_text())
    (wide / "config.json").write_text(json.dumps({**config, "vocab_size": 401}))
    tokens = json.loads((renamed / "tokenizer.json").read_text())
    vocabulary = tokens["model"]["vocab"]
    last, before = (next(token for token, number in vocabulary.items() if number == n) for n in (399, 398))
    vocabulary[last], vocabulary[before] = 398, 399
    (renamed / "tokenizer.json").write_text(json.dumps(tokens))
    places = {"gptq": gptq_2bit, "wide": wide, "renamed": renamed}
    with pytest.raises(UserError, match=message) as error:
        train(tmp_path / "a", *METHODS[method], *(str(flag).format(**places) for flag in flags))
    assert "\n" not in str(error.value) and not (tmp_path / "a").exists()


def test_a_teacher_without_a_tokenizer_is_compared_by_its_width(base_model, gptq_2bit, tmp_path):
    """And a tokenizer that knows more tokens is no other one."""
    bare = shutil.copytree(base_model, tmp_path / "bare", ignore=shutil.ignore_patterns("*token*", "*.jinja"))
    tokenizer = AutoTokenizer.from_pretrained(gptq_2bit)
    check_vocabulary(str(bare), gptq_2bit, tokenizer)
    tokenizer.add_tokens("<|one more|>")
    check_vocabulary(str(base_model), gptq_2bit, tokenizer)


def test_the_teacher_is_loaded_frozen(base_model, gptq_2bit):
    """In --dtype, in evaluation mode, without gradients and without a cache of keys and values."""
    base, training, _ = parse("--mode", 1, "--quantized_model_dir", gptq_2bit, "--distill", "all", "--distill_model",
                              base_model, "--dtype", "bfloat16", "--distill_weight", 0.25)
    tokenizer = AutoTokenizer.from_pretrained(gptq_2bit)
    made = load_distillation(base, training, tokenizer)
    assert (made.weight, made.tokens, made.teacher.dtype) == (0.25, "all", torch.bfloat16)
    assert not made.teacher.training and not any(p.requires_grad for p in made.teacher.parameters())
    assert not made.teacher.config.use_cache
    assert load_distillation(base, SimpleNamespace(distill="none"), tokenizer) is None


def test_the_helpers_of_this_file():
    """FAMILIES has the models, and a row of padded() ends with padding."""
    assert {"llama", "gemma2", "gpt2"} <= set(FAMILIES) and SMALL["hidden_size"] == 32
    assert padded()["attention_mask"].sum(1).tolist() == padded(True)["attention_mask"].sum(1).tolist() == [12, 7, 10]
    assert padded(True)["attention_mask"][1].tolist() == [0] * 5 + [1] * 7
