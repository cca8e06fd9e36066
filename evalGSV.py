"""Evaluation on GSM8K, SQL, ViGGO ("GSV") and any other scored data set by generation, of texts by their perplexity,
and on lm-eval's tasks.

Touches a transformers model, data through data_print_save.py and LoTA/prompts.py, and writes JSON files.
"""
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import zip_longest

import torch
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from data_print_save import find_measured, find_task, holds_texts, load_rows, read_messages, save_results
from LoTA import IGNORE_INDEX, UserError, processes
from LoTA.answer_loss import sum_answer_losses
from LoTA.own_rows import check_flags, folder_name
from LoTA.prompts import (
    PUBLISHED,
    PromptStyle,
    check_fit,
    encode_answer,
    encode_prompt,
    encode_text,
    prepare_tokenizer,
    render_prompt,
    template_date,
    text_windows,
)
from LoTA.scores import Score, check_labels, find_score
from LoTA.settings import MAX_NEW_TOKENS, TEXT_WINDOW, baseConfig, evalConfig, own_row_form, split_names

# What find_scorers() finds: (part of the file's name, a function (tokenizer, place, style, trust_remote_code) -> the
# function that measures a model). place: the model's folder or hub name. style: as in ask(). The first function checks
# what it can and raises UserError, so that a mistake is found before the model is loaded.
Scorer = tuple[str, Callable[..., Callable[..., dict]]]


def find_scorers(eval_args: evalConfig, base_args: baseConfig) -> dict[str, Scorer]:
    """What is measured: {data set or "lm_eval": its Scorer}. Reads the test rows and looks up lm-eval's tasks."""
    scorers, data_name = {}, eval_args.ft_dataset_name
    if data_name != "none":
        score_of(eval_args)                             # a name that does not exist is refused before rows are read
        rows = read_test_rows(eval_args, base_args)
        rows = rows.select(range(min(eval_args.limit or len(rows), len(rows))))
        texts = holds_texts(find_measured(data_name).name, rows)
        idle = next((flag for flag, value, of_texts in (("--score", eval_args.score, False),
                                                        ("--text_window", eval_args.text_window, True))
                     if value is not None and of_texts != texts), None)
        if idle:
            raise UserError(f"{idle} is without effect on {data_name}, whose rows are "
                            f"{'texts' if texts else 'no texts'}: leave it out")
        prepare = prepare_perplexity if texts else prepare_evalgsv
        scorers[data_name] = folder_name(data_name), partial(prepare, eval_args, rows)
    tasks = find_lm_eval_tasks(eval_args)
    if tasks:
        scorers["lm_eval"] = "_".join(tasks.names)[:80], lambda *_: partial(eval_lm_harness, tasks=tasks)
    return scorers


def read_test_rows(eval_args: evalConfig, base_args: baseConfig):
    """The test rows of --ft_dataset_name, a Dataset. Raises UserError where they cannot be read."""
    one, form = find_measured(eval_args.ft_dataset_name, base_args.data_dir), own_row_form(base_args)
    check_flags([one], form)
    return load_rows(one.name, "test", one.place, form)


def is_correct(pred: str, label: str, dataset_name: str) -> bool:
    """Whether the generated text `pred` answers `label`, by the score of the data set's own.

    Raises ValueError where the data set has no score.
    """
    try:
        score = find_task(dataset_name).score
    except UserError:
        score = None
    if score is None:
        raise ValueError(f"no scoring for data set '{dataset_name}'")
    return score(pred, label)


def score_of(eval_args: evalConfig) -> Score:
    """The score that --score names, else that of the data set. Raises UserError where there is no such score."""
    if eval_args.score:
        return find_score(eval_args.score)
    return partial(is_correct, dataset_name=find_measured(eval_args.ft_dataset_name).name)


