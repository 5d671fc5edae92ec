// Weight matrices as they lie in memory, and activations in 8 bits.
//
// A matrix has N outputs (rows of the stored weight) and K inputs. Outputs are taken 16 at a time (a panel), inputs 32
// at a time (a group, which shares scales) and within a group 4 at a time (a step, what one instruction multiplies):
//
//   8 bits   values [panel][group][step 8][output 16][input 4], one byte each: the integer + 128
//   4 bits   values [panel][group][pair of steps 4][output 16][input 4]: the first step's integer (0 to 15) in the
//            low half of a byte, the second's in the high half
//   scales   [panel][group][output 16] in half precision; with a minimum per group, [panel][group][2][output 16]:
//            scales, then minima
//   8 bits, wide   values as with 8 bits; scales [panel][wide group][output 16], a wide group being four groups: fewer
//                  scales, so that products are bound by the integer products alone, for networks that need no more
//   floats   [panel][input K][output 16], 32 or 16 bits
//
// What a weight is:  8 bits: scale * (byte - 128);  4 bits: scale * (nibble - 8), or scale * nibble + minimum.
// N is filled up to a multiple of 16 and K of 32 with zero weights. The layout is the same on every machine, so that a
// file of it can be mapped into memory and used.
//
// Activations are quantised row by row in the same groups: integers from -127 to 127 and, per group, a scale, the sum
// of the integers, and the sum times the scale. The product of a group is
//     float(sum of integer products) * (weight scale * activation scale)  [+ minimum * (activation sum * scale)]
// and groups are added in their order, always. So a row's result is the same bits however many rows are computed with
// it and whoever computes it.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "buffer.h"
#include "lanes.h"

namespace hanmo::native {

enum Kind : int64_t { kFloat32 = 0, kFloat16 = 1, kInt8 = 2, kInt4 = 3, kInt4Minimum = 4, kInt8Wide = 5 };
constexpr int64_t kWide = 4;  // groups of a wide group

INLINE int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

struct Matrix {
  int64_t kind = kFloat32, outputs = 0, inputs = 0;
  const uint8_t* values = nullptr;
  const uint16_t* scales = nullptr;

  int64_t panels() const { return (outputs + kPanel - 1) / kPanel; }
  int64_t width() const { return panels() * kPanel; }
  int64_t groups() const { return (inputs + kGroup - 1) / kGroup; }
  bool quantised() const { return kind >= kInt8; }
  int64_t number_bytes() const { return kind == kFloat32 ? 4 : kind == kFloat16 ? 2 : 1; }
  bool wide() const { return kind == kInt8Wide; }
  int64_t scale_groups() const { return wide() ? (groups() + kWide - 1) / kWide : groups(); }
  int64_t group_bytes() const { return kind == kInt8 || wide() ? kPanel * kGroup : kPanel * kGroup / 2; }
  int64_t group_scales() const { return kind == kInt4Minimum ? 2 * kPanel : kPanel; }
  int64_t value_bytes() const {
    if (quantised()) return panels() * groups() * group_bytes();
    return width() * inputs * number_bytes();
  }
  int64_t scale_count() const { return quantised() ? panels() * scale_groups() * group_scales() : 0; }
  int32_t offset() const { return kind == kInt8 || wide() ? 128 : kind == kInt4 ? 8 : 0; }
  const uint8_t* group_values(int64_t panel, int64_t group) const {
    return values + (panel * groups() + group) * group_bytes();
  }
  const uint16_t* group_scale(int64_t panel, int64_t group) const {
    return scales + (panel * scale_groups() + (wide() ? group / kWide : group)) * group_scales();
  }

