# What a job needs of its cluster, in one place: sourced by slurm/train.sbatch on the first node, inherited by every rank.
# Change it for your site, or set the variables before `sbatch` or `megarl submit`.

# ---- how ranks get their Python: one of the three ----
# A virtual environment that every node sees (tools/setup.sh makes .venv beside this folder):
MEGARL_HOME=${MEGARL_HOME:-$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)}
export MEGARL_PYTHON=${MEGARL_PYTHON:-$MEGARL_HOME/.venv/bin/python}
# Modules, for example MEGARL_MODULES="cuda/12.8 nccl":
for module_name in ${MEGARL_MODULES:-}; do module load "$module_name"; done
# A container, by Pyxis, for example MEGARL_CONTAINER=/images/megarl.sqsh; the run's folders must be mounted:
MEGARL_SRUN=()
if [ -n "${MEGARL_CONTAINER:-}" ]; then
  MEGARL_SRUN+=(--container-image="$MEGARL_CONTAINER" --container-mounts="${MEGARL_MOUNTS:-$PWD}" --container-workdir="$PWD")
  MEGARL_PYTHON=${MEGARL_CONTAINER_PYTHON:-python}
fi
# Where some of the nodes serve vLLM (train_async.sbatch), the ranks are on the others alone:
MEGARL_SERVE_SRUN=("${MEGARL_SRUN[@]}")
if [ -n "${MEGARL_TRAIN_NODES:-}" ]; then
  count=$(tr ',' '\n' <<<"$MEGARL_TRAIN_NODES" | wc -l)
  MEGARL_SRUN+=(--nodelist="$MEGARL_TRAIN_NODES" --nodes="$count" --ntasks=$((count * ${SLURM_NTASKS_PER_NODE:-1})))
fi

# ---- rendezvous: this node is the first, and a port that nobody uses here now ----
[ -n "${MASTER_ADDR:-}" ] || export MEGARL_OWN_RENDEZVOUS=1 # not the site's: a job that follows this one makes its own
export MASTER_ADDR=${MASTER_ADDR:-$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)}
# Nodes that share a host, as in a test cluster, have names that nothing resolves.
getent hosts "$MASTER_ADDR" >/dev/null || MASTER_ADDR=$(hostname -I | cut -d' ' -f1)
export MASTER_PORT=${MASTER_PORT:-$(python3 -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')}

# ---- NCCL and torch ----
export TORCH_NCCL_ASYNC_ERROR_HANDLING=1                              # a failed collective ends its rank
export TORCH_FR_BUFFER_SIZE=${TORCH_FR_BUFFER_SIZE:-2000}             # collectives the flight recorder keeps for a hang
export NCCL_IB_TIMEOUT=${NCCL_IB_TIMEOUT:-22}                         # rides out short link failures
# export NCCL_SOCKET_IFNAME=eth0 NCCL_IB_HCA=mlx5                     # where the defaults find the wrong interface
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}
export PYTHONUNBUFFERED=1
