// The walk through a decoder: one call computes all layers for some tokens, on all threads.
//
// There are two ways to divide the work. With many rows each thread takes some of the rows through everything, so that
// what it computes stays in its own cache; the threads meet once a layer, when the keys and values are stored. With few
// rows the threads divide the outputs of each product, and meet after each. The numbers are the same.
#include <algorithm>

#include "rows.h"

namespace hanmo::native {
namespace {

constexpr int64_t kRowsPerThread = 12;  // from so many on, threads divide rows
constexpr int64_t kFetched = 16384;    // bytes that are asked for before a thread waits: what comes while it does
constexpr int64_t kPrivateRows = 2;     // so few are normed by every thread for itself, which is faster than to wait

struct Range {
  int64_t begin, end;
  int64_t size() const { return end - begin; }
};
Range share(int64_t n, int64_t part, int64_t parts) { return {n * part / parts, n * (part + 1) / parts}; }

class Walk {
 public:
  Walk(Model& model, Cache& cache, const Rows& rows, int thread, bool by_rows, Range own)
      : m(model), s(model.shape), cache(cache), rows(rows), thread(thread), threads(model.team.running()),
        mine(model.threads[thread]), by_rows(by_rows), own(own) {}

  void run() {
    embed();
    for (int64_t layer = 0; layer < s.layers; layer++) block(layer);
    output();
  }

 private:
  Model& m;
  const Shape& s;
  Cache& cache;
  const Rows& rows;
  const int thread, threads;
  ThreadMemory& mine;
  const bool by_rows;
  const Range own;  // rows

  // Where outputs are divided, the threads meet; where rows are, they need not.
  void meet() {
    if (!by_rows) m.team.barrier();
  }
  float* x(int64_t row) { return m.x.data() + row * round_up(s.hidden, kGroup); }
  int64_t qkv_width() const { return round_up(s.query_width() + 2 * s.kv_width(), kPanel); }
  float* qkv(int64_t row) { return m.qkv.data() + row * qkv_width(); }
  int64_t attended_width() const { return round_up(s.query_width(), kGroup); }

  // Ask the memory for the weights with which this thread will begin a product, before it waits for others.
  void fetch(const Matrix& matrix) const {
    if (by_rows || rows.count > kPrivateRows) return;
    const int64_t panel = share(matrix.panels(), thread, threads).begin;
    const uint8_t* p = matrix.values + panel * (matrix.value_bytes() / matrix.panels());
    const int64_t size = std::min<int64_t>(kFetched, matrix.values + matrix.value_bytes() - p);
    for (int64_t i = 0; i < size; i += 64) __builtin_prefetch(p + i);
  }

  void embed() {
    const int64_t width = round_up(s.hidden, kGroup);
    for (int64_t row = own.begin; row < own.end; row++) {
      float* out = x(row);
      std::fill(out, out + width, 0.0f);
      m.embedding.row(rows.tokens[row], out);
      if (s.embedding_scale != 1)
        for (int64_t i = 0; i < s.hidden; i++) out[i] *= s.embedding_scale;
      if (const Vector& table = m.vectors[kPositions]; !table.empty())
        for (int64_t i = 0; i < s.hidden; i++) out[i] += table[rows.positions[row] * s.hidden + i];
    }
    meet();
  }

  void norm(const float* in, float* out, int64_t size, const Vector& weight, const Vector& bias) const {
    norm_row(in, out, size, weight, bias, s.epsilon, s.layer_norm);
  }

  // Calls body(change, begin, end) for rows that stand together and have the same adapter, if it changes this product.
  template <typename Body>
  void for_adapters(Range range, int64_t layer, int64_t name, const Body& body) const {
    if (!rows.adapters) return;
    for (int64_t begin = range.begin, end; begin < range.end; begin = end) {
      const int32_t number = rows.adapters[begin];
      for (end = begin + 1; end < range.end && rows.adapters[end] == number;) end++;
      if (number < 0) continue;
      const LowRank& change = m.adapters[number]->changes[layer * kEmbedding + name];
      if (change.rank()) body(change, begin, end);
    }
  }

  // A x of the rows' adapters, from their floats.
  void begin_change(Range range, int64_t layer, int64_t name, const Activations& a) {
    for_adapters(range, layer, name, [&](const LowRank& change, int64_t begin, int64_t end) {
      const Activations x = a.from(begin);
      multiply(change.a, 0, change.a.panels(), x, end - begin, Target{x.low, x.low_stride}, mine.expanded);
    });
  }

  // out += B (A x), for some panels; `out` is that of the range's first row.
  void add_change(Range range, Range panels, int64_t layer, int64_t name, const Activations& a, float* out,
                  int64_t stride, int64_t first) {
    for_adapters(range, layer, name, [&](const LowRank& change, int64_t begin, int64_t end) {
      const Activations low{0, a.low_stride / kGroup, a.from(begin).low};
      const Target target{out + (begin - range.begin) * stride, stride, true, nullptr, first};
      multiply(change.b, panels.begin, panels.end, low, end - begin, target, mine.expanded);
    });
  }

