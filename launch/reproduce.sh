#!/usr/bin/env bash
# Reproduce a table of the paper: run all that it compares, skip what is done, and write one report with intervals.
#
#   launch/reproduce.sh TABLE [SIZE] [FLAG...]
#
# TABLE is text_prompts, encoders, strategies, injections, perceiver, lengths (user_llm/config/experiments.py: TABLES), all of these, open_llm, or
# cost. SIZE is a variant of the configs: full, small, synthetic, or for open_llm, with --config.llm.checkpoint=DIR, cpu or gpu. FLAGs go to every run: --config.data.dir=DIR names the data,
# --config.user_llm.prompts.favorite.weight=1 adds a task. Of the environment: DATASET (movielens, amazon, google_local or events),
# SEEDS ("0 1 2"), OUT (runs/TABLE) and PYTHON.
set -euo pipefail
cd "$(dirname "$0")/.."
table=${1:?"name a table: text_prompts, encoders, strategies, injections, perceiver, lengths, all, open_llm or cost"} size=full
shift
if [ $# -gt 0 ] && [[ $1 != -* ]]; then
  size=$1
  shift
fi
dataset=${DATASET:-movielens} out=${OUT:-runs/$table}
python=${PYTHON:-python}

if [ "$table" = cost ]; then
  mkdir -p "$out"
  "$python" launch/benchmark_cost.py --size="$size" --rounds=3 --out="$out/cost.json" "$@"
  exec "$python" -m user_llm.report --cost="$out/cost.json" --out="$out/report"
fi
phases=$("$python" -c "
import sys
from user_llm.config.experiments import TABLES
table = sys.argv[1]
sys.exit(f'Unknown table {table!r}: choose cost, {\", \".join(TABLES)}.') if table not in TABLES else None
print(('pretrain_encoder', 'pretrain_lm', *TABLES[table]))" "$table")
runs=()
for seed in ${SEEDS:-0 1 2}; do
  "$python" -m user_llm.main --config="configs/${dataset}_xattn.py:$size" --config.phases="$phases" --config.seed="$seed" \
    --workdir="$out/$seed" "$@"
  runs+=("$out/$seed")
done
"$python" -m user_llm.report "${runs[@]}" --out="$out/report"
