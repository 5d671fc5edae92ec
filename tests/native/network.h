// Random networks for the native engine's interface, and what the programs here share: chance, and how they end. Every
// array lies in memory of its exact size.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <vector>

struct Model;
struct Cache;
extern "C" {
int64_t hanmo_model_new(const int64_t*, const float*, int64_t, Model**);
int64_t hanmo_model_free(Model*);
int64_t hanmo_model_matrix(Model*, int64_t, int64_t, int64_t, int64_t, int64_t, const void*, int64_t, const void*, int64_t);
int64_t hanmo_model_vector(Model*, int64_t, int64_t, const float*, int64_t);
int64_t hanmo_model_sliding(Model*, int64_t, int64_t);
int64_t hanmo_model_rotary(Model*, int64_t, const float*, int64_t, float);
int64_t hanmo_model_types(Model*, const float*, int64_t, int64_t);
int64_t hanmo_model_adapter(Model*, int64_t, int64_t, int64_t, int64_t, const void*, int64_t, const void*, int64_t);
int64_t hanmo_model_adapter_free(Model*, int64_t);
int64_t hanmo_cache_new(const Model*, int64_t, int64_t, Cache**);
int64_t hanmo_cache_free(Cache*);
int64_t hanmo_cache_copy(Cache*, int64_t, int64_t);
int64_t hanmo_forward(Model*, Cache*, int64_t, const int32_t*, const int32_t*, const int32_t*, const int32_t*, int64_t,
                      int64_t, const int32_t*, int64_t, const int32_t*, float*);
int64_t hanmo_encode(Model*, int64_t, const int32_t*, int64_t, const int32_t*, const int32_t*, float*);
}

enum Kind : int64_t { kFloat32, kFloat16, kInt8, kInt4, kInt4Minimum, kInt8Wide };
constexpr int64_t kNoMemory = 4, kIncomplete = 5, kLost = 17;  // complaints
constexpr int64_t kLayerMatrices = 4, kEmbedding = 4, kHead = 5;
constexpr int64_t kLayerVectors = 14, kVectors = 20, kPositions = 17;

inline std::mt19937_64 source;

inline int64_t whole(int64_t least, int64_t most) { return std::uniform_int_distribution<int64_t>(least, most)(source); }
inline bool chance(double p) { return std::uniform_real_distribution<double>()(source) < p; }
inline float normal() { return std::normal_distribution<float>()(source); }
inline int64_t up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }
inline int64_t extreme() {
  static const int64_t values[] = {std::numeric_limits<int64_t>::min(), -(int64_t{1} << 33), -2, -1, 0, 1, 2, 31, 32, 33,
                                   4096, 1 << 16, 1 << 20, 1 << 22, (int64_t{1} << 31) - 1, int64_t{1} << 31,
                                   int64_t{1} << 32, int64_t{1} << 46, int64_t{1} << 62,
                                   std::numeric_limits<int64_t>::max()};
  return values[whole(0, std::size(values) - 1)];
}
inline int32_t extreme32() {
  return static_cast<int32_t>(std::clamp<int64_t>(extreme(), std::numeric_limits<int32_t>::min(),
                                                  std::numeric_limits<int32_t>::max()));
}
inline float strange() {
  static const float values[] = {0, -1, 1e-45f, 1e30f, 3.4e38f, -3.4e38f, std::numeric_limits<float>::infinity(),
                                 std::numeric_limits<float>::quiet_NaN()};
  return values[whole(0, std::size(values) - 1)];
}

[[noreturn]] inline void fail(const std::string& what) {
  std::printf("WRONG: %s\n", what.c_str());
  std::exit(1);
}
inline void fine(int64_t code, const char* what) {
  if (code) fail(std::string(what) + " was refused with " + std::to_string(code));
}
inline void refused(int64_t code, const char* what) {
  if (!code) fail(std::string(what) + " was not refused");
}

inline bool same_bits(const float* a, const float* b, int64_t count) {
  for (int64_t i = 0; i < count; i++) {
    if (std::isnan(a[i]) && std::isnan(b[i])) continue;
    if (std::memcmp(a + i, b + i, 4)) return false;
  }
  return true;
}