  bool alone() const { return !by_rows && rows.count <= kPrivateRows; }

  // What a layer's matrix reads: the rows that `make(row, out)` writes as floats, quantised if the matrix is.
  template <typename Make>
  Activations prepare(int64_t layer, int64_t name, const Make& make) {
    const Matrix& matrix = m.layers[layer].matrices[name];
    const Activations a = (alone() ? mine.activations : m.activations).view(matrix.inputs);
    const Range range = by_rows ? own : alone() ? Range{0, rows.count} : share(rows.count, thread, threads);
    const bool keep = !matrix.quantised() || rows.adapters;
    for (int64_t row = range.begin; row < range.end; row++) {
      float* out = keep ? a.floats + row * a.stride() : mine.row.data();
      std::fill(out + matrix.inputs, out + a.groups * kGroup, 0.0f);
      make(row, out);
      if (matrix.quantised()) quantise_row(out, a, row);
    }
    begin_change(range, layer, name, a);
    if (!alone()) meet();
    return a;
  }

  // out = a layer's matrix * a, for the rows and outputs that are this thread's.
  void product(int64_t layer, int64_t name, const Activations& a, float* out, int64_t stride, const Vector& bias,
               bool add, const Matrix& next) {
    const Matrix& matrix = m.layers[layer].matrices[name];
    const Range panels = by_rows ? Range{0, matrix.panels()} : share(matrix.panels(), thread, threads);
    const Range range = by_rows ? own : Range{0, rows.count};
    const Target target{out + range.begin * stride, stride, add, bias.empty() ? nullptr : bias.data()};
    multiply(matrix, panels.begin, panels.end, a.from(range.begin), range.size(), target, mine.expanded);
    add_change(range, panels, layer, name, a, target.out, stride, 0);
    fetch(next);
    meet();
  }

  void block(int64_t number) {
    Layer& layer = m.layers[number];
    const Vector* v = layer.vectors;
    Activations a = prepare(number, kQueryKeyValue, [&](int64_t row, float* out) {
      norm(x(row), out, s.hidden, v[kAttentionNorm], v[kAttentionNormBias]);
    });
    product(number, kQueryKeyValue, a, m.qkv.data(), qkv_width(), v[kQueryKeyValueBias], false, layer.matrices[kOutput]);
    store_keys(number, layer);
    m.team.barrier();
    attention(number, layer);
    meet();
    a = prepare(number, kOutput, [&](int64_t row, float* out) {
      const float* in = m.attended.data() + row * attended_width();
      std::copy(in, in + s.query_width(), out);
    });
    sublayer(number, kOutput, a, v[kOutputBias], v[kAttentionOutNorm], v[kAttentionOutNormBias], layer.matrices[kGateUp]);
    a = prepare(number, kGateUp, [&](int64_t row, float* out) {
      norm(x(row), out, s.hidden, v[kMlpNorm], v[kMlpNormBias]);
    });
    a = inner(number, a);
    sublayer(number, kDown, a, v[kDownBias], v[kMlpOutNorm], v[kMlpOutNormBias],
             number + 1 < s.layers ? m.layers[number + 1].matrices[kQueryKeyValue] : m.head);
  }

  // Add a sublayer's output to the states, normed first if the model does that.
  void sublayer(int64_t layer, int64_t name, const Activations& a, const Vector& bias, const Vector& weight,
                const Vector& shift, const Matrix& next) {
    const int64_t width = round_up(s.hidden, kGroup);
    if (weight.empty()) return product(layer, name, a, m.x.data(), width, bias, true, next);
    product(layer, name, a, m.sublayer.data(), width, bias, false, next);
    const Range range = by_rows ? own : share(rows.count, thread, threads);
    for (int64_t row = range.begin; row < range.end; row++) {
      float* out = mine.row.data();
      norm(m.sublayer.data() + row * width, out, s.hidden, weight, shift);
      for (int64_t i = 0; i < s.hidden; i++) x(row)[i] += out[i];
    }
    meet();
  }

  // A head's vector, normed if the model does that, rotated and scaled.
  void head_vector(const float* in, float* out, int64_t position, const Vector& weight, const Rotary& rotary,
                   float scale) const {
    const int64_t size = s.head_size, half = s.rotary_size / 2;
    if (weight.empty())
      std::copy(in, in + size, out);
    else
      norm(in, out, size, weight, Vector());
    if (half) rotate_head(out, half, rotary, position);
    for (int64_t i = 0; i < size; i++) out[i] *= scale;
  }

