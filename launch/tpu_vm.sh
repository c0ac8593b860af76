#!/usr/bin/env bash
# Train on Cloud TPU VMs, from nothing to a report: ask for them, install, run on all workers, go on after a preemption.
#
#   launch/tpu_vm.sh --name=NAME --zone=ZONE --type=TYPE --workdir=gs://BUCKET/RUN [FLAG...] -- ARGUMENT...
#
# ARGUMENTs are those of `python -m user_llm.main`. TYPE is an accelerator type: v5litepod-8, v6e-8, v6e-256, v5p-8, v5p-128.
#
#   --project=PROJECT   gcloud's own by default
#   --spot, --reserved  how the TPUs are asked for; on demand by default
#   --slices=N          slices of TYPE, joined by the data axis of the mesh; 1 by default
#   --runtime=VERSION   software of the VMs; by TYPE by default
#   --tries=N           how often to ask again for TPUs that were taken away; 20 by default
#   --delete            give the TPUs back at the end, however it ends
#   --dry_run           print all commands and run none
#
# TPUs that are there under NAME are used again. A run that was interrupted goes on where the workdir says; its report comes to
# runs/NAME.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=launch/common.sh
. launch/common.sh

name='' zone='' type='' workdir='' project='' runtime='' slices=1 tries=20 delete='' kind=()
while [ $# -gt 0 ]; do
  case $1 in
    --name=*) name=${1#*=} ;;
    --zone=*) zone=${1#*=} ;;
    --type=*) type=${1#*=} ;;
    --workdir=*) workdir=${1#*=} ;;
    --project=*) project=${1#*=} ;;
    --runtime=*) runtime=${1#*=} ;;
    --slices=*) slices=${1#*=} ;;
    --tries=*) tries=${1#*=} ;;
    --spot | --reserved) kind+=("$1") ;;
    --delete) delete=1 ;;
    --dry_run) DRY_RUN=1 ;;
    --) shift && break ;;
    *) die "unknown flag $1; arguments of user_llm.main come after --" ;;
  esac
  shift
done
[ -n "$name" ] && [ -n "$zone" ] && [ -n "$type" ] || die "--name, --zone and --type are needed."
[[ $workdir == gs://* ]] || die "--workdir must be on gs://, which all workers and the next try can read, not '$workdir'."
[ $# -gt 0 ] || die "name a config behind --, such as -- --config=configs/movielens_xattn.py."
[ ${#kind[@]} -le 1 ] || die "choose one of --spot and --reserved."
[[ $slices =~ ^[1-9][0-9]*$ && $tries =~ ^[1-9][0-9]*$ ]] || die "--slices and --tries are whole numbers from 1 on."
if [ -z "$runtime" ]; then
  case $type in
    v5litepod-*) runtime=v2-alpha-tpuv5-lite ;;
    v5p-*) runtime=v2-alpha-tpuv5 ;;
    v6e-*) runtime=v2-alpha-tpuv6e ;;
    *) die "no runtime is known for --type=$type: name one by --runtime." ;;
  esac
fi
where=("--zone=$zone" ${project:+"--project=$project"})
if [ "$slices" = 1 ]; then
  nodes=("$name") as=("--node-id=$name")
else
  mapfile -t nodes < <(seq -f "$name-%g" 0 $((slices - 1)))
  as=("--node-count=$slices" "--node-prefix=$name")
fi

state() {
  gcloud compute tpus queued-resources describe "$name" "${where[@]}" '--format=value(state.state)' 2>/dev/null || echo ABSENT
}

give_back() {
  run gcloud compute tpus queued-resources delete "$name" "${where[@]}" --force --quiet
}

# Ask for the TPUs unless they are there, and wait for them; what failed or was taken away is cleared first.
acquire() {
  local found=ABSENT
  [ -n "$DRY_RUN" ] || found=$(state)
  case $found in
    FAILED | SUSPENDED | SUSPENDING) give_back && found=ABSENT ;;
  esac
  if [ "$found" = ABSENT ]; then
    run gcloud compute tpus queued-resources create "$name" "${as[@]}" "${where[@]}" "--accelerator-type=$type" \
      "--runtime-version=$runtime" "${kind[@]}" || return 1
  fi
  [ -z "$DRY_RUN" ] || return 0
  until found=$(state) && [ "$found" = ACTIVE ]; do
    case $found in
      FAILED | SUSPENDED | SUSPENDING | ABSENT) return 1 ;;
    esac
    echo "$name: $found" >&2
    sleep "${POLL_S:-30}"
  done
}

# Run a command line on every worker of every slice at once.
everywhere() {
  local node pids=() failed=0
  for node in "${nodes[@]}"; do
    run gcloud compute tpus tpu-vm ssh "$node" "${where[@]}" --worker=all "--command=$1" &
    pids+=($!)
    [ -z "$DRY_RUN" ] || wait $!
  done
  [ -n "$DRY_RUN" ] && return 0
  for pid in "${pids[@]}"; do wait "$pid" || failed=1; done
  return $failed
}

install() {
  local node
  run git archive --format=tar.gz "--output=$archive" HEAD || return 1
  for node in "${nodes[@]}"; do
    run gcloud compute tpus tpu-vm scp "$archive" "$node:user_llm.tar.gz" "${where[@]}" --worker=all || return 1
  done
  everywhere 'sudo apt-get install -qy python3.11-venv && mkdir -p user_llm && tar -xzf user_llm.tar.gz -C user_llm && cd user_llm && python3.11 -m venv .venv && .venv/bin/pip install -q -e ".[tpu]"'
}

archive=user_llm.tar.gz
if [ -z "$DRY_RUN" ]; then
  scratch=$(mktemp -d)
  archive=$scratch/user_llm.tar.gz
fi
finish() {
  [ -z "${scratch:-}" ] || rm -r "$scratch"
  [ -z "$delete" ] || give_back
}
trap finish EXIT

command="cd user_llm && USER_LLM_DISTRIBUTED=1 $(quoted .venv/bin/python -m user_llm.main "--workdir=$workdir" "$@")"
for ((try = 1; ; try++)); do
  if acquire && install && everywhere "$command"; then
    break
  fi
  # Where the TPUs are still there, it is the run that failed.
  [ "$(state)" != ACTIVE ] || { echo "Error: the run failed; its messages stand above." >&2 && exit 1; }
  [ "$try" -lt "$tries" ] || { echo "Error: the TPUs were taken away $tries times." >&2 && exit 1; }
  echo "$name was taken away: asking again ($try of $tries)." >&2
done
run mkdir -p "runs/$name"
run gcloud storage cp "$workdir/report.*" "$workdir/*.png" "$workdir/results.json" "runs/$name/"
