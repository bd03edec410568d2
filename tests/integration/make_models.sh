#!/usr/bin/env bash
# The ctest fixture: quantizes the bundled model in every mode into OUT/MODE, unless that is newer than the quantizer.
# usage: make_models.sh BIN_DIR SOURCE_DIR OUT
set -euo pipefail
bin=$1 source=$2 out=$3
mkdir -p "$out"
for mode in w4a4kv4 w4a8kv4 bf16; do
  if [ "$out/$mode/config.json" -nt "$bin/nibble-quantize" ]; then
    echo "$mode is up to date"
    continue
  fi
  rm -rf "${out:?}/$mode"
  "$bin/nibble-quantize" --model "$source/deploy/models/novelist-17m" --output "$out/$mode" --mode "$mode" \
    --calibration "$source/deploy/models/text/calibration.txt"
done