def confidence_interval(correct: int, total: int, z: float = 1.96) -> tuple[float, float]:
    """The Wilson score interval of a share: (low, high). z = 1.96 makes it the 95 % interval."""
    share = correct / total
    centre = (share + z * z / (2 * total)) / (1 + z * z / total)
    half = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total)) / (1 + z * z / total)
    return max(0.0, centre - half), min(1.0, centre + half)


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids that end an answer: the tokenizer's eos token, and those of the model's generation_config.

    Chat models often end their turn with a token that is not the tokenizer's eos, and only generation_config says so.
    """
    theirs = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    theirs = theirs if isinstance(theirs, list | tuple) else [theirs]
    return list(dict.fromkeys(token for token in (tokenizer.eos_token_id, *theirs) if token is not None))


@torch.inference_mode()
def generate(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[str], batch_size: int,
             max_new_tokens: int) -> list[str]:
    """Greedy answers to rendered prompts, in the order of the prompts. Sets the tokenizer's padding side to left.

    An answer goes as far as the first of end_tokens().
    Internally batches hold prompts of similar length, and the longest come first. Several processes share out the
    batches that one would have, so their answers are the same in any dtype.
    """
    tokenizer.padding_side = "left"
    encoded, ends = [encode_prompt(tokenizer, p) for p in prompts], end_tokens(model, tokenizer)
    order = sorted(range(len(prompts)), key=lambda i: -len(encoded[i]))
    batches, answers = own_batches(order, batch_size), {}
    with tqdm(total=sum(map(len, batches)), desc="generating", unit="row") as bar:
        for rows in batches:
            batch = tokenizer.pad({"input_ids": [encoded[i] for i in rows]}, return_tensors="pt").to(model.device)
            # Plain greedy decoding, whatever the model's own generation_config.json asks for.
            out = model.generate(**batch, max_new_tokens=max_new_tokens, do_sample=False, num_beams=1, temperature=None,
                                 top_p=None, top_k=None, repetition_penalty=1.0, no_repeat_ngram_size=0,
                                 use_cache=True, pad_token_id=tokenizer.pad_token_id,
                                 eos_token_id=ends if len(ends) > 1 else ends[0])
            for i, new in zip(rows, out[:, batch["input_ids"].shape[1]:].tolist(), strict=True):
                end = next((place for place, token in enumerate(new) if token in ends), len(new))
                answers[i] = tokenizer.decode(new[:end], skip_special_tokens=True).strip()
            bar.update(len(rows))
    answers = {i: answer for of_process in processes.gather(answers) for i, answer in of_process.items()}
    return [answers[i] for i in range(len(prompts))]


def own_batches(rows: list, batch_size: int) -> list[list]:
    """This process's share of the batches that `rows` are cut into, each after the other."""
    batches = [rows[start:start + batch_size] for start in range(0, len(rows), batch_size)]
    return batches[processes.rank()::processes.count()]


def answer_loss(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[str], labels: list[str],
                batch_size: int) -> float:
    """The mean cross entropy of the labels' tokens and their end token after the prompts, in nats.

    Training minimizes the same loss, on prompts and answers that are cut to their maximal lengths.
    """
    pairs = [(encode_prompt(tokenizer, prompt), encode_answer(tokenizer, label))
             for prompt, label in zip(prompts, labels, strict=True)]
    return loss_of_pairs(model, tokenizer, pairs, batch_size)


@torch.inference_mode()
def loss_of_pairs(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, pairs: list[tuple[list[int], list[int]]],
                  batch_size: int) -> float:
    """The mean cross entropy, in nats, of the second ids of each pair after the first ones. No ids are empty."""
    pairs = sorted(pairs, key=lambda pair: -len(pair[0] + pair[1]))
    losses = []                                             # (the sum over a batch, its tokens)
    for batch in own_batches(pairs, batch_size):
        width = max(len(prompt + answer) for prompt, answer in batch)
        ids = torch.full((len(batch), width), tokenizer.pad_token_id)
        targets = torch.full((len(batch), width), IGNORE_INDEX)
        for i, (prompt, answer) in enumerate(batch):        # padded on the right, where no token attends to it
            ids[i, :len(prompt + answer)] = torch.tensor(prompt + answer)
            targets[i, len(prompt):len(prompt + answer)] = torch.tensor(answer)
        loss, count = sum_answer_losses(model, targets.to(model.device), input_ids=ids.to(model.device))
        losses.append((loss.item(), count))
    # In the order in which one process would add them up.
    of_processes = processes.gather(losses)
    losses = [batch for turn in zip_longest(*of_processes) for batch in turn if batch is not None]
    return sum(loss for loss, _ in losses) / sum(count for _, count in losses)


@dataclass(frozen=True)
class Questions:
    """Test rows as rendered prompts with their labels.

    style: how the prompts are written, with what template_date() says of the date.
    room: how many new tokens fit after the longest prompt; None: not known.
    """
    prompts: list[str]
    labels: list[str]
    style: PromptStyle
    room: int | None = None


def ask(tokenizer: PreTrainedTokenizerBase, data_name: str, rows, style: PromptStyle = PUBLISHED) -> Questions:
    """The Questions of test rows. style: that of the training, where the adapter's lota_config.json records it."""
    style = replace(style, date=template_date(tokenizer, style.date))
    pairs = [read_messages(data_name, row, style.layout) for row in rows]
    return Questions([render_prompt(tokenizer, messages, style.date) for messages, _ in pairs],
                     [label for _, label in pairs], style)


