"""LoRA on a 16-bit model, with mode 1's rows, loss and trainer. It says what tuning could give without quantization.

experiments/run.py calls tune(), because mode 1 itself trains on GPTQ models only.
"""
from pathlib import Path

from LoTA.settings import TARGET_MODULES, baseConfig, trainingConfig

PROVENANCE = "tune_16bit.json"          # says what made the folder


def tune(base: baseConfig, training: trainingConfig, output: Path) -> Path:
    """Tunes --pretrained with these settings of mode 1, merges the adapter into the weights, and writes them.

    Returns `output`, which is left as it is where an earlier start finished it.
    """
    if (output / PROVENANCE).exists():
        return output
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import DataCollatorForSeq2Seq

    from data_print_save import prepare_dataset, set_seed
    from LoTA.adapter import load_16bit
    from LoTA.adapter_folder import LotaConfig
    from LoTA.prompts import load_tokenizer
    from LoTA.storage import temporary_folder, whole_folder, write_json
    from LoTA.trainer import RunTrainer, training_arguments
    set_seed(base.seed)
    tokenizer = load_tokenizer([base.pretrained])
    data = prepare_dataset(training.training_data_name, tokenizer, training.train_ratio, training.source_max_len,
                           training.target_max_len, training.debug_number, base.data_dir)
    model = load_16bit(base.pretrained, base.device_map, getattr(torch, base.dtype))
    model.config.use_cache = False
    model = get_peft_model(model, LoraConfig(r=base.lora_r, lora_alpha=base.lora_alpha or 2 * base.lora_r,
                                             target_modules=list(TARGET_MODULES), task_type="CAUSAL_LM"))
    with temporary_folder() as folder:
        trainer = RunTrainer(LotaConfig(method="LoRA", settings=vars(training)), model=model, train_dataset=data,
                             args=training_arguments(base, training, folder),
                             data_collator=DataCollatorForSeq2Seq(tokenizer, pad_to_multiple_of=8))
        trainer.train()
        if trainer.interrupted:
            raise KeyboardInterrupt
    model.config.use_cache = True
    with whole_folder(output, PROVENANCE) as folder:
        model.merge_and_unload().save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        write_json(folder / PROVENANCE, {"training_loss": trainer.state.log_history[-1]["train_loss"],
                                         "train_s": round(trainer.runtime_and_peak()[0], 1)})
    return output
