// The walk through an encoder: one call computes the states of all tokens of some texts, unpadded.
//
// The texts are divided into jobs, whole texts of some dozens of tokens in all. A thread takes a job through all layers
// alone, so that what it computes stays in its own cache and nobody waits; then the next. Where there are too few jobs
// for that, the threads go through a job together: each has some of its rows, and they meet round the attention, which
// reads the keys and values of all. The numbers are the same: a row's products, norms and sums know nothing of other
// rows, and attention goes over the keys of a text in the same order and pieces whoever computes it.
#include "encoder.h"

#include <algorithm>
#include <atomic>

#include "rows.h"

namespace hanmo::native {
namespace {

constexpr int64_t kLargestJob = 192, kSmallestJob = 32;  // tokens, where whole texts allow it
constexpr int64_t kQueryTile = 48;                      // queries of a text that go over its keys together

struct Job {
  int64_t first, last;        // texts
  int64_t begin, rows;        // tokens
};

// Jobs become smaller towards the end, so that the threads end together.
std::vector<Job> divide(const Texts& texts, int64_t threads) {
  int64_t left = 0, begin = 0;
  for (int64_t text = 0; text < texts.count; text++) left += texts.lengths[text];
  std::vector<Job> jobs;
  for (int64_t text = 0; text < texts.count;) {
    const int64_t size = std::clamp(left / (2 * threads), kSmallestJob, kLargestJob);
    Job job{text, text, begin, 0};
    do job.rows += texts.lengths[job.last++];
    while (job.last < texts.count && job.rows + texts.lengths[job.last] <= size);
    jobs.push_back(job);
    text = job.last;
    begin += job.rows;
    left -= job.rows;
  }
  return jobs;
}

// The states of a job's rows, shared by the threads that go through it together.
struct JobMemory {
  ActivationMemory activations, gated;
  Vector x, qkv, attended;

  JobMemory(const Shape& s, int64_t rows) {
    const int64_t hidden = round_up(s.hidden, kGroup), attended_width = round_up(s.query_width() + kPanel, kGroup);
    x.resize(rows * hidden);
    qkv.resize(rows * round_up(s.query_width() + 2 * s.kv_width(), kGroup) + kPanel);
    attended.resize(rows * attended_width);
    activations.reserve(rows, std::max(hidden, attended_width));
    gated.reserve(rows, s.filled_intermediate());
  }
};

// What each thread has for itself.
struct OwnMemory {
  Expanded expanded;
  Vector tile, keys, values, scores;
  float totals[kQueryTile];

  OwnMemory(const Shape& s, int64_t rows, int64_t longest) {
    const int64_t widest = std::max({s.hidden, s.query_width(), s.filled_intermediate()});
    expanded.reserve(widest);
    tile.resize(rows * kWide * 4 * kPanel);
    const int64_t width = round_up(s.head_size, kPanel);
    keys.resize(round_up(longest, kPanel) * s.head_size);
    values.resize(longest * width);
    scores.resize(kQueryTile * round_up(longest, kGroup));
  }
};

// One thread's way through a job.
class Walk {
 public:
  Walk(Model& model, const Texts& texts, const Job& job, JobMemory& memory, OwnMemory& mine, int64_t begin, int64_t end,
       bool together)
      : m(model), s(model.shape), texts(texts), job(job), memory(memory), mine(mine), begin(begin), end(end),
        together(together) {}

  void run() {
    embed();
    for (const Layer& layer : m.layers) block(layer);
    for (int64_t row = begin; row < end; row++) {
      float* out = texts.states + (job.begin + row) * s.hidden;
      if (m.vectors[kFinalNorm].empty())
        std::copy(x(row), x(row) + s.hidden, out);
      else
        norm(x(row), out, m.vectors[kFinalNorm], m.vectors[kFinalNormBias]);
    }
  }

 private:
  Model& m;
  const Shape& s;
  const Texts& texts;
  const Job& job;
  JobMemory& memory;
  OwnMemory& mine;
  const int64_t begin, end;  // this thread's rows of the job
  const bool together;

