// What attention computes: the problem, its runs and tasks, who sees whom, and what to fetch ahead.
//
// Letters: B rows, T queries, S keys, H heads, K key/value heads, N head size. Scores are kept in units of log2, so
// that a probability is 2^(score - largest); the factor scale * log2(e) is multiplied into the packed keys.
#pragma once

#include <memory>
#include <vector>

#include "attention_vectors.h"

namespace hanmo::attention {

constexpr float kLog2E = 1.44269504f;
constexpr int64_t kTasks = 16;  // so many independent pieces of work are enough for a good balance between threads
constexpr float kLowest = -1e30f;  // below every score; finite, so that no difference of two of them is NaN

struct Rows {  // [B, T, heads, N] in memory: heads and N are contiguous, the others have strides (in floats)
  const float* data;
  int64_t batch, position;
};

// The arguments of a call; mirrored by Problem in attention.py.
struct Problem {
  int64_t B, T, S, H, K, N;
  int64_t before, after;    // query t sees the keys from t - before to t + after, inclusive
  const int64_t* segments;  // [B, T] or null
  Rows q, k, v, grad;       // grad: of the result; backward only
  float scale;
};

// Queries and keys that may see each other: one document, or all of a row.
struct Run {
  int64_t batch, query_begin, query_end, key_begin, key_end;
};

// What a query sees of a run is an interval of keys, and what sees a key is an interval of queries.
struct Sight {
  Run run;
  int64_t before, after;
  int64_t first_key(int64_t t) const { return std::max(run.key_begin, t - before); }
  int64_t end_key(int64_t t) const { return std::min(run.key_end, t + after + 1); }
  int64_t first_query(int64_t s) const { return std::max(run.query_begin, s - after); }
  int64_t end_query(int64_t s) const { return std::min(run.query_end, s + before + 1); }
};

inline std::vector<Run> find_runs(const Problem& p) {
  std::vector<Run> runs;
  for (int64_t b = 0; b < p.B; b++) {
    if (p.segments == nullptr) {
      runs.push_back({b, 0, p.T, 0, p.S});
      continue;
    }
    const int64_t* numbers = p.segments + b * p.T;
    for (int64_t begin = 0, t = 1; t <= p.T; t++) {
      if (t < p.T && numbers[t] == numbers[begin]) continue;
      runs.push_back({b, begin, t, begin, t});
      begin = t;
    }
  }
  return runs;
}

// A part of the work of one run and one key/value head: its blocks [first, end) of queries or keys.
struct Task {
  Run run;
  int64_t head, part, first, end;
};

// The split depends on shapes alone, never on the number of threads.
template <typename Length>
std::vector<Task> split_tasks(const Problem& p, int64_t most_parts, const Length& length) {
  const std::vector<Run> runs = find_runs(p);
  const int64_t whole = static_cast<int64_t>(runs.size()) * p.K;
  const int64_t wanted = whole == 0 ? 1 : std::min(most_parts, (kTasks + whole - 1) / whole);
  std::vector<Task> tasks;
  for (const Run& run : runs) {
    const int64_t blocks = (length(run) + kBlock - 1) / kBlock, parts = std::min(wanted, blocks);
    for (int64_t head = 0; head < p.K; head++) {
      for (int64_t part = 0; part < parts; part++) {
        tasks.push_back({run, head, part, blocks * part / parts, blocks * (part + 1) / parts});
      }
    }
  }
  return tasks;
}

// Scratch memory of one thread, kept between calls unless it is large.
class Workspace {
 public:
  explicit Workspace(int64_t floats) {
    constexpr int64_t kSlack = 64 / sizeof(float);  // for the alignment
    if (static_cast<int64_t>(kept().size()) < floats + kSlack) {
      kept().clear();
      kept().resize(floats + kSlack);
    }
    begin_ = reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(kept().data()) + 63) / 64 * 64);
    next_ = begin_;
  }
  ~Workspace() {
    if (kept().size() > kKept) std::vector<float>().swap(kept());
  }
  Workspace(const Workspace&) = delete;
  void clear() { next_ = begin_; }
  float* take(int64_t floats) {
    float* taken = next_;
    next_ += floats;
    return taken;
  }

 private:
  static constexpr size_t kKept = size_t{1} << 20;  // 4 MB
  static std::vector<float>& kept() {
    static thread_local std::vector<float> memory;
    return memory;
  }
  float *begin_, *next_;
};