  void store_keys(int64_t number, const Layer& layer) {
    const Rotary& rotary = m.rotary[layer.sliding];
    const int64_t begin = by_rows ? own.begin : 0, count = by_rows ? own.size() : rows.count;
    const Range units = by_rows ? Range{0, count * s.kv_heads} : share(count * s.kv_heads, thread, threads);
    for (int64_t unit = units.begin; unit < units.end; unit++) {
      const int64_t row = begin + unit / s.kv_heads, head = unit % s.kv_heads;
      const float* in = qkv(row) + s.query_width() + head * s.head_size;
      head_vector(in, mine.row.data(), rows.positions[row], layer.vectors[kKeyNorm], rotary, 1.0f);
      remember(cache, number, head, table(row), rows.positions[row], mine.row.data(), in + s.kv_width(), s.head_size);
    }
  }

  const int32_t* table(int64_t row) const { return rows.tables + rows.sequences[row] * rows.table_stride; }

  // Queries of rows [first, last), which are one sequence's, and of heads [head, end) of one key/value head.
  void attend_tile(int64_t number, const Layer& layer, int64_t first, int64_t last, int64_t head, int64_t end) {
    const int64_t filled = s.filled_head(), group = s.heads / s.kv_heads;
    Query queries[kQueries];
    int count = 0;
    for (int64_t row = first; row < last; row++)
      for (int64_t h = head; h < end; h++, count++) {
        float* vector = mine.queries.data() + count * filled;
        const int64_t position = rows.positions[row];
        head_vector(qkv(row) + h * s.head_size, vector, position, layer.vectors[kQueryNorm], m.rotary[layer.sliding],
                    s.attention_scale);
        const int64_t begin = layer.sliding ? std::max<int64_t>(0, position + 1 - s.window) : 0;
        queries[count] = {vector, mine.outputs.data() + count * filled, begin, position + 1};
      }
    attend(cache, number, head / group, table(first), queries, count, s.attention_cap, mine.attention);
    for (int i = 0; i < count; i++) {
      const int64_t row = first + i / (end - head), h = head + i % (end - head);
      std::copy(queries[i].out, queries[i].out + s.head_size,
                m.attended.data() + row * attended_width() + h * s.head_size);
    }
  }

  void attention(int64_t number, const Layer& layer) {
    const int64_t group = s.heads / s.kv_heads;
    if (!by_rows) {
      const Range units = share(rows.count * s.heads, thread, threads);
      for (int64_t unit = units.begin; unit < units.end;) {
        const int64_t row = unit / s.heads, head = unit % s.heads;
        const int64_t end = std::min({head / group * group + group, head + kQueries, head + units.end - unit});
        attend_tile(number, layer, row, row + 1, head, end);
        unit += end - head;
      }
      return;
    }
    const int64_t together = std::max<int64_t>(1, kQueries / group);
    for (int64_t row = own.begin; row < own.end;) {
      int64_t last = row + 1;
      while (last < own.end && last - row < together && rows.sequences[last] == rows.sequences[row]) last++;
      for (int64_t head = 0; head < s.heads;) {
        const int64_t end = std::min(head / group * group + group, head + kQueries);
        attend_tile(number, layer, row, last, head, end);
        head = end;
      }
      row = last;
    }
  }

  // The inner layer of the feed-forward network: gate and up products, activation; 32 outputs (a group) at a time.
  Activations inner(int64_t layer, const Activations& a) {
    const Matrix &matrix = m.layers[layer].matrices[kGateUp], &next = m.layers[layer].matrices[kDown];
    const Vector& bias = m.layers[layer].vectors[kGateUpBias];
    const Activations out = m.gated.view(next.inputs);
    const bool keep = !next.quantised() || rows.adapters;
    const int64_t panels = inner_panels(s.gated), stride = panels * kPanel;  // of a group
    const Range range = by_rows ? own : Range{0, rows.count};
    const Range groups = by_rows ? Range{0, out.groups} : share(out.groups, thread, threads);
    float* tile = mine.tile.data();
    for (int64_t g = groups.begin; g < groups.end; g++) {
      const Target target{tile, stride, false, bias.empty() ? nullptr : bias.data(), g * stride};
      multiply(matrix, g * panels, (g + 1) * panels, a.from(range.begin), range.size(), target, mine.expanded);
      add_change(range, {g * panels, (g + 1) * panels}, layer, kGateUp, a, tile, stride, g * stride);
      for (int64_t row = range.begin; row < range.end; row++) {
        const float* in = tile + (row - range.begin) * stride;
        activate_group(in, s.gated, s.activation, next.quantised(), keep, out, row, g);
      }
    }
    fetch(next);
    meet();
    if (rows.adapters) {
      begin_change(by_rows ? own : share(rows.count, thread, threads), layer, kDown, out);
      meet();
    }
    return out;
  }

