// RMS norms and rotary positions, alone and together, forwards and backwards, each reading its input once.
//
// Gradients of weights: each block of rows sums its own part, the parts are added in their order. Blocks depend on the
// number of rows alone, so the sum has the same bits with any number of threads.
#include "vector_math.h"

namespace {
using namespace hanmo;

INLINE float inverse_rms(lanes squares, int64_t size, float eps) {
  return static_cast<float>(1.0 / std::sqrt(static_cast<double>(total(squares)) / size + eps));
}

void add_parts(const float* parts, int64_t blocks, int64_t size, float* sum) {
  std::memcpy(sum, parts, size * sizeof(float));
  for (int64_t block = 1; block < blocks; block++)
    for_row(0, size, [&](auto at) { at.store(sum, at.load(sum) + at.load(parts + block * size)); });
}

// Calls body(row, part) for all rows; `part` is the block's share of the gradient of the weight, or null.
template <typename Body>
void for_blocks(int64_t rows, int64_t block, int64_t width, int64_t size, float* parts, float* sum, const Body& body) {
  int64_t blocks = (rows + block - 1) / block;
  parallel_for_work(blocks, rows * width, [&](int64_t b) {
    float* part = parts ? parts + b * size : nullptr;
    if (part) std::memset(part, 0, size * sizeof(float));
    int64_t end = (b + 1) * block < rows ? (b + 1) * block : rows;
    for (int64_t row = b * block; row < end; row++) body(row, part);
  });
  if (parts) add_parts(parts, blocks, size, sum);
}

// Angles of one token. A pair (a, b) of a head turns into (a cos - b sin, b cos + a sin); backwards by the transpose.
struct Angles {
  const float *cos, *sin;
  int64_t half;
  template <typename Piece>
  INLINE void turn(Piece at, lanes a, lanes b, float* out) const {
    at.store(out, a * at.load(cos) - b * at.load(sin));
    at.store(out + half, b * at.load(cos + half) + a * at.load(sin + half));
  }
  template <typename Piece>
  INLINE void turn_back(Piece at, const float* gradient, lanes& a, lanes& b) const {
    lanes g = at.load(gradient), h = at.load(gradient + half);
    a = g * at.load(cos) + h * at.load(sin + half);
    b = h * at.load(cos + half) - g * at.load(sin);
  }
};

INLINE Angles angles(const float* cos, const float* sin, int64_t token, int64_t period, int64_t rotated) {
  int64_t first = token % period * rotated;
  return {cos + first, sin + first, rotated / 2};
}

}  // namespace

// out = x * rms * (offset + weight) for rows of `size`, where rms is 1/sqrt(mean(x^2) + eps), which is kept.
EXPORT void hanmo_rms_norm(const float* x, const float* weight, float offset, float eps, int64_t rows, int64_t size,
                           float* out, float* rms) {
  parallel_for_work(rows, rows * size, [&](int64_t row) {
    const float* from = x + row * size;
    lanes squares = all(0.0f);
    for_row(0, size, [&](auto at) { squares += at.load(from) * at.load(from); });
    float r = rms[row] = inverse_rms(squares, size, eps);
    for_row(0, size, [&](auto at) { at.store(out + row * size, at.load(from) * r * (at.load(weight) + offset)); });
  });
}

// Gradients of x and, with `parts` for ceil(rows/block) x size numbers, of the weight.
EXPORT void hanmo_rms_norm_backward(const float* gradient, const float* x, const float* weight, float offset,
                                    const float* rms, int64_t rows, int64_t size, int64_t block, float* d_x,
                                    float* parts, float* d_weight) {
  for_blocks(rows, block, size, size, parts, d_weight, [&](int64_t row, float* part) {
    const float *g = gradient + row * size, *from = x + row * size;
    float* to = d_x + row * size;
    float r = rms[row];
    lanes dots = all(0.0f);
    if (part)
      for_row(0, size, [&](auto at) {
        lanes product = at.load(g) * at.load(from);
        at.store(part, at.load(part) + product * r);
        dots += product * (at.load(weight) + offset);
      });
    else
      for_row(0, size, [&](auto at) { dots += at.load(g) * at.load(from) * (at.load(weight) + offset); });
    float share = total(dots) * r * r * r / size;
    for_row(0, size, [&](auto at) {
      at.store(to, at.load(g) * r * (at.load(weight) + offset) - at.load(from) * share);
    });
  });
}

