// Sixteen numbers at a time, on every machine: the outputs of one panel of weights (layout.h).
//
// With AVX-512 sixteen floats are one register, with AVX2 two, with NEON four. The compiler may not reorder or contract
// anything here (the library is built without -ffast-math and with -ffp-contract=off): the result of a row must be the
// same bits whichever kernel computes it. A product that is added is written `fma`.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#define INLINE inline __attribute__((always_inline))

namespace hanmo::native {

constexpr int kPanel = 16;  // outputs of a panel
constexpr int kGroup = 32;  // inputs that share a scale
constexpr int kSteps = kGroup / 4;

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif
constexpr int kRegisters = kPanel / kLanes;

// Rows of a tile whose sums fit into the registers: with weights that have a minimum per group, without, and where only
// one panel is left.
#if defined(__AVX512F__)
constexpr int kTilePanels = 2, kMinimumRows = 4, kTileRows = 6, kTallRows = 8;
#elif defined(__AVX2__)
constexpr int kTilePanels = 1, kMinimumRows = 3, kTileRows = 3, kTallRows = 3;
#else
constexpr int kTilePanels = 1, kMinimumRows = 4, kTileRows = 4, kTallRows = 4;
#endif
constexpr int kDirectRows = 32;        // for so many rows, 4-bit weights are expanded anew for each tile
constexpr int kBytesDirectRows = 128;  // for so many rows, 8-bit weights are read where they lie

typedef float lanes __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));
typedef int32_t ilanes __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));

struct Floats {
  lanes at[kRegisters];
};
struct Ints {
  ilanes at[kRegisters];
};

#define EACH for (int i = 0; i < kRegisters; i++)
#define UNROLL _Pragma("GCC unroll 16")

INLINE Floats all(float x) {
  Floats out;
  UNROLL EACH out.at[i] = x - lanes{};  // exactly x
  return out;
}
INLINE Ints all(int32_t x) {
  Ints out;
  UNROLL EACH out.at[i] = ilanes{} + x;
  return out;
}
INLINE Floats load(const float* p) {
  Floats out;
  UNROLL EACH out.at[i] = *reinterpret_cast<const lanes*>(p + i * kLanes);
  return out;
}
INLINE void store(float* p, Floats v) {
  UNROLL EACH* reinterpret_cast<lanes*>(p + i * kLanes) = v.at[i];
}
INLINE Floats operator+(Floats a, Floats b) {
  UNROLL EACH a.at[i] += b.at[i];
  return a;
}
INLINE Floats operator-(Floats a, Floats b) {
  UNROLL EACH a.at[i] -= b.at[i];
  return a;
}
INLINE Floats operator*(Floats a, Floats b) {
  UNROLL EACH a.at[i] *= b.at[i];
  return a;
}
INLINE Floats operator/(Floats a, Floats b) {
  UNROLL EACH a.at[i] /= b.at[i];
  return a;
}
INLINE Floats larger(Floats a, Floats b) {  // a > b ? a : b, also of NaN
#if defined(__AVX512F__)
  a.at[0] = (lanes)_mm512_max_ps((__m512)a.at[0], (__m512)b.at[0]);
#elif defined(__AVX2__)
  UNROLL EACH a.at[i] = (lanes)_mm256_max_ps((__m256)a.at[i], (__m256)b.at[i]);
#else
  UNROLL EACH a.at[i] = a.at[i] > b.at[i] ? a.at[i] : b.at[i];
#endif
  return a;
}
INLINE Floats smaller(Floats a, Floats b) {  // a < b ? a : b, also of NaN
#if defined(__AVX512F__)
  a.at[0] = (lanes)_mm512_min_ps((__m512)a.at[0], (__m512)b.at[0]);
#elif defined(__AVX2__)
  UNROLL EACH a.at[i] = (lanes)_mm256_min_ps((__m256)a.at[i], (__m256)b.at[i]);
#else
  UNROLL EACH a.at[i] = a.at[i] < b.at[i] ? a.at[i] : b.at[i];
#endif
  return a;
}
// The lanes from `first` to before `last`; in the others another number. (Not by single numbers in memory: a load must
// not have to wait for small stores into it.)
INLINE Floats keep(Floats v, int64_t first, int64_t last, float other) {
  if (first <= 0 && last >= kPanel) return v;
  UNROLL EACH {
    ilanes place;
    for (int j = 0; j < kLanes; j++) place[j] = i * kLanes + j;
    const ilanes kept = (place >= static_cast<int32_t>(first)) & (place < static_cast<int32_t>(last));
    v.at[i] = kept ? v.at[i] : lanes{} + other;
  }
  return v;
}
INLINE Floats magnitude(Floats a) {
  UNROLL EACH a.at[i] = reinterpret_cast<lanes>(reinterpret_cast<ilanes>(a.at[i]) & 0x7fffffff);
  return a;
}
INLINE lanes fma_lanes(lanes a, lanes b, lanes c) {
#if defined(__AVX512F__)
  return (lanes)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__)
  return (lanes)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__ARM_NEON)
  return (lanes)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
  return a * b + c;
