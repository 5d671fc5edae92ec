// Products whose sums run over the rows of both operands: the gradient of a weight, out[N, K] = g[M, N].T @ x[M, K],
// and the right operand for the gradient of an input (scales per column of the weight). The format stands in int8.h.
//
// The scales belong to a column within a block of kBlockRows rows, so that one outlier costs the others of its column
// precision in its own block only; the sums of a block are integers, the sum over the blocks is in float32, first block
// first.
#include "int8.h"

namespace hanmo {
namespace {

constexpr int64_t kBlockRows = 256;
constexpr int64_t kLeftPanel = 16;  // columns of g in a panel of the left operand: [block][panel][rows / 4][16][4]
constexpr int64_t kGroup = 96;      // rows of the result that a task computes at a time

constexpr int kVectors = kPanel / kWidth;  // 64 columns are packed at a time: short pieces of memory are slow to read
constexpr int64_t kAhead = 16;             // rows fetched ahead: the processor does not foresee such long strides

// Packs `rows` rows of 64 columns, of which `columns` exist; scales and, where not null, starts are written for all 64.
// The 4 bytes of a step of 16 columns are 64 adjacent bytes, at bytes + (number of the 16) * apart + (row / 4) * step.
void pack_columns(const float* source, int64_t stride, int64_t rows, int64_t columns, uint32_t flip, uint8_t* bytes,
                  int64_t apart, int64_t step, float* scales, int32_t* start) {
  const auto read = [&](int64_t row, int v) {
    const int64_t count = columns - kWidth * v;
    if (row >= rows || count <= 0) return vfloat{};
    const float* p = source + row * stride + kWidth * v;
    return count >= kWidth ? load(p) : load_part(p, count);
  };
  vint most[kVectors] = {}, total[kVectors] = {};
  vfloat factor[kVectors];
  for (int64_t row = 0; row < rows; row++) {
    for (int v = 0; v < kVectors; v++) {
      __builtin_prefetch(source + std::min(row + kAhead, rows - 1) * stride + kWidth * v);
      most[v] = larger(most[v], magnitude(read(row, v)));
    }
  }
  for (int v = 0; v < kVectors; v++) {
    for (int i = 0; i < kWidth; i++) {
      const Scale scale = scale_of(most[v][i]);
      scales[kWidth * v + i] = scale.scale;
      factor[v][i] = scale.factor;
    }
  }
  for (int64_t row = 0; row < rows; row += 4) {
    for (int v = 0; v < kVectors; v++) {
      vint four = {};
      for (int i = 0; i < 4; i++) {
        const vint value = nearest(read(row + i, v) * factor[v]);
        total[v] += value;
        four |= (value & 255) << (8 * i);
      }
      four ^= static_cast<int32_t>(flip);
      std::memcpy(bytes + v * apart + row / 4 * step, &four, sizeof four);
    }
  }
  if (start)
    for (int v = 0; v < kVectors; v++)
      for (int i = 0; i < kWidth; i++) start[kWidth * v + i] = -128 * total[v][i];
}

}  // namespace
}  // namespace hanmo

using namespace hanmo;

// Packs b.T for b[R, N], one scale per column of b: the right operand of a[M, R] @ b.
EXPORT void hanmo_int8_pack_columns(const float* b, int8_t* packed, int32_t* start, float* scales, int64_t R,
                                    int64_t N) {
  parallel_for((N + kPanel - 1) / kPanel, [&](int64_t panel) {
    const int64_t first = panel * kPanel;
    pack_columns(b + first, N, R, N - first, 0, reinterpret_cast<uint8_t*>(packed + first * round_up(R, 4)),
                 64, 256, scales + first, start + first);
  });
}

// Bytes of working memory that hanmo_int8_transposed_product needs.
EXPORT int64_t hanmo_int8_transposed_product_bytes(int64_t M, int64_t N, int64_t K) {
  const int64_t blocks = (M + kBlockRows - 1) / kBlockRows, left = round_up(N, kPanel), right = round_up(K, kPanel);
  return blocks * ((kBlockRows + 4) * left + (kBlockRows + 8) * right);
}

// out[N, K] = g[M, N].T @ x[M, K], both quantised here; no size may be zero.
EXPORT void hanmo_int8_transposed_product(const float* g, const float* x, float* out, uint8_t* work, int64_t M,
                                          int64_t N, int64_t K) {
  const int64_t blocks = (M + kBlockRows - 1) / kBlockRows;
  const int64_t left = round_up(N, kPanel), right = round_up(K, kPanel);
  float* const left_scales = reinterpret_cast<float*>(work);
  float* const right_scales = left_scales + blocks * left;
  int32_t* const start = reinterpret_cast<int32_t*>(right_scales + blocks * right);
  uint8_t* const left_bytes = reinterpret_cast<uint8_t*>(start + blocks * right);
  uint8_t* const right_bytes = left_bytes + blocks * kBlockRows * left;
  const auto rows_of = [&](int64_t block) { return std::min(kBlockRows, M - block * kBlockRows); };

  const int64_t left_panels = left / kPanel, right_panels = right / kPanel, groups = (N + kGroup - 1) / kGroup;
  parallel_for(blocks * left_panels, [&](int64_t task) {
    const int64_t block = task / left_panels, column = task % left_panels * kPanel;
    pack_columns(g + block * kBlockRows * N + column, N, rows_of(block), N - column, 0x80808080u,
                 left_bytes + (block * left + column) * kBlockRows, kBlockRows * kLeftPanel, 4 * kLeftPanel,
                 left_scales + block * left + column, nullptr);
  });
  parallel_for(blocks * right_panels, [&](int64_t task) {
    const int64_t block = task / right_panels, column = task % right_panels * kPanel;
    pack_columns(x + block * kBlockRows * K + column, K, rows_of(block), K - column, 0,
                 right_bytes + (block * right + column) * kBlockRows, 64, 256, right_scales + block * right + column,
                 start + block * right + column);
  });
  parallel_for(groups * right_panels, [&](int64_t task) {
    const int64_t first = task / right_panels * kGroup, rows = std::min(kGroup, N - first);
    const int64_t column = task % right_panels * kPanel, columns = std::min(int64_t{kPanel}, K - column);
    alignas(64) float totals[kGroup * kPanel];
    alignas(64) int32_t sums[kTile * kPanel];
    for (int64_t block = 0; block < blocks; block++) {
      const int8_t* b = reinterpret_cast<int8_t*>(right_bytes + (block * right + column) * kBlockRows);
      const float* scales = right_scales + block * right + column;
      for (int64_t row = 0; row < rows;) {
        const int64_t inside = row % kLeftPanel, height = std::min({int64_t{kTile}, kLeftPanel - inside, rows - row});
        const uint8_t* a = left_bytes + (block * left + first + row - inside) * kBlockRows + 4 * inside;
        multiply(height, (rows_of(block) + 3) / 4, a, 4, 4 * kLeftPanel, b, start + block * right + column, sums);
        for (int64_t r = 0; r < height; r++) {
          const vfloat factor = splat(left_scales[block * left + first + row + r]);
          for (int v = 0; v < 4; v++) {
            float* total = &totals[(row + r) * kPanel + kWidth * v];
            const vfloat value = to_float(sums + r * kPanel + kWidth * v) * load(scales + kWidth * v) * factor;
            store(total, block == 0 ? value : load(total) + value);
          }
        }
        row += height;
      }
    }
    for (int64_t row = 0; row < rows; row++)
      std::memcpy(out + (first + row) * K + column, &totals[row * kPanel], columns * sizeof(float));
  });
}