  // The weights of one output, as floats: embeddings are looked up so.
  void row(int64_t output, float* out) const {
    const int64_t panel = output / kPanel, r = output % kPanel;
    if (!quantised()) {
      for (int64_t k = 0; k < inputs; k++) {
        const int64_t at = (panel * inputs + k) * kPanel + r;
        out[k] = kind == kFloat32 ? reinterpret_cast<const float*>(values)[at]
                                  : half_to_float(reinterpret_cast<const uint16_t*>(values)[at]);
      }
      return;
    }
    for (int64_t group = 0; group < groups(); group++) {
      const uint8_t* bytes = group_values(panel, group);
      const uint16_t* scale = group_scale(panel, group);
      const float d = half_to_float(scale[r]), least = kind == kInt4Minimum ? half_to_float(scale[kPanel + r]) : 0.0f;
      uint8_t q[kGroup];
      for (int64_t step = 0; step < kSteps; step++) {
        if (offset() == 128) {
          std::memcpy(q + step * 4, bytes + step * 64 + r * 4, 4);
          continue;
        }
        for (int64_t i = 0; i < 4; i++) {
          const uint8_t both = bytes[step / 2 * 64 + r * 4 + i];
          q[step * 4 + i] = step % 2 ? both >> 4 : both & 15;
        }
      }
      const int64_t count = inputs - group * kGroup < kGroup ? inputs - group * kGroup : kGroup;
      for (int64_t i = 0; i < count; i++) out[group * kGroup + i] = d * static_cast<float>(q[i] - offset()) + least;
    }
  }
};

// Rows of activations: as floats (K filled up with zeros), or in 8 bits where a quantised matrix reads them.
struct Activations {
  int64_t groups = 0;            // of the inputs of a row
  int64_t row_groups = 0;        // from one row to the next: the same for all uses of a memory, which threads share
  float* floats = nullptr;       // [row][row_groups * 32]
  int8_t* values = nullptr;      // [row][row_groups * 32]
  float* scales = nullptr;       // [row][row_groups]
  int32_t* sums = nullptr;       // [row][row_groups], of the integers
  float* scaled = nullptr;       // [row][row_groups], the same times the scale
  float* low = nullptr;          // [row][low_stride], products with an adapter's first matrix
  int64_t low_stride = 0;

  int64_t stride() const { return row_groups * kGroup; }

  // The same from a row on.
  Activations from(int64_t row) const {
    const int64_t values_before = row * stride(), groups_before = row * row_groups;
    return {groups, row_groups, floats + values_before, values + values_before, scales + groups_before,
            sums + groups_before, scaled + groups_before, low + row * low_stride, low_stride};
  }
};

// Rows of activations with their own memory.
struct ActivationMemory {
  Buffer<float> floats, scales, scaled, low;
  Buffer<int8_t> values;
  Buffer<int32_t> sums;
  int64_t rows = 0, row_groups = 0, low_stride = 0;

