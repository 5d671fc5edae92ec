#!/usr/bin/env bash
# The native engine under AddressSanitizer and UndefinedBehaviorSanitizer: its kernels against plain loops, then random
# networks and requests. Needs only a C++ compiler with these; takes some minutes on two cores, most of them to compile.
#
#     tests/native/sanitize.sh [rounds]
set -euo pipefail
cd "$(dirname "$0")/../.."
rounds=${1:-60}
sources=src/hanmo/inference/native/src
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

compiler=${CXX:-g++}
command -v "$compiler" > /dev/null || { echo "skipped: there is no C++ compiler"; exit 0; }
flags=(-std=c++17 -O1 -g1 -fno-var-tracking -fopenmp -fno-math-errno -fno-trapping-math -ffp-contract=off -w -fno-omit-frame-pointer
       -fsanitize=address,undefined -fno-sanitize-recover=all "-I$sources")
echo 'int main() {}' > "$work/empty.cpp"
"$compiler" "${flags[@]}" "$work/empty.cpp" -o "$work/empty" 2> /dev/null || { echo "skipped: no sanitizers"; exit 0; }

declare -A levels=([plain]="")
if [ "$(uname -m)" = x86_64 ]; then
  grep -qw avx2 /proc/cpuinfo && levels[avx2]="-march=x86-64-v3"
  grep -qw avx512_vnni /proc/cpuinfo && levels[avx512]="-march=x86-64-v4 -mavx512vnni"
elif [ "$(uname -m)" = aarch64 ]; then
  grep -qw asimddp /proc/cpuinfo && levels[neon]="-march=armv8.2-a+dotprod"
fi

# what is too large is refused, not given: as without sanitizers
export ASAN_OPTIONS="allocator_may_return_null=1:max_allocation_size_mb=2048:detect_leaks=1"
export UBSAN_OPTIONS="print_stacktrace=1" OMP_NUM_THREADS=2
for level in "${!levels[@]}"; do
  echo "== $level"
  read -ra machine <<< "${levels[$level]}"
  build() { "$compiler" "${flags[@]}" "${machine[@]}" "$@"; }
  build -c "$sources/walk.cpp" -o "$work/walk.o" &
  build tests/native/kernels.cpp -o "$work/kernels" &
  build -c "$sources/api.cpp" -o "$work/api.o"
  build -c tests/native/requests.cpp -o "$work/requests.o"
  for job in $(jobs -p); do wait "$job"; done
  build "$work"/{api,walk,requests}.o -o "$work/requests"
  "$work/kernels"
  "$work/requests" "${SEED:-1}" "$rounds"
done
