#!/usr/bin/env bash
# The native engine under AddressSanitizer and UndefinedBehaviorSanitizer, in each form that this machine runs: its
# kernels against plain loops, then random networks, requests and texts. Needs only a C++ compiler with these; takes
# some minutes on two cores, most of them to compile.
#
#     tests/native/sanitize.sh [rounds] [form ...]        60 rounds; forms: plain avx2 avxvnni avx512 neon
set -euo pipefail
cd "$(dirname "$0")"
tests=$PWD sources=$(cd ../../src/hanmo/inference/native/src && pwd)
rounds=${1:-60}
shift $(($# ? 1 : 0))
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"

compiler=${CXX:-g++}
command -v "$compiler" > /dev/null || { echo "skipped: there is no C++ compiler"; exit 0; }
# a null pointer ends the program by itself; to look for it before each access takes most of the time to compile
flags=(-std=c++17 -O1 -g1 -fno-var-tracking -fopenmp -fno-math-errno -fno-trapping-math -ffp-contract=off -w -fno-omit-frame-pointer
       -fsanitize=address,undefined -fno-sanitize=null,object-size,vptr -fno-sanitize-recover=all -D_GLIBCXX_SANITIZE_VECTOR=1
       "-I$sources")
echo 'int main() {}' > empty.cpp
"$compiler" "${flags[@]}" empty.cpp -o empty 2> /dev/null || { echo "skipped: no sanitizers"; exit 0; }

declare -A machine=([plain]="" [avx2]="-march=x86-64-v3" [avxvnni]="-march=x86-64-v3 -mavxvnni" [avx512]="-march=x86-64-v4 -mavx512vnni" [neon]="-march=armv8.2-a+dotprod")
forms=(plain)
case $(uname -m) in
  x86_64)
    grep -qw avx2 /proc/cpuinfo && forms+=(avx2)
    # where AVX-512 has the same instruction and AVX has not, AVX-512's stands in for it
    if grep -qw avx_vnni /proc/cpuinfo; then
      forms+=(avxvnni)
    elif grep -qw avx512_vnni /proc/cpuinfo; then
      forms+=(avxvnni)
      printf '%s\n' '#include <immintrin.h>' '#define _mm256_dpbusd_avx_epi32 _mm256_dpbusd_epi32' > stand_in.h
      machine[avxvnni]="-march=x86-64-v3 -mavx512vl -mavx512vnni -include $work/stand_in.h -D__AVXVNNI__ -U__AVX512F__ -U__AVX512VNNI__"
    fi
    grep -qw avx512_vnni /proc/cpuinfo && forms+=(avx512) ;;
  aarch64) grep -qw asimddp /proc/cpuinfo && forms+=(neon) ;;
esac
(($#)) && forms=("$@")

# A program with a fault that was planted ends with this complaint: what follows could fail.
caught() {
  if "${@:2}" > log 2>&1 || ! grep -q "$1" log; then
    echo "WRONG: a planted fault was not caught: $1"
    exit 1
  fi
}

# what is too large is refused, not given: as without sanitizers
export ASAN_OPTIONS="allocator_may_return_null=1:max_allocation_size_mb=2048:detect_leaks=1"
export UBSAN_OPTIONS="print_stacktrace=1" OMP_NUM_THREADS=2
for form in "${forms[@]}"; do
  echo "== $form"
  read -ra instructions <<< "${machine[$form]}"
  programs=(kernels requests texts)
  files=("$sources"/{walk,encoder}.cpp "$tests"/{kernels,requests,texts}.cpp "$sources/api.cpp")
  # AVX2 but for one instruction in the kernels
  [ "$form" = avxvnni ] && programs=(kernels) files=("$tests/kernels.cpp")
  printf '%s\n' "${files[@]}" |
    xargs -P "$(nproc)" -I@ "$compiler" "${flags[@]}" "${instructions[@]}" -c @
  for program in "${programs[@]}"; do
    engine=({api,walk,encoder}.o)
    [ $program = kernels ] && engine=()
    "$compiler" "${flags[@]}" $program.o "${engine[@]}" -o $program
  done
  caught "signed integer overflow" ./kernels planted
  ./kernels | tee "$form.bits"
  [ "$form" = avxvnni ] && continue
  caught "AddressSanitizer" ./requests planted
  # warnings are of memory that no machine has
  ./requests "${SEED:-1}" "$rounds" 2> >(grep -v "WARNING: AddressSanitizer failed to allocate" >&2)
  ./texts "${SEED:-1}" "$rounds"
done

if [ "$(cat ./*.bits | grep exact | sort -u | wc -l)" != 1 ]; then
  echo "WRONG: what is exact differs between the forms"
  exit 1
fi
for form in avxvnni avx512; do
  if [ -f avx2.bits ] && [ -f $form.bits ] && ! cmp -s <(tail -1 avx2.bits) <(tail -1 $form.bits); then
    echo "WRONG: AVX2 and $form round differently"
    exit 1
  fi
done
