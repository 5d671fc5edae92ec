// Products of a matrix with rows of activations: out[row][output], for some panels of the matrix.
//
// A tile of rows and panels keeps all its sums in registers; the weights of the panels are read once for each tile. For
// many rows the weights of two panels are first expanded to bytes, those of 8 bits copied: the same few pages serve all
// panels and stay near. The order of every sum is the same in all tiles.
#pragma once

#include <algorithm>
#include <type_traits>

#include "matrix.h"

namespace hanmo::native {

// Where a product goes: out[row * stride + output - first], plus what is there already (`add`), and a bias per output.
struct Target {
  float* out;
  int64_t stride;
  bool add = false;
  const float* bias = nullptr;  // padded to the width of the matrix
  int64_t first = 0;

  INLINE void put(int64_t row, int64_t output, Floats v) const {
    float* p = out + row * stride + output - first;
    if (bias) v = v + load(bias + output);
    if (add) v = v + load(p);
    store(p, v);
  }
};

constexpr int64_t kAhead = 8192;  // bytes

// Weights of one panel: as they lie in the matrix or, of 4 bits, expanded to bytes [group][step][output][input].
template <int64_t kind, bool expanded>
struct Panel {
  const uint8_t* bytes;
  const uint16_t* halves;
  static constexpr bool kNibbles = kind != kInt8 && !expanded;
  static constexpr int64_t kBytes = kNibbles ? 256 : 512, kScales = kind == kInt4Minimum ? 32 : 16;
  static constexpr int32_t kOffset = kind == kInt8 ? kByteOffset : kind == kInt4 ? 8 : 0;

  INLINE void pair(int64_t group, int two, Bytes& first, Bytes& second) const {  // steps 2 * two and 2 * two + 1
    const uint8_t* p = bytes + group * kBytes;
    if constexpr (kNibbles) {
      const Bytes both = load_bytes(p + two * 64);
      first = low_nibbles(both);
      second = high_nibbles(both);
    } else if constexpr (kind == kInt8 && !expanded) {
      first = load_weights(p + two * 128);
      second = load_weights(p + two * 128 + 64);
    } else {
      first = load_bytes(p + two * 128);
      second = load_bytes(p + two * 128 + 64);
    }
  }
  INLINE Floats scale(int64_t group) const { return load_halves(halves + group * kScales); }
  INLINE Floats minimum(int64_t group) const { return load_halves(halves + group * kScales + kPanel); }
  INLINE void prefetch(int64_t group, int first, int last) const {  // lines of 64 bytes, and the scales with the first
    const uint8_t* p = bytes + group * kBytes;
    for (int line = first; line < last; line++) __builtin_prefetch(p + line * 64);
    if (first == 0) __builtin_prefetch(halves + group * kScales);
  }
};

// What a tile asks the memory for while it computes a group: the lines [first, last) of the group so many ahead.
struct Ahead {
  int64_t groups;
  int first, last;
};

// A tile: `panels` panels from `panel` on times `rows` rows from `row` on.
template <int64_t kind, bool expanded, int rows, int panels>
__attribute__((noinline)) void multiply_tile(const Panel<kind, expanded>* w, int64_t panel, const Activations& a,
                                             int64_t row, const Target& target, Ahead ahead) {
  constexpr int32_t kOffset = Panel<kind, expanded>::kOffset;
  Floats f[rows][panels], least[rows][panels];
  UNROLL for (int r = 0; r < rows; r++)
      UNROLL for (int p = 0; p < panels; p++) f[r][p] = least[r][p] = all(0.0f);
  const int8_t* x = a.values + row * a.stride();
  const int64_t base = row * a.row_groups;
  for (int64_t g = 0; g < a.groups; g++) {
    Ints sums[rows][panels];
    UNROLL for (int r = 0; r < rows; r++) {
      const Ints start = all(-kOffset * a.sums[base + r * a.row_groups + g]);
      UNROLL for (int p = 0; p < panels; p++) sums[r][p] = start;
    }
    UNROLL for (int two = 0; two < kSteps / 2; two++) {
      Bytes first[panels], second[panels];
      UNROLL for (int p = 0; p < panels; p++) w[p].pair(g, two, first[p], second[p]);
      UNROLL for (int r = 0; r < rows; r++) {
        const int8_t* eight = x + r * a.stride() + g * kGroup + two * 8;
        UNROLL for (int p = 0; p < panels; p++)
            sums[r][p] = dot(dot(sums[r][p], first[p], eight), second[p], eight + 4);
      }
    }
    UNROLL for (int p = 0; p < panels; p++) {
      if constexpr (!expanded) w[p].prefetch(g + ahead.groups, ahead.first, ahead.last);
      const Floats scale = w[p].scale(g);
      UNROLL for (int r = 0; r < rows; r++)
          f[r][p] = fma(to_floats(sums[r][p]), scale * all(a.scales[base + r * a.row_groups + g]), f[r][p]);
      if constexpr (kind == kInt4Minimum) {
        const Floats minimum = w[p].minimum(g);
        UNROLL for (int r = 0; r < rows; r++)
            least[r][p] = fma(minimum, all(a.scaled[base + r * a.row_groups + g]), least[r][p]);
      }
    }
  }
  UNROLL for (int r = 0; r < rows; r++)
      UNROLL for (int p = 0; p < panels; p++) {
        if constexpr (kind == kInt4Minimum) f[r][p] = f[r][p] + least[r][p];
        target.put(row + r, (panel + p) * kPanel, f[r][p]);
      }
}

// Calls body(integral_constant) for a number from 1 to most that is known only when the program runs.
template <int most, typename Body>
INLINE void with_constant(int64_t n, const Body& body) {
  if constexpr (most > 1) {
    if (n < most) return with_constant<most - 1>(n, body);
  }
  body(std::integral_constant<int, most>());
}

// All rows times some panels, in tiles as equal as can be. Meanwhile the weights that come next are fetched, each tile
// taking its share: of the next panels or, where one panel follows the other, of those 8 KB ahead.
template <int64_t kind, bool expanded, int panels>
void multiply_rows(const Panel<kind, expanded>* w, int64_t panel, const Activations& a, int64_t rows,
                   const Target& target) {
  constexpr int kMost = panels == 1 ? kTallRows : kind == kInt4Minimum ? kMinimumRows : kTileRows;
  constexpr int64_t kBytes = Panel<kind, expanded>::kBytes, kLines = kBytes / 64;
  const int64_t tiles = (rows + kMost - 1) / kMost, most = (rows + tiles - 1) / tiles;
  const int64_t ahead = panels == 1 ? kAhead / kBytes : panels * a.groups, lines = (kLines + tiles - 1) / tiles;
  for (int64_t row = 0, line = 0; row < rows; row += most, line += lines) {
    const int first = static_cast<int>(std::min(line, kLines)), last = static_cast<int>(std::min(line + lines, kLines));
    with_constant<kMost>(std::min(most, rows - row), [&](auto n) {
      multiply_tile<kind, expanded, n.value, panels>(w, panel, a, row, target, {ahead, first, last});
    });
  }
}

// Weights of the panels of a tile as bytes.
struct Expanded {
  Buffer<uint8_t> values;

