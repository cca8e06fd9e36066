# The other scripts source this file. It makes the environment .venv once, installs requirements.txt and the project
# into it, and activates it. It installs again when requirements.txt or pyproject.toml has changed, and when another
# checkout used the environment last. LOTA_ENV names another place for the environment. Python 3.11 must be on the PATH.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
LOTA_WORK=${LOTA_WORK:+$(realpath -m "$LOTA_WORK")}     # before cd, because it is named from the caller's folder
cd "$root"
env_dir=${LOTA_ENV:-$root/.venv}
# It says what is installed. It is written last, so that an installation that broke off is made again.
stamp="$env_dir/requirements.installed"
what_to_install() { echo "$root"; cat requirements.txt pyproject.toml; }

if ! what_to_install | cmp -s - "$stamp"; then
    python="$env_dir/bin/python"
    "$python" -m pip --version > /dev/null 2>&1 || python=$(command -v python3.11 || command -v python3) \
        || { echo "error: Python 3.11 is needed" >&2; exit 1; }
    "$python" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' \
        || { echo "error: Python 3.11 is needed, $python is $("$python" -V)" >&2; exit 1; }
    echo "installing into $env_dir (about 5 minutes the first time)"
    [ "$python" = "$env_dir/bin/python" ] || "$python" -m venv "$env_dir"
    "$env_dir/bin/python" -m pip install --quiet --progress-bar on -r requirements.txt
    # The commands lota-qaf, lota-quantize, lota-merge, lota-export and lota-check. They run this checkout's files.
    "$env_dir/bin/python" -m pip install --quiet --no-deps --no-build-isolation -e .
    what_to_install > "$stamp"
fi
source "$env_dir/bin/activate"

# The scripts of experiments/ and benchmarks/ import this checkout's files, whatever the environment has installed.
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
export HF_HUB_OFFLINE=${HF_HUB_OFFLINE:-1}    # nothing here needs the hub; a run that does sets it to 0
export TOKENIZERS_PARALLELISM=false
