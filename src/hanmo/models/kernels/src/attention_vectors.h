// Vectors, products of small blocks, and packing, for attention.
#pragma once

#include <algorithm>
#include <utility>

#include "common.h"

#define INLINE inline __attribute__((always_inline))

namespace hanmo::attention {

// Vectors are as wide as the machine's registers: the compiler splits wider ones badly. A product keeps the sums of
// 6 rows times kVectors vectors in registers.
#if defined(__AVX512F__)
constexpr int kLanes = 16, kVectors = 4;
#elif defined(__AVX__)
constexpr int kLanes = 8, kVectors = 2;
#elif defined(__ARM_NEON)
constexpr int kLanes = 4, kVectors = 4;
#else
constexpr int kLanes = 4, kVectors = 2;
#endif
constexpr int kRows = 6;
typedef float lanes __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));
typedef int32_t ilanes __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));

constexpr int64_t kBlock = 64;  // queries and keys that meet at a time

INLINE int64_t vectors_for(int64_t n) { return (n + kLanes - 1) / kLanes; }

INLINE lanes load(const float* p) { return *reinterpret_cast<const lanes*>(p); }
INLINE void store(float* p, lanes v) { *reinterpret_cast<lanes*>(p) = v; }
INLINE lanes all(float x) { return lanes{} + x; }
INLINE lanes maximum(lanes a, lanes b) { return a > b ? a : b; }

struct Whole {  // one vector of a row, from `at` on
  int64_t at;
  INLINE lanes load(const float* row) const { return attention::load(row + at); }
  INLINE void store(float* row, lanes v) const { attention::store(row + at, v); }
};

struct Half {  // the last eight values of a row where a vector holds sixteen; what follows reads as zeros
  int64_t at;
  INLINE lanes load(const float* row) const {
    lanes v = {};
    std::memcpy(&v, row + at, 8 * sizeof(float));
    return v;
  }
  INLINE void store(float* row, lanes v) const { std::memcpy(row + at, &v, 8 * sizeof(float)); }
};

// Calls body(piece) for the pieces of a row of N values, N being a multiple of 8.
template <typename Body>
INLINE void for_row(int64_t N, const Body& body) {
  int64_t i = 0;
  for (; i + kLanes <= N; i += kLanes) body(Whole{i});
  if (kLanes == 16 && i < N) body(Half{i});
}

// The larger of a constant and x; NaN where x is NaN.
INLINE lanes at_least(float least, lanes x) {
#if defined(__AVX512F__)
  return (lanes)_mm512_maskz_max_ps(0xffff, (__m512)all(least), (__m512)x);
#else
  return all(least) > x ? all(least) : x;
#endif
}

// 2^x for x <= 0 (a little above is right too), to 3e-7 of itself; exactly 0 below -127, and NaN for NaN.
INLINE lanes power_of_two(lanes x) {
  x = at_least(-127.0f, x);
  const ilanes exponent = __builtin_convertvector(x + all(127.5f), ilanes);  // of 2^x, with its bias; 0 means zero
  const lanes r = x - __builtin_convertvector(exponent - 127, lanes);
  lanes y = all(0.0013276447f);  // least maximum error on [-1/2, 1/2]
  y = y * r + all(0.0096755335f);
  y = y * r + all(0.0555071300f);
  y = y * r + all(0.2402212000f);
  y = y * r + all(0.6931469400f);
  y = y * r + all(1.0f);
  return y * (lanes)(exponent << 23);
}

template <int... Lane>
INLINE lanes swap(lanes v, int distance, std::integer_sequence<int, Lane...>) {
  switch (distance) {  // lane i gets what lane i ^ distance held
    case 8: return __builtin_shufflevector(v, v, ((Lane ^ 8) % kLanes)...);
    case 4: return __builtin_shufflevector(v, v, ((Lane ^ 4) % kLanes)...);
    case 2: return __builtin_shufflevector(v, v, (Lane ^ 2)...);
    default: return __builtin_shufflevector(v, v, (Lane ^ 1)...);
  }
}
using AllLanes = std::make_integer_sequence<int, kLanes>;

INLINE float largest(lanes v) {
#pragma GCC unroll 4
  for (int distance = kLanes / 2; distance > 0; distance /= 2) v = maximum(v, swap(v, distance, AllLanes()));
  return v[0];
}

INLINE float total_of(lanes v) {
#pragma GCC unroll 4
  for (int distance = kLanes / 2; distance > 0; distance /= 2) v += swap(v, distance, AllLanes());
  return v[0];
}

// One factor of a product: value (row, step) stands at data[row * row_stride + step * step_stride].
struct Left {
  const float* data;
  int64_t row_stride, step_stride;
};