def evalgsv(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, base_args: baseConfig, eval_args: evalConfig,
            subsample: int | None = None, name: str | None = None, extra: dict | None = None, rows=None,
            questions: Questions | None = None) -> dict:
    """Evaluates `model` on the test split of eval_args.ft_dataset_name. Returns the results and saves them as JSON.

    subsample: take only so many rows. name: of the JSON file. extra: more entries for it.
    rows: the test rows, where the caller has read them already. questions: the rendered rows; the others are not read
    then.
    The results are the accuracy with its 95 % interval, every prediction with its prompt and label, the layout of the
    prompts, their date where the chat template writes one, and with eval_args.answer_loss the loss of the labels.
    Without eval_args.generate they have neither accuracy nor predictions.
    """
    data_name, score = find_measured(eval_args.ft_dataset_name).name, score_of(eval_args)
    prepare_tokenizer(tokenizer)
    if questions is None:
        rows = read_test_rows(eval_args, base_args) if rows is None else rows
        questions = ask(tokenizer, data_name, rows.select(range(min(subsample or len(rows), len(rows)))))
    prompts, labels = questions.prompts, questions.labels
    model.eval()
    results = {"data_set": data_name, "rows": len(prompts)}
    if eval_args.generate:
        if eval_args.max_new_tokens is None:
            eval_args = replace(eval_args, max_new_tokens=min(MAX_NEW_TOKENS, questions.room or MAX_NEW_TOKENS))
            if eval_args.max_new_tokens < MAX_NEW_TOKENS:
                print(f"{data_name}: answers have at most {questions.room} tokens: the longest prompt leaves no more")
        predictions = generate(model, tokenizer, prompts, eval_args.eval_batch_size, eval_args.max_new_tokens)
        items = [{"prompt": prompt, "label": label, "prediction": prediction,
                  "correct": score(prediction, label)}
                 for prompt, label, prediction in zip(prompts, labels, predictions, strict=True)]
        correct = sum(item["correct"] for item in items)
        low, high = confidence_interval(correct, len(items))
        results |= {"correct": correct, "accuracy": correct / len(items), "interval_95": (low, high)}
        print(f"{data_name}: {correct} of {len(items)} correct, accuracy {correct / len(items):.2%} "
              f"(95 % interval {low:.2%} to {high:.2%})")
    results |= {**(extra or {}), "prompt_layout": questions.style.layout,
                **({"template_date": questions.style.date} if questions.style.date else {}),
                **({"predictions": items} if eval_args.generate else {})}
    if eval_args.answer_loss:
        results["loss"] = answer_loss(model, tokenizer, prompts, labels, eval_args.eval_batch_size)
        print(f"{data_name}: mean loss of the answers' tokens {results['loss']:.4f}")
    save_results(eval_args.output_path, name or folder_name(data_name), results, base_args, eval_args,
                 keep=name is not None)
    return results


def prepare_evalgsv(eval_args: evalConfig, rows, tokenizer: PreTrainedTokenizerBase, place: str,
                    style: PromptStyle = PUBLISHED, trust_remote_code: bool = False) -> Callable[..., dict]:
    """evalgsv() of these test rows, rendered. See Scorer.

    Raises UserError where a prompt with --max_new_tokens, or with its label for --answer_loss, does not fit the model,
    and where --score can count no answer to a row as right.
    """
    questions = ask(tokenizer, find_measured(eval_args.ft_dataset_name).name, rows, style)
    check_labels(eval_args.score, questions.labels)
    prompts = [encode_prompt(tokenizer, prompt) for prompt in questions.prompts]
    new_tokens = (eval_args.max_new_tokens or 1) if eval_args.generate else 0
    room = check_fit(place, tokenizer, prompts, new_tokens, trust_remote_code)
    if eval_args.answer_loss:
        answered = [ids + encode_answer(tokenizer, label) for ids, label in zip(prompts, questions.labels, strict=True)]
        check_fit(place, tokenizer, answered, trust_remote_code=trust_remote_code)
    return partial(evalgsv, questions=replace(questions, room=room))


