// Matrix products of 8-bit integers: the packed format and the kernel that multiplies one tile.
//
// A product is out[M, N] = a[M, K] @ b[N, K].T with integers between -127 and 127, one scale per row of a and per row
// of b, sums in 32 bits (exact up to K = 65,536), and out = sum * scale of the row * scale of the column.
//
//   Left operand  a: unsigned bytes (value + 128), so that the instruction for unsigned x signed bytes applies. The
//                    kernel takes any layout in which 4 values that follow each other along K are 4 adjacent bytes
//                    ("a step"): `row` bytes lie between rows, `step` bytes between steps.
//   Right operand b: signed bytes in panels of 64 columns (rows of b), [panel][K / 4][64][4]: the 4 bytes of one step
//                    of 64 columns are 256 adjacent bytes. K is filled up to a multiple of 4 and N of 64 with zeros.
//                    Beside it stands, per column, start = -128 * (sum of its values): sums begin with it, which takes
//                    back the 128 added to a.
//   Scales:          float32, one per row of a and per column of b (padded to 64 as well); not a number where the
//                    values were not finite, which makes the whole row or column of the result not a number.
#pragma once

#include <algorithm>
#include <limits>

#include "common.h"

namespace hanmo {

constexpr int kPanel = 64;          // columns of a panel
constexpr int kTile = 6;            // rows that one call of the kernel computes: 6 x 64 sums fill 24 registers
constexpr float kSmallest = 1e-30f;  // a row whose largest value is below counts as zero: 127 / value stays finite
constexpr int32_t kInfinity = 0x7f800000;

inline int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// The largest magnitude as bits: compared as integers, because then infinity and not-a-number are the largest of all.
inline vint magnitude(vfloat v) { return reinterpret_cast<vint>(v) & 0x7fffffff; }
inline vint larger(vint a, vint b) { return a > b ? a : b; }

// Scale of values whose largest magnitude has these bits, and the factor that turns values into integers.
struct Scale {
  float scale, factor;
};
inline Scale scale_of(int32_t bits) {
  if (bits >= kInfinity) return {std::numeric_limits<float>::quiet_NaN(), 0.0f};
  float largest;
  std::memcpy(&largest, &bits, sizeof largest);
  if (largest < kSmallest) return {0.0f, 0.0f};
  return {largest / 127.0f, 127.0f / largest};
}

inline vfloat to_float(const int32_t* p) {
  return __builtin_convertvector(*reinterpret_cast<const vint*>(p), vfloat);
}

// To the nearest integer, ties to even.
inline vint nearest(vfloat v) {
#if defined(__AVX512F__)
  return reinterpret_cast<vint>(_mm512_cvtps_epi32(reinterpret_cast<__m512>(v)));
#else
  vint rounded;
  for (int i = 0; i < kWidth; i++) rounded[i] = static_cast<int32_t>(std::nearbyintf(v[i]));
  return rounded;
#endif
}

// sums[r][64] = start + the products of `rows` <= 6 rows of a with one panel of b over `steps` steps.
#if defined(__AVX512VNNI__)
template <int rows>
__attribute__((noinline)) void multiply_tile(int64_t steps, const uint8_t* a, int64_t row, int64_t step,
                                             const int8_t* b, const int32_t* start, int32_t* sums) {
  __m512i total[rows][4];
#pragma GCC unroll 6
  for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
    for (int v = 0; v < 4; v++) total[r][v] = _mm512_loadu_si512(start + 16 * v);
  for (int64_t s = 0; s < steps; s++, a += step, b += 4 * kPanel) {
    const __m512i b0 = _mm512_loadu_si512(b), b1 = _mm512_loadu_si512(b + 64);
    const __m512i b2 = _mm512_loadu_si512(b + 128), b3 = _mm512_loadu_si512(b + 192);
#pragma GCC unroll 6
    for (int r = 0; r < rows; r++) {
      int32_t four;
      std::memcpy(&four, a + r * row, sizeof four);
      const __m512i spread = _mm512_set1_epi32(four);
      total[r][0] = _mm512_dpbusd_epi32(total[r][0], spread, b0);
      total[r][1] = _mm512_dpbusd_epi32(total[r][1], spread, b1);
      total[r][2] = _mm512_dpbusd_epi32(total[r][2], spread, b2);
      total[r][3] = _mm512_dpbusd_epi32(total[r][3], spread, b3);
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
    for (int v = 0; v < 4; v++) _mm512_storeu_si512(sums + r * kPanel + 16 * v, total[r][v]);
}
#elif defined(__AVX2__)
// Products of 16-bit halves: the instruction for bytes would saturate. 8 columns at a time fit the 16 registers.
template <int rows>
__attribute__((noinline)) void multiply_tile(int64_t steps, const uint8_t* a, int64_t row, int64_t step,
                                             const int8_t* b, const int32_t* start, int32_t* sums) {
  const __m256i low = _mm256_set1_epi32(0x00ff00ff);
  for (int column = 0; column < kPanel; column += 8) {
    __m256i total[rows];
#pragma GCC unroll 6
    for (int r = 0; r < rows; r++) total[r] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(start + column));
    for (int64_t s = 0; s < steps; s++) {
      const __m256i columns = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(b + (s * kPanel + column) * 4));
      const __m256i even = _mm256_srai_epi16(_mm256_slli_epi16(columns, 8), 8), odd = _mm256_srai_epi16(columns, 8);
#pragma GCC unroll 6
      for (int r = 0; r < rows; r++) {
        int32_t four;
        std::memcpy(&four, a + r * row + s * step, sizeof four);
        const __m256i spread = _mm256_set1_epi32(four);
        const __m256i products = _mm256_add_epi32(_mm256_madd_epi16(_mm256_and_si256(spread, low), even),
                                                  _mm256_madd_epi16(_mm256_srli_epi16(spread, 8), odd));
        total[r] = _mm256_add_epi32(total[r], products);
      }
    }
#pragma GCC unroll 6
    for (int r = 0; r < rows; r++)
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(sums + r * kPanel + column), total[r]);
  }
}
#else
template <int rows>
__attribute__((noinline)) void multiply_tile(int64_t steps, const uint8_t* a, int64_t row, int64_t step,
                                             const int8_t* b, const int32_t* start, int32_t* sums) {
  for (int r = 0; r < rows; r++) {
    int32_t* total = sums + r * kPanel;
    std::memcpy(total, start, kPanel * sizeof(int32_t));
    for (int64_t s = 0; s < steps; s++) {
      const uint8_t* values = a + r * row + s * step;
      const int8_t* columns = b + s * kPanel * 4;
      for (int column = 0; column < kPanel; column++)
        for (int i = 0; i < 4; i++) total[column] += values[i] * columns[4 * column + i];
    }
  }
}
#endif

// The same for a number of rows known only when it runs.
inline void multiply(int64_t rows, int64_t steps, const uint8_t* a, int64_t row, int64_t step, const int8_t* b,
                     const int32_t* start, int32_t* sums) {
  switch (rows) {
    case 1: return multiply_tile<1>(steps, a, row, step, b, start, sums);
    case 2: return multiply_tile<2>(steps, a, row, step, b, start, sums);
    case 3: return multiply_tile<3>(steps, a, row, step, b, start, sums);
    case 4: return multiply_tile<4>(steps, a, row, step, b, start, sums);
    case 5: return multiply_tile<5>(steps, a, row, step, b, start, sums);
    default: return multiply_tile<6>(steps, a, row, step, b, start, sums);
  }
}

}  // namespace hanmo
