# Sourced by the other scripts: makes the environment .venv from requirements.txt, once, and activates it.
# LOTA_ENV names another place for it. A Python 3.11 is taken from the PATH.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
LOTA_WORK=${LOTA_WORK:+$(realpath -m "$LOTA_WORK")}     # named from where the script was started
cd "$root"
env_dir=${LOTA_ENV:-$root/.venv}
stamp="$env_dir/requirements.installed"      # written last: a broken installation is made again

if ! cmp -s requirements.txt "$stamp"; then
    python=$(command -v python3.11 || command -v python3) || { echo "error: Python 3.11 is needed" >&2; exit 1; }
    "$python" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' \
        || { echo "error: Python 3.11 is needed, $python is $("$python" -V)" >&2; exit 1; }
    echo "making the environment in $env_dir (about 5 minutes, once)"
    "$python" -m venv "$env_dir"
    "$env_dir/bin/python" -m pip install --quiet --progress-bar on -r requirements.txt
    cp requirements.txt "$stamp"
fi
source "$env_dir/bin/activate"

export HF_HUB_OFFLINE=${HF_HUB_OFFLINE:-1}    # nothing here needs the hub; unset it for runs that do
export TOKENIZERS_PARALLELISM=false
