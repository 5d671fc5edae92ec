// Elementary functions of a vector of floats, and the walk over a row in steps of one vector.
//
// A vector here is as wide as a register of the target: g++ computes wider ones number by number (12.2 does, seen with
// -Wvector-operation-performance), which makes an exponential ten times slower with AVX2.
//
// The coefficients are least-maximum-error fits (by reweighted least squares, against scipy in float64). NaN comes
// out as NaN. Numbers are rounded by conversion to int: the trick of adding and subtracting 1.5*2^23 does nothing
// under -ffast-math.
#pragma once

#include "common.h"

#define INLINE inline __attribute__((always_inline))

namespace hanmo {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif
typedef float lanes __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));
typedef int32_t ilanes __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));

INLINE lanes all(float x) { return lanes{} + x; }
INLINE float total(lanes v) {
  float sum = 0;
  for (int i = 0; i < kLanes; i++) sum += v[i];
  return sum;
}
INLINE lanes maximum(lanes a, lanes b) { return a > b ? a : b; }
INLINE float largest(lanes v) {
  float top = v[0];
  for (int i = 1; i < kLanes; i++) top = v[i] > top ? v[i] : top;
  return top;
}

constexpr int64_t kParallel = 32768;  // floats from which a second thread pays

// Calls body(i) for i in [0, n); split between threads only if there is work for them, `work` being counted in floats.
template <typename Body>
inline void parallel_for_work(int64_t n, int64_t work, const Body& body) {
#pragma omp parallel for schedule(static) if (work >= kParallel)
  for (int64_t i = 0; i < n; i++) body(i);
}

struct Whole {  // one vector of a row, from `at` on
  int64_t at;
  INLINE lanes load(const float* row, float = 0.0f) const { return *reinterpret_cast<const lanes*>(row + at); }
  INLINE void store(float* row, lanes v) const { *reinterpret_cast<lanes*>(row + at) = v; }
};

struct Part {  // the last values of a row, fewer than a vector; what is read after them is `fill`, nothing is written
  int64_t at, count;
#if defined(__AVX512F__)
  INLINE __mmask16 mask() const { return static_cast<__mmask16>((1u << count) - 1); }
  INLINE lanes load(const float* row, float fill = 0.0f) const {
    return (lanes)_mm512_mask_loadu_ps(_mm512_set1_ps(fill), mask(), row + at);
  }
  INLINE void store(float* row, lanes v) const { _mm512_mask_storeu_ps(row + at, mask(), (__m512)v); }
#else
  INLINE lanes load(const float* row, float fill = 0.0f) const {
    lanes v = all(fill);
    for (int64_t i = 0; i < count; i++) v[i] = row[at + i];
    return v;
  }
  INLINE void store(float* row, lanes v) const {
    for (int64_t i = 0; i < count; i++) row[at + i] = v[i];
  }
#endif
};

// Calls body(piece) for the pieces of [first, n), each of which loads from and stores into rows.
template <typename Body>
INLINE void for_row(int64_t first, int64_t n, const Body& body) {
  int64_t i = first;
  for (; i + kLanes <= n; i += kLanes) body(Whole{i});
  if (i < n) body(Part{i, n - i});
}

// The value, which -ffast-math may not merge with what it is added to. (g++'s own __builtin_assoc_barrier takes a
// vector apart.)
INLINE lanes as_written(lanes v) {
#if defined(__AVX512F__)
  asm("" : "+v"(v));
#elif defined(__x86_64__)
  asm("" : "+x"(v));
#elif defined(__aarch64__)
  asm("" : "+w"(v));
#else
  asm("" : "+m"(v));
#endif
  return v;
}

// e^x, to 1.5 units in the last place; below -87 it stays at 1e-38, above 88 at 2e38.
INLINE lanes exp(lanes x) {
  x = x < -87.3f ? all(-87.3f) : x;
  x = x > 88.3f ? all(88.3f) : x;
  ilanes power = __builtin_convertvector(x * 1.44269504f + 127.5f, ilanes);  // exponent with its bias
  lanes n = __builtin_convertvector(power - 127, lanes);
  lanes r = x - n * 0.693359375f;  // ln 2 in two parts; the first has few bits, so this is exact
  r = as_written(r) + n * 2.12194440e-4f;
  lanes q = all(0.0013814218f);
  q = q * r + 0.0083688991f;
  q = q * r + 0.0416684076f;
  q = q * r + 0.1666651964f;
  q = q * r + 0.4999999404f;
  ilanes bits = power << 23;
  return (q * r * r + r + 1.0f) * (lanes)bits;
}

// 1/(1 + e^-x), and what is missing to one, which subtraction would lose where the first is near one.
INLINE lanes sigmoid(lanes x, lanes& missing) {
  lanes e = exp(-x), s = 1.0f / (1.0f + e);
  missing = e * s;
  return s;
}
INLINE lanes sigmoid(lanes x) { return 1.0f / (1.0f + exp(-x)); }

INLINE lanes tanh(lanes x) {
  lanes size = x < 0.0f ? -x : x, square = x * x;
  lanes far = 1.0f - 2.0f / (exp(size + size) + 1.0f);
  lanes near = all(-0.0058951592f);  // x + x^3 q(x^2), where the other form cancels
  near = near * square + 0.0207959730f;
  near = near * square - 0.0537838303f;
  near = near * square + 0.1333192438f;
  near = near * square - 0.3333329856f;
  return size < 0.6f ? near * square * x + x : (x < 0.0f ? -far : far);
}

// Phi(x), the probability that a standard normal number is below x, and its density; both with a small relative
// error on the negative side too, where (1 + erf)/2 would have none of its digits left.
INLINE void normal(lanes x, lanes& below, lanes& density) {
  lanes size = x < 0.0f ? -x : x;
  size = size > 13.2f ? all(13.2f) : size;
  lanes bell = exp(size * size * -0.5f);
  lanes t = 1.0f / (0.35f * size + 1.0f);
  lanes ratio = all(-0.0291093271f);  // of the tail to the bell: a polynomial in 1/(1 + 0.35 |x|)
  ratio = ratio * t + 0.1437901258f;
  ratio = ratio * t - 0.2553311288f;
  ratio = ratio * t + 0.1587263048f;
  ratio = ratio * t - 0.0227936041f;
  ratio = ratio * t + 0.1053703502f;
  ratio = ratio * t + 0.1198688149f;
  ratio = ratio * t + 0.1398567408f;
  ratio = ratio * t + 0.1396217048f;
  lanes tail = ratio * t * bell;
  below = x < 0.0f ? tail : 1.0f - tail;
  density = bell * 0.3989422804f;
}

}  // namespace hanmo