  int64_t hidden_width() const { return round_up(s.hidden, kGroup); }
  int64_t qkv_width() const { return round_up(s.query_width() + 2 * s.kv_width(), kGroup); }
  int64_t attended_width() const { return round_up(s.query_width() + kPanel, kGroup); }  // heads are filled up
  float* x(int64_t row) { return memory.x.data() + row * hidden_width(); }
  float* qkv(int64_t row) { return memory.qkv.data() + row * qkv_width(); }
  float* attended(int64_t row) { return memory.attended.data() + row * attended_width(); }

  void norm(const float* in, float* out, const Vector& weight, const Vector& bias) const {
    norm_row(in, out, s.hidden, weight, bias, s.epsilon, s.layer_norm);
  }
  void meet() {
    if (together) m.team.barrier();
  }

  // Calls body(text's first row, its length, first and last of this thread's rows in it) for each text.
  template <typename Body>
  void each_text(const Body& body) {
    int64_t first = 0;
    for (int64_t text = job.first; text < job.last; text++) {
      const int64_t length = texts.lengths[text], from = std::max(first, begin), to = std::min(first + length, end);
      if (from < to) body(first, length, from, to);
      first += length;
    }
  }

  void embed() {
    each_text([&](int64_t first, int64_t, int64_t from, int64_t to) {
      for (int64_t row = from; row < to; row++) {
        float* out = x(row);
        std::fill(out + s.hidden, out + hidden_width(), 0.0f);  // another text's may be no numbers
        m.embedding.row(texts.tokens[job.begin + row], out);
        for (int64_t i = 0; i < s.hidden; i++) out[i] *= s.embedding_scale;
        if (const Vector& table = m.vectors[kPositions]; !table.empty()) add(out, table.data() + (row - first) * s.hidden);
        if (m.type_count) add(out, m.types.data() + (texts.types ? texts.types[job.begin + row] : 0) * s.hidden);
        if (const Vector& weight = m.vectors[kEmbeddingNorm]; !weight.empty())
          norm(out, out, weight, m.vectors[kEmbeddingNormBias]);
      }
    });
  }
  void add(float* out, const float* in) const {
    for (int64_t i = 0; i < s.hidden; i++) out[i] += in[i];
  }

  // What a matrix reads: this thread's rows of `in` (filled up with zeros), normed first if there is a norm, quantised
  // if the matrix is.
  Activations read(const Matrix& matrix, float* in, int64_t width, const Vector& weight, const Vector& bias) {
    Activations a = memory.activations.view(matrix.inputs);
    if (weight.empty() && !matrix.quantised()) {
      a.floats = in;
      a.row_groups = width / kGroup;
      return a;
    }
    for (int64_t row = begin; row < end; row++) {
      float *normed = a.floats + row * a.stride(), *from = in + row * width;
      if (!weight.empty()) {
        norm(from, normed, weight, bias);
        from = normed;
      }
      if (matrix.wide())
        quantise_row_wide(from, a, row);
      else if (matrix.quantised())
        quantise_row(from, a, row);
    }
    return a;
  }

  void product(const Matrix& matrix, const Activations& a, float* out, int64_t stride, const Vector& bias, bool add) {
    const Target target{out + begin * stride, stride, add, bias.empty() ? nullptr : bias.data()};
    multiply(matrix, 0, matrix.panels(), a.from(begin), end - begin, target, mine.expanded);
  }

  void block(const Layer& layer) {
    const Matrix* matrices = layer.matrices;
    const Vector* v = layer.vectors;
    Activations a = read(matrices[kQueryKeyValue], x(0), hidden_width(), v[kAttentionNorm], v[kAttentionNormBias]);
    product(matrices[kQueryKeyValue], a, qkv(0), qkv_width(), v[kQueryKeyValueBias], false);
    turn_heads(layer);
    meet();
    attention(layer);
    meet();
    a = read(matrices[kOutput], attended(0), attended_width(), Vector(), Vector());
    sublayer(matrices[kOutput], a, v[kOutputBias], v[kAttentionOutNorm], v[kAttentionOutNormBias]);
    a = read(matrices[kGateUp], x(0), hidden_width(), v[kMlpNorm], v[kMlpNormBias]);
    a = inner(matrices[kGateUp], a, v[kGateUpBias], matrices[kDown]);
    sublayer(matrices[kDown], a, v[kDownBias], v[kMlpOutNorm], v[kMlpOutNormBias]);
  }

