// Softmax cross-entropy over the vocabulary: what is computed from a chunk of logits between its products.
#include "vector_math.h"

namespace {
using namespace hanmo;

// Log of the sum of exponentials of a row, which becomes exp(score - largest) if `keep`; `scale` turns these into
// probabilities. Where a row ends within a vector, minus infinity is read: it changes neither maximum nor sum.
float log_sum_exp(float* row, int64_t size, bool keep, float& scale) {
  lanes tops = all(-INFINITY), sums = all(0.0f);
  for_row(0, size, [&](auto at) { tops = maximum(at.load(row, -INFINITY), tops); });
  float top = largest(tops);
  if (keep)
    for_row(0, size, [&](auto at) {
      lanes e = hanmo::exp(at.load(row, -INFINITY) - top);
      at.store(row, e);
      sums += e;
    });
  else
    for_row(0, size, [&](auto at) { sums += hanmo::exp(at.load(row, -INFINITY) - top); });
  float sum = total(sums);
  scale = 1.0f / sum;
  return top + std::log(sum);
}

// Adds the bias and squeezes the scores into (-cap, cap), where there are any.
void finish_scores(float* row, int64_t size, const float* bias, float cap) {
  if (bias) for_row(0, size, [&](auto at) { at.store(row, at.load(row) + at.load(bias)); });
  if (cap > 0.0f) for_row(0, size, [&](auto at) { at.store(row, cap * hanmo::tanh(at.load(row) * (1.0f / cap))); });
}

// The derivative of the squeeze at a squeezed score (a number or a vector).
template <typename Number>
INLINE Number slope(Number s, float cap) {
  return 1.0f - (s * (1.0f / cap)) * (s * (1.0f / cap));
}

}  // namespace

// For each row of logits [rows, size] and its target: the log of the sum of exponentials (read from `lse` if `known`,
// else written there) and the log-probability of the target. With `gradients` the row becomes the gradient of
// `coefficient` x (minus that log-probability) by the logits before bias and cap; coefficients default to one.
EXPORT void hanmo_token_loss(float* logits, const float* bias, const int64_t* targets, const float* coefficients,
                             float cap, int64_t rows, int64_t size, int32_t known, int32_t gradients, float* lse,
                             float* logprobs) {
  parallel_for_work(rows, rows * size, [&](int64_t m) {
    float *row = logits + m * size, scale = 0.0f, coefficient = coefficients ? coefficients[m] : 1.0f;
    int64_t target = targets[m];
    bool capped = cap > 0.0f, keep = gradients && !capped && !known;
    finish_scores(row, size, bias, cap);
    float chosen = row[target];
    if (!known) lse[m] = log_sum_exp(row, size, keep, scale);
    float log_sum = lse[m];
    logprobs[m] = chosen - log_sum;
    if (!gradients) return;
    if (keep)
      for_row(0, size, [&](auto at) { at.store(row, at.load(row) * (scale * coefficient)); });
    else if (capped)
      for_row(0, size, [&](auto at) {
        lanes s = at.load(row);
        at.store(row, hanmo::exp(s - log_sum) * coefficient * slope(s, cap));
      });
    else
      for_row(0, size, [&](auto at) { at.store(row, hanmo::exp(at.load(row) - log_sum) * coefficient); });
    row[target] -= capped ? coefficient * slope(chosen, cap) : coefficient;
  });
}
