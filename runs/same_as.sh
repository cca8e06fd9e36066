#!/usr/bin/env bash
# Says whether this checkout computes what another commit computes: runs the demo of both, and compares the files.
#   bash runs/same_as.sh COMMIT      about 10 minutes; the last line says "the same" or what differs
# The weights of the base, the GPTQ model and the merged model must be equal byte for byte, and the adapter's in value.
# So must all answers. It holds on one machine only, because other CPUs and versions of torch round differently.
set -euo pipefail
commit=${1:?usage: bash runs/same_as.sh COMMIT}
root=$(cd "$(dirname "$0")/.." && pwd)
work=$(mktemp -d)
trap 'git -C "$root" worktree remove --force "$work/checkout"; rm -rf "$work"' EXIT
git -C "$root" worktree add --detach --quiet "$work/checkout" "$commit"
export LOTA_ENV=${LOTA_ENV:-$root/.venv}

(cd "$work/checkout" && PYTHONPATH="$work/checkout" LOTA_WORK="$work/theirs" bash runs/demo.sh)
(cd "$root" && LOTA_WORK="$work/ours" bash runs/demo.sh)

source "$LOTA_ENV/bin/activate"
python - "$work/theirs" "$work/ours" <<'PYTHON'
import hashlib, json, sys
from pathlib import Path

from safetensors.torch import load_file

PATTERNS = ("base/*.safetensors", "gptq/*/*.safetensors", "adapter/*/adapter_model.safetensors",
            "merged/*.safetensors", "merged/lota/*.safetensors")


def digest(file):
    """Of an adapter the values count, because its ternary matrices were float32 before they were int8."""
    if file.name != "adapter_model.safetensors":
        return hashlib.sha256(file.read_bytes()).hexdigest()
    found = hashlib.sha256()
    for name, tensor in sorted(load_file(file).items()):
        found.update(name.encode() + tensor.double().numpy().tobytes())
    return found.hexdigest()


def contents(folder):
    """{what: its digest or its answers}. Names of runs hold the time, so they are left out."""
    found = {f"{pattern} {i}": digest(file) for pattern in PATTERNS
             for i, file in enumerate(sorted(Path(folder).glob(pattern)))}
    for file in Path(folder, "results").glob("*.json"):
        model = next(name for name in ("16bit", "gptq", "live", "merged") if f"_{name}_" in file.name)
        found[f"answers, {model}"] = [item["prediction"] for item in json.loads(file.read_text())["predictions"]]
    return found


theirs, ours = map(contents, sys.argv[1:])
differ = sorted(what for what in theirs.keys() | ours.keys() if theirs.get(what) != ours.get(what))
sys.exit(f"these differ: {', '.join(differ)}") if differ else print(f"the same: {len(ours)} files and sets of answers")
PYTHON
