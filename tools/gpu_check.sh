#!/usr/bin/env bash
# Is the CUDA backend right and fast on this machine? Conformance with the CPU specification, compute-sanitizer on a part of
# it, the operator benchmark; then one table, a verdict and a JSON file. From a source tree (builds first; needs nvcc, cmake
# and the packages of tools/setup.sh) or from a bundle (needs the driver and CUDA's libraries only).
#   tools/gpu_check.sh                        build for this GPU, then everything
#   tools/gpu_check.sh --steps conformance    some of conformance,memcheck,racecheck,bench
#   tools/gpu_check.sh --bench '--ops linear --shapes 70b,8b'    other arguments of nibble-bench-op
#   tools/gpu_check.sh --out DIR              where logs and gpu_check.json go (default: gpu_check.out)
#   tools/gpu_check.sh --bundle OUT.tar.xz    build and pack for a machine without compilers; needs no GPU
#   tools/gpu_check.sh --build DIR            this build folder (default: build/gpu_check); configured if it is new
#   tools/gpu_check.sh --architectures 90a    compute capabilities of the bundle (default: 80;89;90a)
# Exit code: 0 when all is right, 1 when something is wrong, 2 for bad arguments, 3 when this machine lacks something.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)

tests=(linear_test rows_test attention_test sampling_test)  # of every backend: here their CUDA half
cuda_tests=(rows_conformance_test gemm_w4ax_silu_test gemm_sm80_conformance_test)  # those that this build has
steps=conformance,memcheck,racecheck,bench bench='' out=gpu_check.out bundle='' build='' architectures=''
while [ $# -gt 0 ]; do
  case $1 in
    --steps | --bench | --out | --bundle | --build | --architectures)
      [ $# -ge 2 ] || { echo "gpu_check: $1 needs a value" >&2; exit 2; }
      declare "${1#--}=$2"
      shift
      ;;
    -h | --help)
      sed -n '2,12s/^# \{0,1\}//p' "$0"
      exit 0
      ;;
    *)
      echo "gpu_check: unknown argument '$1'; --help tells more" >&2
      exit 2
      ;;
  esac
  shift
done
for step in ${steps//,/ }; do
  case $step in
    conformance | memcheck | racecheck | bench) ;;
    *) echo "gpu_check: --steps has '$step', must be some of conformance, memcheck, racecheck, bench" >&2; exit 2 ;;
  esac
done

lacks() {
  echo "gpu_check: $1" >&2
  exit 3
}
export PATH=$PATH:${CUDA_HOME:-/usr/local/cuda}/bin
# Behind whatever is set already: a bundle's libraries, then CUDA's.
export LD_LIBRARY_PATH=$here/lib:${CUDA_HOME:-/usr/local/cuda}/lib64:${LD_LIBRARY_PATH:-}

# What was built: a commit, marked when files differ from it.
commit_of_tree() { git -C "$here/.." describe --always --dirty --exclude '*' 2>/dev/null || echo unknown; }

build_tree() {  # ARCHITECTURES
  local tree=$here/..
  command -v cmake >/dev/null || lacks 'cmake is not installed, and this is a source tree: install it, or take a bundle'
  command -v nvcc >/dev/null || lacks 'nvcc was not found in PATH, CUDA_HOME or /usr/local/cuda: install the CUDA toolkit, or take a bundle'
  build=${build:-$tree/build/gpu_check}
  if [ ! -e "$build/CMakeCache.txt" ]; then
    cmake -S "$tree" -B "$build" -DCMAKE_BUILD_TYPE=Release -DNIBBLE_WITH_CUDA=ON "-DNIBBLE_CUDA_ARCHITECTURES=$1" >"$out/cmake.log" 2>&1 ||
      lacks "cmake failed, see $out/cmake.log (tools/setup.sh installs the packages it needs)"
  fi
  echo "building in $build ..."
  local targets=("${tests[@]}" rows_conformance_test nibble-bench-op)
  [[ $1 != *90a* ]] || targets+=(gemm_w4ax_silu_test)
  [[ $1 != *8[09]* ]] || targets+=(gemm_sm80_conformance_test)
  cmake --build "$build" --parallel "$(nproc)" --target "${targets[@]}" >"$out/build.log" 2>&1 || {
    tail -n 20 "$out/build.log" >&2
    echo "gpu_check: the build failed, see $out/build.log" >&2
    exit 1
  }
  bin=$build/bin
}

pack() {  # FILE
  local stage
  stage=$(mktemp -d)
  mkdir -p "$stage/gpu_check/bin" "$stage/gpu_check/lib"
  for program in "${tests[@]}" "${cuda_tests[@]}" nibble-bench-op; do
    [ -e "$bin/$program" ] || continue
    strip -o "$stage/gpu_check/bin/$program" "$bin/$program"
    # What every Linux or CUDA itself brings stays out.
    ldd "$bin/$program" | awk '$2 == "=>" && $3 ~ /^\// {print $3}' |
      grep -vE '/(libc|libm|libdl|librt|libpthread|libgcc_s|libstdc\+\+|libcuda[a-z]*|libcublas(Lt)?|ld-linux[^/]*)\.so' || true
  done | sort -u | while read -r library; do
    cp -L "$library" "$stage/gpu_check/lib/"
    strip "$stage/gpu_check/lib/$(basename "$library")"
  done
  cp "$0" "$stage/gpu_check/gpu_check.sh"
  commit_of_tree >"$stage/gpu_check/commit"
  tar -C "$stage" -cJf "$1" gpu_check
  rm -rf "$stage"
  echo "packed $1, $(du -h "$1" | cut -f1): unpack it and run gpu_check/gpu_check.sh"
}

