// Random networks and requests, possible and impossible, for the native engine's interface. What is possible must
// give each text the bits it has alone, one token at a time on one thread; what is not must be refused; and whatever
// is asked for, the program must end by itself. Built with AddressSanitizer and UndefinedBehaviorSanitizer, in which
// every array lies in memory of its exact size.
//
//     requests [seed] [rounds]
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
int64_t hanmo_model_adapter(Model*, int64_t, int64_t, int64_t, int64_t, const void*, int64_t, const void*, int64_t);
int64_t hanmo_model_adapter_free(Model*, int64_t);
int64_t hanmo_cache_new(const Model*, int64_t, int64_t, Cache**);
int64_t hanmo_cache_free(Cache*);
int64_t hanmo_cache_copy(Cache*, int64_t, int64_t);
int64_t hanmo_forward(Model*, Cache*, int64_t, const int32_t*, const int32_t*, const int32_t*, const int32_t*, int64_t,
                      int64_t, const int32_t*, int64_t, const int32_t*, float*);
}

namespace {

constexpr int64_t kPage = 32, kNoMemory = 4;
constexpr int kMatrices = 4, kLayerVectors = 14, kVectors = 18;
std::mt19937_64 source;

int64_t whole(int64_t least, int64_t most) { return std::uniform_int_distribution<int64_t>(least, most)(source); }
bool chance(double p) { return std::uniform_real_distribution<double>()(source) < p; }
float normal() { return std::normal_distribution<float>()(source); }
int64_t up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }
int64_t extreme() {
  static const int64_t values[] = {std::numeric_limits<int64_t>::min(), -(int64_t{1} << 33), -2, -1, 0, 1, 2, 31, 32, 33,
                                   4096, 1 << 16, 1 << 20, 1 << 22, (int64_t{1} << 31) - 1, int64_t{1} << 31,
                                   int64_t{1} << 32, int64_t{1} << 46, int64_t{1} << 62,
                                   std::numeric_limits<int64_t>::max()};
  return values[whole(0, std::size(values) - 1)];
}
float strange() {
  static const float values[] = {0, -1, 1e-45f, 1e30f, 3.4e38f, -3.4e38f, std::numeric_limits<float>::infinity(),
                                 std::numeric_limits<float>::quiet_NaN()};
  return values[whole(0, std::size(values) - 1)];
}

[[noreturn]] void fail(const std::string& what) {
  std::printf("WRONG: %s\n", what.c_str());
  std::exit(1);
}
void fine(int64_t code, const char* what) {
  if (code) fail(std::string(what) + " was refused with " + std::to_string(code));
}

uint16_t half(float x) {  // of a normal number that half precision has
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const int exponent = static_cast<int>(bits >> 23 & 255) - 112;
  if (exponent <= 0) return 0;
  return static_cast<uint16_t>(bits >> 16 & 0x8000) | static_cast<uint16_t>(exponent << 10 | (bits >> 13 & 1023));
}

