#!/usr/bin/env bash
# A real Slurm cluster on this machine, for the tests marked slurm: one controller and nodes n1 .. nN, all of them here.
#   eval "$(tools/slurm_up.sh up [NODES])"     # starts it (2 nodes), and sets SLURM_CONF for the commands of this shell
#   tools/slurm_up.sh down                     # ends it
# Needs root, and Debian's packages: apt-get install slurm-wlm munge. All it writes is under MEGARL_SLURM_HOME
# (/tmp/megarl-slurm); it leaves /etc alone, and a munge or a Slurm that runs already.
set -euo pipefail
home=${MEGARL_SLURM_HOME:-/tmp/megarl-slurm}
conf=$home/slurm.conf

down() {
  [ -d "$home" ] || return 0
  SLURM_CONF=$conf timeout 10 scancel --user="$(id -un)" 2>/dev/null || true
  for pid in "$home"/*.pid; do [ -f "$pid" ] && kill "$(cat "$pid")" 2>/dev/null || true; done
  for _ in $(seq 50); do
    alive=0
    for pid in "$home"/*.pid; do [ -f "$pid" ] && kill -0 "$(cat "$pid")" 2>/dev/null && alive=1; done
    [ $alive = 0 ] && break
    sleep 0.2
  done
  rm -rf "$home"
}

up() {
  nodes=${1:-2}
  down
  host=$(hostname -s)
  mkdir -p "$home/state" "$home/munge"
  chmod 755 "$home" "$home/munge"
  # Ports that nobody uses: a cluster beside this one has its own.
  read -r -a ports < <(python3 -c '
import socket, sys
held = [socket.socket() for _ in range(1 + int(sys.argv[1]))]
for one in held: one.bind(("127.0.0.1", 0))
print(*(one.getsockname()[1] for one in held))' "$nodes")
  dd if=/dev/urandom of="$home/munge/key" bs=1 count=1024 status=none
  chmod 400 "$home/munge/key"
  munged --key-file="$home/munge/key" --socket="$home/munge/socket" --pid-file="$home/munged.pid" \
    --log-file="$home/munge/log" --seed-file="$home/munge/seed" --force >&2
  {
    # Credentials that live 10 s: a job that is queued again starts once those of its last start have expired.
    cat <<CONF
ClusterName=megarl
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=${ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$home/munge/socket,cred_expire=10
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
StateSaveLocation=$home/state
SlurmdSpoolDir=$home/spool-%n
SlurmctldPidFile=$home/slurmctld.pid
SlurmdPidFile=$home/slurmd-%n.pid
SlurmctldLogFile=$home/slurmctld.log
SlurmdLogFile=$home/slurmd-%n.log
JobRequeue=1
ReturnToService=2
MpiDefault=none
KillWait=10
SlurmdParameters=config_overrides
SlurmdTimeout=10
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP OverSubscribe=FORCE:8
CONF
    for n in $(seq "$nodes"); do
      echo "NodeName=n$n NodeHostname=$host NodeAddr=127.0.0.1 Port=${ports[$n]} CPUs=4 RealMemory=2000 State=UNKNOWN"
    done
  } >"$conf"
  export SLURM_CONF=$conf
  for n in $(seq "$nodes"); do mkdir -p "$home/spool-n$n"; done
  slurmctld -f "$conf" >&2
  for n in $(seq "$nodes"); do slurmd -f "$conf" -N "n$n" >&2; done
  for _ in $(seq 60); do
    [ "$(sinfo --noheader --states=idle --format=%D 2>/dev/null)" = "$nodes" ] && { echo "export SLURM_CONF=$conf"; return; }
    sleep 0.5
  done
  echo "the nodes did not become idle: see $home/slurmctld.log" >&2
  return 1
}

case ${1:-} in
  up) up "${2:-2}" ;;
  down) down ;;
  *) sed -n '2,6p' "$0" && exit 2 ;;
esac