mkdir -p "$out"
if [ -n "$bundle" ]; then
  build_tree "${architectures:-80;89;90a}"
  pack "$bundle"
  exit 0
fi
command -v nvidia-smi >/dev/null || lacks 'nvidia-smi was not found: is the NVIDIA driver installed?'
gpu=$(nvidia-smi --query-gpu=name,driver_version,compute_cap --format=csv,noheader 2>/dev/null | head -n 1) ||
  lacks 'nvidia-smi finds no GPU'
[ -n "$gpu" ] || lacks 'nvidia-smi finds no GPU'
if [ -x "$here/bin/nibble-bench-op" ]; then
  bin=$here/bin
else
  case ${gpu##*, } in
    8.0) build_tree '80' ;;
    8.9) build_tree '89' ;;
    9.0) build_tree '90a' ;;
    *) lacks "compute capability ${gpu##*, } has no kernels; those of 8.0, 8.9 and 9.0 have" ;;
  esac
fi
commit=$(cat "$here/commit" 2>/dev/null || commit_of_tree)
echo "$gpu, commit $commit"

# ---- the checks: one row each: name, result (ok, FAILED, skipped), seconds, detail
rows=() failed=0
record() {
  rows+=("$1|$2|$3|$4")
  printf '%-28s %-8s %5ss  %s\n' "$1" "$2" "$3" "$4"
  [ "$2" != FAILED ] || failed=$((failed + 1))
}

# NAME LOG COMMAND...: ok when it exits with 0; the detail is the last line of the log that says how many tests passed or
# what the sanitizer counted.
check() {
  local name=$1 log=$2 begin=$SECONDS result=ok code=0 detail
  shift 2
  "$@" >"$log" 2>&1 || code=$?
  [ $code -eq 0 ] || result=FAILED
  detail=$(grep -aE 'ERROR SUMMARY|RACECHECK SUMMARY|\[  (PASSED|FAILED) +\] [0-9]+ test|error:|bug:' "$log" | tail -n 1 | sed 's/^=* *//') || true
  if [ $result = ok ] && grep -aq '\[  PASSED  \] 0 tests' "$log" && ! grep -aq '\[  SKIPPED \]' "$log"; then
    result=FAILED  # the filter or the build has no CUDA
  elif [ $result = ok ] && grep -aq '\[  SKIPPED \]' "$log"; then
    result=skipped
    detail=$(grep -a -m 1 -A 1 'Skipped' "$log" | tail -n 1)
  fi
  record "$name" $result $((SECONDS - begin)) "${detail:-exit code $code}, $log"
}
wants() { [[ ,$steps, == *,$1,* ]]; }

if wants conformance; then
  for test in "${tests[@]}"; do
    check "conformance ${test%_test}" "$out/$test.log" "$bin/$test" --gtest_filter='*/cuda*' "--gtest_output=json:$out/$test.json"
  done
  for test in "${cuda_tests[@]}"; do
    [ ! -e "$bin/$test" ] || check "${test%_test}" "$out/$test.log" "$bin/$test"
  done
fi
# Small tests only: a sanitizer makes kernels a hundred times slower.
sanitize() {  # TOOL TEST FILTER
  if ! command -v compute-sanitizer >/dev/null; then
    record "$1 ${2%_test}" skipped 0 'compute-sanitizer was not found; it is part of the CUDA toolkit'
    return
  fi
  check "$1 ${2%_test}" "$out/$1.$2.log" timeout 300 compute-sanitizer --tool "$1" --error-exitcode 9 --print-limit 5 \
    "$bin/$2" --gtest_filter="$3"
}
for tool in memcheck racecheck; do
  wants $tool || continue
  sanitize $tool sampling_test '*EqualsTheSpecification/cuda:*LogprobsAreOfTheRawLogits/cuda:*RecordHistory*/cuda'
  sanitize $tool linear_test '*/cuda'
  sanitize $tool rows_test '*/cuda'
  sanitize $tool attention_test '*/cuda'
done
if wants bench; then
  read -ra arguments <<<"$bench"
  begin=$SECONDS code=0
  "$bin/nibble-bench-op" --backend cuda --threads "$(nproc)" --json "$out/op.json" "${arguments[@]}" >"$out/op.txt" 2>"$out/op.log" || code=$?
  cat "$out/op.txt"
  detail=$(tail -n 1 "$out/op.txt")
  [ $code -eq 0 ] && result=ok || result=FAILED
  record 'operator benchmark' "$result" $((SECONDS - begin)) "${detail:-$(tail -n 1 "$out/op.log")}"
fi

# ---- one table, a verdict, JSON
echo
printf '%-28s %-8s %6s  %s\n' check result time detail
json=''
for row in "${rows[@]}"; do
  IFS='|' read -r name result seconds detail <<<"$row"
  printf '%-28s %-8s %5ss  %s\n' "$name" "$result" "$seconds" "$detail"
  detail=${detail//\\/\\\\}
  json+="${json:+,}
  {\"name\": \"$name\", \"result\": \"$result\", \"seconds\": $seconds, \"detail\": \"${detail//\"/\\\"}\"}"
done
{
  printf '{"date": "%s", "commit": "%s", "gpu": "%s", "failed": %s, "checks": [%s\n ]' "$(date -u +%Y%m%d-%H%M%S)" "$commit" "$gpu" \
    $failed "$json"
  if [ -s "$out/op.json" ] && wants bench; then
    printf ',\n "op": '
    cat "$out/op.json"
  fi
  echo '}'
} >"$out/gpu_check.json"
if [ $failed -eq 0 ]; then
  echo "RIGHT: ${#rows[@]} checks, none failed ($out/gpu_check.json)"
else
  echo "WRONG: $failed of ${#rows[@]} checks failed ($out/gpu_check.json)"
  exit 1
fi
