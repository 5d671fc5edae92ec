// Attention backwards: the weights are computed again, block by block, from the scores and the saved normalizer
// (Dao et al. 2022, algorithm 4). All sums run in an order that depends on shapes alone.
#include <omp.h>

#include "attention_blocks.h"

namespace hanmo::attention {
namespace {

struct Gradients {
  float *q, *k, *v;  // [B, T, H, N], [B, S, K, N] twice; null: not wanted
};

// Scratch memory: packed keys and values of one task with the sums of their gradients, and one block of queries.
struct Scratch {
  int64_t padded, key_begin, key_end;
  float *key_columns, *value_columns;  // blocks of [N, 64]; the keys are multiplied by scale * log2(e)
  float *keys, *dk, *dv;               // [keys, padded]
  float *queries, *grads, *dq;         // [64, padded]
  float *normalizer, *delta;           // [64]: of the softmax; sum over N of grad * y

  Scratch(Workspace& workspace, int64_t begin, int64_t end, int64_t N)
      : padded(vectors_for(N) * kLanes), key_begin(begin), key_end(end) {
    const int64_t whole = (end - begin + kBlock - 1) / kBlock * kBlock;
    key_columns = workspace.take(whole * N), value_columns = workspace.take(whole * N);
    keys = workspace.take(whole * padded), dk = workspace.take(whole * padded), dv = workspace.take(whole * padded);
    queries = workspace.take(kBlock * padded), grads = workspace.take(kBlock * padded);
    dq = workspace.take(kBlock * padded);
    normalizer = workspace.take(kBlock), delta = workspace.take(kBlock);
  }
  static int64_t size(int64_t keys, int64_t N) {
    const int64_t padded = vectors_for(N) * kLanes;
    return (keys + kBlock - 1) / kBlock * kBlock * (2 * N + 3 * padded) + kBlock * (3 * padded + 2);
  }
};

void pack_keys(const Problem& p, const Task& task, const Scratch& s) {
  const float* key = p.k.data + task.run.batch * p.k.batch + s.key_begin * p.k.position + task.head * p.N;
  const float* value = p.v.data + task.run.batch * p.v.batch + s.key_begin * p.v.position + task.head * p.N;
  const int64_t count = s.key_end - s.key_begin;
  for (int64_t i = 0; i < count; i += kBlock) {
    const int64_t rows = std::min(kBlock, count - i);
    pack_columns(key + i * p.k.position, p.k.position, rows, p.N, p.scale * kLog2E, s.key_columns + i * p.N);
    pack_columns(value + i * p.v.position, p.v.position, rows, p.N, 1.0f, s.value_columns + i * p.N);
  }
  pack_rows(key, p.k.position, count, p.N, s.keys);
  std::memset(s.dk, 0, count * s.padded * sizeof(float));
  std::memset(s.dv, 0, count * s.padded * sizeof(float));
}

// Queries [t0, t1) of one head.
void pack_queries(const Problem& p, const Run& run, int64_t head, int64_t t0, int64_t t1, const Scratch& s,
                  const float* y, const float* normalizer) {
  const HeadRows query = head_rows(p.q, p.N, head, run.batch, t0, t1);
  const HeadRows grad = head_rows(p.grad, p.N, head, run.batch, t0, t1);
  pack_rows(query.data, query.stride, query.count, p.N, s.queries);
  pack_rows(grad.data, grad.stride, grad.count, p.N, s.grads);
  y += ((run.batch * p.T + t0) * p.H + head) * p.N;
  for (int64_t i = 0; i < t1 - t0; i++, y += p.H * p.N) {
    const float* row = s.grads + i * s.padded;
    lanes total = {};
    for_row(p.N, [&](auto piece) { total += piece.load(row) * piece.load(y); });
    s.delta[i] = total_of(total);
  }
  std::memcpy(s.normalizer, normalizer + (run.batch * p.H + head) * p.T + t0, (t1 - t0) * sizeof(float));
  std::memset(s.dq, 0, (t1 - t0) * s.padded * sizeof(float));
}

// The packed queries [t0, t1) meet the keys [s0, s1); everything is added to the sums in the scratch memory.
void meet(const Problem& p, const Sight& sight, const Scratch& scratch, const Gradients& wanted, int64_t t0, int64_t t1,
          int64_t s0, int64_t s1, const Ahead& ahead) {
  const int64_t N = p.N, padded = scratch.padded, vectors = vectors_for(N);
  const int64_t key = s0 - scratch.key_begin, width = vectors_for(s1 - s0);
  float weights[kBlock * kBlock] __attribute__((aligned(64)));  // [query, key]
  float slopes[kBlock * kBlock] __attribute__((aligned(64)));   // gradient of the scores, without the scale
  for_tiles(t0, t1, [&](int64_t first, int64_t last) {
    const Columns columns = columns_seen(sight, first, last, s0, s1 - s0);
    const int64_t row = first - t0, rows = last - first;
    const int64_t from = columns.from, to = columns.to;
    float *weight = weights + row * kBlock, *slope = slopes + row * kBlock;
    if (to > from) {
      product(rows, to - from, {scratch.queries + row * padded, padded, 1},
              scratch.key_columns + key * N + from * kLanes, kBlock, N, weight + from * kLanes, kBlock, false);
      product(rows, to - from, {scratch.grads + row * padded, padded, 1},
              scratch.value_columns + key * N + from * kLanes, kBlock, N, slope + from * kLanes, kBlock, false);
    }
    if (sight.first_key(first) >= s0 || s0 == scratch.key_begin) ahead.fetch(row, row + rows);
    hide(sight, first, last, s0, columns, weight);
    for (int64_t i = 0; i < rows; i++, weight += kBlock, slope += kBlock) {
      const lanes normalizer = all(scratch.normalizer[row + i]), delta = all(scratch.delta[row + i]);
      for (int64_t v = from; v < to; v++) {
        const lanes w = power_of_two(load(weight + v * kLanes) - normalizer);
        store(weight + v * kLanes, w);
        store(slope + v * kLanes, w * (load(slope + v * kLanes) - delta));
      }
      for (int64_t v = 0; v < width; v++) {
        if (v >= from && v < to) continue;
        store(weight + v * kLanes, lanes{});
        store(slope + v * kLanes, lanes{});
      }
    }
  });
  if (wanted.k != nullptr || wanted.v != nullptr) {
    for_tiles(s0, s1, [&](int64_t first, int64_t last) {
      const int64_t begin = std::max(t0, sight.first_query(first)) - t0;
      const int64_t end = std::min(t1, sight.end_query(last - 1)) - t0, at = key + first - s0;
      if (begin >= end) return;
      const auto add = [&](const float* left, const float* right, float* sums) {
        product(last - first, vectors, {left + begin * kBlock + (first - s0), 1, kBlock}, right + begin * padded,
                padded, end - begin, sums + at * padded, padded, true);
      };
      if (wanted.v != nullptr) add(weights, scratch.grads, scratch.dv);
      if (wanted.k != nullptr) add(slopes, scratch.queries, scratch.dk);
    });
  }
  if (wanted.q == nullptr) return;
  for_tiles(t0, t1, [&](int64_t first, int64_t last) {
    const Columns columns = columns_seen(sight, first, last, s0, s1 - s0);
    if (columns.empty()) return;
    product(last - first, vectors, {slopes + (first - t0) * kBlock + columns.begin, kBlock, 1},
            scratch.keys + (key + columns.begin) * padded, padded, columns.end - columns.begin,
            scratch.dq + (first - t0) * padded, padded, true);
  });
}

// Packed rows of one head, multiplied by a factor, to where they belong.
void write(const float* rows, int64_t padded, int64_t count, int64_t N, float factor, float* out, int64_t stride) {
  for (int64_t i = 0; i < count; i++, rows += padded, out += stride) {
    for_row(N, [&](auto piece) { piece.store(out, piece.load(rows) * all(factor)); });
  }
}

void backward(const Problem& p, const Task& task, const Task& next, Workspace& workspace, const float* y,
              const float* normalizer, const Gradients& out, float* partial) {
  const Sight sight = {task.run, p.before, p.after};
  const Run& run = task.run;
  const int64_t N = p.N, begin = run.key_begin + task.first * kBlock;
  const Scratch s(workspace, begin, std::min(run.key_end, run.key_begin + task.end * kBlock), N);
  pack_keys(p, task, s);
  const int64_t group = p.H / p.K;
  float* const dq = task.part == 0 ? out.q : partial + (task.part - 1) * p.B * p.T * p.H * N;
  for (int64_t head = task.head * group; head < (task.head + 1) * group; head++) {
    for (int64_t t0 = run.query_begin, t1; t0 < run.query_end; t0 = t1) {
      t1 = std::min(t0 + kBlock, run.query_end);
      const QueryBlock then = next_block(p, task, next, head, run.query_begin, t1, run.query_end);
      const int64_t place = ((then.run->batch * p.T + then.begin) * p.H + then.head) * N, count = then.end - then.begin;
      Ahead ahead(N);
      ahead.add(head_rows(p.q, N, then.head, then.run->batch, then.begin, then.end));
      ahead.add(head_rows(p.grad, N, then.head, then.run->batch, then.begin, then.end));
      ahead.add({y + place, p.H * N, count});
      if (out.q != nullptr) ahead.add({out.q + place, p.H * N, count});
      if (head + 1 == (task.head + 1) * group) add_keys(p, next, t0 - run.query_begin, t1 - run.query_begin, ahead);
      pack_queries(p, run, head, t0, t1, s, y, normalizer);
      const int64_t first = std::max(s.key_begin, sight.first_key(t0));
      const int64_t end = std::min(s.key_end, sight.end_key(t1 - 1));
      for (int64_t s0 = first - (first - run.key_begin) % kBlock; s0 < end; s0 += kBlock) {
        meet(p, sight, s, out, t0, t1, s0, std::min(s0 + kBlock, s.key_end), ahead);
      }
      if (out.q != nullptr) {
        write(s.dq, s.padded, t1 - t0, N, p.scale, dq + ((run.batch * p.T + t0) * p.H + head) * N, p.H * N);
      }
    }
  }
  const int64_t place = ((run.batch * p.S + s.key_begin) * p.K + task.head) * N, count = s.key_end - s.key_begin;
  if (out.k != nullptr) write(s.dk, s.padded, count, N, p.scale, out.k + place, p.K * N);
  if (out.v != nullptr) write(s.dv, s.padded, count, N, 1.0f, out.v + place, p.K * N);
}

// Adds what the later parts of a run's keys gave for the queries of one head, in their order.
void gather(const Problem& p, const Task& last, const float* partial, float* dq) {
  const int64_t group = p.H / p.K * p.N, size = p.B * p.T * p.H * p.N;
  for (int64_t t = last.run.query_begin; t < last.run.query_end; t++) {
    const int64_t at = (last.run.batch * p.T + t) * p.H * p.N + last.head * group;
    for (int64_t part = 0; part < last.part; part++) {
      const float* from = partial + part * size + at;
      for_row(group, [&](auto piece) { piece.store(dq + at, piece.load(dq + at) + piece.load(from)); });
    }
  }
}

}  // namespace
}  // namespace hanmo::attention