#endif
}
INLINE Floats fma(Floats a, Floats b, Floats c) {
  UNROLL EACH a.at[i] = fma_lanes(a.at[i], b.at[i], c.at[i]);
  return a;
}
INLINE float sum(Floats v) {  // halves added to each other, on every machine
#if defined(__AVX512F__)
  const __m512 all16 = (__m512)v.at[0];
  const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(all16), _mm512_extractf32x8_ps(all16, 1));
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
#endif
  float out[kPanel];
  store(out, v);
  UNROLL for (int half = kPanel / 2; half; half /= 2)
    for (int i = 0; i < half; i++) out[i] += out[i + half];
  return out[0];
}
INLINE int32_t sum_of(Ints v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_epi32((__m512i)v.at[0]);
#endif
  int32_t out[kPanel], total = 0;
  std::memcpy(out, &v, sizeof out);
  for (int32_t part : out) total += part;
  return total;
}
INLINE float largest(Floats v) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps((__m512)v.at[0]);
#endif
  float out[kPanel];
  store(out, v);
  UNROLL for (int half = kPanel / 2; half; half /= 2)
    for (int i = 0; i < half; i++) out[i] = out[i] > out[i + half] ? out[i] : out[i + half];
  return out[0];
}
INLINE Floats to_floats(Ints v) {
  Floats out;
  UNROLL EACH out.at[i] = __builtin_convertvector(v.at[i], lanes);
  return out;
}
INLINE Ints nearest(Floats v) {  // ties to even; of numbers that fit
  Ints out;
#if defined(__AVX512F__)
  out.at[0] = (ilanes)_mm512_cvtps_epi32((__m512)v.at[0]);
#elif defined(__AVX2__)
  UNROLL EACH out.at[i] = (ilanes)_mm256_cvtps_epi32((__m256)v.at[i]);
#elif defined(__ARM_NEON)
  UNROLL EACH out.at[i] = (ilanes)vcvtnq_s32_f32((float32x4_t)v.at[i]);
#else
  EACH for (int j = 0; j < kLanes; j++) out.at[i][j] = static_cast<int32_t>(std::nearbyintf(v.at[i][j]));
#endif
  return out;
}

// Integers from -128 to 127 as bytes.
INLINE void store_signed(int8_t* p, Ints v) {
#if defined(__AVX512F__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8((__m512i)v.at[0]));
#else
  int32_t out[kPanel];
  std::memcpy(out, &v, sizeof out);
  for (int i = 0; i < kPanel; i++) p[i] = static_cast<int8_t>(out[i]);
#endif
}

// Half precision in memory.
#if defined(__ARM_NEON)
typedef __fp16 Half;  // g++ knows _Float16 for ARM only from version 13 on
#elif !defined(__F16C__)
typedef _Float16 Half;
#endif
INLINE float half_to_float(uint16_t bits) {
#if defined(__F16C__)
  return _cvtsh_ss(bits);
#else
  Half half;
  std::memcpy(&half, &bits, sizeof half);
  return static_cast<float>(half);
#endif
}
INLINE uint16_t float_to_half(float x) {
#if defined(__F16C__)
  return _cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT);
#else
  const Half half = static_cast<Half>(x);
  uint16_t bits;
  std::memcpy(&bits, &half, sizeof bits);
  return bits;
