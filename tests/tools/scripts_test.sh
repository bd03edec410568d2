#!/usr/bin/env bash
# Every shell script of the repository parses, and passes shellcheck where that is installed; the scripts' own refusals.
set -euo pipefail
cd "$(dirname "$0")/../.."

mapfile -t scripts < <(find tools tests deploy .ci -type f \( -name '*.sh' -o -path '.ci/run' \) | sort)
[ ${#scripts[@]} -ge 5 ] || { echo "found only ${#scripts[@]} scripts"; exit 1; }
for script in "${scripts[@]}"; do
  bash -n "$script"
  if [ "$(basename "$script")" != steps.sh ] && [ ! -x "$script" ]; then
    echo "$script is not executable"
    exit 1
  fi
done
if command -v shellcheck >/dev/null; then
  shellcheck -x "${scripts[@]}"
else
  echo "shellcheck is not installed: syntax checked only"
fi

# expect CODE TEXT COMMAND...: the exit code, and the text somewhere in the output.
expect() {
  local code=0 output want_code=$1 want_text=$2
  shift 2
  output=$("$@" 2>&1) || code=$?
  if [ "$code" -ne "$want_code" ] || [[ $output != *"$want_text"* ]]; then
    printf '%s: exit code %s, expected %s and "%s":\n%s\n' "$*" "$code" "$want_code" "$want_text" "$output"
    exit 1
  fi
}
for script in setup demo test; do
  expect 2 "unknown argument '--nonsense'" "tools/$script.sh" --nonsense
  expect 0 "tools/$script.sh" "tools/$script.sh" --help
done
expect 2 '--prompt needs a text' tools/demo.sh --prompt
expect 0 'libgrpc++-dev' tools/setup.sh --list

# A failing step ends the script with its code and shows the end of its output.
log_dir=$(mktemp -d)
trap 'rm -rf "$log_dir"' EXIT
cat >"$log_dir/steps" <<'SCRIPT'
set -euo pipefail
LOG_DIR=$1 STEPS_TOTAL=3
. tools/steps.sh
step 'works' true
step 'breaks' bash -c 'echo the reason; exit 7'
echo 'not reached'
SCRIPT
expect 7 'the reason' bash "$log_dir/steps" "$log_dir"
if bash "$log_dir/steps" "$log_dir" | grep -q 'not reached'; then
  echo 'a failed step did not end the script'
  exit 1
fi
echo "${#scripts[@]} scripts are fine"