inline uint16_t half(float x) {  // of a normal number that half precision has
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const int exponent = static_cast<int>(bits >> 23 & 255) - 112;
  if (exponent <= 0) return 0;
  return static_cast<uint16_t>(bits >> 16 & 0x8000) | static_cast<uint16_t>(exponent << 10 | (bits >> 13 & 1023));
}

struct Sizes {
  int64_t layers = whole(1, 3), kv_heads = whole(1, 3), heads = kv_heads * whole(1, chance(0.2) ? 14 : 4);
  int64_t head_size = chance(0.5) ? whole(1, 12) * 2 : whole(1, 70), hidden = whole(1, 70);
  int64_t intermediate = chance(0.2) ? whole(100, 300) : whole(1, 100);
  int64_t vocabulary = whole(1, 60), context = whole(1, 200), rotary = chance(0.8) ? whole(0, head_size / 2) * 2 : 0;
  int64_t gated = whole(0, 1), window = chance(0.5) ? whole(1, 40) : 0, most_rows = whole(1, 90);
};

// A network with random weights: a decoder or, with `encoder`, what an encoder needs and may have. `wild`: with huge
// weights, so that sums become infinite.
struct Network : Sizes {
  const bool encoder, wild = chance(0.1);
  std::vector<int64_t> sizes{layers,  hidden, heads, kv_heads, head_size, intermediate, vocabulary, context,
                             rotary,  whole(0, 4), gated, whole(0, 1), window, most_rows};
  std::vector<float> numbers{1e-5f, chance(0.3) ? 3.0f : 1.0f, 0.4f, chance(0.3) ? 5.0f : 0.0f, chance(0.3) ? 9.0f : 0.0f};
  std::vector<std::unique_ptr<char[]>> memory;
  struct Part {
    int64_t layer, name, kind, outputs, inputs, value_bytes, scale_bytes;
    char *values, *scales;
    const float* floats() const { return reinterpret_cast<const float*>(values); }
  };
  struct Change {
    int64_t layer, name, rank;
    Part a, b;
  };
  std::vector<Part> matrices, vectors;
  std::vector<float> frequencies = std::vector<float>(rotary / 2);
  std::vector<int64_t> sliding;
  std::map<int64_t, std::vector<Change>> adapters;
  int64_t type_count = 0;
  Part types{};

  explicit Network(bool encoder_ = false, const Sizes& given = {}) : Sizes(given), encoder(encoder_) {
    const int64_t most = encoder ? kInt8Wide : kInt4Minimum, same = chance(0.5) ? whole(0, most) : -1;
    const auto kind = [&] { return same >= 0 ? same : whole(0, most); };
    for (int64_t layer = 0; layer < layers; layer++) {
      for (int64_t name = 0; name < kLayerMatrices; name++)
        matrices.push_back(matrix(layer, name, kind(), outputs_of(name), inputs_of(name)));
      sliding.push_back(window && chance(0.5));
    }
    matrices.push_back(matrix(-1, kEmbedding, whole(0, kInt8Wide), vocabulary, hidden));  // looked up only
    if (!encoder) matrices.push_back(matrix(-1, kHead, kind(), vocabulary, hidden));
    for (int64_t name = 0; name < kVectors; name++) {
      const bool norm = name == 0 || name == 2 || name == 14;
      const bool needed = (!encoder && norm) || (name == kPositions && rotary == 0);
      if (!needed && !chance(0.3)) continue;
      const bool of_layer = name < kLayerVectors;
      for (int64_t layer = of_layer ? 0 : -1; layer < (of_layer ? layers : 0); layer++) {
        const int64_t length = length_of(name);
        Part part{layer, name, 0, length, 1, 4 * length, 0, take(4 * length), nullptr};
        floats(part.values, length, 1.0f);
        vectors.push_back(part);
      }
    }
    for (float& f : frequencies) f = std::exp(normal());
    if (encoder && chance(0.5)) {
      type_count = whole(1, 3);
      types = {-1, 0, 0, type_count * hidden, 1, 4 * type_count * hidden, 0, take(4 * type_count * hidden), nullptr};
      floats(types.values, types.outputs, 1.0f);
    }
  }

  char* take(int64_t bytes) {
    memory.emplace_back(new char[bytes]);
    return memory.back().get();
  }

  void floats(char* to, int64_t count, float size) {
    for (int64_t i = 0; i < count; i++) {
      const float x = wild && chance(0.05) ? 1e30f * normal() : size * normal();
      std::memcpy(to + 4 * i, &x, 4);
    }
  }

