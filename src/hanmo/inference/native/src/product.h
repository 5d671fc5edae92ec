// Products of a matrix with rows of activations: out[row][output], for some panels of the matrix.
//
// Few rows read the packed weights as they are. For many rows two panels at a time are unpacked to bytes and floats
// first, and tiles of rows and panels keep all sums in registers. The order of every sum is the same in both.
#pragma once

#include <algorithm>
#include <type_traits>

#include "matrix.h"

namespace hanmo::native {

// Where a product goes: out[row * stride + output], plus what is there already (`add`), and a bias per output.
struct Target {
  float* out;
  int64_t stride;
  bool add = false;
  const float* bias = nullptr;  // padded to the width of the matrix

  INLINE void put(int64_t row, int64_t output, Floats v) const {
    float* p = out + row * stride + output;
    if (bias) v = v + load(bias + output);
    if (add) v = v + load(p);
    store(p, v);
  }
};

// Weights of one panel in their packed form.
template <int64_t kind>
struct Packed {
  const uint8_t* bytes;
  const uint16_t* halves;
  static constexpr int64_t kBytes = kind == kInt8 ? 512 : 256, kScales = kind == kInt4Minimum ? 32 : 16;
  static constexpr int32_t kOffset = kind == kInt8 ? 128 : kind == kInt4 ? 8 : 0;

  INLINE void pair(int64_t group, int two, Bytes& first, Bytes& second) const {  // steps 2 * two and 2 * two + 1
    const uint8_t* p = bytes + group * kBytes;
    if constexpr (kind == kInt8) {
      first = load_bytes(p + two * 128);
      second = load_bytes(p + two * 128 + 64);
    } else {
      const Bytes both = load_bytes(p + two * 64);
      first = low_nibbles(both);
      second = high_nibbles(both);
    }
  }
  INLINE Floats scale(int64_t group) const { return load_halves(halves + group * kScales); }
  INLINE Floats minimum(int64_t group) const { return load_halves(halves + group * kScales + kPanel); }
  INLINE void prefetch(int64_t group) const {
    constexpr int64_t kAhead = kind == kInt8 ? 3072 : 2048;
    for (int64_t i = 0; i < kBytes; i += 64) __builtin_prefetch(bytes + group * kBytes + kAhead + i);
    if (kScales == 32) __builtin_prefetch(halves + group * kScales + 512);
  }
};

// The packed weights of one panel times `rows` rows.
template <int64_t kind, int rows>
void multiply_few(const Matrix& m, int64_t panel, const Activations& a, int64_t row, const Target& target) {
  const int64_t groups = m.groups();
  const Packed<kind> w{m.group_values(panel, 0), m.group_scale(panel, 0)};
  Floats f[rows], least[rows];
  UNROLL for (int r = 0; r < rows; r++) f[r] = least[r] = all(0.0f);
  const int8_t* x = a.values + row * a.stride();
  const int64_t base = row * a.row_groups;
  for (int64_t g = 0; g < groups; g++) {
    Ints sums[rows];
    UNROLL for (int r = 0; r < rows; r++) sums[r] = all(-Packed<kind>::kOffset * a.sums[base + r * a.row_groups + g]);
    UNROLL for (int two = 0; two < kSteps / 2; two++) {
      Bytes first, second;
      w.pair(g, two, first, second);
      UNROLL for (int r = 0; r < rows; r++) {
        const int8_t* p = x + r * a.stride() + g * kGroup + two * 8;
        sums[r] = dot(dot(sums[r], first, p), second, p + 4);
      }
    }
    w.prefetch(g);
    const Floats scale = w.scale(g);
    UNROLL for (int r = 0; r < rows; r++)
        f[r] = fma(to_floats(sums[r]), scale * all(a.scales[base + r * a.row_groups + g]), f[r]);
    if constexpr (kind == kInt4Minimum) {
      const Floats minimum = w.minimum(g);
      UNROLL for (int r = 0; r < rows; r++) least[r] = fma(minimum, all(a.scaled[base + r * a.row_groups + g]), least[r]);
    }
  }
  UNROLL for (int r = 0; r < rows; r++) {
    if constexpr (kind == kInt4Minimum) f[r] = f[r] + least[r];
    target.put(row + r, panel * kPanel, f[r]);
  }
}

// Some panels unpacked: values [group][step][panel][64], scales and minima [group][panel][16].
struct Unpacked {
  std::vector<uint8_t> values;
  std::vector<float> scales, minima;
  int64_t groups = 0;
  int32_t offset = 0;
  bool minimum = false;

