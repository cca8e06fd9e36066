"""LoTA-QAF: lossless ternary adaptation for quantization-aware fine-tuning. https://arxiv.org/abs/2505.18724

--mode 1 trains an adapter on a GPTQ model; --mode 2 merges it into the integer grid and evaluates.

    python LoTA_QAF_main.py --mode 1 --lota_qaf True --quantized_model_dir GPTQ --pretrained MODEL \\
        --training_data_name viggo --num_train_epochs 1
    python LoTA_QAF_main.py --mode 2 --load_adapter ADAPTER --ft_dataset_name viggo
"""
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from data_print_save import check_cuda, params_print, scored_tasks, set_seed, training_sets
from LoTA import UserError, processes, run_script, settings
from LoTA.prompts import PromptStyle, check_fit, load_tokenizer, style_of, template_date
from LoTA.settings import METHODS, baseConfig, evalConfig, trainingConfig

# Torch and the libraries are imported in the functions that need them, so that --help and mistakes answer at once.
if TYPE_CHECKING:
    from evalGSV import Scorer
    from LoTA.adapter_folder import AdapterFolder
    from LoTA.folders import GPTQFolder, MergedFolder


def parse_args(argv: Sequence[str] | None = None) -> tuple[baseConfig, trainingConfig, evalConfig]:
    """The settings that the arguments `argv` ask for. Where it is None, sys.argv is read."""
    return settings.parse_args(__doc__, training_sets(), scored_tasks(), argv)


# --- mode 1 -------------------------------------------------------------------------------------------------------

def train(base: baseConfig, training: trainingConfig) -> Path:
    """Trains an adapter. Returns its folder."""
    settings.check_method(base, training)
    processes.check_launch(base.device_map)
    from LoTA.folders import open_base
    folder = open_base(base.quantized_model_dir)
    base, training = settings.complete_training(base, training, folder)
    settings.check_training(base, training, folder)
    if training.max_steps > 0 and training.num_train_epochs > 0:
        print(f"--max_steps {training.max_steps} decides; --num_train_epochs {training.num_train_epochs} has no effect")

    from data_print_save import get_Ada_path, prepare_dataset
    from LoTA.adapter import layers_by_name, load_for_training
    from LoTA.adapter_folder import check_resumable, config_of_checkpoint
    from LoTA.distill import load_distillation
    from LoTA.sequences import make_collator
    from LoTA.trainer import (
        GridTrainer,
        LotaTrainer,
        Run,
        RunTrainer,
        config_of_run,
        forget_peak_memory,
        real_optimizer,
        training_arguments,
    )
    numbers = ((training.interval_point, training.filter_ratio, training.min_grad) if base.lota_qaf
               else (training.learning_rate, base.lora_r, base.lora_alpha))
    size, _ = folder.model_size(base.pretrained)
    name_of_run = partial(get_Ada_path, size, base.w_bits, METHODS[base.method], *numbers, training.training_data_name)
    processes.connect(base.device_map)
    with Run(training.adapter_path, name_of_run) as run:
        arguments = training_arguments(base, training, run.folder,
                                       any(".experts." in module for module in folder.modules))
        forget_peak_memory()
        check_cuda()
        set_seed(base.seed)
        style = style_of(base, config_of_checkpoint(training.adapter_ckpt))
        tokenizer = load_tokenizer([base.quantized_model_dir, base.pretrained], base.trust_remote_code,
                                   style.chat_template)
        style = replace(style, date=processes.agree(template_date(tokenizer, style.date)))
        data = prepare_dataset(training.training_data_name, tokenizer, training.train_ratio, training.source_max_len,
                               training.target_max_len, training.debug_number, base.data_dir, style,
                               settings.own_row_form(base), training.train_turns, base.seed)
        check_fit(base.quantized_model_dir, tokenizer, data["input_ids"], trust_remote_code=base.trust_remote_code)
        params_print(base, training)
        config = config_of_run(base, training, folder, data)
        recorded = {"template_date": style.date, "chat_template": style.chat_template}
        config = replace(config, settings={**config.settings, **recorded})
        processes.require_equal({"rows": config.training["data"], "GPTQ weights": config.fingerprint_all,
                                 "versions": config.versions})
        if training.adapter_ckpt:
            check_resumable(training.adapter_ckpt, config)

        distillation = load_distillation(base, training, tokenizer)         # first, because it may refuse the teacher
        model = load_for_training(base, config, folder)
        model.print_trainable_parameters()
        common = {"model": model, "train_dataset": data, "args": arguments, "config": config,
                  "distillation": distillation,
                  "data_collator": make_collator(training.packing, tokenizer, model, distillation)}
        if base.method == "lota":
            trainer = LotaTrainer(ternary_optimizer(model, base, training), **common)
        elif base.method == "lrqat":
            trainer = GridTrainer(real_optimizer(model, base, training, arguments), **common)
        else:
            trainer = RunTrainer(**common)
        with layers_by_name(model):             # resuming loads an adapter too
            trainer.train(resume_from_checkpoint=training.adapter_ckpt)
        steps = trainer.state.global_step
        if trainer.interrupted:
            raise UserError(f"interrupted at step {steps}; resume with --adapter_ckpt "
                            f"{run.folder / f'checkpoint-{steps}'}")

        final = trainer.save_finished(run)
    print(f"adapter saved to {final}")
    return final


