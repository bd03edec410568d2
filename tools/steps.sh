# shellcheck shell=bash
# Numbered steps with live progress, for tools/demo.sh and tools/test.sh. To be sourced; the caller sets STEPS_TOTAL and
# LOG_DIR and uses `set -euo pipefail`.
#   step "Build" cmake --build build/release        [3/6] Build ............ 41.2 s
# A step's output goes to $LOG_DIR; on a terminal its newest line is shown while it runs, elsewhere a line every 30 s.
# A failing step shows the end of its output and ends the script with the step's exit code.

STEPS_DONE=0
STEP_CHILD=
if [ -t 1 ]; then
  bold=$'\e[1m' dim=$'\e[2m' red=$'\e[31m' green=$'\e[32m' cyan=$'\e[36m' plain=$'\e[0m'
else
  bold='' dim='' red='' green='' cyan='' plain=''
fi

now_ms() { date +%s%3N; }
seconds_since() { local ms=$(($(now_ms) - $1)); printf '%d.%d' $((ms / 1000)) $((ms % 1000 / 100)); }

step_header() {
  STEPS_DONE=$((STEPS_DONE + 1))
  STEP_TITLE="${cyan}[$STEPS_DONE/$STEPS_TOTAL]${plain} ${bold}$1${plain}"
}

# step_note TEXT: a step that had nothing to do.
step_note() {
  step_header "$1"
  echo "$STEP_TITLE  ${dim}$2${plain}"
}

step() {
  local title=$1 start log code=0 line last_report room polls=0
  shift
  step_header "$title"
  start=$(now_ms)
  last_report=$start
  log=$LOG_DIR/step-$STEPS_DONE.log
  : >"$log"
  [ -t 1 ] || echo "$STEP_TITLE"
  "$@" >"$log" 2>&1 </dev/null &
  STEP_CHILD=$!
  while kill -0 "$STEP_CHILD" 2>/dev/null; do
    if [ -t 1 ]; then
      line=$(tail -c 2000 "$log" | tr '\r' '\n' | sed 's/\x1b\[[0-9;]*[A-Za-z]//g' | grep -v '^ *$' | tail -n 1 || true)
      room=$(($(tput cols 2>/dev/null || echo 80) - ${#title} - 22))
      printf '\r\e[K%s  %s s  %s%s%s' "$STEP_TITLE" "$(seconds_since "$start")" "$dim" "${line:0:$((room > 0 ? room : 0))}" "$plain"
    elif [ $(($(now_ms) - last_report)) -ge 30000 ]; then
      last_report=$(now_ms)
      echo "    $(seconds_since "$start") s  $(tail -c 400 "$log" | tr '\r' '\n' | tail -n 1)"
    fi
    sleep "$((polls++ < 10 ? 0 : 1)).1"  # short steps end at once, long ones leave the CPU alone
  done
  wait "$STEP_CHILD" || code=$?
  STEP_CHILD=
  if [ "$code" -eq 0 ]; then
    if [ -t 1 ]; then
      printf '\r\e[K%s  %sok%s  %s s\n' "$STEP_TITLE" "$green" "$plain" "$(seconds_since "$start")"
    else
      echo "    ok  $(seconds_since "$start") s"
    fi
    return 0
  fi
  if [ -t 1 ]; then printf '\r\e[K%s\n' "$STEP_TITLE"; fi
  tail -n "${STEP_TAIL_LINES:-40}" "$log"
  echo "    ${red}failed${plain} after $(seconds_since "$start") s with exit code $code; all of its output: $log"
  return "$code"
}

stop_step() {
  if [ -n "$STEP_CHILD" ]; then kill "$STEP_CHILD" 2>/dev/null || true; fi
}