// A network with random weights. `wild`: with huge weights, so that sums become infinite.
struct Network {
  int64_t layers = whole(1, 3), kv_heads = whole(1, 3), heads = kv_heads * whole(1, chance(0.2) ? 14 : 4);
  int64_t head_size = chance(0.5) ? whole(1, 12) * 2 : whole(1, 70), hidden = whole(1, 70), intermediate = whole(1, 100);
  int64_t vocabulary = whole(1, 60), context = whole(1, 200), rotary = chance(0.8) ? whole(0, head_size / 2) * 2 : 0;
  int64_t gated = whole(0, 1), window = chance(0.5) ? whole(1, 40) : 0, most_rows = whole(1, 90);
  bool wild = chance(0.1);
  std::vector<int64_t> sizes{layers,  hidden, heads, kv_heads, head_size, intermediate, vocabulary, context,
                             rotary,  whole(0, 4), gated, whole(0, 1), window, most_rows};
  std::vector<float> numbers{1e-5f, chance(0.3) ? 3.0f : 1.0f, 0.4f, chance(0.3) ? 5.0f : 0.0f, chance(0.3) ? 9.0f : 0.0f};
  std::vector<std::unique_ptr<char[]>> memory;
  struct Part {
    int64_t layer, name, kind, outputs, inputs, value_bytes, scale_bytes;
    char *values, *scales;
  };
  std::vector<Part> matrices, vectors;
  std::vector<float> frequencies = std::vector<float>(rotary / 2);
  std::vector<int64_t> sliding;

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
    const int64_t number = kind == 0 ? 4 : 2;
    const int64_t bytes = kind < 2 ? panels * 16 * inputs * number : panels * groups * (kind == 2 ? 512 : 256);
    const int64_t scales = kind < 2 ? 0 : panels * groups * (kind == 4 ? 32 : 16);
    Part part{layer, name, kind, outputs, inputs, bytes, 2 * scales, take(bytes), scales ? take(2 * scales) : nullptr};
    const float size = 1.0f / std::sqrt(static_cast<float>(inputs));
    if (kind == 0) floats(part.values, bytes / 4, size);
    if (kind == 1)
      for (int64_t i = 0; i < bytes / 2; i++) {
        const uint16_t bits = half(size * normal());
        std::memcpy(part.values + 2 * i, &bits, 2);
      }
    if (kind >= 2)
      for (int64_t i = 0; i < bytes; i++) part.values[i] = static_cast<char>(whole(0, 255));
    for (int64_t i = 0; i < scales; i++) {
      const uint16_t bits = wild && chance(0.1) ? 0x7bff : half((kind == 2 ? 0.02f : 0.2f) * size * normal());
      std::memcpy(part.scales + 2 * i, &bits, 2);
    }
    return part;
  }

  int64_t outputs_of(int64_t name) const {
    if (name == 0) return (heads + 2 * kv_heads) * head_size;
    if (name == 2) return up(intermediate, 32) * (gated ? 2 : 1);
    return name < 4 ? hidden : vocabulary;
  }
  int64_t inputs_of(int64_t name) const { return name == 1 ? heads * head_size : name == 3 ? intermediate : hidden; }
  int64_t length_of(int64_t name) const {
    if (name == 8 || name == 9) return head_size;
    if (name == 10 || name == 12) return outputs_of(name - 10);
    return name == 16 ? vocabulary : name == 17 ? context * hidden : hidden;
  }

  Network() {
    const int64_t same = chance(0.5) ? whole(0, 4) : -1;
    const auto kind = [&] { return same >= 0 ? same : whole(0, 4); };
    for (int64_t layer = 0; layer < layers; layer++) {
      for (int64_t name = 0; name < kMatrices; name++)
        matrices.push_back(matrix(layer, name, kind(), outputs_of(name), inputs_of(name)));
      sliding.push_back(window && chance(0.5));
    }
    for (int64_t name = 4; name < 6; name++) matrices.push_back(matrix(-1, name, kind(), vocabulary, hidden));
    for (int64_t name = 0; name < kVectors; name++) {
      const bool needed = name == 0 || name == 2 || name == 14 || (name == 17 && rotary == 0);
      if (!needed && !chance(0.3)) continue;
      for (int64_t layer = name < kLayerVectors ? 0 : -1; layer < (name < kLayerVectors ? layers : 0); layer++) {
        const int64_t length = length_of(name);
        Part part{layer, name, 0, length, 1, 4 * length, 0, take(4 * length), nullptr};
        floats(part.values, length, 1.0f);
        vectors.push_back(part);
      }
    }
    for (float& f : frequencies) f = std::exp(normal());
  }

  Model* build(int64_t threads) const {
    Model* model = nullptr;
    fine(hanmo_model_new(sizes.data(), numbers.data(), threads, &model), "a network");
    for (const Part& p : matrices)
      fine(hanmo_model_matrix(model, p.layer, p.name, p.kind, p.outputs, p.inputs, p.values, p.value_bytes, p.scales,
                              p.scale_bytes), "a matrix");
    for (const Part& p : vectors)
      fine(hanmo_model_vector(model, p.layer, p.name, reinterpret_cast<float*>(p.values), p.outputs), "a vector");
    for (int64_t layer = 0; layer < layers; layer++) fine(hanmo_model_sliding(model, layer, sliding[layer]), "sliding");
    for (int64_t local = 0; local < 2; local++)
      fine(rotary ? hanmo_model_rotary(model, local, frequencies.data(), rotary / 2, 1.0f) : 0, "frequencies");
    for (const auto& [number, changes] : adapters)
      for (const Change& c : changes)
        fine(hanmo_model_adapter(model, number, c.layer, c.name, c.rank, c.a.values, c.a.value_bytes, c.b.values,
                                 c.b.value_bytes), "an adapter");
    return model;
  }

  struct Change {
    int64_t layer, name, rank;
    Part a, b;
  };
  std::map<int64_t, std::vector<Change>> adapters;

  void add_adapters() {
    for (int64_t number = 0; number < 3; number++)
      for (int64_t layer = 0; layer < layers; layer++)
        for (int64_t name = 0; name < kMatrices; name++)
          if (chance(0.5)) {
            const int64_t rank = whole(1, 40);
            adapters[2 * number].push_back({layer, name, rank, matrix(0, 0, 0, rank, inputs_of(name)),
                                            matrix(0, 0, 0, outputs_of(name), rank)});
          }
  }
};