def prepare_perplexity(eval_args: evalConfig, rows, tokenizer: PreTrainedTokenizerBase, place: str,
                       style: PromptStyle = PUBLISHED, trust_remote_code: bool = False) -> Callable[..., dict]:
    """eval_perplexity() of these texts, cut into windows. See Scorer.

    Raises UserError where --text_window is longer than the model takes, and for a token that it has no embedding for.
    """
    name = find_measured(eval_args.ft_dataset_name).name
    texts = [encode_text(tokenizer, read_messages(name, row)[1]) for row in rows]
    room = check_fit(place, tokenizer, [[tokenizer.eos_token_id]], trust_remote_code=trust_remote_code)
    longest = math.inf if room is None else room + 1
    if eval_args.text_window is not None and eval_args.text_window > longest:
        raise UserError(f"--text_window {eval_args.text_window} is too long: {place} takes {longest} tokens "
                        "(max_position_embeddings)")
    length = eval_args.text_window or min(TEXT_WINDOW, longest)
    windows = [window for ids in texts for window in text_windows(ids, length)]
    check_fit(place, tokenizer, windows, trust_remote_code=trust_remote_code)
    return partial(eval_perplexity, texts=len(texts), windows=windows, length=length)


def eval_perplexity(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: int, windows: list[list[int]],
                    length: int, base_args: baseConfig, eval_args: evalConfig, name: str,
                    extra: dict | None = None) -> dict:
    """The perplexity of texts: the exponential of the mean cross entropy of their tokens. Saves the results as JSON.

    texts: how many they are. windows: their tokens as text_windows() gives them, at most `length` a window. Every token
    but the first of a text counts once, and so does the end token. name: of the JSON file. extra: more entries for it.
    """
    model.eval()
    data_name = find_measured(eval_args.ft_dataset_name).name
    loss = loss_of_pairs(model, tokenizer, [(window[:1], window[1:]) for window in windows], eval_args.eval_batch_size)
    results = {"data_set": data_name, "rows": texts, "windows": len(windows), "window": length,
               "tokens": sum(len(window) - 1 for window in windows), "loss": loss, "perplexity": math.exp(loss),
               **(extra or {})}
    print(f"{data_name}: perplexity {results['perplexity']:.4f} of {results['tokens']} tokens in windows of {length}")
    save_results(eval_args.output_path, name, results, base_args, eval_args, keep=True)
    return results


@dataclass(frozen=True)
class LmEvalTasks:
    """lm-eval tasks that exist. manager: lm-eval's TaskManager, which takes seconds to make."""
    names: list[str]
    manager: object


def find_lm_eval_tasks(eval_args: evalConfig) -> LmEvalTasks | None:
    """The tasks in --tasks, or None. Raises UserError where lm-eval does not know a name."""
    names = split_names(eval_args.tasks)
    if not names:
        return None
    from lm_eval.tasks import TaskManager
    manager = TaskManager(include_path=eval_args.include_path)
    unknown = [name for name in names if name not in manager.all_tasks]
    if unknown:
        raise UserError(f"lm-eval knows no task named {', '.join(unknown)}; local tasks come in with --include_path")
    return LmEvalTasks(names, manager)


def eval_lm_harness(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tasks: LmEvalTasks,
                    base_args: baseConfig, eval_args: evalConfig, name: str, extra: dict | None = None) -> dict:
    """Runs lm-eval on `tasks`, prints its table, saves the scores, and returns all results. name: of the JSON file.

    Of several processes each answers its share of the requests, as lm-eval cuts them.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.utils import make_table
    class SharedOut(HFLM):
        """HFLM for a model that is in memory in several processes. HFLM would take it for one process's."""
        rank = property(lambda self: processes.rank())
        world_size = property(lambda self: processes.count())

        def all_gather(self, tensor):
            return torch.stack([value.to(tensor.device) for value in processes.gather(tensor.cpu())])

        def gather_object(self, obj, dst=0):
            values = processes.gather(obj)
            return values if self.rank == dst else None

        def barrier(self):
            processes.wait()

    seed = base_args.seed
    results = simple_evaluate(
        model=SharedOut(pretrained=model, tokenizer=tokenizer, batch_size=eval_args.eval_batch_size), tasks=tasks.names,
        num_fewshot=eval_args.num_fewshot, task_manager=tasks.manager, limit=eval_args.limit, random_seed=seed,
        numpy_random_seed=seed, torch_random_seed=seed, fewshot_random_seed=seed)
    results = processes.agree(results)          # lm-eval returns them to the first process alone
    print(make_table(results))
    if results.get("groups"):
        print(make_table(results, "groups"))
    kept = {k: results[k] for k in ("results", "groups", "versions", "n-shot", "n-samples") if k in results}
    save_results(eval_args.output_path, name, {**(extra or {}), **kept}, base_args, eval_args, keep=True)
    return results
