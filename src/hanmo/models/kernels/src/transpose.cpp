// Float32 products whose sums run over the rows of both operands: the gradient of a weight. Neither operand is
// transposed: a step of the sum takes a row of each, which is how they lie in memory.
#include <omp.h>

#include <algorithm>

#include "common.h"

namespace hanmo {
namespace {

constexpr int kTile = 6, kPanel = 64;  // 6 x 64 sums fill 24 registers
constexpr int64_t kDepth = 256;   // rows of a and b that are packed at a time
constexpr int64_t kGroup = 192;   // rows of the result that a task computes
constexpr int64_t kColumns = 384;  // and columns, at most: its sums stay in the cache of the second level

// sums[r][64] += sum over d of a[d][r] * b[d][64]; the rows of a are 16 values apart, those of sums `width`.
template <int rows>
__attribute__((noinline)) void multiply_tile(int64_t depth, const float* a, const float* b, float* sums,
                                             int64_t width) {
  vfloat total[rows][4];
#pragma GCC unroll 6
  for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
    for (int v = 0; v < 4; v++) total[r][v] = load(sums + r * width + kWidth * v);
  for (int64_t d = 0; d < depth; d++, a += kWidth, b += kPanel) {
    const vfloat b0 = load(b), b1 = load(b + 16), b2 = load(b + 32), b3 = load(b + 48);
#pragma GCC unroll 6
    for (int r = 0; r < rows; r++) {
      const vfloat spread = splat(a[r]);
      total[r][0] += spread * b0;
      total[r][1] += spread * b1;
      total[r][2] += spread * b2;
      total[r][3] += spread * b3;
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
    for (int v = 0; v < 4; v++) store(sums + r * width + kWidth * v, total[r][v]);
}

// Copies `depth` rows of `columns` values into panels of `width` (a multiple of 16): packed[panel][depth][width].
// Where a panel has fewer values its last ones mean nothing.
void pack(const float* source, int64_t stride, int64_t depth, int64_t columns, int64_t width, float* packed) {
  for (int64_t d = 0; d < depth; d++, source += stride) {
    for (int64_t c = 0; c < columns; c += kWidth) {
      float* place = packed + (c / width * depth + d) * width + c % width;
      if (columns >= c + kWidth) store(place, load(source + c));
      else store(place, load_part(source + c, columns - c));
    }
  }
}

}  // namespace
}  // namespace hanmo

using namespace hanmo;

// out[N, K] = a[M, N].T @ b[M, K], where rows of a lie a_stride values apart and rows of b b_stride; no size may be
// zero.
EXPORT void hanmo_transposed_product(const float* a, const float* b, float* out, int64_t M, int64_t N, int64_t K,
                                     int64_t a_stride, int64_t b_stride) {
  const int64_t groups = (N + kGroup - 1) / kGroup, threads = omp_get_max_threads();
  const int64_t panels = (K + kPanel - 1) / kPanel;
  // Every thread gets work where there is enough; no sum depends on where a part ends.
  const int64_t parts = std::min(panels, std::max((K + kColumns - 1) / kColumns, (2 * threads + groups - 1) / groups));
  const int64_t width = (panels + parts - 1) / parts * kPanel;
  parallel_for(groups * parts, [&](int64_t task) {
    const int64_t first = task / parts * kGroup, rows = std::min(kGroup, N - first);
    const int64_t left = task % parts * width, columns = std::min(width, K - left);
    if (columns <= 0) return;
    alignas(64) float sums[kGroup * kColumns], a_packed[kDepth * kGroup], b_packed[kDepth * kPanel];
    std::memset(sums, 0, kGroup * width * sizeof(float));
    for (int64_t m = 0; m < M; m += kDepth) {
      const int64_t depth = std::min(kDepth, M - m);
      pack(a + m * a_stride + first, a_stride, depth, rows, kWidth, a_packed);
      for (int64_t column = 0; column < columns; column += kPanel) {
        const int64_t count = std::min(int64_t{kPanel}, columns - column);
        pack(b + m * b_stride + left + column, b_stride, depth, count, kPanel, b_packed);
        for (int64_t row = 0; row < rows;) {
          const int64_t inside = row % kWidth, height = std::min({int64_t{kTile}, kWidth - inside, rows - row});
          const float* part = a_packed + (row - inside) * depth + inside;
          float* target = &sums[row * width + column];
          switch (height) {
            case 1: multiply_tile<1>(depth, part, b_packed, target, width); break;
            case 2: multiply_tile<2>(depth, part, b_packed, target, width); break;
            case 3: multiply_tile<3>(depth, part, b_packed, target, width); break;
            case 4: multiply_tile<4>(depth, part, b_packed, target, width); break;
            case 5: multiply_tile<5>(depth, part, b_packed, target, width); break;
            default: multiply_tile<6>(depth, part, b_packed, target, width);
          }
          row += height;
        }
      }
    }
    for (int64_t row = 0; row < rows; row++)
      std::memcpy(out + (first + row) * K + left, &sums[row * width], columns * sizeof(float));
  });
}
