"""Evaluation on GSM8K, SQL and ViGGO: generate, score, save.

Touches a transformers model through `generate`, data through data_print_save, and writes one JSON file.
"""
import math
import re

import torch
from tqdm import tqdm

from data_print_save import (
    IGNORE_INDEX,
    encode_prompt,
    load_rows,
    prepare_tokenizer,
    read_messages,
    render_prompt,
    save_results,
)


def is_correct(pred, label, dataset_name):
    """Whether the generated text `pred` answers `label`.

    gsm8k: the numbers after the last "####" are equal. viggo: the function name and the sorted attributes are equal.
    sql: the strings are equal. White space around an answer never counts.
    """
    if dataset_name == "gsm8k":
        answer = _gsm8k_answer(pred)
        return answer is not None and answer == _gsm8k_answer(label)
    if dataset_name == "viggo":
        return _viggo_parts(pred) == _viggo_parts(label)
    if dataset_name == "sql":
        return pred.strip() == label.strip()
    raise ValueError(f"no scoring for data set '{dataset_name}'")


def _gsm8k_answer(text):
    """What follows the last ####, as a number where it is one; None without ####."""
    if "####" not in text:
        return None
    answer = text.rsplit("####", 1)[1].strip().split("\n")[0]
    answer = answer.replace(",", "").replace("$", "").rstrip(".").strip()
    try:
        return float(answer)
    except ValueError:
        return answer


def _viggo_parts(text):
    """(function, sorted attributes). Commas inside a value's brackets do not separate attributes."""
    function, _, rest = text.strip().partition("(")
    attributes = re.split(r",\s*(?![^\[]*\])", rest.strip().removesuffix(")"))
    return function.strip(), sorted(a.strip() for a in attributes)


def confidence_interval(correct, total, z=1.96):
    """The 95 % Wilson score interval of a share: (low, high)."""
    share = correct / total
    centre = (share + z * z / (2 * total)) / (1 + z * z / total)
    half = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total)) / (1 + z * z / total)
    return max(0.0, centre - half), min(1.0, centre + half)


@torch.inference_mode()
def generate(model, tokenizer, prompts, batch_size, max_new_tokens):
    """Greedy answers to rendered prompts, in their order. Batches of similar length, longest first."""
    tokenizer.padding_side = "left"
    encoded = [encode_prompt(tokenizer, p) for p in prompts]
    order = sorted(range(len(prompts)), key=lambda i: -len(encoded[i]))
    answers = [None] * len(prompts)
    with tqdm(total=len(prompts), desc="generating", unit="row") as bar:
        for start in range(0, len(order), batch_size):
            rows = order[start:start + batch_size]
            batch = tokenizer.pad({"input_ids": [encoded[i] for i in rows]}, return_tensors="pt").to(model.device)
            # Plain greedy decoding, whatever the model's own generation_config.json asks for.
            out = model.generate(**batch, max_new_tokens=max_new_tokens, do_sample=False, num_beams=1, temperature=None,
                                 top_p=None, top_k=None, repetition_penalty=1.0, no_repeat_ngram_size=0,
                                 use_cache=True, pad_token_id=tokenizer.pad_token_id,
                                 eos_token_id=tokenizer.eos_token_id)
            new = tokenizer.batch_decode(out[:, batch["input_ids"].shape[1]:], skip_special_tokens=True)
            for i, text in zip(rows, new, strict=True):
                answers[i] = text.strip()
            bar.update(len(rows))
    return answers


@torch.inference_mode()
def answer_loss(model, tokenizer, prompts, labels, batch_size):
    """Mean cross entropy of the labels' tokens and the end token after rendered prompts, in nats: what training
    minimizes."""
    items = sorted(((encode_prompt(tokenizer, prompt),
                     tokenizer(label + tokenizer.eos_token, add_special_tokens=False)["input_ids"])
                    for prompt, label in zip(prompts, labels, strict=True)), key=lambda item: -len(item[0] + item[1]))
    total = tokens = 0
    for start in range(0, len(items), batch_size):
        batch = items[start:start + batch_size]
        width = max(len(prompt + answer) for prompt, answer in batch)
        ids = torch.full((len(batch), width), tokenizer.pad_token_id)
        targets = torch.full((len(batch), width), IGNORE_INDEX)
        for i, (prompt, answer) in enumerate(batch):        # padded on the right: nothing attends to it
            ids[i, :len(prompt + answer)] = torch.tensor(prompt + answer)
            targets[i, len(prompt):len(prompt + answer)] = torch.tensor(answer)
        logits = model(input_ids=ids.to(model.device)).logits[:, :-1].float()
        total += torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets[:, 1:].flatten().to(logits.device),
                                                   ignore_index=IGNORE_INDEX, reduction="sum").item()
        tokens += sum(len(answer) for _, answer in batch)
    return total / tokens


def evalgsv(model, tokenizer, base_args, eval_args, subsample=None, name=None, extra=None):
    """Evaluates `model` on the test split of eval_args.ft_dataset_name; returns the results and saves them as JSON.

    subsample: only the first rows. name: of the JSON file. extra: more entries for it. The results: accuracy with its
    95 % interval, every prediction with its prompt and label, and with eval_args.answer_loss the loss of the labels.
    """
    data_name = eval_args.ft_dataset_name
    prepare_tokenizer(tokenizer)
    rows = load_rows(data_name, "test", base_args.data_dir)
    if subsample:
        rows = rows.select(range(min(subsample, len(rows))))
    pairs = [read_messages(data_name, row) for row in rows]
    prompts = [render_prompt(tokenizer, messages) for messages, _ in pairs]
    model.eval()
    predictions = generate(model, tokenizer, prompts, eval_args.eval_batch_size, eval_args.max_new_tokens)
    items = [{"prompt": prompt, "label": label, "prediction": prediction,
              "correct": is_correct(prediction, label, data_name)}
             for prompt, (_, label), prediction in zip(prompts, pairs, predictions, strict=True)]
    correct = sum(item["correct"] for item in items)
    results = {"data_set": data_name, "rows": len(items), "correct": correct, "accuracy": correct / len(items),
               "interval_95": confidence_interval(correct, len(items)), **(extra or {}), "predictions": items}
    low, high = results["interval_95"]
    print(f"{data_name}: {correct} of {len(items)} correct, accuracy {correct / len(items):.2%} "
          f"(95 % interval {low:.2%} to {high:.2%})")
    if eval_args.answer_loss:
        results["loss"] = answer_loss(model, tokenizer, prompts, [label for _, label in pairs],
                                      eval_args.eval_batch_size)
        print(f"{data_name}: mean loss of the answers' tokens {results['loss']:.4f}")
    save_results(eval_args.output_path, name or data_name, results, base_args, eval_args)
    return results