  // Memory for so many groups, so that `take` asks for none.
  void reserve(int64_t most) {
    values.reserve(most * kSteps * kTilePanels * 64);
    scales.reserve(most * kTilePanels * kPanel);
    minima.reserve(most * kTilePanels * kPanel);
  }

  template <int64_t kind>
  void take(const Matrix& m, int64_t panel) {
    groups = m.groups();
    offset = m.offset();
    minimum = kind == kInt4Minimum;
    values.resize(groups * kSteps * kTilePanels * 64);
    scales.resize(groups * kTilePanels * kPanel);
    minima.resize(minimum ? scales.size() : 0);
    for (int part = 0; part < kTilePanels; part++) {
      const Packed<kind> w{m.group_values(panel + part, 0), m.group_scale(panel + part, 0)};
      for (int64_t g = 0; g < groups; g++) {
        uint8_t* out = values.data() + (g * kSteps * kTilePanels + part) * 64;
        for (int two = 0; two < kSteps / 2; two++) {
          Bytes first, second;
          w.pair(g, two, first, second);
          store_bytes(out + 2 * two * kTilePanels * 64, first);
          store_bytes(out + (2 * two + 1) * kTilePanels * 64, second);
        }
        w.prefetch(g);
        store(scales.data() + (g * kTilePanels + part) * kPanel, w.scale(g));
        if (minimum) store(minima.data() + (g * kTilePanels + part) * kPanel, w.minimum(g));
      }
    }
  }
};

// A tile: `rows` rows times the unpacked panels.
template <int rows>
__attribute__((noinline)) void multiply_tile(const Unpacked& w, const Activations& a, int64_t row, int64_t output,
                                             const Target& target) {
  const int64_t groups = w.groups;
  Floats f[rows][kTilePanels];
  UNROLL for (int r = 0; r < rows; r++)
      UNROLL for (int p = 0; p < kTilePanels; p++) f[r][p] = all(0.0f);
  const int8_t* x = a.values + row * a.stride();
  const int64_t base = row * a.row_groups;
  for (int64_t g = 0; g < groups; g++) {
    Ints sums[rows][kTilePanels];
    UNROLL for (int r = 0; r < rows; r++) {
      const Ints start = all(-w.offset * a.sums[base + r * a.row_groups + g]);
      UNROLL for (int p = 0; p < kTilePanels; p++) sums[r][p] = start;
    }
    const uint8_t* bytes = w.values.data() + g * kSteps * kTilePanels * 64;
    UNROLL for (int step = 0; step < kSteps; step++) {
      Bytes weights[kTilePanels];
      UNROLL for (int p = 0; p < kTilePanels; p++) weights[p] = load_bytes(bytes + (step * kTilePanels + p) * 64);
      UNROLL for (int r = 0; r < rows; r++) {
        const int8_t* four = x + r * a.stride() + g * kGroup + step * 4;
        UNROLL for (int p = 0; p < kTilePanels; p++) sums[r][p] = dot(sums[r][p], weights[p], four);
      }
    }
    const float* scale = w.scales.data() + g * kTilePanels * kPanel;
    UNROLL for (int r = 0; r < rows; r++) {
      const Floats d = all(a.scales[base + r * a.row_groups + g]);
      UNROLL for (int p = 0; p < kTilePanels; p++)
          f[r][p] = fma(to_floats(sums[r][p]), load(scale + p * kPanel) * d, f[r][p]);
    }
  }
  if (w.minimum) {
    Floats least[rows][kTilePanels];
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int p = 0; p < kTilePanels; p++) least[r][p] = all(0.0f);
    for (int64_t g = 0; g < groups; g++) {
      const float* minimum = w.minima.data() + g * kTilePanels * kPanel;
      UNROLL for (int r = 0; r < rows; r++) {
        const Floats scaled = all(a.scaled[base + r * a.row_groups + g]);
        UNROLL for (int p = 0; p < kTilePanels; p++)
            least[r][p] = fma(load(minimum + p * kPanel), scaled, least[r][p]);
      }
    }
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int p = 0; p < kTilePanels; p++) f[r][p] = f[r][p] + least[r][p];
  }
  UNROLL for (int r = 0; r < rows; r++)
      UNROLL for (int p = 0; p < kTilePanels; p++) target.put(row + r, output + p * kPanel, f[r][p]);
}