// Arrays of one call, each in memory of its own size.
struct Request {
  std::vector<int32_t> tokens, sequences, positions, adapters, tables, wanted;
  int64_t stride = 1;

  int64_t run(Model* model, Cache* cache, float* logits) const {
    const int64_t count = static_cast<int64_t>(tokens.size());
    return hanmo_forward(model, cache, count, tokens.data(), sequences.data(), positions.data(),
                         adapters.empty() ? nullptr : adapters.data(), static_cast<int64_t>(tables.size()) / stride,
                         stride, tables.data(), static_cast<int64_t>(wanted.size()), wanted.data(), logits);
  }
};

bool same_bits(const float* a, const float* b, int64_t count) {
  for (int64_t i = 0; i < count; i++) {
    if (std::isnan(a[i]) && std::isnan(b[i])) continue;
    if (std::memcmp(a + i, b + i, 4)) return false;
  }
  return true;
}

struct Text {
  std::vector<int32_t> tokens, table;
  int32_t adapter;
  std::vector<std::vector<float>> logits;  // of each token, as they came
  int64_t length() const { return static_cast<int64_t>(tokens.size()); }
};

class Walk {
 public:
  explicit Walk(const Network& n)
      : n(n), width(up(n.vocabulary, 16)), number_bytes(1 << whole(0, 2)), model(n.build(whole(1, 5))) {
    fine(hanmo_cache_new(model, kPages, number_bytes, &cache), "a cache");
    users.resize(kPages);
  }
  ~Walk() {
    hanmo_cache_free(cache);
    hanmo_model_free(model);
  }

  void run(int64_t steps) {
    for (int64_t step = 0; step < steps; step++) {
      if (texts.empty() || (texts.size() < 6 && chance(0.3))) begin();
      if (chance(0.15)) fork();
      if (chance(0.1)) trim();
      read();
    }
    for (const Text& text : texts) compare(text);
  }