def ternary_optimizer(model, base: baseConfig, training: trainingConfig):
    """A tSignSGD over A and B. It also steps an AdamW over mu and the scales, where these are learned."""
    import torch

    from LoTA.trainer import trained_groups
    from t_signSGD import tSignSGD
    matrices, real = trained_groups(model, base, training)
    return tSignSGD(
        matrices, threshold_ratio=training.filter_ratio, min_grad=training.min_grad, filter_upper=training.filter_upper,
        momentum=training.momentum, real_optimizer=torch.optim.AdamW(real) if real else None,
        warm_up=training.warm_up, flip_limit=training.flip_limit, omega=training.interval_point)


# --- mode 2 -------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Subject:
    """A model to evaluate, found and checked, but not loaded yet.

    base: the settings, completed by what the model's folder says. name: the beginning of its results' names.
    load: a function that loads it. tokenizer: where its tokenizer may be. style: how its prompts are written.
    exportable: what --export may write.
    extra: what its results say beside the settings: the adapter's record, and the share of integers that a merge moved.
    """
    base: baseConfig
    name: str
    load: Callable
    tokenizer: list[str | None]
    style: PromptStyle
    exportable: "AdapterFolder | MergedFolder | None" = None
    extra: dict = field(default_factory=dict)


def evaluate(base: baseConfig, evaluation: evalConfig) -> dict:
    """Merges where there is something to merge, evaluates, exports. Returns {data set or "lm_eval": results}."""
    settings.check_evaluation(evaluation)
    processes.check_launch(evaluation.device or base.device_map)
    scorers = {}
    if not settings.only_merges(evaluation):
        from evalGSV import find_scorers
        scorers = find_scorers(evaluation, base)
    which, source = find_model(base, evaluation)
    from LoTA.storage import temporary_folder
    processes.connect(evaluation.device or base.device_map)
    with temporary_folder() as temporary:
        subject = SUBJECTS[which](base, evaluation, source, temporary)
        results = measure(subject, evaluation, scorers) if scorers else {}
        if evaluation.export and processes.is_first():
            from LoTA.export.run import export
            export(subject.exportable, evaluation.export, evaluation.export_path, gptq=subject.base.quantized_model_dir,
                   evaluation=results.get(evaluation.ft_dataset_name), verify=True)
            print(f"exported and verified: {evaluation.export_path}")
    return results


def measure(subject: Subject, evaluation: evalConfig, scorers: "dict[str, Scorer]") -> dict:
    """Loads a model and runs every scorer on it. scorers: as find_scorers() in evalGSV.py returns them."""
    check_cuda()
    set_seed(subject.base.seed)
    tokenizer = load_tokenizer(subject.tokenizer, subject.base.trust_remote_code, subject.style.chat_template)
    params_print(subject.base, evaluation, *filter(None, [subject.extra.get("adapter")]))
    ready = {key: (label, prepare(tokenizer, subject.tokenizer[0], subject.style, subject.base.trust_remote_code))
             for key, (label, prepare) in scorers.items()}
    extra = {name: vars(value) if name == "adapter" else value for name, value in subject.extra.items()}
    model, when = subject.load(), datetime.now().strftime("%d_%H%M%S")
    return {key: score(model, tokenizer, base_args=subject.base, eval_args=evaluation, extra=extra,
                       name=f"{subject.name}_{label}_{when}") for key, (label, score) in ready.items()}


def find_model(base: baseConfig, evaluation: evalConfig) -> tuple[str, "AdapterFolder | MergedFolder | None"]:
    """(the key in SUBJECTS of what the settings ask for, the adapter or merged folder, opened)."""
    if evaluation.load_adapter == "none":
        return ("16bit" if evaluation.auto_gptq == "none" else "gptq"), None
    if not Path(evaluation.load_adapter).is_dir():
        raise UserError(f"--load_adapter {evaluation.load_adapter} is not a folder")
    from LoTA.adapter_folder import AdapterFolder
    from LoTA.folders import MergedFolder, is_merged
    if is_merged(evaluation.load_adapter):
        return "merged", MergedFolder(evaluation.load_adapter)
    adapter = AdapterFolder(evaluation.load_adapter, evaluation.load_ada_interval, base.residual)
    return ("live" if adapter.config.method == "LoRA" or not evaluation.merge else "merged"), adapter


