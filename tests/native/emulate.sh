#!/usr/bin/env bash
# The native engine built for ARM and run here by qemu, with NEON's dot product and without: its kernels against plain
# loops and against the bits that this machine's have, then random networks, requests and texts.
# Needs g++-aarch64-linux-gnu and qemu-user; takes some minutes on two cores.
#
#     tests/native/emulate.sh [rounds]                     8 rounds
set -euo pipefail
cd "$(dirname "$0")"
tests=$PWD sources=$(cd ../../src/hanmo/inference/native/src && pwd)
rounds=${1:-8}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"

compiler=aarch64-linux-gnu-g++
for needed in $compiler qemu-aarch64; do
  command -v $needed > /dev/null || { echo "skipped: there is no $needed"; exit 0; }
done
flags=(-std=c++17 -O2 -fopenmp -fno-math-errno -fno-trapping-math -ffp-contract=off -w "-I$sources")
export OMP_NUM_THREADS=2 QEMU_LD_PREFIX=/usr/aarch64-linux-gnu

# The bits of this machine's kernels: what is exact, and with instructions that multiply and add at once what is rounded.
exact="" rounded=""
if command -v g++ > /dev/null; then
  here=()
  grep -qw avx2 /proc/cpuinfo && here=(-march=x86-64-v3)
  g++ "${flags[@]}" "${here[@]}" "$tests/kernels.cpp" -o here && ./here | tee here.bits
  exact=$(grep exact here.bits)
  [ ${#here[@]} = 0 ] || rounded=$(grep rounded here.bits)
fi

declare -A machine=([neon]="-march=armv8.2-a+dotprod" [plain]="")
for form in neon plain; do
  echo "== ARM, $form"
  read -ra instructions <<< "${machine[$form]}"
  printf '%s\n' "$sources"/{walk,encoder}.cpp "$tests"/{kernels,requests,texts}.cpp "$sources/api.cpp" |
    xargs -P "$(nproc)" -I@ $compiler "${flags[@]}" "${instructions[@]}" -c @
  $compiler "${flags[@]}" kernels.o -o kernels
  $compiler "${flags[@]}" {api,walk,encoder,requests}.o -o requests
  $compiler "${flags[@]}" {api,walk,encoder,texts}.o -o texts
  qemu-aarch64 ./kernels | tee arm.bits
  for bits in "$exact" "$rounded"; do
    grep -q "$bits" arm.bits || { echo "WRONG: this machine has other bits: $bits"; exit 1; }
  done
  qemu-aarch64 ./requests "${SEED:-1}" "$rounds"
  qemu-aarch64 ./texts "${SEED:-1}" "$rounds"
done
