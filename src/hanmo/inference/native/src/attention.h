// Keys and values in pages, and attention over them.
//
// A page holds kPage positions of one sequence, for each layer and key/value head, in half precision or as floats:
//     keys    [head dimension, filled up to 32][position 32]: one load gives a dimension of 16 or 32 positions
//     values  [position 32][head dimension, filled up to 32]
// Which page holds which positions of a sequence is a table of page numbers. Pages are shared by sequences that begin
// alike.
//
// A query (one head of one token) takes three passes over its positions: scores, softmax, sum of values, each in the
// order of positions, beginning at a page. Several queries that share a key/value head go over it together; what a
// query computes does not depend on its company.
#pragma once

#include <algorithm>
#include <limits>

#include "arithmetic.h"
#include "product.h"

namespace hanmo::native {

constexpr int kPage = 32;       // positions of a page
constexpr int kQueries = 12;    // queries that go over the keys together
constexpr float kMasked = -1e30f;

struct Cache {
  int64_t pages = 0, layers = 0, heads = 0, dimensions = 0;  // dimensions of a head, filled up to 32
  int64_t number_bytes = 2;                                  // 2: half precision, 4: floats
  char* memory = nullptr;

  int64_t part() const { return dimensions * kPage; }  // numbers of the keys, or the values, of one head in one page
  int64_t page_bytes() const { return layers * heads * 2 * part() * number_bytes; }
  template <typename Number>
  Number* keys(int64_t page, int64_t layer, int64_t head) const {
    return reinterpret_cast<Number*>(memory + page * page_bytes()) + (layer * heads + head) * 2 * part();
  }
  template <typename Number>
  Number* values(int64_t page, int64_t layer, int64_t head) const {
    return keys<Number>(page, layer, head) + part();
  }
};

INLINE Floats load_numbers(const float* p) { return load(p); }
INLINE Floats load_numbers(const uint16_t* p) { return load_halves(p); }
INLINE void put_number(float* p, float x) { *p = x; }
INLINE void put_number(uint16_t* p, float x) {
  constexpr float kMost = 65504.0f;  // the largest half: an infinity would spoil every later token
  *p = float_to_half(std::clamp(x, -kMost, kMost));
}

// One head of one token that looks for its keys.
struct Query {
  const float* vector;  // [dimensions], scaled and rotated
  float* out;           // [dimensions]
  int64_t begin, end;   // positions it sees
};

struct Scores {  // of up to kQueries queries, [query][position]
  std::vector<float> memory;
  int64_t stride = 0;
  void reserve(int64_t positions) {
    stride = round_up(positions, kPage) + kPage;
    if (static_cast<int64_t>(memory.size()) < stride * kQueries) memory.resize(stride * kQueries);
  }
};

INLINE Floats squash(Floats scores, float cap) { return cap > 0 ? tanh(scores * all(1.0f / cap)) * all(cap) : scores; }

// Scores of the queries with every position of the pages [first, last).
template <typename Number, int queries>
void score(const Cache& cache, int64_t layer, int64_t head, const int32_t* table, int64_t first, int64_t last,
           const Query* query, float cap, Scores& scores) {
  for (int64_t page = first; page < last; page++) {
    const Number* keys = cache.keys<Number>(table[page], layer, head);
    Floats sums[queries][kPage / kPanel];
    UNROLL for (int q = 0; q < queries; q++) sums[q][0] = sums[q][1] = all(0.0f);
    for (int64_t d = 0; d < cache.dimensions; d++) {
      const Floats a = load_numbers(keys + d * kPage), b = load_numbers(keys + d * kPage + kPanel);
      UNROLL for (int q = 0; q < queries; q++) {
        const Floats x = all(query[q].vector[d]);
        sums[q][0] = fma(x, a, sums[q][0]);
        sums[q][1] = fma(x, b, sums[q][1]);
      }
    }
    UNROLL for (int q = 0; q < queries; q++)
        UNROLL for (int half = 0; half < 2; half++)
            store(scores.memory.data() + q * scores.stride + (page - first) * kPage + half * kPanel,
                  squash(sums[q][half], cap));
  }
}

// Scores to weights that are not divided by their sum yet; returns that sum. Positions outside [begin, end) get zero.
inline float soften(float* scores, int64_t begin, int64_t end, int64_t count) {
  Floats top = all(kMasked);
  for (int64_t i = 0; i < count; i += kPanel) top = larger(top, keep(load(scores + i), begin - i, end - i, kMasked));
  const Floats greatest = all(largest(top) * kLog2E), base = all(kLog2E);
  Floats total = all(0.0f);
  for (int64_t i = 0; i < count; i += kPanel) {
    const Floats weight = exp2(fma(keep(load(scores + i), begin - i, end - i, kMasked), base, all(0.0f) - greatest));
    const Floats kept = keep(weight, begin - i, end - i, 0.0f);
    store(scores + i, kept);
    total = total + kept;
  }
  return sum(total);
}

template <typename Number, int queries>
void collect(const Cache& cache, int64_t layer, int64_t head, const int32_t* table, int64_t first, int64_t last,
             const Query* query, const float* totals, const Scores& scores) {
  for (int64_t d = 0; d < cache.dimensions; d += kPage) {
    Floats sums[queries][2];
    UNROLL for (int q = 0; q < queries; q++) sums[q][0] = sums[q][1] = all(0.0f);
    for (int64_t page = first; page < last; page++) {
      const Number* values = cache.values<Number>(table[page], layer, head) + d;
      const float* weights = scores.memory.data() + (page - first) * kPage;
      for (int64_t t = 0; t < kPage; t++) {
        const Floats a = load_numbers(values + t * cache.dimensions);
        const Floats b = load_numbers(values + t * cache.dimensions + kPanel);
        UNROLL for (int q = 0; q < queries; q++) {
          const Floats w = all(weights[q * scores.stride + t]);
          sums[q][0] = fma(w, a, sums[q][0]);
          sums[q][1] = fma(w, b, sums[q][1]);
        }
      }
    }
    UNROLL for (int q = 0; q < queries; q++) {
      const Floats scale = all(1.0f / totals[q]);
      store(query[q].out + d, sums[q][0] * scale);
      store(query[q].out + d + kPanel, sums[q][1] * scale);
    }
  }
}

// Queries of one sequence that share a key/value head; at most kQueries.
template <typename Number>
void attend_to(const Cache& cache, int64_t layer, int64_t head, const int32_t* table, const Query* query, int count,
               float cap, Scores& scores) {
  int64_t begin = std::numeric_limits<int64_t>::max(), end = 0;
  for (int q = 0; q < count; q++) {
    begin = std::min(begin, query[q].begin);
    end = std::max(end, query[q].end);
  }
  const int64_t first = begin / kPage, last = (end + kPage - 1) / kPage, start = first * kPage;
  scores.reserve((last - first) * kPage);
  with_constant<kQueries>(count, [&](auto n) {
    score<Number, n.value>(cache, layer, head, table, first, last, query, cap, scores);
  });
  float totals[kQueries];
  for (int q = 0; q < count; q++)
    totals[q] = soften(scores.memory.data() + q * scores.stride, query[q].begin - start, query[q].end - start,
                       (last - first) * kPage);
  with_constant<kQueries>(count, [&](auto n) {
    collect<Number, n.value>(cache, layer, head, table, first, last, query, totals, scores);
  });
}

inline void attend(const Cache& cache, int64_t layer, int64_t head, const int32_t* table, const Query* query, int count,
                   float cap, Scores& scores) {
  if (cache.number_bytes == 2)
    attend_to<uint16_t>(cache, layer, head, table, query, count, cap, scores);
  else
    attend_to<float>(cache, layer, head, table, query, count, cap, scores);
}

// Store one token's key and value of one head at a position.
template <typename Number>
void remember_as(const Cache& cache, int64_t layer, int64_t head, const int32_t* table, int64_t position,
                 const float* key, const float* value, int64_t dimensions) {
  Number* keys = cache.keys<Number>(table[position / kPage], layer, head) + position % kPage;
  Number* values = cache.values<Number>(table[position / kPage], layer, head) + position % kPage * cache.dimensions;
  for (int64_t d = 0; d < dimensions; d++) {
    put_number(keys + d * kPage, key[d]);
    put_number(values + d, value[d]);
  }
}
inline void remember(const Cache& cache, int64_t layer, int64_t head, const int32_t* table, int64_t position,
                     const float* key, const float* value, int64_t dimensions) {
  if (cache.number_bytes == 2)
    remember_as<uint16_t>(cache, layer, head, table, position, key, value, dimensions);
  else
    remember_as<float>(cache, layer, head, table, position, key, value, dimensions);
}

}  // namespace hanmo::native