  // Add a sublayer's output to the states, and norm the sum if the network does that (BERT).
  void sublayer(const Matrix& matrix, const Activations& a, const Vector& bias, const Vector& weight,
                const Vector& shift) {
    product(matrix, a, x(0), hidden_width(), bias, true);
    if (weight.empty()) return;
    for (int64_t row = begin; row < end; row++) norm(x(row), x(row), weight, shift);
  }

  // Queries and keys normed and rotated, if the network does that; queries scaled.
  void turn_heads(const Layer& layer) {
    const Rotary& rotary = m.rotary[layer.sliding];
    each_text([&](int64_t first, int64_t, int64_t from, int64_t to) {
      for (int64_t row = from; row < to; row++)
        for (int64_t head = 0; head < s.heads + s.kv_heads; head++) {
          float* vector = qkv(row) + head * s.head_size;
          const bool query = head < s.heads;
          const Vector& weight = layer.vectors[query ? kQueryNorm : kKeyNorm];
          if (!weight.empty()) norm_row(vector, vector, s.head_size, weight, Vector(), s.epsilon, s.layer_norm);
          if (s.rotary_size) rotate_head(vector, s.rotary_size / 2, rotary, row - first);
          if (query)
            for (int64_t i = 0; i < s.head_size; i++) vector[i] *= s.attention_scale;
        }
    });
  }

  void attention(const Layer& layer) {
    const int64_t group = s.heads / s.kv_heads;
    each_text([&](int64_t first, int64_t length, int64_t from, int64_t to) {
      for (int64_t shared = 0; shared < s.kv_heads; shared++) {
        gather(first, length, shared);
        for (int64_t head = shared * group; head < (shared + 1) * group; head++)
          for (int64_t tile = (from - first) / kQueryTile * kQueryTile; tile < to - first; tile += kQueryTile)
            attend(layer, first, length, head, tile, std::max(tile, from - first),
                   std::min(tile + kQueryTile, to - first));
      }
    });
    for (int64_t row = begin; row < end; row++)
      std::fill(attended(row) + s.query_width(), attended(row) + attended_width(), 0.0f);
  }

  // The keys and values of one head of a text, as matrices of floats lie (matrix.h): keys as 16 outputs a panel,
  // [panel][dimension][key 16], and values with the dimensions as outputs, [panel][key][dimension 16].
  void gather(int64_t first, int64_t length, int64_t head) {
    const int64_t size = s.head_size;
    for (int64_t t = 0; t < length; t++) {
      const float *key = qkv(first + t) + s.query_width() + head * size, *value = key + s.kv_width();
      float* keys = mine.keys.data() + t / kPanel * kPanel * size + t % kPanel;
      for (int64_t d = 0; d < size; d++) keys[d * kPanel] = key[d];
      for (int64_t d = 0; d < size; d += kPanel) store(mine.values.data() + d * length + t * kPanel, load(value + d));
    }
  }

