#!/usr/bin/env bash
# The whole test suite, in an environment made from this repository's files.
#   bash runs/test.sh            everything
#   bash runs/test.sh -k merge   arguments go to pytest
set -euo pipefail
source "$(dirname "$0")/environment.sh"
ruff check .
python -m pytest "$@"
