# Sourced by the scripts that work through steps. $log is where the output of each goes.
# shellcheck shell=bash

# step NAME COMMAND...  runs the command, its output to the log, and prints one line: name and seconds taken.
step() {
  local name=$1 start=${EPOCHREALTIME/[.,]/} elapsed
  shift
  printf '  %-30s' "$name"
  # A subshell of its own keeps `set -e` alive inside the step; `if step` would switch it off.
  set +e
  (set -e; "$@") >>"$log" 2>&1 9>&-
  local status=$?
  set -e
  elapsed=$((${EPOCHREALTIME/[.,]/} - start))
  if ((status != 0)); then
    printf 'failed\n\n'
    tail -n 40 "$log" >&2
    printf '\n%s failed; the whole log is %s\n' "$name" "$log" >&2
    exit 1
  fi
  printf '%4d.%d s\n' $((elapsed / 1000000)) $((elapsed / 100000 % 10))
}
