// Keys and values in pages, and attention over them.
//
// A page holds kPage positions of one sequence, for each layer and key/value head its keys, then its values. As floats
// or in half precision:
//     keys    [head dimension, filled up to 32][position 32]: one load gives a dimension of 16 or 32 positions
//     values  [position 32][head dimension, filled up to 32]
// In 8 bits, with a scale in half precision for each position and group of 32 dimensions:
//     keys    [panel 2][group][step 8][position 16][dimension 4], the integer + 128: an 8-bit matrix (matrix.h) with
//             positions for outputs, which is multiplied by queries in 8 bits
//     scales  [panel 2][group][position 16]
//     values  [position 32][head dimension, filled up to 32], signed
//     scales  [group][position 32]
// Which page holds which positions of a sequence is a table of page numbers. Pages are shared by sequences that begin
// alike. All numbers in a page are finite: what is left of one sequence cannot spoil the next one's zeros.
//
// A query (one head of one token) takes three passes over its positions: scores, softmax, sum of values, each in the
// order of positions, beginning at a page. Several queries that share a key/value head go over it together; what a
// query computes does not depend on its company.
#pragma once

#include <algorithm>
#include <limits>
#include <type_traits>

#include "arithmetic.h"
#include "product.h"

namespace hanmo::native {

constexpr int kPage = 32;       // positions of a page
constexpr int kQueries = 12;    // queries that go over the keys together
constexpr float kMasked = -1e30f;
constexpr float kLargestHalf = 65504.0f;

struct Cache {
  int64_t pages = 0, layers = 0, heads = 0, dimensions = 0;  // dimensions of a head, filled up to 32
  int64_t number_bytes = 2;                                  // 1: 8 bits with scales, 2: half precision, 4: floats
  Buffer<char> memory;
  Buffer<int64_t> written;  // [page], the last call that wrote to it: how a call finds that it would do so twice
  int64_t calls = 0;

  int64_t numbers() const { return dimensions * kPage; }  // of the keys, or the values, of one head in one page
  int64_t groups() const { return dimensions / kGroup; }
  int64_t part_bytes() const { return numbers() * number_bytes + (number_bytes == 1 ? groups() * kPage * 2 : 0); }
  int64_t page_bytes() const { return layers * heads * 2 * part_bytes(); }
  template <typename Number>
  Number* keys(int64_t page, int64_t layer, int64_t head) {
    return reinterpret_cast<Number*>(memory.data() + page * page_bytes() + (layer * heads + head) * 2 * part_bytes());
  }
  template <typename Number>
  Number* values(int64_t page, int64_t layer, int64_t head) {
    return reinterpret_cast<Number*>(keys<char>(page, layer, head) + part_bytes());
  }
  uint16_t* scales(uint8_t* numbers_of_part) const { return reinterpret_cast<uint16_t*>(numbers_of_part + numbers()); }
};

INLINE Floats load_numbers(const float* p) { return load(p); }
INLINE Floats load_numbers(const uint16_t* p) { return load_halves(p); }
INLINE Floats load_numbers(const int8_t* p) { return load_integers(p); }
INLINE float tame(float x, float most) { return x > most ? most : x < -most ? -most : x == x ? x : 0.0f; }
INLINE Floats tame(Floats v, float most) {
  UNROLL EACH {
    lanes& x = v.at[i];
    x = x > most ? lanes{} + most : x < -most ? lanes{} - most : x == x ? x : lanes{};
  }
  return v;
}
INLINE void put_number(float* p, float x) { *p = tame(x, 1e30f); }
INLINE void put_number(uint16_t* p, float x) { *p = float_to_half(tame(x, kLargestHalf)); }
INLINE void put_numbers(float* p, Floats v) { store(p, tame(v, 1e30f)); }
INLINE void put_numbers(uint16_t* p, Floats v) { store_halves(p, tame(v, kLargestHalf)); }

// One head of one token that looks for its keys.
struct Query {
  const float* vector;  // [dimensions], scaled and rotated
  float* out;           // [dimensions]
  int64_t begin, end;   // positions it sees
};

struct Scores {  // of up to kQueries queries, [query][position]
  Vector memory;
  int64_t stride = 0;
  // Room for the keys of so many positions, wherever they begin.
  void reserve(int64_t positions) {
    stride = round_up(positions, kPage) + kPage;
    memory.reserve(stride * kQueries);
  }
  float* of(int64_t query) { return memory.data() + query * stride; }
};

INLINE Floats squash(Floats scores, float cap) { return cap > 0 ? tanh(scores * all(1.0f / cap)) * all(cap) : scores; }

// Scores of the queries with every position of the pages [first, last).
template <typename Number, int queries>
void score(Cache& cache, int64_t layer, int64_t head, const int32_t* table, int64_t first, int64_t last,
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
            store(scores.of(q) + (page - first) * kPage + half * kPanel, squash(sums[q][half], cap));
  }
}