def loading(base: baseConfig, evaluation: evalConfig) -> dict:
    """The keyword arguments that load_16bit(), load_gptq(), load_live() and load_merged() share."""
    import torch
    return {"device": evaluation.device or base.device_map, "dtype": getattr(torch, base.dtype),
            "attn_implementation": base.flash_attn, "trust_remote_code": base.trust_remote_code}


def subject_16bit(base: baseConfig, evaluation: evalConfig, source: None, temporary: Path) -> Subject:
    """--auto_gptq none: the 16-bit model."""
    from LoTA.folders import check_model_name
    if base.pretrained is None:
        raise UserError("--auto_gptq none evaluates the 16-bit model: name it with --pretrained")
    check_model_name("--pretrained", base.pretrained)

    def load():
        from LoTA.adapter import load_16bit
        return load_16bit(base.pretrained, **loading(base, evaluation))
    return Subject(replace(base, quantized_model_dir=None), f"{Path(base.pretrained).name}_16bit", load,
                   [base.pretrained], style_of(base))


def subject_gptq(base: baseConfig, evaluation: evalConfig, source: None, temporary: Path) -> Subject:
    """The bare GPTQ model, or a merged folder that is named as one."""
    from LoTA.folders import open_base
    folder = open_base(base.quantized_model_dir)

    def load():
        from LoTA.adapter import load_base
        return load_base(folder, backend=evaluation.backend, **loading(base, evaluation)).model
    return Subject(settings.complete_base(base, folder), f"{folder.path.name}_gptq", load,
                   [str(folder.path), base.pretrained], style_of(base))


def subject_live(base: baseConfig, evaluation: evalConfig, adapter: "AdapterFolder", temporary: Path) -> Subject:
    """A GPTQ model with its adapter unmerged, as it was trained."""
    base, folder = base_of(adapter, base)
    adapter.check_match(folder)

    def load():
        from LoTA.adapter import load_live
        return load_live(adapter, folder.path, backend=evaluation.backend, **loading(base, evaluation))
    return Subject(base, f"{adapter.path.resolve().name}_live", load, [str(folder.path), base.pretrained],
                   style_of(base, adapter.config), adapter, {"adapter": adapter.config.record()})


def subject_merged(base: baseConfig, evaluation: evalConfig, source: "AdapterFolder | MergedFolder",
                   temporary: Path) -> Subject:
    """A merged folder. An adapter is merged first, into --merged_path or a temporary folder."""
    from LoTA.adapter_folder import AdapterFolder
    from LoTA.folders import MergedFolder
    from LoTA.lota_merge import merge_folders, print_moved
    merged = source
    if isinstance(source, AdapterFolder):
        base, folder = base_of(source, base)
        output = Path(evaluation.merged_path or temporary / "merged")
        if processes.is_first():
            print_moved(merge_folders(source, folder, output))
        output = processes.shared_folder(output, "--merged_path")
        if evaluation.merged_path:
            print(f"merged and verified: {output}")
        base, merged = replace(base, group_size=None), MergedFolder(output)     # its groups may be finer

    def load():
        from LoTA.adapter import load_merged
        return load_merged(merged, backend=evaluation.backend, **loading(base, evaluation)).model
    return Subject(settings.complete_base(base, merged), f"{source.path.resolve().name}_merged", load,
                   [str(merged.path), base.pretrained or merged.lota.pretrained], style_of(base, merged.lota), merged,
                   {"moved": merged.lota.training.get("moved"), "adapter": merged.lota.record()})


SUBJECTS = {"16bit": subject_16bit, "gptq": subject_gptq, "live": subject_live, "merged": subject_merged}


def base_of(adapter: "AdapterFolder", base: baseConfig) -> tuple[baseConfig, "GPTQFolder"]:
    """(settings, GPTQ folder). The adapter names both models, where no flag does."""
    from LoTA.folders import open_base
    base = replace(base, pretrained=base.pretrained or adapter.config.pretrained,
                   quantized_model_dir=base.quantized_model_dir or adapter.config.quantized_model_dir)
    folder = open_base(base.quantized_model_dir)
    return settings.complete_base(base, folder), folder


def main() -> None:
    base, training, evaluation = parse_args()
    if base.mode == 1:
        train(base, training)
    else:
        evaluate(base, evaluation)


def cli() -> None:
    """The console command lota-qaf."""
    with processes.one_voice():
        run_script(main, "in mode 1 lower --train_batch_size, --source_max_len or --target_max_len and keep "
                         "--gradient_checkpointing True; in mode 2 lower --eval_batch_size or --max_new_tokens")
        processes.leave()


if __name__ == "__main__":
    cli()