  void impossible() {
    Request good = request();
    if (good.tokens.empty()) return;
    const int64_t rows = static_cast<int64_t>(good.tokens.size());
    std::vector<float> logits(good.wanted.size() * width);
    Request bad = good;
    const int64_t row = whole(0, rows - 1);
    const auto number = [&] {
      const int64_t value = chance(0.5) ? whole(-3, 300) : extreme();
      return static_cast<int32_t>(std::clamp<int64_t>(value, std::numeric_limits<int32_t>::min(),
                                                      std::numeric_limits<int32_t>::max()));
    };
    bool must_fail = false;
    switch (whole(0, 5)) {
      case 0: bad.tokens[row] = number(); must_fail = bad.tokens[row] < 0 || bad.tokens[row] >= n.vocabulary; break;
      case 1: bad.sequences[row] = number(); must_fail = bad.sequences[row] < 0; break;
      case 2: bad.positions[row] = number(); must_fail = bad.positions[row] < 0 || bad.positions[row] >= n.context; break;
      case 3: bad.tables[whole(0, static_cast<int64_t>(bad.tables.size()) - 1)] = number(); break;
      case 4:
        bad.adapters.assign(rows, -1);
        bad.adapters[row] = number();
        must_fail = bad.adapters[row] < -1 || bad.adapters[row] > 4;
        break;
      default:
        if (bad.wanted.empty()) return;
        bad.wanted[0] = number();
        must_fail = bad.wanted[0] < 0 || bad.wanted[0] >= rows;
    }
    // what is written where it should not may be another text's: the walk ends here
    if (!bad.run(model, cache, logits.data()) && must_fail) fail("an impossible request was not refused");
    texts.clear();
    const Request& g = good;
    float* out = logits.data();
    const int64_t tables = static_cast<int64_t>(g.tables.size()) / g.stride;
    const int32_t *t = g.tokens.data(), *s = g.sequences.data(), *p = g.positions.data(), *pages = g.tables.data();
    const auto refused = [](int64_t code) {
      if (!code) fail("a call without its arrays was not refused");
    };
    refused(hanmo_forward(nullptr, cache, rows, t, s, p, nullptr, tables, g.stride, pages, 0, nullptr, nullptr));
    refused(hanmo_forward(model, nullptr, rows, t, s, p, nullptr, tables, g.stride, pages, 0, nullptr, nullptr));
    refused(hanmo_forward(model, cache, rows, nullptr, s, p, nullptr, tables, g.stride, pages, 0, nullptr, nullptr));
    refused(hanmo_forward(model, cache, rows, t, nullptr, p, nullptr, tables, g.stride, pages, 0, nullptr, nullptr));
    refused(hanmo_forward(model, cache, rows, t, s, nullptr, nullptr, tables, g.stride, pages, 0, nullptr, nullptr));
    refused(hanmo_forward(model, cache, rows, t, s, p, nullptr, tables, g.stride, nullptr, 0, nullptr, nullptr));
    refused(hanmo_forward(model, cache, rows, t, s, p, nullptr, tables, g.stride, pages, 1, nullptr, out));
    refused(hanmo_forward(model, cache, rows, t, s, p, nullptr, tables, g.stride, pages, rows + 1, g.wanted.data(), out));
    for (int64_t count : {int64_t{0}, int64_t{-1}, n.most_rows + 1, std::numeric_limits<int64_t>::max()}) {
      refused(hanmo_forward(model, cache, count, t, s, p, nullptr, tables, g.stride, pages, 0, nullptr, nullptr));
      refused(hanmo_forward(model, cache, rows, t, s, p, nullptr, count, g.stride, pages, 0, nullptr, nullptr));
    }
    for (int64_t stride : {int64_t{0}, int64_t{-1}, std::numeric_limits<int64_t>::max()})
      refused(hanmo_forward(model, cache, rows, t, s, p, nullptr, tables, stride, pages, 0, nullptr, nullptr));
    if (rows > 1 || reinterpret_cast<uintptr_t>(t) % 4 == 0)
      refused(hanmo_forward(model, cache, 1, reinterpret_cast<const int32_t*>(reinterpret_cast<const char*>(t) + 1), s, p,
                            nullptr, tables, g.stride, pages, 0, nullptr, nullptr));
    for (int turn = 0; turn < 10; turn++) hanmo_cache_copy(cache, extreme() % 64, extreme());
  }

 private:
  static constexpr int64_t kPages = 24;
  const Network& n;
  const int64_t width, number_bytes;
  Model* model;
  Cache* cache = nullptr;
  std::vector<Text> texts;
  std::vector<int> users;

  int64_t free_page() {
    std::vector<int64_t> free;
    for (int64_t page = 0; page < kPages; page++)
      if (!users[page]) free.push_back(page);
    return free.empty() ? -1 : free[whole(0, static_cast<int64_t>(free.size()) - 1)];
  }
  void begin() {
    texts.push_back({});
    texts.back().adapter = n.adapters.empty() || chance(0.4) ? -1 : static_cast<int32_t>(2 * whole(0, 2));
    if (!n.adapters.count(texts.back().adapter)) texts.back().adapter = -1;
  }
  Text& any() { return texts[whole(0, static_cast<int64_t>(texts.size()) - 1)]; }
  void fork() {
    const Text copy = any();
    for (int32_t page : copy.table) users[page]++;
    texts.push_back(copy);
  }
  void drop_pages(Text& text, int64_t kept) {
    while (static_cast<int64_t>(text.table.size()) > kept) {
      users[text.table.back()]--;
      text.table.pop_back();
    }
  }
  void trim() {
    Text& text = any();
    compare(text);
    const int64_t length = whole(0, text.length());
    text.tokens.resize(length);
    text.logits.resize(length);
    drop_pages(text, up(length, kPage) / kPage);
  }

