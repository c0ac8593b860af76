#!/usr/bin/env bash
# Train on TPUs of a GKE cluster by XPK (github.com/AI-Hypercomputer/xpk): build an image, start a workload, follow it to its end.
#
#   launch/gke_xpk.sh --cluster=NAME --zone=ZONE --type=TYPE --image=REPOSITORY/NAME:TAG --name=WORKLOAD --workdir=gs://BUCKET/RUN [FLAG...] -- ARGUMENT...
#
# ARGUMENTs are those of `python -m user_llm.main`; TYPE is XPK's, such as v5litepod-8 or v6e-256.
#
#   --project=PROJECT   gcloud's own by default
#   --slices=N          1 by default
#   --create            create the cluster first
#   --spot              with --create: of spot capacity
#   --delete            delete the cluster at the end
#   --dry_run           print all commands and run none
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=launch/common.sh
. launch/common.sh

cluster='' zone='' type='' image='' name='' workdir='' project='' slices=1 create='' spot=() delete=''
while [ $# -gt 0 ]; do
  case $1 in
    --cluster=*) cluster=${1#*=} ;;
    --zone=*) zone=${1#*=} ;;
    --type=*) type=${1#*=} ;;
    --image=*) image=${1#*=} ;;
    --name=*) name=${1#*=} ;;
    --workdir=*) workdir=${1#*=} ;;
    --project=*) project=${1#*=} ;;
    --slices=*) slices=${1#*=} ;;
    --create) create=1 ;;
    --spot) spot=(--spot) ;;
    --delete) delete=1 ;;
    --dry_run) DRY_RUN=1 ;;
    --) shift && break ;;
    *) die "unknown flag $1; arguments of user_llm.main come after --" ;;
  esac
  shift
done
for needed in cluster zone type image name; do
  [ -n "${!needed}" ] || die "--$needed is needed."
done
[[ $workdir == gs://* ]] || die "--workdir must be on gs://, which all workers can read, not '$workdir'."
[ $# -gt 0 ] || die "name a config behind --, such as -- --config=configs/movielens_xattn.py."
[[ $slices =~ ^[1-9][0-9]*$ ]] || die "--slices is a whole number from 1 on."
where=("--cluster=$cluster" "--zone=$zone" ${project:+"--project=$project"})

run docker build --build-arg=EXTRA=tpu "--tag=$image" --file=launch/Dockerfile .
run docker push "$image"
[ -z "$create" ] || run xpk cluster create "${where[@]}" "--tpu-type=$type" "--num-slices=$slices" "${spot[@]}"
[ -z "$delete" ] || trap 'run xpk cluster delete "${where[@]}" --force' EXIT
run xpk workload create "${where[@]}" "--workload=$name" "--tpu-type=$type" "--num-slices=$slices" "--docker-image=$image" \
  --max-restarts=20 --env=USER_LLM_DISTRIBUTED=1 \
  "--command=$(quoted python -m user_llm.main "--workdir=$workdir" "$@")"
run xpk workload list "${where[@]}" "--wait-for-job-completion=$name"
run mkdir -p "runs/$name"
run gcloud storage cp "$workdir/report.*" "$workdir/*.png" "$workdir/results.json" "runs/$name/"