#endif
}
INLINE Floats load_halves(const uint16_t* p) {
  Floats out;
#if defined(__AVX512F__)
  out.at[0] = (lanes)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__F16C__)
  UNROLL EACH out.at[i] = (lanes)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + i * kLanes)));
#elif defined(__ARM_NEON)
  UNROLL EACH out.at[i] = (lanes)vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p + i * kLanes)));
#else
  EACH for (int j = 0; j < kLanes; j++) out.at[i][j] = half_to_float(p[i * kLanes + j]);
#endif
  return out;
}
INLINE void store_halves(uint16_t* p, Floats v) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph((__m512)v.at[0], _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
  UNROLL EACH _mm_storeu_si128(reinterpret_cast<__m128i*>(p + i * kLanes),
                               _mm256_cvtps_ph((__m256)v.at[i], _MM_FROUND_TO_NEAREST_INT));
#elif defined(__ARM_NEON)
  UNROLL EACH vst1_u16(p + i * kLanes, vreinterpret_u16_f16(vcvt_f16_f32((float32x4_t)v.at[i])));
#else
  EACH for (int j = 0; j < kLanes; j++) p[i * kLanes + j] = float_to_half(v.at[i][j]);
#endif
}

// Sixteen integers of 8 bits as floats.
INLINE Floats load_integers(const int8_t* p) {
  Floats out;
#if defined(__AVX512F__)
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  out.at[0] = (lanes)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes));
#elif defined(__AVX2__)
  UNROLL EACH {
    const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p + i * kLanes));
    out.at[i] = (lanes)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes));
  }
#elif defined(__ARM_NEON)
  const int8x16_t bytes = vld1q_s8(p);
  const int16x8_t low = vmovl_s8(vget_low_s8(bytes)), high = vmovl_s8(vget_high_s8(bytes));
  out.at[0] = (lanes)vcvtq_f32_s32(vmovl_s16(vget_low_s16(low)));
  out.at[1] = (lanes)vcvtq_f32_s32(vmovl_s16(vget_high_s16(low)));
  out.at[2] = (lanes)vcvtq_f32_s32(vmovl_s16(vget_low_s16(high)));
  out.at[3] = (lanes)vcvtq_f32_s32(vmovl_s16(vget_high_s16(high)));
#else
  EACH for (int j = 0; j < kLanes; j++) out.at[i][j] = p[i * kLanes + j];
#endif
  return out;
}