  // Tokens that some texts read next; makes room for them.
  Request request() {
    Request r;
    int64_t room = n.most_rows;
    for (size_t i = 0; i < texts.size(); i++) {
      Text& text = texts[i];
      int64_t count = std::min({whole(0, chance(0.3) ? 60 : 4), room, n.context - text.length()});
      if (count > 0 && text.length() % kPage && users[text.table.back()] > 1) {
        const int64_t own = free_page();
        if (own < 0) continue;
        fine(hanmo_cache_copy(cache, text.table.back(), own), "a copy");
        users[text.table.back()]--;
        users[own]++;
        text.table.back() = static_cast<int32_t>(own);
      }
      while (up(text.length() + count, kPage) / kPage > static_cast<int64_t>(text.table.size())) {
        const int64_t page = free_page();
        if (page < 0) {
          count = static_cast<int64_t>(text.table.size()) * kPage - text.length();
          break;
        }
        users[page]++;
        text.table.push_back(static_cast<int32_t>(page));
      }
      for (int64_t j = 0; j < count; j++) {
        r.tokens.push_back(static_cast<int32_t>(whole(0, n.vocabulary - 1)));
        r.sequences.push_back(static_cast<int32_t>(i));
        r.positions.push_back(static_cast<int32_t>(text.length() + j));
        if (!n.adapters.empty()) r.adapters.push_back(text.adapter);
      }
      room -= count;
    }
    r.stride = 1;
    for (const Text& text : texts) r.stride = std::max(r.stride, static_cast<int64_t>(text.table.size()));
    for (const Text& text : texts)
      for (int64_t i = 0; i < r.stride; i++)
        r.tables.push_back(i < static_cast<int64_t>(text.table.size()) ? text.table[i] : -7);
    r.tables.shrink_to_fit();
    for (size_t row = 0; row < r.tokens.size(); row++) r.wanted.push_back(static_cast<int32_t>(row));
    return r;
  }

  void read() {
    if (static_cast<int64_t>(texts.size()) > n.most_rows) return;
    const Request r = request();
    if (r.tokens.empty()) return;
    const std::unique_ptr<float[]> logits(new float[r.wanted.size() * width]);
    fine(r.run(model, cache, logits.get()), "a request");
    for (size_t row = 0; row < r.tokens.size(); row++) {
      Text& text = texts[r.sequences[row]];
      text.tokens.push_back(r.tokens[row]);
      text.logits.emplace_back(logits.get() + row * width, logits.get() + row * width + n.vocabulary);
    }
  }

  // A text alone, a token at a time, on one thread.
  void compare(const Text& text) {
    if (!text.length()) return;
    Model* alone = n.build(1);
    Cache* own = nullptr;
    fine(hanmo_cache_new(alone, 8, number_bytes, &own), "a cache");
    std::vector<float> logits(width);
    Request r;
    r.tables = {7, 6, 5, 4, 3, 2, 1, 0};
    r.stride = 8, r.sequences = {0}, r.wanted = {0}, r.tokens = {0}, r.positions = {0};
    if (text.adapter >= 0) r.adapters = {text.adapter};
    for (int64_t i = 0; i < text.length(); i++) {
      r.tokens[0] = text.tokens[i], r.positions[0] = static_cast<int32_t>(i);
      fine(r.run(alone, own, logits.data()), "a token");
      if (!same_bits(logits.data(), text.logits[i].data(), n.vocabulary))
        fail("a text has other bits alone, at position " + std::to_string(i));
    }
    hanmo_cache_free(own);
    hanmo_model_free(alone);
  }
};