// Calls body(integral_constant) for a number from 1 to most that is known only when the program runs.
template <int most, typename Body>
INLINE void with_constant(int64_t n, const Body& body) {
  if constexpr (most > 1) {
    if (n < most) return with_constant<most - 1>(n, body);
  }
  body(std::integral_constant<int, most>());
}

template <int64_t kind>
void multiply_quantised(const Matrix& m, int64_t begin, int64_t end, const Activations& a, int64_t rows,
                        const Target& target, Unpacked& work) {
  int64_t panel = begin;
  if (rows > kFewRows)
    for (; panel + kTilePanels <= end; panel += kTilePanels) {
      work.take<kind>(m, panel);
      for (int64_t row = 0; row < rows; row += kTileRows)
        with_constant<kTileRows>(std::min<int64_t>(kTileRows, rows - row), [&](auto n) {
          multiply_tile<n.value>(work, a, row, panel * kPanel, target);
        });
    }
  for (; panel < end; panel++)
    for (int64_t row = 0; row < rows; row += kFewRows)
      with_constant<kFewRows>(std::min<int64_t>(kFewRows, rows - row), [&](auto n) {
        multiply_few<kind, n.value>(m, panel, a, row, target);
      });
}

// A tile of a matrix with wide groups, whose weights are read as they are packed.
template <int rows, int panels>
__attribute__((noinline)) void multiply_wide(const Matrix& m, int64_t panel, const Activations& a, int64_t row,
                                             const Target& target) {
  const int64_t groups = m.groups(), panel_bytes = groups * m.group_bytes(), scale_groups = m.scale_groups();
  const uint8_t* bytes = m.group_values(panel, 0);
  const uint16_t* scales = m.group_scale(panel, 0);
  Floats f[rows][panels];
  UNROLL for (int r = 0; r < rows; r++)
      UNROLL for (int p = 0; p < panels; p++) f[r][p] = all(0.0f);
  const int8_t* x = a.values + row * a.stride();
  const int64_t base = row * a.row_groups, stride = a.stride();
  for (int64_t wide = 0; wide < scale_groups; wide++) {
    Ints sums[rows][panels];
    UNROLL for (int r = 0; r < rows; r++) {
      const Ints start = all(-m.offset() * a.sums[base + r * a.row_groups + wide]);
      UNROLL for (int p = 0; p < panels; p++) sums[r][p] = start;
    }
    const int64_t last = std::min(groups, (wide + 1) * kWide);
    for (int64_t g = wide * kWide; g < last; g++)
      UNROLL for (int step = 0; step < kSteps; step++) {
        Bytes weights[panels];
        UNROLL for (int p = 0; p < panels; p++) weights[p] = load_bytes(bytes + p * panel_bytes + (g * kSteps + step) * 64);
        UNROLL for (int r = 0; r < rows; r++) {
          const int8_t* four = x + r * stride + g * kGroup + step * 4;
          UNROLL for (int p = 0; p < panels; p++) sums[r][p] = dot(sums[r][p], weights[p], four);
        }
      }
    Floats scale[panels];
    UNROLL for (int p = 0; p < panels; p++) scale[p] = load_halves(scales + (p * scale_groups + wide) * kPanel);
    UNROLL for (int r = 0; r < rows; r++) {
      const Floats d = all(a.scales[base + r * a.row_groups + wide]);
      UNROLL for (int p = 0; p < panels; p++) f[r][p] = fma(to_floats(sums[r][p]), scale[p] * d, f[r][p]);
    }
  }
  UNROLL for (int r = 0; r < rows; r++)
      UNROLL for (int p = 0; p < panels; p++) target.put(row + r, (panel + p) * kPanel, f[r][p]);
}