using namespace hanmo::attention;

// dq[B, T, H, N], dk and dv[B, S, K, N], each null where it is not wanted; y and normalizer are those of the way there.
EXPORT void hanmo_attention_backward(const Problem* problem, const float* y, const float* normalizer, float* dq,
                                     float* dk, float* dv) {
  const Problem p = *problem;
  const std::vector<Task> tasks = split_tasks(p, kTasks / 2, [](const Run& r) { return r.key_end - r.key_begin; });
  const int64_t count = static_cast<int64_t>(tasks.size()), threads = omp_get_max_threads();
  int64_t keys = 0, parts = 1;
  for (const Task& task : tasks) {
    keys = std::max(keys, task.run.key_end - task.run.key_begin);
    parts = std::max(parts, task.part + 1);
  }
  const std::unique_ptr<float[]> partial(new float[dq == nullptr ? 0 : (parts - 1) * p.B * p.T * p.H * p.N]);
#pragma omp parallel
  {
    Workspace workspace(Scratch::size(keys, p.N));
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < count; i++) {
      workspace.clear();
      const Task& next = tasks[std::min(i + threads, count - 1)];
      backward(p, tasks[i], next, workspace, y, normalizer, {dq, dk, dv}, partial.get());
    }
    if (dq != nullptr && parts > 1) {
#pragma omp for schedule(static)
      for (int64_t i = 0; i < count; i++) {
        if (i + 1 == count || tasks[i + 1].part == 0) gather(p, tasks[i], partial.get(), dq);
      }
    }
  }
}
