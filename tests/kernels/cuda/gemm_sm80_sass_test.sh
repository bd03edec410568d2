#!/usr/bin/env bash
# The machine code of the W4Ax kernels for sm_80 and sm_89 multiplies on the 4-bit tensor cores (IMMA.16864), which no
# later compiler or source may turn into anything else unseen, and keeps nothing in local memory.
# Usage: gemm_sm80_sass_test.sh <library> <cuobjdump>; exits with 77 (skipped) where there is no cuobjdump.
set -euo pipefail
library=$1 cuobjdump=$2
[ -x "$cuobjdump" ] || { echo "no cuobjdump"; exit 77; }
found=0
for architecture in sm_80 sm_89; do
  sass=$("$cuobjdump" -sass -arch "$architecture" "$library")
  grep -q "arch = $architecture" <<<"$sass" || continue
  found=1
  four=$(grep -cE 'IMMA\.16864\.[US0-9.]*S4' <<<"$sass" || true)
  eight=$(grep -cE 'IMMA\.16832\.S8' <<<"$sass" || true)
  local=$(grep -cE '\b(LDL|STL)\b' <<<"$sass" || true)
  echo "$architecture: $four 4-bit and $eight 8-bit matrix products, $local accesses to local memory"
  [ "$four" -gt 0 ] && [ "$eight" -gt 0 ] && [ "$local" -eq 0 ] || exit 1
done
[ "$found" -eq 1 ] || { echo "no code for sm_80 or sm_89 in $library"; exit 1; }