  void output() {
    if (by_rows) m.team.barrier();
    const int64_t width = m.head.width();
    for (int64_t first = 0; first < rows.outputs; first += s.most_rows) {
      const int64_t count = std::min(rows.outputs - first, s.most_rows);
      const Activations a = m.activations.view(m.head.inputs);
      const Range range = share(count, thread, threads);
      for (int64_t i = range.begin; i < range.end; i++) {
        float* out = m.head.quantised() ? mine.row.data() : a.floats + i * a.stride();
        std::fill(out + s.hidden, out + a.groups * kGroup, 0.0f);
        norm(x(rows.output_rows[first + i]), out, s.hidden, m.vectors[kFinalNorm], m.vectors[kFinalNormBias]);
        if (m.head.quantised()) quantise_row(out, a, i);
      }
      m.team.barrier();
      const Range panels = share(m.head.panels(), thread, threads);
      const Vector& bias = m.vectors[kHeadBias];
      const Target target{rows.logits + first * width, width, false, bias.empty() ? nullptr : bias.data()};
      multiply(m.head, panels.begin, panels.end, a, count, target, mine.expanded);
      if (s.logit_cap > 0)
        for (int64_t i = 0; i < count; i++)
          for (int64_t o = panels.begin * kPanel; o < panels.end * kPanel; o += kPanel) {
            float* p = rows.logits + (first + i) * width + o;
            store(p, squash(load(p), s.logit_cap));
          }
      m.team.barrier();
    }
  }
};

// Rows for each thread, so that each has as much to do: attention costs more for later positions.
void divide(const Model& model, const Rows& rows, int threads, Range* out) {
  const Shape& s = model.shape;
  const double products = static_cast<double>(s.hidden) * (2 * s.query_width() + 2 * s.kv_width()) +
                          static_cast<double>(s.hidden) * s.intermediate * (s.gated ? 3 : 2);
  const double position = 8.0 * static_cast<double>(s.query_width());  // floats are about four times as slow as bytes
  double total = 0, so_far = 0;
  for (int64_t row = 0; row < rows.count; row++) total += products + position * rows.positions[row];
  int64_t row = 0;
  for (int t = 0; t < threads; t++) {
    const int64_t begin = row;
    while (row < rows.count && (t + 1 == threads || so_far < total * (t + 1) / threads))
      so_far += products + position * rows.positions[row++];
    out[t] = {begin, row};
  }
}

}  // namespace

void Model::reserve() {
  const Shape& s = shape;
  const int64_t rows = s.most_rows, hidden = round_up(s.hidden, kGroup);
  const int64_t widest = std::max({hidden, round_up(s.query_width(), kGroup), s.filled_intermediate()});
  const int64_t qkv_width = round_up(s.query_width() + 2 * s.kv_width(), kPanel);
  x.resize(rows * hidden);
  qkv.resize(rows * qkv_width);
  sublayer.resize(rows * hidden);
  attended.resize(rows * round_up(s.query_width(), kGroup));
  activations.reserve(rows, std::max(hidden, round_up(s.query_width(), kGroup)));
  gated.reserve(rows, s.filled_intermediate());
  for (ThreadMemory& memory : threads) {
    memory.activations.reserve(kPrivateRows, widest);
    memory.row.resize(widest + s.filled_head());
    memory.tile.resize(rows * 4 * kPanel);
    memory.queries.resize(kQueries * s.filled_head());
    memory.outputs.resize(kQueries * s.filled_head());
    memory.expanded.reserve(widest);
    memory.attention.vectors.reserve(kQueries, s.filled_head());
  }
}

void Model::reserve_low(int64_t ranks) {
  activations.reserve_low(ranks);
  gated.reserve_low(ranks);
  for (ThreadMemory& memory : threads) memory.activations.reserve_low(ranks);
}

void forward(Model& model, Cache& cache, const Rows& rows) {
  // Whatever may want memory comes first: no exception may leave the threads' work.
  const int32_t last = *std::max_element(rows.positions, rows.positions + rows.count);
  for (ThreadMemory& memory : model.threads) memory.attention.scores.reserve(last + int64_t{1});
  if (model.shape.rotary_size)
    for (Rotary& rotary : model.rotary) rotary.reach(last + int64_t{1});
  std::vector<Range> own(model.team.size());  // of the rows
  bool by_rows = false;
  model.team.run([&](int thread) {
    const int threads = model.team.running();
    if (thread == 0) {
      by_rows = rows.count >= kRowsPerThread * threads;
      if (by_rows)
        divide(model, rows, threads, own.data());
      else
        for (int t = 0; t < threads; t++) own[t] = share(rows.count, t, threads);
    }
    model.team.barrier();
    Walk(model, cache, rows, thread, by_rows, own[thread]).run();
  });
}

}  // namespace hanmo::native
