#!/usr/bin/env bash
# The README's results on a CPU, from nothing: data, two 16-bit bases, GPTQ at 4, 3 and 2 bits, and the runs of a stage.
#   bash runs/experiment.sh DATA test          the table: 3 seeds, all test rows; about 3 hours on 2 cores
#   bash runs/experiment.sh DATA confirm       the same on bases and rows that nothing was chosen on; about 5 hours
#   bash runs/experiment.sh DATA choose        candidates side by side, on rows of the train split
#   bash runs/experiment.sh DATA ablation      one setting at a time, the same rows
# More flags go to runs/experiment_runs.py: DATA choose --settings recovery task --bits 4 --only LoRA QA-LoRA
# DATA holds ViGGO's train.csv and test.csv, published in github.com/jjuraska/data2text-nlg. What is already made, trained
# or scored is left alone: start it again after an interruption. Lines of JSON go to WORK/STAGE.jsonl (LOTA_WORK names
# WORK); JOBS runs go on at a time [the number of cores], each on one thread.
set -euo pipefail
data=$(realpath "${1:?usage: bash runs/experiment.sh DATA test}")
stage=${2:?usage: bash runs/experiment.sh DATA test}
case $stage in test | confirm | choose | ablation) ;; *) echo "error: no stage $stage" >&2; exit 1 ;; esac
source "$(dirname "$0")/environment.sh"
work=${LOTA_WORK:-work/experiment}
lines=$work/$stage.jsonl
cut=()
if [ "$stage" = confirm ]; then work=$work/turned cut=(--turned); fi       # other rows, so other bases
mkdir -p "$work"

# 1. Rows for the bases, for tuning, for choosing. No row is in two of them.
[ -e "$work/data" ] || python runs/experiment_data.py --data_dir "$data" --output "$work/data" ${cut[@]+"${cut[@]}"}

# 2. The bases: one has seen all nine functions, one six of them. GPTQ of each, group 32 (16 and 64 for the ablation).
quantize() { [ -e "$work/gptq/int$2_$3_base_$1" ] || python gptq_quantize.py --model "$work/base_$1" --bits "$2" \
    --group_size "$3" --calibration viggo --data_dir "$work/data/base_$1" --samples 128 --output_dir "$work/gptq"; }
for setting in recovery task; do
    [ -e "$work/base_$setting/model.safetensors" ] || python runs/tiny_base.py --data_name viggo \
        --data_dir "$work/data/base_$setting" --output "$work/base_$setting"
    for bits in 4 3 2; do quantize "$setting" "$bits" 32; done
done
if [ "$stage" = ablation ]; then quantize recovery 2 16; quantize recovery 2 64; fi

# 3. The runs.
if [ "$stage" = test ] || [ "$stage" = confirm ]; then range=(--settings recovery task --bits 2 3 4); fi
python runs/experiment_runs.py --work "$work" --stage "$stage" ${range[@]+"${range[@]}"} "${@:3}" --output "$work/$stage.json"
# glibc gives the memory of large tensors back and faults it in again at every step: 14 % of a step's time.
export MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=8000000000 MALLOC_TOP_PAD_=268435456
python runs/experiment.py --runs "$work/$stage.json" --work "$work" --results "$lines" \
    --jobs "${JOBS:-$(nproc)}"
echo "lines in $lines; runs/experiment_table.py makes the README's table and figures of those in experiments/results/"
