#!/usr/bin/env bash
# Makes the virtual environment that grpo_vs_trl.py and compare_trl.py run TRL in; does nothing when it is there.
#
#   bash tools/bench/trl_setup.sh
#
# MEGARL_BENCH_HOME        folder for it (default /tmp/megarl-bench); the environment is its sub-folder trl-venv
# MEGARL_TORCH_INDEX=URL   package index for torch alone, as for tools/setup.sh
set -euo pipefail
cd "$(dirname "$0")/../.."

venv=${MEGARL_BENCH_HOME:-/tmp/megarl-bench}/trl-venv
if [ -e "$venv/.complete" ]; then exit 0; fi

python3 -m venv "$venv"
index=()
[ -z "${MEGARL_TORCH_INDEX:-}" ] || index=(--index-url "$MEGARL_TORCH_INDEX")
# torch alone and first: the same release on both sides. No vLLM: TRL samples with transformers here.
mapfile -t pinned < <(python3 megarl/pins.py trl) # torch, then TRL
"$venv/bin/pip" install --quiet ${index[@]+"${index[@]}"} "${pinned[0]}"
"$venv/bin/pip" install --quiet "${pinned[@]}"
touch "$venv/.complete"