// The same in 8 bits.
inline void score(Cache& cache, int64_t layer, int64_t head, const int32_t* table, int64_t first, int64_t last,
                  const Query* query, int count, float cap, const Activations& vectors, Scores& scores) {
  for (int q = 0; q < count; q++) quantise_row(query[q].vector, vectors, q);
  Matrix keys{kInt8, kPage, cache.dimensions, nullptr, nullptr};
  for (int64_t page = first; page < last; page++) {
    uint8_t* numbers = cache.keys<uint8_t>(table[page], layer, head);
    keys.values = numbers, keys.scales = cache.scales(numbers);
    const Target target{scores.of(0) + (page - first) * kPage, scores.stride};
    for (int64_t panel = 0; panel < kPage / kPanel; panel++) {
      const Panel<kInt8, false> w{keys.group_values(panel, 0), keys.group_scale(panel, 0)};
      multiply_rows<kInt8, false, 1>(&w, panel, vectors, count, target);
    }
  }
  if (cap > 0)
    for (int q = 0; q < count; q++)
      for (int64_t i = 0; i < (last - first) * kPage; i += kPanel)
        store(scores.of(q) + i, squash(load(scores.of(q) + i), cap));
}

// Scores to weights that are not divided by their sum yet; returns that sum. Positions outside [begin, end) get zero.
inline float soften(float* scores, int64_t begin, int64_t end, int64_t count) {
  Floats top = all(kMasked);
  for (int64_t i = 0; i < count; i += kPanel) top = larger(keep(load(scores + i), begin - i, end - i, kMasked), top);
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

// Sums of the values of the pages [first, last), weighted by scores that were made weights.
template <typename Number, int queries>
void collect(Cache& cache, int64_t layer, int64_t head, const int32_t* table, int64_t first, int64_t last,
             const Query* query, const float* totals, Scores& scores) {
  for (int64_t d = 0; d < cache.dimensions; d += kGroup) {
    Floats sums[queries][2];
    float scaled[queries][kPage];
    UNROLL for (int q = 0; q < queries; q++) sums[q][0] = sums[q][1] = all(0.0f);
    for (int64_t page = first; page < last; page++) {
      Number* numbers = cache.values<Number>(table[page], layer, head);
      const Number* values = numbers + d;
      if constexpr (std::is_same_v<Number, int8_t>) {
        const uint16_t* scale = cache.scales(reinterpret_cast<uint8_t*>(numbers)) + d / kGroup * kPage;
        const Floats a = load_halves(scale), b = load_halves(scale + kPanel);
        UNROLL for (int q = 0; q < queries; q++) {
          const float* weights = scores.of(q) + (page - first) * kPage;
          store(scaled[q], load(weights) * a);
          store(scaled[q] + kPanel, load(weights + kPanel) * b);
        }
      }
      for (int64_t t = 0; t < kPage; t++) {
        const Floats a = load_numbers(values + t * cache.dimensions);
        const Floats b = load_numbers(values + t * cache.dimensions + kPanel);
        UNROLL for (int q = 0; q < queries; q++) {
          const Floats w = all(std::is_same_v<Number, int8_t> ? scaled[q][t] : scores.of(q)[(page - first) * kPage + t]);
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

// What a thread needs to attend.
struct AttentionMemory {
  Scores scores;
  ActivationMemory vectors;  // of queries in 8 bits
};

// Queries of one sequence that share a key/value head; at most kQueries. `vector` of each is filled up with zeros.
template <typename Number>
void attend_to(Cache& cache, int64_t layer, int64_t head, const int32_t* table, const Query* query, int count,
               float cap, AttentionMemory& memory) {
  int64_t begin = std::numeric_limits<int64_t>::max(), end = 0;
  for (int q = 0; q < count; q++) {
    begin = std::min(begin, query[q].begin);
    end = std::max(end, query[q].end);
  }
  const int64_t first = begin / kPage, last = (end + kPage - 1) / kPage, start = first * kPage;
  Scores& scores = memory.scores;
  if constexpr (std::is_same_v<Number, int8_t>)
    score(cache, layer, head, table, first, last, query, count, cap, memory.vectors.view(cache.dimensions), scores);
  else
    with_constant<kQueries>(count, [&](auto n) {
      score<Number, n.value>(cache, layer, head, table, first, last, query, cap, scores);
    });
  float totals[kQueries];
  for (int q = 0; q < count; q++)
    totals[q] = soften(scores.of(q), query[q].begin - start, query[q].end - start, (last - first) * kPage);
  with_constant<kQueries>(count, [&](auto n) {
    collect<Number, n.value>(cache, layer, head, table, first, last, query, totals, scores);
  });
}

inline void attend(Cache& cache, int64_t layer, int64_t head, const int32_t* table, const Query* query, int count,
                   float cap, AttentionMemory& memory) {
  switch (cache.number_bytes) {
    case 1: return attend_to<int8_t>(cache, layer, head, table, query, count, cap, memory);
    case 2: return attend_to<uint16_t>(cache, layer, head, table, query, count, cap, memory);
    default: return attend_to<float>(cache, layer, head, table, query, count, cap, memory);
  }
}

// Store one token's key and value of one head at a position.
template <typename Number>
void remember_as(Cache& cache, int64_t layer, int64_t head, int64_t page, int64_t place, const float* key,
                 const float* value, int64_t dimensions) {
  Number* keys = cache.keys<Number>(page, layer, head) + place;
  Number* values = cache.values<Number>(page, layer, head) + place * cache.dimensions;
  int64_t d = 0;
  for (; d + kPanel <= dimensions; d += kPanel) {
    Number numbers[kPanel];
    put_numbers(numbers, load(key + d));
    for (int i = 0; i < kPanel; i++) keys[(d + i) * kPage] = numbers[i];
    put_numbers(values + d, load(value + d));
  }
  for (; d < dimensions; d++) {
    put_number(keys + d * kPage, key[d]);
    put_number(values + d, value[d]);
  }
}

// 32 dimensions in 8 bits; returns the scale, in half precision.
INLINE uint16_t quantise_dimensions(const float* x, int64_t count, int8_t* out) {
  float tamed[kGroup] = {};
  for (int64_t i = 0; i < std::min<int64_t>(count, kGroup); i++) tamed[i] = tame(x[i], 127 * kLargestHalf);
  Floats first = load(tamed), second = load(tamed + kPanel);
  const uint16_t scale = float_to_half(greatest(first, second) / 127.0f);
  const float d = half_to_float(scale), factor = d > 0 ? 1.0f / d : 0.0f;
  for (Floats* part : {&first, &second}) {
    const Ints nearest_ones = nearest(smaller(larger(*part * all(factor), all(-127.0f)), all(127.0f)));
    int32_t integers[kPanel];
    std::memcpy(integers, &nearest_ones, sizeof integers);
    for (int i = 0; i < kPanel; i++) *out++ = static_cast<int8_t>(integers[i]);
  }
  return scale;
}

inline void remember_bytes(Cache& cache, int64_t layer, int64_t head, int64_t page, int64_t place, const float* key,
                           const float* value, int64_t dimensions) {
  uint8_t* keys = cache.keys<uint8_t>(page, layer, head);
  int8_t* values = cache.values<int8_t>(page, layer, head);
  uint16_t *key_scales = cache.scales(keys), *value_scales = cache.scales(reinterpret_cast<uint8_t*>(values));
  const int64_t panel = place / kPanel, within = place % kPanel;
  for (int64_t g = 0; g < cache.groups(); g++) {
    int8_t integers[kGroup];
    const int64_t at = panel * cache.groups() + g, count = dimensions - g * kGroup;
    key_scales[at * kPanel + within] = quantise_dimensions(key + g * kGroup, count, integers);
    for (int i = 0; i < kGroup; i++)
      keys[(at * kSteps + i / 4) * 64 + within * 4 + i % 4] = static_cast<uint8_t>(integers[i] + 128);
    value_scales[g * kPage + place] = quantise_dimensions(value + g * kGroup, count, integers);
    std::memcpy(values + place * cache.dimensions + g * kGroup, integers, kGroup);
  }
}

inline void remember(Cache& cache, int64_t layer, int64_t head, const int32_t* table, int64_t position,
                     const float* key, const float* value, int64_t dimensions) {
  const int64_t page = table[position / kPage], place = position % kPage;
  switch (cache.number_bytes) {
    case 1: return remember_bytes(cache, layer, head, page, place, key, value, dimensions);
    case 2: return remember_as<uint16_t>(cache, layer, head, page, place, key, value, dimensions);
    default: return remember_as<float>(cache, layer, head, page, place, key, value, dimensions);
  }
}

}  // namespace hanmo::native
