// Activations, plain and gated, forwards and backwards, each in one pass.
#include <type_traits>

#include "vector_math.h"
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {
using namespace hanmo;

constexpr int64_t kBlock = 8192;  // numbers a thread takes at a time

// Each activation gives its value and, for the backward pass, value and derivative.
struct Relu {
  static INLINE lanes value(lanes x) { return x < 0.0f ? all(0.0f) : x; }
  static INLINE void both(lanes x, lanes& f, lanes& slope) {
    f = value(x);
    slope = x > 0.0f ? all(1.0f) : all(0.0f);
  }
};

struct Silu {
  static INLINE lanes value(lanes x) { return x * sigmoid(x); }
  static INLINE void both(lanes x, lanes& f, lanes& slope) {
    lanes missing, s = sigmoid(x, missing);
    f = x * s;
    slope = s + f * missing;
  }
};

struct Gelu {
  static INLINE lanes value(lanes x) {
    lanes below, density;
    normal(x, below, density);
    return x * below;
  }
  static INLINE void both(lanes x, lanes& f, lanes& slope) {
    lanes below, density;
    normal(x, below, density);
    f = x * below;
    slope = below + x * density;
  }
};

struct GeluTanh {  // (1 + tanh u)/2 is sigmoid(2u)
  static INLINE lanes clipped(lanes x) {  // beyond this the sigmoid is 0 or 1, and powers of x might overflow
    x = x < -12.0f ? all(-12.0f) : x;
    return x > 12.0f ? all(12.0f) : x;
  }
  static INLINE lanes value(lanes x) {
    lanes c = clipped(x);
    return x * sigmoid(c * (1.5957691216f + 0.0713548163f * c * c));
  }
  static INLINE void both(lanes x, lanes& f, lanes& slope) {
    lanes c = clipped(x), square = c * c, missing;
    lanes s = sigmoid(c * (1.5957691216f + 0.0713548163f * square), missing);
    f = x * s;
    slope = s + c * s * missing * (1.5957691216f + 0.2140644488f * square);
  }
};

// A result larger than the caches is written past them, which saves reading the lines that are overwritten. (16 MB or
// more: a fifth less time, and the product that reads the result next takes no longer.)
constexpr int64_t kFar = 1 << 22;

bool is_far([[maybe_unused]] int64_t n, [[maybe_unused]] const float* first, [[maybe_unused]] const float* second) {
#if defined(__x86_64__)
  return n >= kFar && (reinterpret_cast<uintptr_t>(first) | reinterpret_cast<uintptr_t>(second)) % 64 == 0;
#else
  return false;
#endif
}

template <bool far, typename Piece>
INLINE void put(Piece at, float* row, lanes v) {
#if defined(__AVX512F__)
  if constexpr (far && std::is_same_v<Piece, Whole>) return _mm512_stream_ps(row + at.at, (__m512)v);
#elif defined(__AVX2__)
  if constexpr (far && std::is_same_v<Piece, Whole>) return _mm256_stream_ps(row + at.at, (__m256)v);
#elif defined(__x86_64__)
  if constexpr (far && std::is_same_v<Piece, Whole>) return _mm_stream_ps(row + at.at, (__m128)v);
#endif
  at.store(row, v);
}

// Calls body(piece) for pieces of [0, n), blocks of them in different threads.
template <bool far, typename Body>
void for_all(int64_t n, const Body& body) {
  parallel_for_work((n + kBlock - 1) / kBlock, n, [&](int64_t block) {
    int64_t first = block * kBlock, end = first + kBlock < n ? first + kBlock : n;
    for_row(first, end, body);
#if defined(__x86_64__)
    if (far) _mm_sfence();
#endif
  });
}

template <typename F, bool far>
void forward(const float* gate, const float* up, float* out, int64_t n) {
  if (up)
    for_all<far>(n, [=](auto at) { put<far>(at, out, F::value(at.load(gate)) * at.load(up)); });
  else
    for_all<far>(n, [=](auto at) { put<far>(at, out, F::value(at.load(gate))); });
}

template <typename F, bool far>
void backward(const float* gradient, const float* gate, const float* up, float* d_gate, float* d_up, int64_t n) {
  for_all<far>(n, [=](auto at) {
    lanes f, slope, g = at.load(gradient);
    F::both(at.load(gate), f, slope);
    if (up) {
      put<far>(at, d_up, g * f);
      g *= at.load(up);
    }
    put<far>(at, d_gate, g * slope);
  });
}

template <typename F>
void choose_forward(const float* gate, const float* up, float* out, int64_t n) {
  (is_far(n, out, out) ? forward<F, true> : forward<F, false>)(gate, up, out, n);
}

template <typename F>
void choose_backward(const float* gradient, const float* gate, const float* up, float* d_gate, float* d_up, int64_t n) {
  (is_far(n, d_gate, d_up) ? backward<F, true> : backward<F, false>)(gradient, gate, up, d_gate, d_up, n);
}

}  // namespace

// out = f(gate) * up, or f(gate) where `up` is null; f: 0 relu, 1 silu, 2 gelu, 3 gelu by tanh.
EXPORT void hanmo_activate(int32_t f, const float* gate, const float* up, float* out, int64_t n) {
  (f == 0   ? choose_forward<Relu>
   : f == 1 ? choose_forward<Silu>
   : f == 2 ? choose_forward<Gelu>
            : choose_forward<GeluTanh>)(gate, up, out, n);
}

// The gradients of both; `d_up` is written where `up` is given.
EXPORT void hanmo_activate_backward(int32_t f, const float* gradient, const float* gate, const float* up, float* d_gate,
                                    float* d_up, int64_t n) {
  (f == 0   ? choose_backward<Relu>
   : f == 1 ? choose_backward<Silu>
   : f == 2 ? choose_backward<Gelu>
            : choose_backward<GeluTanh>)(gradient, gate, up, d_gate, d_up, n);
}