  Part matrix(int64_t layer, int64_t name, int64_t kind, int64_t outputs, int64_t inputs) {
    const int64_t panels = up(outputs, 16) / 16, groups = up(inputs, 32) / 32;
    const bool bytes_each = kind == kInt8 || kind == kInt8Wide;
    const int64_t bytes =
        kind < kInt8 ? panels * 16 * inputs * (kind == kFloat32 ? 4 : 2) : panels * groups * (bytes_each ? 512 : 256);
    const int64_t scale_groups = kind == kInt8Wide ? up(groups, 4) / 4 : groups;
    const int64_t scales = kind < kInt8 ? 0 : panels * scale_groups * (kind == kInt4Minimum ? 32 : 16);
    Part part{layer, name, kind, outputs, inputs, bytes, 2 * scales, take(bytes), scales ? take(2 * scales) : nullptr};
    const float size = 1.0f / std::sqrt(static_cast<float>(inputs));
    if (kind == kFloat32) floats(part.values, bytes / 4, size);
    if (kind == kFloat16)
      for (int64_t i = 0; i < bytes / 2; i++) {
        const uint16_t bits = half(size * normal());
        std::memcpy(part.values + 2 * i, &bits, 2);
      }
    if (kind >= kInt8)
      for (int64_t i = 0; i < bytes; i++) part.values[i] = static_cast<char>(whole(0, 255));
    for (int64_t i = 0; i < scales; i++) {
      const uint16_t bits = wild && chance(0.1) ? 0x7bff : half((bytes_each ? 0.02f : 0.2f) * size * normal());
      std::memcpy(part.scales + 2 * i, &bits, 2);
    }
    return part;
  }

  int64_t outputs_of(int64_t name) const {
    if (name == 0) return (heads + 2 * kv_heads) * head_size;
    if (name == 2) return up(intermediate, 32) * (gated ? 2 : 1);
    return name < kEmbedding ? hidden : vocabulary;
  }
  int64_t inputs_of(int64_t name) const { return name == 1 ? heads * head_size : name == 3 ? intermediate : hidden; }
  int64_t length_of(int64_t name) const {
    if (name == 8 || name == 9) return head_size;
    if (name == 10 || name == 12) return outputs_of(name - 10);
    return name == 16 ? vocabulary : name == kPositions ? context * hidden : hidden;
  }

  void add_adapters() {
    for (int64_t number = 0; number < 3; number++)
      for (int64_t layer = 0; layer < layers; layer++)
        for (int64_t name = 0; name < kLayerMatrices; name++)
          if (chance(0.5)) {
            const int64_t rank = whole(1, 40);
            adapters[2 * number].push_back({layer, name, rank, matrix(0, 0, kFloat32, rank, inputs_of(name)),
                                            matrix(0, 0, kFloat32, outputs_of(name), rank)});
          }
  }

  static int64_t put(Model* model, const Part& p) {
    return hanmo_model_matrix(model, p.layer, p.name, p.kind, p.outputs, p.inputs, p.values, p.value_bytes, p.scales,
                              p.scale_bytes);
  }

  Model* build(int64_t threads) const {
    Model* model = nullptr;
    fine(hanmo_model_new(sizes.data(), numbers.data(), threads, &model), "a network");
    for (const Part& p : matrices) fine(put(model, p), "a matrix");
    for (const Part& p : vectors)
      fine(hanmo_model_vector(model, p.layer, p.name, p.floats(), p.outputs), "a vector");
    for (int64_t layer = 0; layer < layers; layer++) fine(hanmo_model_sliding(model, layer, sliding[layer]), "sliding");
    for (int64_t local = 0; local < 2; local++)
      fine(rotary ? hanmo_model_rotary(model, local, frequencies.data(), rotary / 2, 1.0f) : 0, "frequencies");
    if (type_count) fine(hanmo_model_types(model, types.floats(), type_count, types.outputs), "segments");
    for (const auto& [number, changes] : adapters)
      for (const Change& c : changes)
        fine(hanmo_model_adapter(model, number, c.layer, c.name, c.rank, c.a.values, c.a.value_bytes, c.b.values,
                                 c.b.value_bytes), "an adapter");
    return model;
  }
};