// All rows. Meanwhile the weights of the next panels are fetched, a part with each tile: they come from far away.
template <int panels>
void multiply_wide_rows(const Matrix& m, int64_t panel, const Activations& a, int64_t rows, const Target& target) {
  const int64_t size = m.groups() * m.group_bytes() * panels, tiles = (rows + kTileRows - 1) / kTileRows;
  const int64_t part = size / (tiles ? tiles : 1);
  const uint8_t* next = m.group_values(panel, 0) + size;
  for (int64_t row = 0; row < rows; row += kTileRows, next += part) {
    for (int64_t i = 0; i < part; i += 64) __builtin_prefetch(next + i, 0, 2);
    with_constant<kTileRows>(std::min<int64_t>(kTileRows, rows - row),
                             [&](auto n) { multiply_wide<n.value, panels>(m, panel, a, row, target); });
  }
}

// Floats: the inputs one after the other, in two sums (even and odd ones) so that they need not wait for each other.
template <int64_t kind, int rows, int panels>
void multiply_floats(const Matrix& m, int64_t panel, const Activations& a, int64_t row, const Target& target) {
  const int64_t stride = a.stride(), size = m.inputs * kPanel;
  Floats f[rows][panels][2];
  UNROLL for (int r = 0; r < rows; r++)
      UNROLL for (int p = 0; p < panels; p++) f[r][p][0] = f[r][p][1] = all(0.0f);
  const float* x = a.floats + row * stride;
  const float* w = reinterpret_cast<const float*>(m.values) + panel * size;
  const uint16_t* halves = reinterpret_cast<const uint16_t*>(m.values) + panel * size;
  for (int64_t k = 0; k < m.inputs; k += 2)
    UNROLL for (int odd = 0; odd < 2; odd++) {
      if (odd && k + 1 == m.inputs) break;
      Floats weights[panels];
      UNROLL for (int p = 0; p < panels; p++) {
        const int64_t at = p * size + (k + odd) * kPanel;
        weights[p] = kind == kFloat32 ? load(w + at) : load_halves(halves + at);
      }
      UNROLL for (int r = 0; r < rows; r++) {
        const Floats one = all(x[r * stride + k + odd]);
        UNROLL for (int p = 0; p < panels; p++) f[r][p][odd] = fma(weights[p], one, f[r][p][odd]);
      }
    }
  UNROLL for (int r = 0; r < rows; r++)
      UNROLL for (int p = 0; p < panels; p++)
          target.put(row + r, (panel + p) * kPanel, f[r][p][0] + f[r][p][1]);
}

template <int64_t kind, int panels>
void multiply_float_rows(const Matrix& m, int64_t panel, const Activations& a, int64_t rows, const Target& target) {
  for (int64_t row = 0; row < rows; row += kTileRows)
    with_constant<kTileRows>(std::min<int64_t>(kTileRows, rows - row),
                             [&](auto n) { multiply_floats<kind, n.value, panels>(m, panel, a, row, target); });
}

template <int64_t kind>
void multiply_float_panels(const Matrix& m, int64_t begin, int64_t end, const Activations& a, int64_t rows,
                           const Target& target) {
  int64_t panel = begin;
  for (; panel + kTilePanels <= end; panel += kTilePanels)
    multiply_float_rows<kind, kTilePanels>(m, panel, a, rows, target);
  for (; panel < end; panel++) multiply_float_rows<kind, 1>(m, panel, a, rows, target);
}

// out[row][output] for the outputs of panels [begin, end).
inline void multiply(const Matrix& m, int64_t begin, int64_t end, const Activations& a, int64_t rows,
                     const Target& target, Unpacked& work) {
  switch (m.kind) {
    case kInt8: return multiply_quantised<kInt8>(m, begin, end, a, rows, target, work);
    case kInt4: return multiply_quantised<kInt4>(m, begin, end, a, rows, target, work);
    case kInt4Minimum: return multiply_quantised<kInt4Minimum>(m, begin, end, a, rows, target, work);
    case kInt8Wide: {
      int64_t panel = begin;
      for (; panel + kTilePanels <= end; panel += kTilePanels)
        multiply_wide_rows<kTilePanels>(m, panel, a, rows, target);
      for (; panel < end; panel++) multiply_wide_rows<1>(m, panel, a, rows, target);
      return;
    }
    case kFloat16: return multiply_float_panels<kFloat16>(m, begin, end, a, rows, target);
    default: return multiply_float_panels<kFloat32>(m, begin, end, a, rows, target);
  }
}

}  // namespace hanmo::native
