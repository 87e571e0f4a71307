#!/usr/bin/env bash
# Sets up .venv, then trains: GRPO with a megatron-core policy over 2 ranks and vLLM rollouts. Arguments go to run.py.
set -euo pipefail
cd "$(dirname "$0")/.."
bash tools/setup.sh
unset PYTHONDONTWRITEBYTECODE # every rank imports the same, and half the time would be compiling
exec .venv/bin/python examples/quickstart/run.py "$@"