  // For rows of so many inputs, a multiple of 32.
  void reserve(int64_t rows_, int64_t widest) {
    rows = rows_, row_groups = widest / kGroup;
    floats.resize(rows * widest);
    values.resize(rows * widest);
    scales.resize(rows * row_groups);
    scaled.resize(rows * row_groups);
    sums.resize(rows * row_groups);
  }
  // For adapters of so many ranks.
  void reserve_low(int64_t ranks) {
    const int64_t stride = std::max(low_stride, round_up(ranks, kGroup));
    low.reserve(rows * stride);
    low_stride = stride;
  }
  Activations view(int64_t inputs) {
    return {round_up(inputs, kGroup) / kGroup, row_groups,    floats.data(), values.data(), scales.data(), sums.data(),
            scaled.data(),                     low.data(),    low_stride};
  }
};

// The larger of two magnitudes, lane by lane. Compared are the bits, for which infinity and what is no number are largest.
INLINE Ints greater(Ints a, Ints b) {
  UNROLL EACH a.at[i] = a.at[i] > b.at[i] ? a.at[i] : b.at[i];
  return a;
}
INLINE Ints bits_of_magnitude(Floats v) {
  Ints out;
  UNROLL EACH out.at[i] = reinterpret_cast<ilanes>(v.at[i]) & 0x7fffffff;
  return out;
}
INLINE float greatest(Ints magnitudes) {
  int32_t out[kPanel];
  std::memcpy(out, &magnitudes, sizeof out);
  UNROLL for (int half = kPanel / 2; half; half /= 2)
    for (int i = 0; i < half; i++) out[i] = out[i] > out[i + half] ? out[i] : out[i + half];
  float top;
  std::memcpy(&top, out, sizeof top);
  return top;
}
INLINE float greatest(Floats first, Floats second) {
  return greatest(greater(bits_of_magnitude(first), bits_of_magnitude(second)));
}

// What a group is that holds an infinite number or none: no product of it is a number.
INLINE void quantise_none(int64_t count, int8_t* values, float* scale, int32_t* sum, float* scaled) {
  std::memset(values, 0, count);
  *sum = 0;
  *scale = *scaled = std::numeric_limits<float>::quiet_NaN();
}

// One group of 32 floats.
INLINE void quantise_group(Floats first, Floats second, int8_t* values, float* scale, int32_t* sum, float* scaled) {
  const float top = greatest(first, second);
  if (!std::isfinite(top)) return quantise_none(kGroup, values, scale, sum, scaled);
  const float d = top > 1e-30f ? top / 127.0f : 0.0f, factor = top > 1e-30f ? 127.0f / top : 0.0f;
  const Ints a = nearest(first * all(factor)), b = nearest(second * all(factor));
  int32_t out[kGroup];
  std::memcpy(out, &a, sizeof a);
  std::memcpy(out + kPanel, &b, sizeof b);
  int32_t total = 0;
#if defined(__AVX512F__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(values), _mm512_cvtepi32_epi8((__m512i)a.at[0]));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(values + kPanel), _mm512_cvtepi32_epi8((__m512i)b.at[0]));
  total = _mm512_reduce_add_epi32(_mm512_add_epi32((__m512i)a.at[0], (__m512i)b.at[0]));
#else
  for (int i = 0; i < kGroup; i++) {
    values[i] = static_cast<int8_t>(out[i]);
    total += out[i];
  }
#endif
  *scale = d;
  *sum = total;
  *scaled = d * static_cast<float>(total);
}

INLINE void quantise_row(const float* x, const Activations& a, int64_t row) {
  for (int64_t g = 0; g < a.groups; g++) {
    const int64_t at = row * a.row_groups + g;
    quantise_group(load(x + g * kGroup), load(x + g * kGroup + kPanel), a.values + at * kGroup, a.scales + at,
                   a.sums + at, a.scaled + at);
  }
}

// Some groups of floats with one scale.
template <int64_t groups>
INLINE void quantise_groups(const float* x, int8_t* values, float* scale, int32_t* sum, float* scaled) {
  constexpr int kVectors = groups * kGroup / kPanel;
  Floats v[kVectors];
  Ints top = all(0);
  UNROLL for (int i = 0; i < kVectors; i++) {
    v[i] = load(x + i * kPanel);
    top = greater(top, bits_of_magnitude(v[i]));
  }
  const float most = greatest(top), factor = most > 1e-30f ? 127.0f / most : 0.0f;
  if (!std::isfinite(most)) return quantise_none(groups * kGroup, values, scale, sum, scaled);
  Ints total = all(0);
  UNROLL for (int i = 0; i < kVectors; i++) {
    const Ints q = nearest(v[i] * all(factor));
    UNROLL for (int j = 0; j < kRegisters; j++) total.at[j] += q.at[j];
    store_signed(values + i * kPanel, q);
  }
  *scale = most * (1.0f / 127.0f);
  *sum = sum_of(total);
  *scaled = *scale * static_cast<float>(*sum);
}
INLINE void quantise_wide(const float* x, int64_t groups, int8_t* values, float* scale, int32_t* sum, float* scaled) {
  switch (groups) {  // at most a wide group of them
    case 4: return quantise_groups<4>(x, values, scale, sum, scaled);
    case 3: return quantise_groups<3>(x, values, scale, sum, scaled);
    case 2: return quantise_groups<2>(x, values, scale, sum, scaled);
    default: return quantise_groups<1>(x, values, scale, sum, scaled);
  }
}

// A row for a matrix with wide groups.
INLINE void quantise_row_wide(const float* x, const Activations& a, int64_t row) {
  for (int64_t g = 0; g < a.groups; g += kWide) {
    const int64_t at = row * a.row_groups + g, scale = row * a.row_groups + g / kWide;
    const int64_t groups = a.groups - g < kWide ? a.groups - g : kWide;
    quantise_wide(x + g * kGroup, groups, a.values + at * kGroup, a.scales + scale, a.sums + scale, a.scaled + scale);
  }
}

}  // namespace hanmo::native
