#!/usr/bin/env bash
# Does it run at all? A synthetic variant on this machine's CPU, as if it had several devices, or as several hosts would.
#
#   launch/cpu_smoke.sh [--devices=N] [--processes=N] [--config=FILE:VARIANT] [--workdir=DIR] [--dry_run] [-- ARGUMENT...]
#
# 8 devices shared by 1 process and configs/movielens_xattn.py:synthetic unless said otherwise; further ARGUMENTs go to
# `python -m user_llm.main`. PYTHON names the interpreter.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=launch/common.sh
. launch/common.sh

devices=8 processes=1 config=configs/movielens_xattn.py:synthetic workdir=runs/cpu_smoke
while [ $# -gt 0 ]; do
  case $1 in
    --devices=*) devices=${1#*=} ;;
    --processes=*) processes=${1#*=} ;;
    --config=*) config=${1#*=} ;;
    --workdir=*) workdir=${1#*=} ;;
    --dry_run) DRY_RUN=1 ;;
    --) shift && break ;;
    *) die "unknown flag $1; arguments of user_llm.main come after --" ;;
  esac
  shift
done
[[ $devices =~ ^[1-9][0-9]*$ && $processes =~ ^[1-9][0-9]*$ ]] || die "--devices and --processes are whole numbers from 1 on."
((devices % processes == 0)) || die "$devices devices cannot be shared evenly by $processes processes."
run_one() {
  run env JAX_PLATFORMS=cpu "XLA_FLAGS=--xla_force_host_platform_device_count=$((devices / processes))" "${together[@]}" \
    "${PYTHON:-python}" -m user_llm.main "--config=$config" "--workdir=$workdir" "$@"
}
together=()
if [ "$processes" = 1 ]; then
  run_one "$@"
  exit
fi
pids=()
for ((index = 0; index < processes; index++)); do
  together=("COORDINATOR_ADDRESS=127.0.0.1:${PORT:-29500}" "NUM_PROCESSES=$processes" "PROCESS_ID=$index")
  run_one "$@" &
  pids+=($!)
  [ -z "$DRY_RUN" ] || wait $!
done
[ -z "$DRY_RUN" ] || exit 0
# One that fails takes the others with it, which would wait for it for minutes.
for _ in "${pids[@]}"; do
  wait -n || { code=$? && kill "${pids[@]}" 2>/dev/null; exit "$code"; }
done
