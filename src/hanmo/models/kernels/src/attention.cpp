// Attention forwards, blockwise with a running softmax (Milakov & Gimelshein 2018; Dao et al. 2022).
#include <omp.h>

#include <array>
#include <cmath>

#include "attention_blocks.h"

namespace hanmo::attention {
namespace {

struct Scratch {  // of one thread
  float *keys, *values;       // packed: blocks of [N, 64]; [S, padded]
  float *sums;                // [64, padded]: values, weighted, of a block of queries
  static int64_t size(int64_t keys, int64_t N) {
    const int64_t whole = (keys + kBlock - 1) / kBlock * kBlock, padded = vectors_for(N) * kLanes;
    return whole * N + whole * padded + kBlock * padded;
  }
};

constexpr int kAtLeastRows = kLanes < 8 ? 8 : kLanes;  // in whole vectors

// The running softmax of 64 queries: largest score, and partial sums of the weights, one in each lane.
struct Softmax {
  float most[kBlock + kAtLeastRows];
  float total[kBlock][kLanes] __attribute__((aligned(64)));
};

// Scores [rows <= 6, V vectors] of the rows from `row` on become weights; sums so far [rows, vectors] are corrected
// for the new largest score, unless there are none.
template <int V>
void weigh(Softmax& softmax, int64_t row, int64_t rows, float* scores, float* sums, int64_t vectors, bool fresh) {
  float most[kAtLeastRows], factors[kAtLeastRows];
  std::memcpy(most, softmax.most + row, sizeof(most));
  for (int64_t i = 0; i < rows; i++) {
    lanes high = load(scores + i * kBlock);
#pragma GCC unroll 16
    for (int v = 1; v < V; v++) high = maximum(high, load(scores + i * kBlock + v * kLanes));
    most[i] = std::max(most[i], largest(high));
  }
  for (int i = 0; i < kAtLeastRows; i += kLanes) {
    store(factors + i, power_of_two(load(softmax.most + row + i) - load(most + i)));
    store(softmax.most + row + i, load(most + i));
  }
  for (int64_t i = 0; i < rows; i++) {
    const lanes now = all(most[i]);
    lanes total = load(softmax.total[row + i]) * all(factors[i]);
#pragma GCC unroll 16
    for (int v = 0; v < V; v++) {
      const lanes weight = power_of_two(load(scores + i * kBlock + v * kLanes) - now);
      store(scores + i * kBlock + v * kLanes, weight);
      total += weight;
    }
    store(softmax.total[row + i], total);
  }
  if (fresh) return;
  for (int64_t i = 0; i < rows; i++, sums += vectors * kLanes) {
    const lanes factor = all(factors[i]);
    for (int64_t v = 0; v < vectors; v++) store(sums + v * kLanes, load(sums + v * kLanes) * factor);
  }
}

using Weigh = void (*)(Softmax&, int64_t, int64_t, float*, float*, int64_t, bool);
template <int... V>
constexpr std::array<Weigh, sizeof...(V)> weigh_all(std::integer_sequence<int, V...>) {
  return {weigh<V + 1>...};
}
constexpr auto kWeigh = weigh_all(std::make_integer_sequence<int, kBlock / kLanes>());  // by the number of vectors

// One block of queries [t0, t1) of one head, from `query` (the row of t0) to y and, if it is wanted, log2 of the sum.
void attend(const Problem& p, const Sight& sight, const Scratch& scratch, int64_t packed_from, const float* query,
            int64_t t0, int64_t t1, const Ahead& ahead, float* y, float* normalizer) {
  const int64_t N = p.N, vectors = vectors_for(N), padded = vectors * kLanes;
  float scores[kRows * kBlock] __attribute__((aligned(64)));
  Softmax softmax;
  std::fill(std::begin(softmax.most), std::end(softmax.most), kLowest);
  std::memset(softmax.total, 0, (t1 - t0) * sizeof(softmax.total[0]));
  const int64_t begin = sight.first_key(t0), end = sight.end_key(t1 - 1);
  for (int64_t block = packed_from + (begin - packed_from) / kBlock * kBlock; block < end; block += kBlock) {
    const float* keys = scratch.keys + (block - packed_from) * N;
    const float* values = scratch.values + (block - packed_from) * padded;
    const int64_t count = std::min(kBlock, sight.run.key_end - block);
    for_tiles(t0, t1, [&](int64_t first, int64_t last) {
      const Columns columns = columns_seen(sight, first, last, block, count);
      if (columns.empty()) return;
      const int64_t rows = last - first, row = first - t0;
      const bool fresh = sight.first_key(first) >= block;
      if (fresh) ahead.fetch(row, row + rows);
      float *score = scores + columns.from * kLanes, *sums = scratch.sums + row * padded;
      product(rows, columns.to - columns.from, {query + row * p.q.position, p.q.position, 1},
              keys + columns.from * kLanes, kBlock, N, score, kBlock, false);
      hide(sight, first, last, block, columns, scores);
      kWeigh[columns.to - columns.from - 1](softmax, row, rows, score, sums, vectors, fresh);
      product(rows, vectors, {scores + columns.begin, kBlock, 1}, values + columns.begin * padded, padded,
              columns.end - columns.begin, sums, padded, !fresh);
    });
  }
  for (int64_t i = 0; i < t1 - t0; i++) {
    const float total = total_of(load(softmax.total[i])), *sums = scratch.sums + i * padded;
    const bool blind = total == 0;  // a query that sees nothing gets zeros
    const lanes factor = all(1.0f / total);
    for_row(N, [&](auto piece) { piece.store(y + i * p.H * N, blind ? lanes{} : piece.load(sums) * factor); });
    if (normalizer != nullptr) normalizer[i] = blind ? 0.0f : softmax.most[i] + std::log2(total);
  }
}

void forward(const Problem& p, const Task& task, const Task& next, Workspace& workspace, float* y, float* normalizer) {
  const Sight sight = {task.run, p.before, p.after};
  const Run& run = task.run;
  const int64_t t_begin = run.query_begin + task.first * kBlock;
  const int64_t t_end = std::min(run.query_end, run.query_begin + task.end * kBlock);
  // Blocks of keys begin at the same places whatever the part of the queries is.
  const int64_t from = run.key_begin + (sight.first_key(t_begin) - run.key_begin) / kBlock * kBlock;
  const int64_t to = std::max(from, sight.end_key(t_end - 1));
  const int64_t N = p.N, padded = vectors_for(N) * kLanes, whole = (to - from + kBlock - 1) / kBlock * kBlock;
  const Scratch scratch = {workspace.take(whole * N), workspace.take(whole * padded), workspace.take(kBlock * padded)};
  const float* key = p.k.data + run.batch * p.k.batch + from * p.k.position + task.head * N;
  const float* value = p.v.data + run.batch * p.v.batch + from * p.v.position + task.head * N;
  for (int64_t s = 0; s < to - from; s += kBlock) {
    pack_columns(key + s * p.k.position, p.k.position, std::min(kBlock, to - from - s), N, p.scale * kLog2E,
                 scratch.keys + s * N);
  }
  pack_rows(value, p.v.position, to - from, N, scratch.values);
  const int64_t group = p.H / p.K, end = (task.head + 1) * group;
  for (int64_t head = task.head * group; head < end; head++) {
    for (int64_t t0 = t_begin, t1; t0 < t_end; t0 = t1) {
      t1 = std::min(t0 + kBlock, t_end);
      float* out = y + ((run.batch * p.T + t0) * p.H + head) * N;
      const QueryBlock then = next_block(p, task, next, head, t_begin, t1, t_end);
      Ahead ahead(N);
      ahead.add({y + ((then.run->batch * p.T + then.begin) * p.H + then.head) * N, p.H * N, then.end - then.begin});
      ahead.add(head_rows(p.q, N, then.head, then.run->batch, then.begin, then.end));
      if (head + 1 == end) add_keys(p, next, t0 - t_begin, t1 - t_begin, ahead);
      attend(p, sight, scratch, from, head_rows(p.q, N, head, run.batch, t0, t1).data, t0, t1, ahead, out,
             normalizer == nullptr ? nullptr : normalizer + (run.batch * p.H + head) * p.T + t0);
    }
  }
}

}  // namespace
}  // namespace hanmo::attention

using namespace hanmo::attention;

// y[B, T, H, N]; normalizer[B, H, T] (for the way back; may be null): log2 of the sum of the powers of the scores.
EXPORT void hanmo_attention_forward(const Problem* problem, float* y, float* normalizer) {
  const Problem p = *problem;
  const std::vector<Task> tasks = split_tasks(p, kTasks, [](const Run& r) { return r.query_end - r.query_begin; });
  const int64_t count = static_cast<int64_t>(tasks.size()), threads = omp_get_max_threads();
  int64_t longest = 0;
  for (const Task& task : tasks) longest = std::max(longest, task.run.key_end - task.run.key_begin);
#pragma omp parallel
  {
    Workspace workspace(Scratch::size(longest, p.N));
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < count; i++) {
      workspace.clear();
      forward(p, tasks[i], tasks[std::min(i + threads, count - 1)], workspace, y, normalizer);
    }
  }
}
