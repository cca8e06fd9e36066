#!/usr/bin/env bash
# Everything that a GPU must show, on one card in at most 9 minutes: the kernels against the reference, a training run
# whose merged model is compared with the live one, and the benchmarks. Every part is a process with a time limit, so a
# part that fails does not stop the next. The last lines say which parts passed.
#   bash runs/gpu.sh                                    all parts
#   PARTS="gpu_check gpu_train" bash runs/gpu.sh        some of them
#   bash runs/gpu.sh --rehearse                         the same with tiny shapes, on a CPU too; writes nothing
# It needs Python 3.11 or later with torch, triton, transformers, peft and accelerate, and downloads nothing. What else
# is missing benchmarks/stand_in/ stands in for. By environment variables:
#   OUT       where the JSON files go     [benchmarks/results]
#   PYTHON    the Python that runs it     [python3]
#   SECONDS_IN_ALL   no part runs longer than until then    [530]
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3} quick=()
if [ "${1:-}" = --rehearse ]; then
    quick=(--quick)
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}            # a second thread only adds contention on tensors this small
elif [ -n "${1:-}" ]; then
    echo "error: no flag $1" >&2; exit 2
fi
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false TQDM_DISABLE=1
for package in gptqmodel pydantic xxhash pytest allpairspy; do
    "$python" -c "import importlib.util as u, sys; sys.exit(u.find_spec('$package') is None)" \
        || { PYTHONPATH+=":$PWD/benchmarks/stand_in/$package"; echo "$package is not installed: a stand-in is used"; }
done
"$python" -c 'import torch; exit(not torch.cuda.is_available())' || [ ${#quick[@]} -gt 0 ] \
    || { echo "error: torch finds no GPU; --rehearse runs on a CPU" >&2; exit 1; }

log=$(mktemp) summary=() failed=0 end=$((SECONDS + ${SECONDS_IN_ALL:-530}))
trap 'rm -f "$log"' EXIT
# part NAME LIMIT SCRIPT FLAGS: runs it for at most LIMIT seconds, prints the end of what it said, notes how it ended.
part() {
    local name=$1 limit=$2 begin=$SECONDS result=passed
    shift 2
    case " ${PARTS:-$name} " in *" $name "*) ;; *) return ;; esac
    if [ $((end - SECONDS)) -lt "$limit" ]; then limit=$((end - SECONDS)); fi
    if [ "$limit" -lt 5 ]; then summary+=("$name: no time was left") failed=1; return; fi
    echo "=== $name: $*"
    timeout -k 5 "$limit" "$python" -u "benchmarks/$1" "${@:2}" ${quick[@]+"${quick[@]}"} > "$log" 2>&1
    case $? in 0) ;; 124 | 137) result="stopped after $limit s" failed=1 ;; *) result=FAILED failed=1 ;; esac
    if [ "$result" = passed ]; then tail -n 30 "$log"; else tail -n 60 "$log"; fi | cut -c 1-400
    summary+=("$name: $result, $((SECONDS - begin)) s")
}
part gpu_check 130 gpu_check.py --seconds 100
part gpu_train 130 gpu_train.py
part layer 80 layer.py --bits 4 2 --rounds 3
part optimizer 40 optimizer.py
part train_step_1B 70 train_step.py --shape 1B --bits 4 --batch 8 --length 512 --rounds 3 --output train_step_1B
part train_step_8B 170 train_step.py --shape 8B --bits 4 --batch 8 --length 512 --rounds 3 --output train_step_8B
part generate 80 generate.py --shape 1B --bits 4 --batch 1 8 --new_tokens 64 --rounds 3
part monitor 60 monitor.py --shape 8B --blocks 4 --rounds 3
printf '%s\n' "=== summary, $SECONDS s" "${summary[@]}"
exit $failed
