#!/bin/sh
# Runs a CUDA compilation and fails it when ptxas had to spill registers or to serialise wgmma instructions: both are
# silent otherwise, and cost more than any of the tuning around them. NIBBLE_ALLOW_SPILLS=1 in the environment lets an
# experiment pass. Usage: check_ptxas.sh <launcher ...> nvcc <arguments ...>
log=$(mktemp) || exit 1
trap 'rm -f "$log"' EXIT
"$@" -Xptxas=-v 2>"$log"
code=$?
bad=$(grep -E '[1-9][0-9]* bytes spill|Potential Performance Loss' "$log")
if [ $code -eq 0 ] && [ -n "$bad" ] && [ -z "$NIBBLE_ALLOW_SPILLS" ]; then
  cat "$log" >&2
  echo "error: ptxas spilled registers or serialised wgmma instructions: see above" >&2
  while [ $# -gt 0 ]; do
    if [ "$1" = -o ]; then rm -f "$2"; fi
    shift
  done
  exit 1
fi
grep -vE '^ptxas info|bytes stack frame|^ *$' "$log" >&2
exit $code
