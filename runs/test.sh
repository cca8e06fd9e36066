#!/usr/bin/env bash
# The whole test suite, in an environment made from this repository's files.
#   bash runs/test.sh            everything but the slow tests
#   bash runs/test.sh --slow     everything
#   bash runs/test.sh -k merge   further arguments go to pytest
set -euo pipefail
source "$(dirname "$0")/environment.sh"
[ "${1:-}" = --slow ] && shift && set -- -m "slow or not slow" "$@" || set -- -m "not slow" "$@"
ruff check .
python -m pytest "$@"
