#!/usr/bin/env bash
# Installs what tests need, then lints and tests. Arguments go to pytest in place of the usual selection:
#   bash tools/test.sh -m gpu
set -euo pipefail
cd "$(dirname "$0")/.."
bash tools/setup.sh test
.venv/bin/ruff check .
# Two files at a time: ranks wait for one another often enough.
[ $# -gt 0 ] || set -- -n 2 --dist loadfile -m "not gpu and not slurm and not slow and not compat"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # ranks share the cores
unset PYTHONDONTWRITEBYTECODE # a hundred processes import megatron-core, of which half the time would be compiling
exec .venv/bin/python -m pytest -q "$@"
