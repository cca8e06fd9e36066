#!/usr/bin/env bash
# Table 1 of the paper for Llama 3.1 8B. GPTQ quantizes to 4, 3 and 2 bits (group 64, 1,024 samples of C4). LoRA,
# QA-LoRA and LoTA train on each: 300 steps of Alpaca, scored on MMLU (5-shot), and one epoch of GSM8K, SQL and ViGGO,
# scored on their own test rows. It needs a GPU and the hub. It was not run at this size; a test runs it at a small one.
#   bash runs/table1_8b.sh
#   BITS=2 SEEDS="1 2 3" METHODS="QA-LoRA published" bash runs/table1_8b.sh
# After an interruption start the script again: it makes and measures only what is missing. Every run adds a line of
# JSON to WORK/results.jsonl. By environment variables:
#   MODEL       the 16-bit model, folder or hub name   [meta-llama/Llama-3.1-8B]
#   WORK        where everything goes                  [work/table1_8b]
#   BITS SEEDS  [4 3 2] [1]
#   METHODS     some of LoRA, QA-LoRA, published, ternary, full (the last three are LoTA's recipes)   [all]
#   SETS        [alpaca gsm8k sql viggo]
#   DATA        a folder with the data sets in folders of their own, instead of the hub
#   QUANTIZE TRAIN EVALUATE   more flags of gptq_quantize.py, of mode 1, of mode 2, for all runs
set -euo pipefail
export HF_HUB_OFFLINE=${HF_HUB_OFFLINE:-0}
model=${MODEL:-meta-llama/Llama-3.1-8B}
if [ -d "$model" ]; then model=$(realpath "$model"); fi       # before environment.sh changes the folder
data=${DATA:+$(realpath "$DATA")}
work=${WORK:+$(realpath -m "$WORK")}
source "$(dirname "$0")/environment.sh"
work=${work:-work/table1_8b}
bits=${BITS:-4 3 2}
mkdir -p "$work"

# 1. GPTQ.
for b in $bits; do
    [ -e "$work/gptq/int${b}_64_$(basename "$model")" ] || python gptq_quantize.py --model "$model" --bits "$b" \
        --group_size 64 --output_dir "$work/gptq" ${QUANTIZE:-}
done

# 2. The list of runs, with the paper's settings, and the runs themselves.
# shellcheck disable=SC2086        # lists of words
python experiments/plan.py --stage table1 --work "$work" --model "$model" --bits $bits --seeds ${SEEDS:-1} \
    --sets ${SETS:-alpaca gsm8k sql viggo} ${METHODS:+--only $METHODS} ${data:+--data "$data"} \
    "--train=${TRAIN:-}" "--evaluate=${EVALUATE:-}" --output "$work/runs.json"
python experiments/run.py --runs "$work/runs.json" --work "$work" --results "$work/results.jsonl"
