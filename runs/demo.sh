#!/usr/bin/env bash
# Every step on a tiny model, on a laptop without a GPU: a 16-bit model -> GPTQ at 2 bits -> ternary adapters (mode 1)
# -> merge and evaluation (mode 2) -> one table. It takes about four minutes, and five more for the environment once.
#   bash runs/demo.sh
# Only the packages are downloaded. Everything else is made here, in work/demo or where LOTA_WORK says.
# experiments/results/demo.json, from which the README's table is made, is a copy of WORK/demo.json.
set -euo pipefail
source "$(dirname "$0")/environment.sh"
work=${LOTA_WORK:-work/demo}
rm -rf "$work"
start=$SECONDS

step() { echo; echo "=== $* ($((SECONDS - start)) s)"; }
main() { python LoTA_QAF_main.py --data_dir "$work/data" --dtype float32 --report_to none "$@"; }
evaluate() { main --mode 2 --ft_dataset_name viggo --max_new_tokens 96 --eval_batch_size 100 \
                  --output_path "$work/results" "$@"; }

step "1. a data set: sentences and their meaning representations, made from templates"
python experiments/demo_data.py --output "$work/data"

step "2. a tiny Llama, trained from scratch on it: the 16-bit model"
python experiments/tiny_base.py --data_name viggo --data_dir "$work/data" --output "$work/base" \
    --hidden_size 64 --intermediate_size 192 --layers 3 --heads 4 --vocab_size 500 --epochs 14 --learning_rate 2e-3

step "3. GPTQ quantizes it to 2 bits, with groups of 64 rows"
python gptq_quantize.py --model "$work/base" --bits 2 --group_size 64 --calibration viggo --data_dir "$work/data" \
    --samples 32 --output_dir "$work/gptq"
gptq=$(echo "$work"/gptq/int2_*)

# omega is 0.5 r, because at the published 0.75 r a model this small moves next to no integer.
step "4. mode 1: ternary adapters with t-SignSGD"
main --mode 1 --lota_qaf True --quantized_model_dir "$gptq" --pretrained "$work/base" --training_data_name viggo \
    --max_steps 150 --train_batch_size 64 --lora_r 16 --interval_point 8 --gradient_checkpointing False \
    --save_number 2 --logging_steps 10 --adapter_path "$work/adapter"
adapter=$(echo "$work"/adapter/*LoTA*)

step "5. mode 2: the 16-bit model, the GPTQ model, the adapter live, the adapter merged"
evaluate --auto_gptq none --pretrained "$work/base"
evaluate --quantized_model_dir "$gptq"
evaluate --load_adapter "$adapter" --merge False
evaluate --load_adapter "$adapter" --merged_path "$work/merged"

step "6. the table"
python experiments/compare.py --results "$work/results" --adapter "$adapter" --merged "$work/merged" \
    --output "$work/demo.json"
echo "done in $((SECONDS - start)) s, the environment not counted; everything is in $work"
