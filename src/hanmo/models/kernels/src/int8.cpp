// Quantisation to 8-bit integers and products with a packed right operand (the format stands in int8.h).
#include "int8.h"

#include <omp.h>

#include <vector>

namespace hanmo {
namespace {

constexpr int64_t kBlockRows = 96;        // rows of a that are quantised together and meet all of b
constexpr int64_t kBlockBytes = 1 << 17;  // of them at most so many that they stay in the cache of the second level

// One row of K floats to bytes (value + 128), zeros up to a multiple of 4; returns its scale.
float quantize_row(const float* source, int64_t K, uint8_t* bytes) {
  const int64_t whole = K / kWidth * kWidth;
  vint most = {}, second = {};
  int64_t k = 0;
  for (; k + 2 * kWidth <= whole; k += 2 * kWidth) {
    most = larger(most, magnitude(load(source + k)));
    second = larger(second, magnitude(load(source + k + kWidth)));
  }
  for (; k < whole; k += kWidth) most = larger(most, magnitude(load(source + k)));
  if (whole < K) most = larger(most, magnitude(load_part(source + whole, K - whole)));
  most = larger(most, second);
  int32_t bits = 0;
  for (int i = 0; i < kWidth; i++) bits = std::max(bits, most[i]);
  const Scale scale = scale_of(bits);
  const vfloat factor = splat(scale.factor);
  const auto convert = [&](vfloat v) {
    const vint integers = nearest(v * factor) + 128;
#if defined(__AVX512F__)
    return _mm512_cvtepi32_epi8(reinterpret_cast<__m512i>(integers));
#else
    typedef uint8_t vbyte __attribute__((vector_size(16), aligned(1), may_alias));
    return __builtin_convertvector(integers, vbyte);
#endif
  };
  for (k = 0; k < whole; k += kWidth) {
    const auto packed = convert(load(source + k));
    std::memcpy(bytes + k, &packed, kWidth);
  }
  if (whole < K) {
    const auto packed = convert(load_part(source + whole, K - whole));
    std::memcpy(bytes + whole, &packed, round_up(K, 4) - whole);
  }
  return scale.scale;
}

// Packs 64 rows of bytes (value + 128; `padded` of them a row) into one panel.
void pack_panel(int64_t padded, const uint8_t* bytes, int8_t* packed, int32_t* start) {
  for (int column = 0; column < kPanel; column++) {
    const uint8_t* source = bytes + column * padded;
    int32_t total = 0;
    for (int64_t k = 0; k < padded; k++) total += source[k];
    start[column] = -128 * (total - 128 * static_cast<int32_t>(padded));
  }
  for (int64_t step = 0; step < padded / 4; step++) {
    for (int column = 0; column < kPanel; column++) {
      uint32_t four;
      std::memcpy(&four, bytes + column * padded + 4 * step, sizeof four);
      four ^= 0x80808080u;  // of each byte value + 128 -> value
      std::memcpy(packed + (step * kPanel + column) * 4, &four, sizeof four);
    }
  }
}

}  // namespace
}  // namespace hanmo

using namespace hanmo;

// out[M, N] = a[M, K] @ b.T + bias: a is quantised row by row, b is packed. bias[N] may be null; no size may be zero.
EXPORT void hanmo_int8_product(const float* a, const int8_t* packed, const int32_t* start, const float* scales,
                               const float* bias, float* out, int64_t M, int64_t N, int64_t K) {
  const int64_t padded = round_up(K, 4), panels = (N + kPanel - 1) / kPanel, threads = omp_get_max_threads();
  const int64_t most = std::min(kBlockRows, std::max(kBlockBytes / padded, int64_t{4 * kTile}));
  // As many blocks as keep all threads busy to the end; no sum depends on where a block ends.
  const int64_t rounds = (M + most * threads - 1) / (most * threads);
  const int64_t block = round_up((M + rounds * threads - 1) / (rounds * threads), kTile);
  const int64_t blocks = (M + block - 1) / block;
  const int64_t parts = std::min(panels, std::max(int64_t{1}, threads / blocks));
#pragma omp parallel
  {
    std::vector<uint8_t> bytes(block * padded + 64);
    std::vector<float> row_scales(block);
#pragma omp for schedule(static)
    for (int64_t task = 0; task < blocks * parts; task++) {
      const int64_t first = task / parts * block, rows = std::min(block, M - first), part = task % parts;
      for (int64_t r = 0; r < rows; r++) row_scales[r] = quantize_row(a + (first + r) * K, K, &bytes[r * padded]);
      for (int64_t panel = part * panels / parts; panel < (part + 1) * panels / parts; panel++) {
        const int64_t column = panel * kPanel, columns = std::min(int64_t{kPanel}, N - column);
        vfloat scale[4], addend[4] = {};
        for (int v = 0; v < 4; v++) {
          scale[v] = load(scales + column + kWidth * v);
          const int64_t count = std::min(int64_t{kWidth}, columns - kWidth * v);
          if (bias && count > 0) addend[v] = load_part(bias + column + kWidth * v, count);
        }
        for (int64_t tile = 0; tile < rows; tile += kTile) {
          float* target = out + (first + tile) * N + column;
          const float* row_scale = &row_scales[tile];
          const int64_t height = std::min(int64_t{kTile}, rows - tile);
          alignas(64) int32_t sums[kTile * kPanel];
          multiply(height, padded / 4, &bytes[tile * padded], padded, 4, packed + column * padded, start + column,
                   sums);
          for (int64_t r = 0; r < height; r++) {
            const vfloat factor = splat(row_scale[r]);
            for (int v = 0; v < 4 && kWidth * v < columns; v++) {
              const vfloat result = to_float(sums + r * kPanel + kWidth * v) * scale[v] * factor + addend[v];
              float* place = target + r * N + kWidth * v;
              if (columns >= kWidth * (v + 1)) store(place, result);
              else store_part(place, result, columns - kWidth * v);
            }
          }
        }
      }
    }
  }
}

// Packs b[N, K], one scale per row of b.
EXPORT void hanmo_int8_pack_rows(const float* b, int8_t* packed, int32_t* start, float* scales, int64_t N, int64_t K) {
  const int64_t padded = round_up(K, 4);
  parallel_for((N + kPanel - 1) / kPanel, [&](int64_t panel) {
    std::vector<uint8_t> bytes(kPanel * padded, 128);
    const int64_t first = panel * kPanel;
    for (int64_t c = 0; c < kPanel; c++)
      scales[first + c] = first + c < N ? quantize_row(b + (first + c) * K, K, &bytes[c * padded]) : 0.0f;
    pack_panel(padded, bytes.data(), packed + first * padded, start + first);
  });
}
