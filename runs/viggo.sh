#!/usr/bin/env bash
# The README's ViGGO table, on a CPU: a tiny Llama trained from scratch on ViGGO's train split, GPTQ at 2 bits,
# LoTA at two thresholds, and mode 2 on all test rows. About 20 minutes on 2 cores.
#   bash runs/viggo.sh DATA      DATA holds ViGGO's train.csv and test.csv (columns mr and ref), which are published
#                                in github.com/jjuraska/data2text-nlg
# What is already made or trained is left alone: start it again after an interruption. Only step 4 always runs.
set -euo pipefail
data=$(realpath "${1:?usage: bash runs/viggo.sh DATA}")
source "$(dirname "$0")/environment.sh"
work=${LOTA_WORK:-work/viggo}
mkdir -p "$work"

main() { python LoTA_QAF_main.py --data_dir "$data" --dtype float32 "$@"; }
evaluate() { main --mode 2 --ft_dataset_name viggo --max_new_tokens 160 --eval_batch_size 64 \
                  --output_path "$work/results" "$@"; }

# 1. The 16-bit model: about 2 M parameters, 12 epochs.
[ -e "$work/base/model.safetensors" ] || python runs/tiny_base.py --data_name viggo --data_dir "$data" \
    --output "$work/base"

# 2. GPTQ, 2 bits, group 32, calibrated on 128 training rows.
[ -e "$work"/gptq/int2_32_base ] || python gptq_quantize.py --model "$work/base" --bits 2 --group_size 32 \
    --calibration viggo --data_dir "$data" --samples 128 --output_dir "$work/gptq"

# 3. Ternary adapters: 160 steps of 64 rows, omega = 0.75 r as published, and 0.5 r.
for omega in 12 8; do
    compgen -G "$work/adapter_$omega/*MB_*" > /dev/null || main --mode 1 --lota_qaf True \
        --quantized_model_dir "$work/gptq/int2_32_base" --pretrained "$work/base" --training_data_name viggo \
        --lora_r 16 --interval_point "$omega" --max_steps 160 --train_batch_size 64 --gradient_checkpointing False \
        --logging_steps 10 --save_number 4 --adapter_path "$work/adapter_$omega"
done

# 4. Everything on the 1,083 test rows.
evaluate --auto_gptq none --pretrained "$work/base"
evaluate --quantized_model_dir "$work/gptq/int2_32_base"
for omega in 12 8; do
    adapter=$(echo "$work/adapter_$omega"/*MB_*)
    evaluate --load_adapter "$adapter" --merge False
    evaluate --load_adapter "$adapter" --merged_path "$work/merged_$omega"
    python runs/compare.py --results "$work/results" --adapter "$adapter" --merged "$work/merged_$omega"
done