// Turns (or turns back) the first `rotated` numbers of each of the heads of `tokens` tokens; cos and sin are
// [period, rotated], token t having row t mod period.
EXPORT void hanmo_rotate(const float* x, const float* cos, const float* sin, int64_t tokens, int64_t heads,
                         int64_t size, int64_t rotated, int64_t period, int32_t back, float* out) {
  parallel_for_work(tokens, tokens * heads * size, [&](int64_t token) {
    Angles by = angles(cos, sin, token, period, rotated);
    for (int64_t head = token * heads; head < (token + 1) * heads; head++) {
      const float* from = x + head * size;
      float* to = out + head * size;
      if (back)
        for_row(0, by.half, [&](auto at) {
          lanes a, b;
          by.turn_back(at, from, a, b);
          at.store(to, a);
          at.store(to + by.half, b);
        });
      else
        for_row(0, by.half, [&](auto at) { by.turn(at, at.load(from), at.load(from + by.half), to); });
      if (rotated < size) std::memcpy(to + rotated, from + rotated, (size - rotated) * sizeof(float));
    }
  });
}

// The RMS norm of each head, then its rotation. `rms` is [tokens, heads].
EXPORT void hanmo_norm_rotate(const float* x, const float* weight, float offset, float eps, const float* cos,
                              const float* sin, int64_t tokens, int64_t heads, int64_t size, int64_t rotated,
                              int64_t period, float* out, float* rms) {
  parallel_for_work(tokens, tokens * heads * size, [&](int64_t token) {
    Angles by = angles(cos, sin, token, period, rotated);
    for (int64_t head = token * heads; head < (token + 1) * heads; head++) {
      const float* from = x + head * size;
      float* to = out + head * size;
      lanes squares = all(0.0f);
      for_row(0, size, [&](auto at) { squares += at.load(from) * at.load(from); });
      float r = rms[head] = inverse_rms(squares, size, eps);
      auto normed = [&](auto at, int64_t skip) {
        return at.load(from + skip) * r * (at.load(weight + skip) + offset);
      };
      for_row(0, by.half, [&](auto at) { by.turn(at, normed(at, 0), normed(at, by.half), to); });
      for_row(rotated, size, [&](auto at) { at.store(to, normed(at, 0)); });
    }
  });
}

// Its gradients; `parts` as for hanmo_rms_norm_backward, blocks being of tokens.
EXPORT void hanmo_norm_rotate_backward(const float* gradient, const float* x, const float* weight, float offset,
                                       const float* rms, const float* cos, const float* sin, int64_t tokens,
                                       int64_t heads, int64_t size, int64_t rotated, int64_t period, int64_t block,
                                       float* d_x, float* parts, float* d_weight) {
  for_blocks(tokens, block, heads * size, size, parts, d_weight, [&](int64_t token, float* part) {
    Angles by = angles(cos, sin, token, period, rotated);
    for (int64_t head = token * heads; head < (token + 1) * heads; head++) {
      const float *g = gradient + head * size, *from = x + head * size;
      float *to = d_x + head * size, r = rms[head];
      lanes dots = all(0.0f);
      auto take = [&](auto at, int64_t skip, lanes turned) {  // the gradient of the normed head, kept in d_x
        lanes product = turned * at.load(from + skip);
        at.store(to + skip, turned);
        dots += product * (at.load(weight + skip) + offset);
        if (part) at.store(part + skip, at.load(part + skip) + product * r);
      };
      for_row(0, by.half, [&](auto at) {
        lanes a, b;
        by.turn_back(at, g, a, b);
        take(at, 0, a);
        take(at, by.half, b);
      });
      for_row(rotated, size, [&](auto at) { take(at, 0, at.load(g)); });
      float share = total(dots) * r * r * r / size;
      for_row(0, size, [&](auto at) {
        at.store(to, at.load(to) * r * (at.load(weight) + offset) - at.load(from) * share);
      });
    }
  });
}