// Four inputs of sixteen outputs: 64 bytes, [output][input]; and the exact sums of their products with four signed bytes
// that all outputs share. Weights of 8 bits are stored as unsigned bytes, 128 too large. Where the processor multiplies
// signed bytes only they are made signed when they are loaded, and there is nothing to take off the sums again.
#if defined(__ARM_FEATURE_DOTPROD) && !defined(__AVX2__)
constexpr int32_t kByteOffset = 0;
#else
constexpr int32_t kByteOffset = 128;
#endif
#if defined(__AVX512VNNI__)
struct Bytes {
  __m512i at;
};
INLINE Bytes load_bytes(const uint8_t* p) { return {_mm512_loadu_si512(p)}; }
INLINE Bytes low_nibbles(Bytes w) { return {_mm512_and_si512(w.at, _mm512_set1_epi8(15))}; }
INLINE Bytes high_nibbles(Bytes w) { return {_mm512_and_si512(_mm512_srli_epi16(w.at, 4), _mm512_set1_epi8(15))}; }
INLINE void store_bytes(uint8_t* p, Bytes w) { _mm512_storeu_si512(p, w.at); }
INLINE Ints dot(Ints sums, Bytes w, const int8_t* x) {
  int32_t four;
  std::memcpy(&four, x, 4);
  sums.at[0] = (ilanes)_mm512_dpbusd_epi32((__m512i)sums.at[0], w.at, _mm512_set1_epi32(four));
  return sums;
}
#elif defined(__AVX2__)
struct Bytes {
  __m256i at[2];
};
INLINE Bytes load_bytes(const uint8_t* p) {
  return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)),
          _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 32))};
}
INLINE Bytes low_nibbles(Bytes w) {
  UNROLL EACH w.at[i] = _mm256_and_si256(w.at[i], _mm256_set1_epi8(15));
  return w;
}
INLINE Bytes high_nibbles(Bytes w) {
  UNROLL EACH w.at[i] = _mm256_and_si256(_mm256_srli_epi16(w.at[i], 4), _mm256_set1_epi8(15));
  return w;
}
INLINE void store_bytes(uint8_t* p, Bytes w) {
  UNROLL EACH _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + 32 * i), w.at[i]);
}
INLINE Ints dot(Ints sums, Bytes w, const int8_t* x) {
  int32_t four;
  std::memcpy(&four, x, 4);
  const __m256i spread = _mm256_set1_epi32(four);
#if defined(__AVXVNNI__)
  UNROLL EACH sums.at[i] = (ilanes)_mm256_dpbusd_avx_epi32((__m256i)sums.at[i], w.at[i], spread);
#else  // in halves of 16 bits: the instruction for bytes saturates
  const __m256i low = _mm256_set1_epi16(0xff);
  const __m256i even = _mm256_srai_epi16(_mm256_slli_epi16(spread, 8), 8), odd = _mm256_srai_epi16(spread, 8);
  UNROLL EACH {
    const __m256i a = _mm256_madd_epi16(_mm256_and_si256(w.at[i], low), even);
    const __m256i b = _mm256_madd_epi16(_mm256_srli_epi16(w.at[i], 8), odd);
    sums.at[i] += (ilanes)_mm256_add_epi32(a, b);
  }
#endif
  return sums;
}
#elif defined(__ARM_FEATURE_DOTPROD)
struct Bytes {
  uint8x16_t at[4];
};
INLINE Bytes load_bytes(const uint8_t* p) {
  return {vld1q_u8(p), vld1q_u8(p + 16), vld1q_u8(p + 32), vld1q_u8(p + 48)};
}
INLINE Bytes low_nibbles(Bytes w) {
  UNROLL EACH w.at[i] = vandq_u8(w.at[i], vdupq_n_u8(15));
  return w;
}
INLINE Bytes high_nibbles(Bytes w) {
  UNROLL EACH w.at[i] = vshrq_n_u8(w.at[i], 4);
  return w;
}
INLINE void store_bytes(uint8_t* p, Bytes w) {
  UNROLL EACH vst1q_u8(p + 16 * i, w.at[i]);
}
INLINE Ints dot(Ints sums, Bytes w, const int8_t* x) {
  int32_t four;
  std::memcpy(&four, x, 4);
  const int8x16_t spread = vreinterpretq_s8_s32(vdupq_n_s32(four));
  UNROLL EACH sums.at[i] = (ilanes)vdotq_s32((int32x4_t)sums.at[i], vreinterpretq_s8_u8(w.at[i]), spread);
  return sums;
}
#else
struct Bytes {
  uint8_t at[64];
};
INLINE Bytes load_bytes(const uint8_t* p) {
  Bytes w;
  std::memcpy(w.at, p, 64);
  return w;
}
INLINE Bytes low_nibbles(Bytes w) {
  for (uint8_t& byte : w.at) byte &= 15;
  return w;
}
INLINE Bytes high_nibbles(Bytes w) {
  for (uint8_t& byte : w.at) byte >>= 4;
  return w;
}
INLINE void store_bytes(uint8_t* p, Bytes w) { std::memcpy(p, w.at, 64); }
INLINE Ints dot(Ints sums, Bytes w, const int8_t* x) {
  int32_t out[kPanel];
  std::memcpy(out, &sums, sizeof out);
  for (int r = 0; r < kPanel; r++)
    for (int j = 0; j < 4; j++) out[r] += w.at[4 * r + j] * x[j];
  std::memcpy(&sums, out, sizeof out);
  return sums;
}
#endif

// Weights of 8 bits as `dot` wants them.
INLINE Bytes load_weights(const uint8_t* p) {
  Bytes w = load_bytes(p);
#if defined(__ARM_FEATURE_DOTPROD) && !defined(__AVX2__)
  UNROLL EACH w.at[i] = veorq_u8(w.at[i], vdupq_n_u8(128));
#endif
  return w;
}

}  // namespace hanmo::native