// Networks and parts that cannot be.
void impossible_parts() {
  const Network n;
  for (int turn = 0; turn < 40; turn++) {
    auto sizes = n.sizes;
    auto numbers = n.numbers;
    for (int64_t change = whole(1, 3); change; change--) sizes[whole(0, static_cast<int64_t>(sizes.size()) - 1)] = extreme();
    if (chance(0.3)) numbers[whole(0, 4)] = strange();
    Model* model = nullptr;
    if (!hanmo_model_new(sizes.data(), numbers.data(), chance(0.9) ? 2 : extreme(), &model)) {
      Cache* cache = nullptr;
      if (!hanmo_cache_new(model, chance(0.7) ? whole(1, 4) : extreme(), chance(0.7) ? 2 : extreme(), &cache))
        hanmo_cache_free(cache);
      const int32_t zero = 0;
      std::vector<float> logits(16);
      if (!hanmo_forward(model, cache, 1, &zero, &zero, &zero, nullptr, 1, 1, &zero, 1, &zero, logits.data()))
        fail("a network without weights computes");
      hanmo_model_free(model);
    }
  }
  Model* model = n.build(2);
  for (int turn = 0; turn < 200; turn++) {
    Network::Part p = n.matrices[whole(0, static_cast<int64_t>(n.matrices.size()) - 1)];
    int64_t* fields[] = {&p.layer, &p.name, &p.kind, &p.outputs, &p.inputs, &p.value_bytes, &p.scale_bytes};
    const int64_t chosen = whole(0, 6), before = *fields[chosen];
    *fields[chosen] = chance(0.5) ? before + whole(-1, 1) : extreme();
    // names and layers may be exchanged for others of the same size; all else must be refused
    if (*fields[chosen] == before || chosen < 3) continue;
    if (!hanmo_model_matrix(model, p.layer, p.name, p.kind, p.outputs, p.inputs, p.values, p.value_bytes, p.scales,
                            p.scale_bytes))
      fail("a matrix of another size was not refused");
  }
  for (int turn = 0; turn < 100; turn++) {
    const Network::Part& p = n.vectors[whole(0, static_cast<int64_t>(n.vectors.size()) - 1)];
    const int64_t count = chance(0.5) ? p.outputs + whole(-1, 1) : extreme();
    if (count != p.outputs && !hanmo_model_vector(model, p.layer, p.name, reinterpret_cast<float*>(p.values), count))
      fail("a vector of another size was not refused");
    if (!hanmo_model_vector(model, p.layer + n.layers + 1, p.name, reinterpret_cast<float*>(p.values), p.outputs))
      fail("a vector of no layer was not refused");
    hanmo_model_sliding(model, extreme(), extreme());
    const float value = strange();
    const std::vector<float> frequencies(64, value);
    const int64_t pairs = extreme();
    if (!hanmo_model_rotary(model, whole(0, 1), frequencies.data(), pairs, strange()) && pairs != n.rotary / 2)
      fail("frequencies of another count were not refused");
    int64_t c[] = {whole(0, 2), 0, whole(0, 3), 1, 4, 4};
    c[whole(0, 5)] = extreme();
    hanmo_model_adapter(model, c[0], c[1], c[2], c[3], &value, std::min<int64_t>(c[4], 4), &value, std::min<int64_t>(c[5], 4));
    hanmo_model_adapter_free(model, extreme());
  }
  for (const Network::Part& p : n.matrices) {
    std::vector<char> values(p.values, p.values + p.value_bytes);
    std::vector<char> scales(p.scales, p.scales + p.scale_bytes);
    const uint16_t nan = 0x7e00;
    const uint32_t infinite = 0x7f800000;
    if (p.kind == 0) std::memcpy(values.data() + 4 * whole(0, p.value_bytes / 4 - 1), &infinite, 4);
    if (p.kind == 1) std::memcpy(values.data() + 2 * whole(0, p.value_bytes / 2 - 1), &nan, 2);
    if (p.kind >= 2) std::memcpy(scales.data() + 2 * whole(0, p.scale_bytes / 2 - 1), &nan, 2);
    if (!hanmo_model_matrix(model, p.layer, p.name, p.kind, p.outputs, p.inputs, values.data(), p.value_bytes,
                            scales.data(), p.scale_bytes))
      fail("a matrix that holds NaN was not refused");
  }
  hanmo_model_free(model);
}

// A cache for a network of the largest sizes, and requests for more memory than any machine has.
void too_large() {
  std::vector<int64_t> sizes{4096, 1 << 20, 1 << 16, 1 << 16, 4096, 1 << 22, int64_t{1} << 31, int64_t{1} << 31,
                             4096, 0,       1,       0,       0,    1 << 16};
  const std::vector<float> numbers{1e-5f, 1, 1, 0, 0};
  Model* model = nullptr;
  if (hanmo_model_new(sizes.data(), numbers.data(), 1024, &model) != kNoMemory) fail("2^48 bytes were given");
  sizes[13] = 1, sizes[1] = 64, sizes[5] = 64;
  if (hanmo_model_new(sizes.data(), numbers.data(), 1, &model)) return;
  Cache* cache = nullptr;
  if (hanmo_cache_new(model, int64_t{1} << 31, 4, &cache) != kNoMemory) fail("2^79 bytes were given");
  const float value = 1;
  if (!hanmo_model_vector(model, -1, 17, &value, int64_t{1} << 62)) fail("a table of 2^64 bytes was taken");
  hanmo_model_free(model);
}

}  // namespace

int main(int count, char** arguments) {
  const uint64_t seed = count > 1 ? std::strtoull(arguments[1], nullptr, 10) : 1;
  const int rounds = count > 2 ? std::atoi(arguments[2]) : 100;
  for (int round = 0; round < rounds; round++) {
    source.seed(seed * 1000003 + round);
    Network network;
    if (round % 2) network.add_adapters();
    Walk walk(network);
    walk.run(whole(2, 14));
    for (int turn = 0; turn < 5; turn++) walk.impossible();
    if (round % 4 == 0) impossible_parts();
    if (round % 32 == 0) too_large();
  }
  std::printf("%d networks: fine\n", rounds);
  return 0;
}
