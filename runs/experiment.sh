#!/usr/bin/env bash
# The experiments on a CPU, from nothing: data, two 16-bit bases, GPTQ at 4, 3 and 2 bits, and the runs of one stage.
#   bash runs/experiment.sh DATA test          3 seeds, scored on all test rows; about 3 hours on 2 cores
#   bash runs/experiment.sh DATA confirm       the same with bases and rows on which nothing was chosen; about 5 hours
#   bash runs/experiment.sh DATA choose        many candidates, scored on rows of the train split
#   bash runs/experiment.sh DATA ablation      one setting is changed at a time, scored on the same rows
# More flags go to experiments/plan.py: DATA choose --settings recovery task --bits 4 --only LoRA QA-LoRA
# DATA holds ViGGO's train.csv and test.csv, which github.com/jjuraska/data2text-nlg publishes. After an interruption
# start the script again: it makes, trains and scores only what is missing. Every run adds a line of JSON to
# WORK/STAGE.jsonl. By environment variables:
#   LOTA_WORK   the folder WORK                                        [work/experiment]
#   JOBS        how many runs there are at a time, on one thread each  [the number of cores]
set -euo pipefail
data=$(realpath "${1:?usage: bash runs/experiment.sh DATA test}")
stage=${2:?usage: bash runs/experiment.sh DATA test}
case $stage in test | confirm | choose | ablation) ;; *) echo "error: no stage $stage" >&2; exit 1 ;; esac
source "$(dirname "$0")/environment.sh"
work=${LOTA_WORK:-work/experiment}
lines=$work/$stage.jsonl
cut=()
if [ "$stage" = confirm ]; then work=$work/turned cut=(--turned); fi       # apart, because its bases differ
mkdir -p "$work"

# 1. Rows for the bases, for tuning and for choosing. Each row has one of these uses.
[ -e "$work/data" ] || python experiments/data.py --data_dir "$data" --output "$work/data" ${cut[@]+"${cut[@]}"}

# 2. The bases: one has seen all nine functions, the other six of them. GPTQ of each, in groups of 32. The ablation also
#    needs groups of 16 and 64.
quantize() { [ -e "$work/gptq/int$2_$3_base_$1" ] || python gptq_quantize.py --model "$work/base_$1" --bits "$2" \
    --group_size "$3" --calibration viggo --data_dir "$work/data/base_$1" --samples 128 --output_dir "$work/gptq"; }
for setting in recovery task; do
    [ -e "$work/base_$setting/model.safetensors" ] || python experiments/tiny_base.py --data_name viggo \
        --data_dir "$work/data/base_$setting" --output "$work/base_$setting"
    for bits in 4 3 2; do quantize "$setting" "$bits" 32; done
done
if [ "$stage" = ablation ]; then quantize recovery 2 16; quantize recovery 2 64; fi

# 3. The runs.
if [ "$stage" = test ] || [ "$stage" = confirm ]; then range=(--settings recovery task --bits 2 3 4); fi
python experiments/plan.py --work "$work" --stage "$stage" ${range[@]+"${range[@]}"} "${@:3}" \
    --output "$work/$stage.json"
# glibc would return the memory of large tensors to the system after every step and fetch it again, which takes 14 % of
# a step's time.
export MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=8000000000 MALLOC_TOP_PAD_=268435456
python experiments/run.py --runs "$work/$stage.json" --work "$work" --results "$lines" \
    --jobs "${JOBS:-$(nproc)}"
echo "lines in $lines; experiments/tables.py makes tables and figures from those in experiments/results/"