// What rows [first, end) see of the keys of a block, counted from its begin: columns [begin, end), in the vectors
// [from, to), of which all rows see [clear_from, clear_to) whole.
struct Columns {
  int64_t begin, end, from, to, clear_from, clear_to;
  bool empty() const { return begin >= end; }
};

INLINE Columns columns_seen(const Sight& sight, int64_t first, int64_t last, int64_t block, int64_t count) {
  const int64_t begin = std::max<int64_t>(0, sight.first_key(first) - block);
  const int64_t end = std::min(count, sight.end_key(last - 1) - block);
  if (begin >= end) return {0, 0, 0, 0, 0, 0};
  return {begin,
          end,
          begin / kLanes,
          vectors_for(end),
          vectors_for(std::max<int64_t>(0, sight.first_key(last - 1) - block)),
          std::max<int64_t>(0, sight.end_key(first) - block) / kLanes};
}

// Scores [last - first, 64] that their row does not see become minus infinity.
INLINE void hide(const Sight& sight, int64_t first, int64_t last, int64_t block, const Columns& columns,
                 float* scores) {
  ilanes count;
  for (int i = 0; i < kLanes; i++) count[i] = i;
  for (int64_t v = columns.from; v < columns.to; v++) {
    if (v >= columns.clear_from && v < columns.clear_to) continue;
    float* score = scores + v * kLanes;
    for (int64_t t = first; t < last; t++, score += kBlock) {
      const int64_t begin = block + v * kLanes;
      const ilanes from = ilanes{} + static_cast<int32_t>(std::max<int64_t>(0, sight.first_key(t) - begin));
      const ilanes to = ilanes{} + static_cast<int32_t>(std::max<int64_t>(0, sight.end_key(t) - begin));
      store(score, (count >= from) & (count < to) ? load(score) : all(-INFINITY));
    }
  }
}

// Rows of one head in memory.
struct HeadRows {
  const float* data;
  int64_t stride, count;
};

INLINE HeadRows head_rows(const Rows& tensor, int64_t N, int64_t head, int64_t row, int64_t begin, int64_t end) {
  return {tensor.data + row * tensor.batch + begin * tensor.position + head * N, tensor.position, end - begin};
}

// Rows that the next block will touch; they are fetched into the cache while there is still other work.
struct Ahead {
  HeadRows parts[8];
  int64_t N, count = 0;
  explicit Ahead(int64_t size) : N(size) {}
  void add(const HeadRows& rows) { parts[count++] = rows; }
  INLINE void fetch(int64_t first, int64_t last) const {
    for (int64_t part = 0; part < count; part++) {
      for (int64_t i = first; i < std::min(last, parts[part].count); i++) {
        const float* row = parts[part].data + i * parts[part].stride;
        for (int64_t n = 0; n < N; n += kLanes) __builtin_prefetch(row + n, 0, 2);
      }
    }
  }
};

// A block of queries of one head.
struct QueryBlock {
  const Run* run;
  int64_t head, begin, end;
};

// The block after the one that ends at `end`: of the same head, of the group's next head, or of the next task.
INLINE QueryBlock next_block(const Problem& p, const Task& task, const Task& next, int64_t head, int64_t begin,
                             int64_t end, int64_t last) {
  const int64_t group = p.H / p.K;
  if (end < last) return {&task.run, head, end, std::min(end + kBlock, last)};
  if (head + 1 < (task.head + 1) * group) return {&task.run, head + 1, begin, std::min(begin + kBlock, last)};
  const int64_t first = next.run.query_begin;
  return {&next.run, next.head * group, first, std::min(first + kBlock, next.run.query_end)};
}

// Some of the keys and values of the next task, counted from their first.
INLINE void add_keys(const Problem& p, const Task& next, int64_t first, int64_t last, Ahead& ahead) {
  const int64_t begin = std::min(next.run.key_begin + first, next.run.key_end);
  const int64_t end = std::min(next.run.key_begin + last, next.run.key_end);
  ahead.add(head_rows(p.k, p.N, next.head, next.run.batch, begin, end));
  ahead.add(head_rows(p.v, p.N, next.head, next.run.batch, begin, end));
}

}  // namespace hanmo::attention
