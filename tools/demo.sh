#!/usr/bin/env bash
# From a clone to prose: installs packages, builds, quantizes the bundled model to W4A4KV4, starts nibble-router and two
# tensor-parallel nibble-workers on free ports, streams a generation through gRPC, and stops everything again.
#   tools/demo.sh                  the whole way; quick when built already
#   tools/demo.sh --keep           leave the system running and print its addresses
#   tools/demo.sh --prompt TEXT    continue another text
#   tools/demo.sh --no-setup       do not look at packages
# Exit code: 0 when prose came out, otherwise that of the step that failed.
set -euo pipefail
cd "$(dirname "$0")/.."

keep=false setup=true
prompt='The rain had not ceased since morning. Elizabeth stood at the window, and'
while [ $# -gt 0 ]; do
  case $1 in
    --keep) keep=true ;;
    --no-setup) setup=false ;;
    --prompt)
      [ $# -ge 2 ] || { echo "demo: --prompt needs a text" >&2; exit 2; }
      prompt=$2
      shift
      ;;
    -h | --help)
      sed -n '2,8s/^# \{0,1\}//p' "$0"
      exit 0
      ;;
    *)
      echo "demo: unknown argument '$1'; --help tells more" >&2
      exit 2
      ;;
  esac
  shift
done

run_dir=$PWD/build/demo
bin=$PWD/build/release/bin
source_model=deploy/models/novelist-17m
model=$run_dir/novelist-17m-w4a4kv4  # the name it will have in the service
LOG_DIR=$run_dir/log
STEPS_TOTAL=7
mkdir -p "$LOG_DIR"
. tools/steps.sh
started=$(now_ms)

# ---- children end with this script, however it ends ------------------------------------------------------------------
pids=()
spoken=false  # whether the verdict was given

stop_children() {
  [ ${#pids[@]} -gt 0 ] || return 0
  kill -TERM "${pids[@]}" 2>/dev/null || true
  local pid i
  for pid in "${pids[@]}"; do
    for ((i = 0; i < 100; ++i)); do
      kill -0 "$pid" 2>/dev/null || break
      sleep 0.1
    done
    kill -KILL "$pid" 2>/dev/null || true
  done
  wait "${pids[@]}" 2>/dev/null || true
  pids=()
}

at_exit() {
  local code=$?
  trap - EXIT
  stop_step
  stop_children
  if [ "$code" -ne 0 ] && ! $spoken; then
    echo
    echo "${red}${bold}demo failed${plain} after $(seconds_since "$started") s (exit code $code). Logs: $LOG_DIR"
  fi
  exit "$code"
}
trap at_exit EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP

# start NAME COMMAND...: in the background, output to NAME.log. The kernel kills it when this shell dies without traps.
start() {
  local name=$1
  shift
  if $keep; then
    setsid "$@" >"$LOG_DIR/$name.log" 2>&1 </dev/null &
  elif command -v setpriv >/dev/null; then
    setpriv --pdeathsig KILL -- "$@" >"$LOG_DIR/$name.log" 2>&1 </dev/null &
  else
    "$@" >"$LOG_DIR/$name.log" 2>&1 </dev/null &
  fi
  pids+=($!)
}

# port_of NAME: waits for NAME.port; sets $port.
port_of() {
  local pid=${pids[-1]} i
  for ((i = 0; i < 600; ++i)); do
    if [ -s "$run_dir/$1.port" ]; then
      port=$(tr -d '[:space:]' <"$run_dir/$1.port")
      return 0
    fi
    kill -0 "$pid" 2>/dev/null || break
    sleep 0.05
  done
  echo "$1 did not start:" >&2
  tail -n 20 "$LOG_DIR/$1.log" >&2
  return 1
}

# ---- steps -----------------------------------------------------------------------------------------------------------
if $setup; then
  step_header 'Packages'
  echo "$STEP_TITLE"
  tools/setup.sh | sed 's/^/    /'
else
  step_note 'Packages' 'skipped'
fi

step 'Configure' cmake --preset release
step 'Build' cmake --build --preset release -j "$(nproc)" \
  --target nibble-quantize nibble-worker nibble-router nibble

if [ -f "$model/config.json" ] && [ "$model/config.json" -nt "$bin/nibble-quantize" ] &&
  [ "$model/config.json" -nt "$source_model/model.safetensors" ]; then
  step_note 'Quantize to W4A4KV4' 'up to date'
else
  rm -rf "$model"
  step 'Quantize to W4A4KV4' "$bin/nibble-quantize" --model "$source_model" --output "$model" --mode w4a4kv4 \
    --calibration deploy/models/text/calibration.txt
fi

step_header 'Start nibble-router and 2 nibble-workers (one replica, tensor-parallel)'
echo "$STEP_TITLE"
begin=$(now_ms)
rm -f "$run_dir"/*.port
workers=()
for rank in 0 1; do
  start "worker-$rank" "$bin/nibble-worker" --model "$model" --listen 127.0.0.1:0 --port-file "$run_dir/worker-$rank.port" \
    --metrics-listen 127.0.0.1:0 --metrics-port-file "$run_dir/worker-$rank-metrics.port" --kv-memory 64MiB
  port_of "worker-$rank"
  workers+=("127.0.0.1:$port")
done
start router "$bin/nibble-router" --model "$model" --listen 127.0.0.1:0 --port-file "$run_dir/router.port" \
  --metrics-listen 127.0.0.1:0 --metrics-port-file "$run_dir/router-metrics.port" --replica "${workers[0]},${workers[1]}"
port_of router
server=127.0.0.1:$port
"$bin/nibble" status --server "$server" --wait 60 >/dev/null
echo "    ${green}ready${plain}  $(seconds_since "$begin") s  ${dim}router $server, workers ${workers[*]}${plain}"

sampling=(--max-tokens 150 --temperature 0.75 --top-p 0.9 --repetition-penalty 1.1 --seed 6)
step_header 'Generate'
echo "$STEP_TITLE  ${dim}nibble generate --server $server ${sampling[*]}${plain}"
echo
# The summary, on stderr, waits until tee has passed on the last word.
generated=0
"$bin/nibble" generate --server "$server" --prompt "$prompt" --echo "${sampling[@]}" --deadline 60 2>"$LOG_DIR/generate.err" |
  tee "$run_dir/prose.txt" || generated=$?
echo
echo "    ${dim}$(cat "$LOG_DIR/generate.err")${plain}"
if [ "$generated" -ne 0 ]; then exit "$generated"; fi
if [ "$(wc -w <"$run_dir/prose.txt")" -lt 40 ]; then
  echo "demo: the generation is shorter than 40 words" >&2
  exit 1
fi
echo

step_header 'Status'
echo "$STEP_TITLE"
"$bin/nibble" status --server "$server" | sed 's/^/    /'
echo

spoken=true
if $keep; then
  metrics=$(tr -d '[:space:]' <"$run_dir/router-metrics.port")
  echo "${green}${bold}demo ok${plain} in $(seconds_since "$started") s; the system stays up:"
  cat <<TEXT
    gRPC       $server            (nibble.v1.Inference, health, reflection)
    metrics    http://127.0.0.1:$metrics/metrics
    try        build/release/bin/nibble generate --server $server "Call me Ishmael."
               build/release/bin/nibble status --server $server --watch
    logs       $LOG_DIR
    stop       kill ${pids[*]}
TEXT
  trap - EXIT
  exit 0
fi
stop_children
echo "${green}${bold}demo ok${plain} in $(seconds_since "$started") s. Next: tools/demo.sh --keep, tools/test.sh, docs/README.md"
