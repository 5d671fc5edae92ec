// What all kernels share: vector types that every compiler target understands, and the loop over threads.
//
// A vector is 16 floats wide on every machine; the compiler splits it into what the target has (one register with
// AVX-512, two with AVX2, four with NEON). Code that needs an instruction of one target stands behind its macro, with
// a portable form beside it.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif
#if defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace hanmo {

constexpr int kWidth = 16;
typedef float vfloat __attribute__((vector_size(64), aligned(4), may_alias));
typedef int32_t vint __attribute__((vector_size(64), aligned(4), may_alias));

inline vfloat load(const float* p) { return *reinterpret_cast<const vfloat*>(p); }
inline void store(float* p, vfloat v) { *reinterpret_cast<vfloat*>(p) = v; }
inline vfloat splat(float x) { return vfloat{} + x; }

inline vfloat load_part(const float* p, int64_t count) {  // the first `count` < 16 values, zeros after them
  vfloat v = {};
  std::memcpy(&v, p, count * sizeof(float));
  return v;
}
inline void store_part(float* p, vfloat v, int64_t count) { std::memcpy(p, &v, count * sizeof(float)); }

inline float sum(vfloat v) {
  float total = 0;
  for (int i = 0; i < kWidth; i++) total += v[i];
  return total;
}

// Calls body(i) for i in [0, n), split between the threads of the OpenMP team that torch uses.
template <typename Body>
inline void parallel_for(int64_t n, const Body& body) {
#pragma omp parallel for schedule(static)
  for (int64_t i = 0; i < n; i++) body(i);
}

}  // namespace hanmo
