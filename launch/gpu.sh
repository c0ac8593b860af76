#!/usr/bin/env bash
# Train on the GPUs of this host, or as one of several hosts, each with a process for all of its GPUs.
#
#   launch/gpu.sh [--dry_run] -- ARGUMENT...                                                  # this host
#   launch/gpu.sh --coordinator=HOST:PORT --hosts=N --index=I [--dry_run] -- ARGUMENT...      # on each of N hosts
#   launch/gpu.sh --slurm=N [--dry_run] -- ARGUMENT...                                        # N hosts by SLURM
#
# ARGUMENTs are those of `python -m user_llm.main`; several hosts share the --workdir. PYTHON names the interpreter; the extra `gpu`
# is installed in it.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=launch/common.sh
. launch/common.sh

coordinator='' hosts='' index='' slurm=''
while [ $# -gt 0 ]; do
  case $1 in
    --coordinator=*) coordinator=${1#*=} ;;
    --hosts=*) hosts=${1#*=} ;;
    --index=*) index=${1#*=} ;;
    --slurm=*) slurm=${1#*=} ;;
    --dry_run) DRY_RUN=1 ;;
    --) shift && break ;;
    *) die "unknown flag $1; arguments of user_llm.main come after --" ;;
  esac
  shift
done
[ $# -gt 0 ] || die "name a config behind --, such as -- --config=configs/movielens_xattn.py."
train=("${PYTHON:-python}" -m user_llm.main "$@")
if [ -n "$slurm" ]; then
  [ -z "$coordinator$hosts$index" ] || die "SLURM knows the hosts: leave --coordinator, --hosts and --index out."
  [[ $slurm =~ ^[1-9][0-9]*$ ]] || die "--slurm is a whole number of hosts."
  # jax would give each process one GPU there, but for what is said here.
  run srun "--nodes=$slurm" --ntasks-per-node=1 --gpus-per-node="${GPUS_PER_NODE:-8}" env USER_LLM_DISTRIBUTED=1 \
    "JAX_LOCAL_DEVICE_IDS=$(seq -s, 0 $((${GPUS_PER_NODE:-8} - 1)))" "${train[@]}"
elif [ -n "$coordinator$hosts$index" ]; then
  [[ $coordinator == *:* && $hosts =~ ^[1-9][0-9]*$ && $index =~ ^[0-9]+$ && $index -lt $hosts ]] ||
    die "several hosts need --coordinator=HOST:PORT, --hosts=N and --index from 0 to N - 1."
  run env "COORDINATOR_ADDRESS=$coordinator" "NUM_PROCESSES=$hosts" "PROCESS_ID=$index" "${train[@]}"
else
  run "${train[@]}"
fi
