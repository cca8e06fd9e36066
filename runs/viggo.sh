#!/usr/bin/env bash
# The published recipe on ViGGO, on a CPU: a tiny Llama is trained from scratch on the train split and quantized to 2
# bits, LoTA trains at two values of omega, and mode 2 scores all test rows. About 20 minutes on 2 cores.
#   bash runs/viggo.sh DATA
# DATA holds ViGGO's train.csv and test.csv (columns mr and ref), which github.com/jjuraska/data2text-nlg publishes.
# Everything is made in work/viggo, or where LOTA_WORK says. After an interruption start the script again: it makes and
# trains only what is missing, and scores everything. experiments/results/viggo_*.json, from which the table of the
# pages is made, are copies of WORK/viggo_*.json.
set -euo pipefail
data=$(realpath "${1:?usage: bash runs/viggo.sh DATA}")
source "$(dirname "$0")/environment.sh"
work=${LOTA_WORK:-work/viggo}
mkdir -p "$work"

main() { python LoTA_QAF_main.py --data_dir "$data" --dtype float32 "$@"; }
evaluate() { main --mode 2 --ft_dataset_name viggo --max_new_tokens 160 --eval_batch_size 64 \
                  --output_path "$work/results" "$@"; }

# 1. The 16-bit model: about 2 M parameters, 12 epochs.
[ -e "$work/base/model.safetensors" ] || python experiments/tiny_base.py --data_name viggo --data_dir "$data" \
    --output "$work/base"

# 2. GPTQ, 2 bits, group 32, calibrated on 128 training rows.
[ -e "$work"/gptq/int2_32_base ] || python gptq_quantize.py --model "$work/base" --bits 2 --group_size 32 \
    --calibration viggo --data_dir "$data" --samples 128 --output_dir "$work/gptq"

# 3. Two ternary adapters, 160 steps of 64 rows each: omega = 0.75 r, as published, and 0.5 r.
for omega in 12 8; do
    compgen -G "$work/adapter_$omega/*MB_*" > /dev/null || main --mode 1 --lota_qaf True \
        --quantized_model_dir "$work/gptq/int2_32_base" --pretrained "$work/base" --training_data_name viggo \
        --lora_r 16 --interval_point "$omega" --max_steps 160 --train_batch_size 64 --gradient_checkpointing False \
        --logging_steps 10 --save_number 4 --adapter_path "$work/adapter_$omega"
done

# 4. All models on the 1,083 test rows.
evaluate --auto_gptq none --pretrained "$work/base"
evaluate --quantized_model_dir "$work/gptq/int2_32_base"
for omega in 12 8; do
    adapter=$(echo "$work/adapter_$omega"/*MB_*)
    evaluate --load_adapter "$adapter" --merge False
    evaluate --load_adapter "$adapter" --merged_path "$work/merged_$omega"
    python experiments/compare.py --results "$work/results" --adapter "$adapter" --merged "$work/merged_$omega" \
        --output "$work/viggo_$omega.json"
done