  // Queries [from, to) of a text, which lie in the tile that begins at `tile`, and one head. All queries of a tile go
  // over the same keys; those outside a query's window weigh nothing.
  void attend(const Layer& layer, int64_t first, int64_t length, int64_t head, int64_t tile, int64_t from, int64_t to) {
    const int64_t size = s.head_size, window = layer.sliding ? s.window : length, stride = round_up(length, kGroup);
    const int64_t low = std::max<int64_t>(0, tile - window) / kPanel * kPanel;
    const int64_t count = std::min(length, tile + kQueryTile + window) - low;
    float* scores = mine.scores.data();
    const Matrix keys{kFloat32, count, size, bytes(mine.keys.data() + low * size), nullptr};
    const Activations queries = floats(qkv(first + from) + head * size, qkv_width());
    multiply(keys, 0, keys.panels(), queries, to - from, Target{scores, stride}, mine.expanded);
    for (int64_t t = from; t < to; t++)
      mine.totals[t - from] = soften(scores + (t - from) * stride, std::max<int64_t>(0, t - window - low),
                                     std::min(length, t + window + 1) - low, keys.width());
    float* out = attended(first + from) + head * size;
    if (count == length) {
      const Matrix values{kFloat32, size, count, bytes(mine.values.data()), nullptr};
      multiply(values, 0, values.panels(), floats(scores, stride), to - from, Target{out, attended_width()}, mine.expanded);
    } else {  // some keys of all: the panels stand too far apart for one matrix
      for (int64_t d = 0; d < size; d += kPanel) {
        const Matrix values{kFloat32, kPanel, count, bytes(mine.values.data() + d * length + low * kPanel), nullptr};
        multiply(values, 0, 1, floats(scores, stride), to - from, Target{out + d, attended_width()}, mine.expanded);
      }
    }
    for (int64_t t = from; t < to; t++) {
      const float scale = 1.0f / mine.totals[t - from];
      for (int64_t d = 0; d < size; d++) out[(t - from) * attended_width() + d] *= scale;
    }
  }
  static const uint8_t* bytes(const float* p) { return reinterpret_cast<const uint8_t*>(p); }
  static Activations floats(float* p, int64_t stride) {
    Activations a;
    a.floats = p;
    a.row_groups = stride / kGroup;
    return a;
  }

  // The inner layer of the feed-forward network: product and activation, some outputs at a time: those that share a
  // scale in what the next matrix reads.
  Activations inner(const Matrix& matrix, const Activations& a, const Vector& bias, const Matrix& next) {
    const Activations out = memory.gated.view(next.inputs);
    const int64_t panels = inner_panels(s.gated), step = next.wide() ? kWide : 1, stride = step * panels * kPanel;
    for (int64_t g = 0; g < out.groups; g += step) {
      const int64_t groups = std::min(step, out.groups - g);
      const Target target{mine.tile.data(), stride, false, bias.empty() ? nullptr : bias.data(), g * panels * kPanel};
      multiply(matrix, g * panels, (g + groups) * panels, a.from(begin), end - begin, target, mine.expanded);
      for (int64_t row = begin; row < end; row++) {
        float* tile = mine.tile.data() + (row - begin) * stride;
        if (next.wide())
          activate_wide(tile, s.gated, s.activation, groups, out, row, g);
        else
          activate_group(tile, s.gated, s.activation, next.quantised(), !next.quantised(), out, row, g);
      }
    }
    return out;
  }
};

}  // namespace

void encode(Model& model, const Texts& texts) {
  const Shape& s = model.shape;
  const int64_t longest = *std::max_element(texts.lengths, texts.lengths + texts.count);
  if (s.rotary_size)
    for (Rotary& rotary : model.rotary) rotary.reach(longest);
  const int64_t threads = model.team.size();
  const std::vector<Job> jobs = divide(texts, threads);
  int64_t rows = 0;
  for (const Job& job : jobs) rows = std::max(rows, job.rows);
  const bool together = threads > 1 && static_cast<int64_t>(jobs.size()) < 2 * threads;
  std::vector<JobMemory> memory;
  std::vector<OwnMemory> own;
  for (int64_t t = 0; t < threads; t++) {
    if (t == 0 || !together) memory.emplace_back(s, rows);
    own.emplace_back(s, rows, longest);
  }
  std::atomic<size_t> next{0};
  model.team.run([&](int thread) {
    if (!together) {
      for (size_t i = next++; i < jobs.size(); i = next++)
        Walk(model, texts, jobs[i], memory[thread], own[thread], 0, jobs[i].rows, false).run();
      return;
    }
    const int64_t running = model.team.running();
    for (const Job& job : jobs) {
      const int64_t begin = job.rows * thread / running, end = job.rows * (thread + 1) / running;
      Walk(model, texts, job, memory[0], own[thread], begin, end, true).run();
      model.team.barrier();  // the next job divides its rows elsewhere
    }
  });
}

}  // namespace hanmo::native