// c[R, V] (+)= left[R, depth] @ right[depth, V], V being counted in vectors
template <int R, int V>
void product_tile(Left left, const float* right, int64_t right_stride, int64_t depth, float* c, int64_t c_stride,
                  bool add) {
  constexpr int kSets = R * V <= 8 ? 2 : 1;  // few sums would wait for each other: odd steps have their own
  lanes total[kSets][R][V];
#pragma GCC unroll 8
  for (int r = 0; r < R; r++) {
#pragma GCC unroll 8
    for (int v = 0; v < V; v++) {
      total[0][r][v] = add ? load(c + r * c_stride + v * kLanes) : lanes{};
      if (kSets == 2) total[kSets - 1][r][v] = lanes{};
    }
  }
  const auto step = [&](const float* a, const float* b, lanes(&sums)[R][V]) {
    lanes vectors[V];
#pragma GCC unroll 8
    for (int v = 0; v < V; v++) vectors[v] = load(b + v * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
      const lanes value = all(a[r * left.row_stride]);
#pragma GCC unroll 8
      for (int v = 0; v < V; v++) sums[r][v] += value * vectors[v];
    }
  };
  int64_t k = 0;
  if (kSets == 2) {
    for (; k + 2 <= depth; k += 2) {
      step(left.data + k * left.step_stride, right + k * right_stride, total[0]);
      step(left.data + (k + 1) * left.step_stride, right + (k + 1) * right_stride, total[kSets - 1]);
    }
  }
  for (; k < depth; k++) step(left.data + k * left.step_stride, right + k * right_stride, total[0]);
#pragma GCC unroll 8
  for (int r = 0; r < R; r++) {
#pragma GCC unroll 8
    for (int v = 0; v < V; v++) {
      if (kSets == 2) total[0][r][v] += total[kSets - 1][r][v];
      store(c + r * c_stride + v * kLanes, total[0][r][v]);
    }
  }
}

using TileProduct = void (*)(Left, const float*, int64_t, int64_t, float*, int64_t, bool);
template <int R>
INLINE TileProduct product_of(int64_t vectors) {
  return vectors == 1   ? product_tile<R, 1>
         : vectors == 2 ? product_tile<R, 2>
         : vectors == 3 ? product_tile<R, std::min(3, kVectors)>
                        : product_tile<R, kVectors>;
}

// The same for any number of vectors and up to 6 rows.
inline void product(int64_t rows, int64_t vectors, Left left, const float* right, int64_t right_stride, int64_t depth,
                    float* c, int64_t c_stride, bool add) {
  for (int64_t done = 0, panels = (vectors + kVectors - 1) / kVectors; panels > 0; panels--) {
    const int64_t width = (vectors - done + panels - 1) / panels;
    const TileProduct tile = rows == 6   ? product_of<6>(width)
                             : rows == 5 ? product_of<5>(width)
                             : rows == 4 ? product_of<4>(width)
                             : rows == 3 ? product_of<3>(width)
                             : rows == 2 ? product_of<2>(width)
                                         : product_of<1>(width);
    tile(left, right + done * kLanes, right_stride, depth, c + done * kLanes, c_stride, add);
    done += width;
  }
}

// Calls body(first, end) for [begin, end) in pieces of at most 6 rows, of nearly equal size.
template <typename Body>
INLINE void for_tiles(int64_t begin, int64_t end, const Body& body) {
  for (int64_t tiles = (end - begin + kRows - 1) / kRows; tiles > 0; tiles--) {
    const int64_t next = begin + (end - begin + tiles - 1) / tiles;
    body(begin, next);
    begin = next;
  }
}

// Rows of one head, copied to [count, padded] with zeros after the N values.
inline void pack_rows(const float* source, int64_t stride, int64_t count, int64_t N, float* packed) {
  const int64_t padded = vectors_for(N) * kLanes;
  for (int64_t t = 0; t < count; t++, source += stride, packed += padded) {
    for_row(N, [&](auto piece) { store(packed + piece.at, piece.load(source)); });
  }
}

// One step of a transposition: blocks of `Distance` lanes change places between two rows.
template <int Distance, int... Lane>
INLINE void exchange(lanes& a, lanes& b, std::integer_sequence<int, Lane...>) {
  const lanes first = a, second = b;
  a = __builtin_shufflevector(first, second, (Lane & Distance ? kLanes + Lane - Distance : Lane)...);
  b = __builtin_shufflevector(first, second, (Lane & Distance ? kLanes + Lane : Lane + Distance)...);
}

template <int Distance>
INLINE void transpose(lanes (&row)[kLanes]) {
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; i++) {
    if (!(i & Distance)) exchange<Distance>(row[i], row[i + Distance], AllLanes());
  }
  if constexpr (Distance > 1) transpose<Distance / 2>(row);
}

// Up to 64 rows of one head, transposed to [N, 64] and multiplied by a factor; zeros up to a whole vector.
inline void pack_columns(const float* source, int64_t stride, int64_t count, int64_t N, float factor, float* packed) {
  for (int64_t s = 0; s < count; s += kLanes) {
    const int64_t rows = std::min<int64_t>(kLanes, count - s);
    const float* from = source + s * stride;
    for_row(N, [&](auto piece) {
      lanes row[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; i++) row[i] = i < rows ? piece.load(from + i * stride) : lanes{};
      transpose<kLanes / 2>(row);
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; i++) {
        if (piece.at + i < N) store(packed + (piece.at + i) * kBlock + s, row[i] * all(factor));
      }
    });
  }
}

}  // namespace hanmo::attention
