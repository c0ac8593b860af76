# What the launch scripts share; sourced. Each sets DRY_RUN=1 at --dry_run: commands are then printed, and none is run.
# shellcheck shell=bash
DRY_RUN=${DRY_RUN:-}

# Refuse the command line in one sentence.
die() {
  echo "Error: $*" >&2
  exit 2
}

# Run a command, or print it so that it can be pasted.
run() {
  if [ -n "$DRY_RUN" ]; then
    printf '%q ' "$@" | sed 's/ $//'
    echo
  else
    "$@"
  fi
}

# Return a command line for another shell to read.
quoted() { printf '%q ' "$@" | sed 's/ $//'; }
