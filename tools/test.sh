#!/usr/bin/env bash
# Installs packages, builds everything and runs every test: unit, kernel conformance, integration with real processes.
# Where there is a CUDA compiler the CUDA kernels are built too (no GPU needed; tools/gpu_check.sh runs them on one).
#   tools/test.sh              release build, all tests
#   tools/test.sh --quick      only the unit tests
#   tools/test.sh --asan       AddressSanitizer and UndefinedBehaviorSanitizer too
#   tools/test.sh --tsan       ThreadSanitizer too
#   tools/test.sh --no-setup   do not look at packages
# Exit code: 0 when every test of every chosen build passed.
set -euo pipefail
cd "$(dirname "$0")/.."

quick=false setup=true presets=(release)
for argument in "$@"; do
  case $argument in
    --quick) quick=true ;;
    --asan) presets+=(asan) ;;
    --tsan) presets+=(tsan) ;;
    --no-setup) setup=false ;;
    -h | --help)
      sed -n '2,9s/^# \{0,1\}//p' "$0"
      exit 0
      ;;
    *)
      echo "test: unknown argument '$argument'; --help tells more" >&2
      exit 2
      ;;
  esac
done

LOG_DIR=$PWD/build/test-log
STEPS_TOTAL=$((4 + ${#presets[@]} * ($($quick && echo 3 || echo 4))))
STEP_TAIL_LINES=80
mkdir -p "$LOG_DIR"
. tools/steps.sh
started=$(now_ms)

at_exit() {
  local code=$?
  trap - EXIT
  stop_step
  echo
  if [ "$code" -eq 0 ]; then
    echo "${green}${bold}all tests passed${plain}: ${presets[*]}, in $(seconds_since "$started") s"
  else
    echo "${red}${bold}tests failed${plain} after $(seconds_since "$started") s (exit code $code). Logs: $LOG_DIR"
  fi
  exit "$code"
}
trap at_exit EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP

if $setup; then
  step_header 'Packages'
  echo "$STEP_TITLE"
  tools/setup.sh | sed 's/^/    /'
else
  step_note 'Packages' 'skipped'
fi

# What ctest said last: "100% tests passed, 0 tests failed out of 42".
summary() { grep -E 'tests passed|No tests were found' "$LOG_DIR/step-$STEPS_DONE.log" | tail -n 1 | sed 's/^/    /'; }

for preset in "${presets[@]}"; do
  step "Configure ($preset)" cmake --preset "$preset"
  step "Build ($preset)" cmake --build --preset "$preset" -j "$(nproc)"
  step "Unit tests ($preset)" ctest --preset "$preset" -L unit -j "$(nproc)" --no-tests=error
  summary
  if ! $quick; then
    # Real processes that measure time and kill each other: one test at a time.
    step "Integration tests ($preset)" ctest --preset "$preset" -LE unit
    summary
  fi
done

nvcc=$(PATH=$PATH:${CUDA_HOME:+$CUDA_HOME/bin:}${CUDA_PATH:+$CUDA_PATH/bin:}/usr/local/cuda/bin command -v nvcc || true)
if [ -n "$nvcc" ]; then
  # The kernels, what plans them and what checks them on a GPU; not the rest of the project a second time.
  step 'Configure (cuda)' cmake --preset cuda
  step 'Build kernels (cuda)' cmake --build --preset cuda -j "$(nproc)" --target nibble_cuda_check
  step 'Plan tests (cuda)' ctest --preset cuda -R '^(rows|attention|sampling|dense|gemm_w4ax|gemm_sm80)_(plan|segments|sass)_test$' -j "$(nproc)" --no-tests=error
  summary
else
  for title in 'Configure (cuda)' 'Build kernels (cuda)' 'Plan tests (cuda)'; do
    step_note "$title" 'skipped: no nvcc in PATH, CUDA_HOME or /usr/local/cuda'
  done
fi