  // Memory for matrices of so many inputs.
  void reserve(int64_t inputs) { values.reserve(round_up(inputs, kGroup) / kGroup * kTilePanels * 512); }

  template <int64_t kind>
  const uint8_t* take(const Panel<kind, false>& w, int part, int64_t groups) {
    uint8_t* const begin = values.data() + part * groups * 512;
    for (int64_t g = 0; g < groups; g++) {
      for (int two = 0; two < kSteps / 2; two++) {
        Bytes first, second;
        w.pair(g, two, first, second);
        store_bytes(begin + g * 512 + two * 128, first);
        store_bytes(begin + g * 512 + two * 128 + 64, second);
      }
      w.prefetch(g + kAhead / w.kBytes, 0, w.kBytes / 64);
    }
    return begin;
  }
};

template <int64_t kind>
void multiply_quantised(const Matrix& m, int64_t begin, int64_t end, const Activations& a, int64_t rows,
                        const Target& target, Expanded& work) {
  int64_t panel = begin;
  if (rows > (kind == kInt8 ? kTallRows : 1))  // fewer rows wait for memory: one panel after the other comes faster
    for (; panel + kTilePanels <= end; panel += kTilePanels) {
      Panel<kind, false> w[kTilePanels];
      for (int p = 0; p < kTilePanels; p++) w[p] = {m.group_values(panel + p, 0), m.group_scale(panel + p, 0)};
      if (rows <= (kind == kInt8 ? kBytesDirectRows : kDirectRows)) {
        multiply_rows<kind, false, kTilePanels>(w, panel, a, rows, target);
      } else {
        Panel<kind, true> bytes[kTilePanels];
        for (int p = 0; p < kTilePanels; p++) bytes[p] = {work.take(w[p], p, m.groups()), w[p].halves};
        multiply_rows<kind, true, kTilePanels>(bytes, panel, a, rows, target);
      }
    }
  for (; panel < end; panel++) {
    const Panel<kind, false> w{m.group_values(panel, 0), m.group_scale(panel, 0)};
    multiply_rows<kind, false, 1>(&w, panel, a, rows, target);
  }
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
      const Ints start = all(-kByteOffset * a.sums[base + r * a.row_groups + wide]);
      UNROLL for (int p = 0; p < panels; p++) sums[r][p] = start;
    }
    const int64_t last = std::min(groups, (wide + 1) * kWide);
    for (int64_t g = wide * kWide; g < last; g++)
      UNROLL for (int step = 0; step < kSteps; step++) {
        Bytes weights[panels];
        UNROLL for (int p = 0; p < panels; p++) weights[p] = load_weights(bytes + p * panel_bytes + (g * kSteps + step) * 64);
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
  const int64_t part = size / tiles;
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
                     const Target& target, Expanded& work) {
  if (rows < 1) return;  // of a thread for which there were none
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
