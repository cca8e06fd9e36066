#!/usr/bin/env bash
# The deployment table: a merged ViGGO model is exported in every format, and every engine that runs on a CPU opens it
# and answers all 1,083 test rows. About 25 minutes on 2 cores, 10 of them for building llama.cpp once.
#   bash runs/deploy.sh DATA
# DATA is that of runs/viggo.sh. Both scripts use the same folder, work/viggo or LOTA_WORK, and the same 16-bit model.
# The script makes only what is missing, but runs every engine. experiments/results/deploy.json, from which the table of
# docs/deploy.md is made, is a copy of WORK/deploy/deploy.json.
set -euo pipefail
data=$(realpath "${1:?usage: bash runs/deploy.sh DATA}")
source "$(dirname "$0")/environment.sh"
work=${LOTA_WORK:-work/viggo}
mkdir -p "$work"

# llama.cpp with its Python binding, in the release that was tested.
python -c 'import llama_cpp' 2>/dev/null || CMAKE_BUILD_PARALLEL_LEVEL=$(nproc) pip install --quiet \
    "llama-cpp-python==0.3.36"

# 1. The 16-bit model, as in runs/viggo.sh.
[ -e "$work/base/model.safetensors" ] || python experiments/tiny_base.py --data_name viggo --data_dir "$data" \
    --output "$work/base"

# 2. GPTQ at 4 and 2 bits, group 32. On each an adapter with offset and one without, 160 steps, omega = 0.5 r.
for bits in 4 2; do
    gptq="$work/gptq/int${bits}_32_base"
    [ -e "$gptq" ] || python gptq_quantize.py --model "$work/base" --bits "$bits" --group_size 32 \
        --calibration viggo --data_dir "$data" --samples 128 --output_dir "$work/gptq"
    for residual in True False; do
        into="$work/deploy/adapter_${bits}_$residual"
        compgen -G "$into/*MB_*" > /dev/null || python LoTA_QAF_main.py --mode 1 --method lota --residual "$residual" \
            --quantized_model_dir "$gptq" --pretrained "$work/base" --training_data_name viggo --data_dir "$data" \
            --lora_r 16 --interval_point 8 --max_steps 160 --train_batch_size 64 --gradient_checkpointing False \
            --dtype float32 --logging_steps 40 --save_strategy no --adapter_path "$into"
    done
    # 3. Merge, export in every format with verification, generate in every engine.
    python experiments/deploy.py --data_dir "$data" --adapter "$work/deploy/adapter_${bits}_True"/*MB_* \
        --without_offset "$work/deploy/adapter_${bits}_False"/*MB_* --output "$work/deploy/int$bits"
done

# 4. The rows of both tables in one file.
python - "$work/deploy" << 'PYTHON'
import json, pathlib, sys
folder = pathlib.Path(sys.argv[1])
rows = [row for bits in (4, 2) for row in json.loads((folder / f"int{bits}/deploy.json").read_text())]
(folder / "deploy.json").write_text(json.dumps(rows, indent=1) + "\n")
PYTHON
