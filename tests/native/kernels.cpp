// The kernels of the native engine against plain loops in double precision, on the machine this is compiled for.
//
// Printed are also two sums over all bits: of what is exact, which every machine must have, and of what is rounded,
// which all machines must have that multiply and add at once.
//
//     kernels
//     kernels planted             sums of integers beyond 32 bits: UndefinedBehaviorSanitizer must say so
#include <cstdio>
#include <random>
#include <vector>

#include "attention.h"
#include "team.h"

using namespace hanmo::native;

namespace {

std::mt19937_64 source(1);
int failures = 0;

int64_t whole(int64_t least, int64_t most) { return std::uniform_int_distribution<int64_t>(least, most)(source); }
float uniform(float least, float most) {  // by the same operations on every machine, as what follows
  return least + (most - least) * static_cast<float>(source() >> 40) * 0x1p-24f;
}
float normal() { return 1.732f * (uniform(-1, 1) + uniform(-1, 1) + uniform(-1, 1)); }
const float kNan = std::numeric_limits<float>::quiet_NaN(), kInfinite = std::numeric_limits<float>::infinity();

// The sum over all bits that come.
struct Bits {
  uint64_t sum = 0xcbf29ce484222325;
  void add(uint64_t more) { sum = (sum ^ more) * 0x100000001b3; }
  void add(float x) {
    uint32_t bits = 0x7fc00000;  // there are many NaN
    if (!std::isnan(x)) std::memcpy(&bits, &x, sizeof bits);
    add(uint64_t{bits});
  }
  template <typename Number>
  void add(const Number* values, int64_t count) {
    for (int64_t i = 0; i < count; i++) {
      if constexpr (std::is_same_v<Number, float>)
        add(values[i]);
      else
        add(static_cast<uint64_t>(values[i]));
    }
  }
} exact, rounded;

void expect(bool fine, const char* what, double got = 0, double wanted = 0) {
  if (fine) return;
  if (failures++ < 20) std::printf("wrong: %s: %.9g, not %.9g\n", what, got, wanted);
}
void near(double got, double wanted, double allowed, const char* what) {
  expect(std::abs(got - wanted) <= allowed, what, got, wanted);
}

// The weights of a matrix by the layout's description, not by the engine's code.
double weight(const Matrix& m, int64_t output, int64_t input) {
  const int64_t panel = output / 16, r = output % 16, groups = (m.inputs + 31) / 32, g = input / 32, i = input % 32;
  if (m.kind == kFloat32) return reinterpret_cast<const float*>(m.values)[(panel * m.inputs + input) * 16 + r];
  if (m.kind == kFloat16)
    return half_to_float(reinterpret_cast<const uint16_t*>(m.values)[(panel * m.inputs + input) * 16 + r]);
  const int64_t at = panel * groups + g, step = i / 4;
  const int64_t scale_at = m.kind == kInt8Wide ? panel * ((groups + 3) / 4) + g / 4 : at;
  if (m.kind == kInt8 || m.kind == kInt8Wide)
    return half_to_float(m.scales[scale_at * 16 + r]) * (m.values[at * 512 + step * 64 + r * 4 + i % 4] - 128.0);
  const uint8_t both = m.values[at * 256 + step / 2 * 64 + r * 4 + i % 4];
  const int nibble = step % 2 ? both >> 4 : both & 15;
  if (m.kind == kInt4) return half_to_float(m.scales[at * 16 + r]) * (nibble - 8.0);
  return half_to_float(m.scales[at * 32 + r]) * static_cast<double>(nibble) + half_to_float(m.scales[at * 32 + 16 + r]);
}

// A matrix with random weights and its memory.
struct Random {
  Matrix m;
  Buffer<uint8_t> values;
  Buffer<uint16_t> scales;

  Random(int64_t kind, int64_t outputs, int64_t inputs) : m{kind, outputs, inputs, nullptr, nullptr} {
    values.resize(m.value_bytes());
    scales.resize(m.scale_count());
    m.values = values.data(), m.scales = scales.data();
    for (int64_t i = 0; i < scales.size(); i++) scales[i] = float_to_half(0.02f * normal());
    for (int64_t i = 0; i < values.size(); i++) values[i] = static_cast<uint8_t>(whole(0, 255));
    if (kind == kFloat32)
      for (int64_t i = 0; i < values.size() / 4; i++) reinterpret_cast<float*>(values.data())[i] = normal();
    if (kind == kFloat16)
      for (int64_t i = 0; i < values.size() / 2; i++)
        reinterpret_cast<uint16_t*>(values.data())[i] = float_to_half(normal());
  }
};

void quantise(const Matrix& m, const Activations& a, int64_t row) {
  const float* floats = a.floats + row * a.stride();
  if (m.wide())
    quantise_row_wide(floats, a, row);
  else
    quantise_row(floats, a, row);
}

// An input of a row as the kernels see it.
double input_of(const Matrix& m, const Activations& a, int64_t row, int64_t k) {
  if (!m.quantised()) return a.floats[row * a.stride() + k];
  const int64_t group = k / kGroup / (m.wide() ? kWide : 1);
  return a.values[row * a.stride() + k] * static_cast<double>(a.scales[row * a.row_groups + group]);
}

void check_products() {
  for (int64_t kind = kFloat32; kind <= kInt8Wide; kind++)
    for (int64_t turn = 0; turn < 20; turn++) {
      // the last ones at the borders where weights of 4 bits, and of 8, are expanded for all rows at once
      const int64_t borders[] = {kDirectRows, kDirectRows + 1, kBytesDirectRows, kBytesDirectRows + 1, whole(130, 200)};
      const bool many = turn >= 15;
      const int64_t outputs = whole(1, many ? 50 : 90), inputs = whole(1, many ? 150 : 300);
      const int64_t rows = many ? borders[turn - 15] : turn < 2 ? turn : whole(1, 40);
      const Random random(kind, outputs, inputs);
      const Matrix& m = random.m;
      ActivationMemory memory;
      memory.reserve(std::max<int64_t>(rows, 1), round_up(inputs, kGroup) + kGroup * whole(0, 2));
      const Activations a = memory.view(inputs);
      const int64_t bad = turn > 8 ? whole(0, rows - 1) : -1;  // a row that holds no numbers
      for (int64_t row = 0; row < rows; row++) {
        for (int64_t k = 0; k < inputs; k++) a.floats[row * a.stride() + k] = normal();
        if (row == bad) a.floats[row * a.stride() + whole(0, inputs - 1)] = turn % 2 ? kNan : -kInfinite;
        quantise(m, a, row);
      }
      Expanded work;
      work.reserve(inputs);
      std::vector<double> weights(outputs * inputs);
      for (int64_t n = 0; n < outputs; n++)
        for (int64_t k = 0; k < inputs; k++) weights[n * inputs + k] = weight(m, n, k);
      const int64_t width = m.width(), from = whole(0, m.panels() - 1), to = whole(from, m.panels()), stride = width + 3;
      std::vector<float> out(rows * width), single(width), looked_up(round_up(inputs, kGroup)), bias(width);
      std::vector<float> part(rows * stride, 7.0f);
      for (float& b : bias) b = normal();
      multiply(m, 0, m.panels(), a, rows, Target{out.data(), width}, work);
      // some panels alone, added to what is there, with a bias
      multiply(m, from, to, a, rows, Target{part.data(), stride, true, bias.data(), from * kPanel}, work);
      for (int64_t row = 0; row < rows; row++) {
        multiply(m, 0, m.panels(), a.from(row), 1, Target{single.data(), width}, work);
        for (int64_t n = 0; n < outputs; n++)
          expect(!std::memcmp(&single[n], &out[row * width + n], 4) || row == bad, "a row alone has other bits", single[n],
                 out[row * width + n]);
        for (int64_t i = 0; i < stride; i++) {
          const int64_t n = from * kPanel + i;
          const float wanted = n < to * kPanel ? out[row * width + n] + bias[n] + 7.0f : 7.0f;
          expect(part[row * stride + i] == wanted || row == bad, "some panels", part[row * stride + i], wanted);
        }
        rounded.add(out.data() + row * width, outputs);
        for (int64_t n = 0; n < outputs; n++) {
          double sum = 0, size = 0;
          for (int64_t k = 0; k < inputs; k++) {
            const double product = weights[n * inputs + k] * input_of(m, a, row, k);
            sum += product;
            size += std::abs(product);
          }
          if (row == bad)
            expect(!std::isfinite(out[row * width + n]), "a product with what is no number", out[row * width + n]);
          else
            near(out[row * width + n], sum, 1e-5 * size + 1e-6, "product");
        }
      }
      for (int64_t n = 0; n < outputs; n++) {
        m.row(n, looked_up.data());
        exact.add(looked_up.data(), kind == kInt4Minimum ? 0 : inputs);
        for (int64_t k = 0; k < inputs; k++) near(looked_up[k], weights[n * inputs + k], 1e-6, "row");
      }
    }
}

// Sums of integer products, without scales: they must be the same on all machines.
void check_dot() {
  for (int turn = 0; turn < 500; turn++) {
    uint8_t weights[64];
    int8_t four[4];
    for (uint8_t& w : weights) w = static_cast<uint8_t>(turn % 3 ? whole(0, 255) : whole(0, 1) * 255);
    for (int8_t& x : four) x = static_cast<int8_t>(turn % 2 ? whole(-127, 127) : whole(0, 1) * 254 - 127);
    const int32_t start = static_cast<int32_t>(whole(-1000000, 1000000)), added = four[0] + four[1] + four[2] + four[3];
    int32_t bytes[kPanel], nibbles[kPanel];
    const Ints of_bytes = dot(all(start - kByteOffset * added), load_weights(weights), four);
    const Ints of_nibbles = dot(dot(all(start), low_nibbles(load_bytes(weights)), four), high_nibbles(load_bytes(weights)), four);
    std::memcpy(bytes, &of_bytes, sizeof bytes);
    std::memcpy(nibbles, &of_nibbles, sizeof nibbles);
    for (int r = 0; r < kPanel; r++) {
      int32_t wanted = start, wanted_nibbles = start;
      for (int i = 0; i < 4; i++) {
        wanted += (weights[4 * r + i] - 128) * four[i];
        wanted_nibbles += (weights[4 * r + i] % 16 + weights[4 * r + i] / 16) * four[i];
      }
      expect(bytes[r] == wanted, "dot", bytes[r], wanted);
      expect(nibbles[r] == wanted_nibbles, "dot of 4 bits", nibbles[r], wanted_nibbles);
    }
    exact.add(bytes, kPanel);
    exact.add(nibbles, kPanel);
  }
}

// Weights and activations of the greatest size: no sum may saturate.
void check_extremes() {
  for (int64_t kind : {kInt8, kInt4, kInt4Minimum, kInt8Wide})
    for (int byte : {0, 255})
      for (int sign : {-1, 1}) {
        Matrix m{kind, 16, 32, nullptr, nullptr};
        std::vector<uint8_t> values(m.value_bytes(), static_cast<uint8_t>(byte));
        std::vector<uint16_t> scales(m.scale_count(), float_to_half(1.0f));
        m.values = values.data(), m.scales = scales.data();
        ActivationMemory memory;
        memory.reserve(1, 32);
        const Activations a = memory.view(32);
        std::fill(a.floats, a.floats + 32, 127.0f * static_cast<float>(sign));
        quantise(m, a, 0);
        std::vector<float> out(16);
        Expanded work;
        multiply(m, 0, 1, a, 1, Target{out.data(), 16}, work);
        for (float got : out) near(got, 32 * 127.0 * sign * weight(m, 0, 0), 0.01, "extreme product");
      }
}

void check_functions() {
  float in[16], out[16];
  const auto over = [&](const char* name, float least, float most, double allowed, auto ours, auto exact) {
    for (int turn = 0; turn < 500; turn++) {
      for (float& x : in) x = uniform(least, most);
      store(out, ours(load(in)));
      rounded.add(out, 16);
      for (int i = 0; i < 16; i++) {
        const double wanted = exact(static_cast<double>(in[i]));
        near(out[i], wanted, allowed * std::max(1e-3, std::abs(wanted)), name);
      }
    }
  };
  over("exp2", -100, 100, 1e-6, [](Floats x) { return exp2(x); }, [](double x) { return std::exp2(x); });
  over("tanh", -12, 12, 1e-5, [](Floats x) { return tanh(x); }, [](double x) { return std::tanh(x); });
  over("sigmoid", -80, 80, 1e-5, [](Floats x) { return sigmoid(x); }, [](double x) { return 1 / (1 + std::exp(-x)); });
  over("gelu", -8, 8, 1e-3, [](Floats x) { return gelu(x); },
       [](double x) { return x * 0.5 * std::erfc(-x / std::sqrt(2.0)); });
  over("nearest", -1e6f, 1e6f, 0, [](Floats x) { return to_floats(nearest(x)); }, [](double x) { return std::nearbyint(x); });
  over("fma", -10, 10, 1e-6, [](Floats x) { return fma(x, x, all(1.0f)); }, [](double x) { return x * x + 1; });
  for (float x : {kNan, kInfinite, -kInfinite, 3e38f, -3e38f, 1e-44f})
    for (int64_t kind = kSilu; kind <= kGeluQuick; kind++) store(out, activate(all(x), kind));  // anything, but no crash
  store(out, exp2(all(kNan)));
  expect(out[0] > 0 && out[0] < 1e-37f, "exp2 of what is no number", out[0]);
}

void check_halves() {
  for (int bits = 0; bits < 65536; bits += 16) {
    uint16_t halves[16], back[16];
    float one[16];
    for (int i = 0; i < 16; i++) halves[i] = static_cast<uint16_t>(bits + i);
    store(one, load_halves(halves));
    store_halves(back, load(one));
    exact.add(one, 16);
    for (int i = 0; i < 16; i++) {
      const int exponent = halves[i] >> 10 & 31, fraction = halves[i] & 1023;
      if (exponent == 31 && fraction) {
        expect((back[i] & 0x7c00) == 0x7c00 && back[i] & 1023, "no number in half precision", back[i]);
        continue;
      }
      double size = exponent ? std::ldexp(1024 + fraction, exponent - 25) : std::ldexp(fraction, -24);
      if (exponent == 31) size = kInfinite;
      expect(one[i] == (halves[i] & 0x8000 ? -size : size), "half", one[i], size);
      expect(half_to_float(halves[i]) == one[i], "one half", one[i]);
      expect(float_to_half(one[i]) == halves[i], "half and back", float_to_half(one[i]), halves[i]);
      expect(back[i] == halves[i], "halves and back", back[i], halves[i]);
    }
  }
  for (int turn = 0; turn < 4000; turn++) {  // what lies between two halves, and far beyond them
    float in[16];
    uint16_t halves[16];
    const int power = static_cast<int>(turn % 2 ? whole(-26, 17) : whole(-140, 126));
    for (float& x : in) x = std::ldexp(normal(), power);
    store_halves(halves, load(in));
    exact.add(halves, 16);
    for (int i = 0; i < 16; i++) expect(halves[i] == float_to_half(in[i]), "halves", halves[i], float_to_half(in[i]));
  }
}

// What is kept of keys and values: finite, and no larger than the format holds.
void check_tame() {
  for (float most : {1e30f, kLargestHalf})
    for (float x : {0.0f, -0.0f, 1.0f, -1.0f, most, -most, 1.0001f * most, -2 * most, 1e-45f, -1e-45f, 3.4e38f, kInfinite,
                    -kInfinite, kNan, -kNan}) {
      float out[16];
      store(out, tame(all(x), most));
      const float wanted = std::isnan(x) ? 0.0f : std::min(std::max(x, -most), most);
      expect(tame(x, most) == wanted, "one number tamed", tame(x, most), wanted);
      for (float got : out) expect(got == wanted && std::signbit(got) == std::signbit(wanted), "tamed", got, wanted);
      uint16_t one;
      put_number(&one, x);
      expect((one & 0x7c00) != 0x7c00, "a half that is finite", one);
    }
}

// Groups of `groups` * 32 numbers that share a scale; 0: one group by the other function.
template <int64_t groups>
void check_group() {
  constexpr int64_t kCount = std::max<int64_t>(groups, 1) * kGroup;
  float x[kCount];
  int8_t values[kCount];
  float scale, scaled;
  int32_t total;
  for (int turn = 0; turn < 1000; turn++) {
    const float size = std::exp2(static_cast<float>(whole(-140, 120)));
    for (float& v : x) v = normal() * size;
    if (turn % 4 == 1) x[whole(0, kCount - 1)] = turn % 8 == 1 ? kNan : -kInfinite;
    if constexpr (groups)
      quantise_wide(x, groups, values, &scale, &total, &scaled);
    else
      quantise_group(load(x), load(x + kPanel), values, &scale, &total, &scaled);
    int sum = 0;
    for (int64_t i = 0; i < kCount; i++) {
      sum += values[i];
      expect(values[i] >= -127, "an integer of 8 bits", values[i]);
      if (turn % 4 != 1) near(values[i] * static_cast<double>(scale), x[i], 0.51 * scale + 1e-30, "quantised");
    }
    exact.add(values, kCount);
    exact.add(scale);
    expect(sum == total, "sum of integers", total, sum);
    expect(std::isnan(scale) == (turn % 4 == 1), "scale of what is no number", scale);
    expect(std::isnan(scaled) == (turn % 4 == 1), "scaled sum of what is no number", scaled);
  }
}

// A page holds what it was given, in its place, and nothing else has changed.
void check_memory() {
  for (int64_t number_bytes : {1, 2, 4})
    for (int turn = 0; turn < 60; turn++) {
      const int64_t size = whole(1, 80), place = whole(0, kPage - 1);
      Cache cache;
      cache.pages = 3, cache.layers = 2, cache.heads = 2, cache.dimensions = round_up(size, kGroup);
      cache.number_bytes = number_bytes;
      cache.memory.resize(3 * cache.page_bytes());
      const int32_t table[] = {2, 1};
      std::vector<float> key(size), value(size);
      for (std::vector<float>* vector : {&key, &value})
        for (float& x : *vector) {
          const float wild[] = {kNan, kInfinite, -kInfinite, 1e31f, -70000.0f, 1e-44f};
          x = whole(0, 5) ? normal() : wild[whole(0, 5)];
        }
      remember(cache, 1, 1, table, kPage + place, key.data(), value.data(), size);
      exact.add(reinterpret_cast<const uint8_t*>(cache.memory.data()), cache.memory.size());
      int64_t changed = 0, expected = 0;
      for (int64_t i = 0; i < cache.memory.size(); i++) changed += cache.memory[i] != 0;
      const char *keys = cache.keys<char>(1, 1, 1), *values = cache.values<char>(1, 1, 1);
      for (int64_t d = 0; d < cache.dimensions; d++)
        for (const char* part : {keys, values}) {
          const float given = d >= size ? 0.0f : part == keys ? key[d] : value[d];
          const int64_t at = part == keys ? d * kPage + place : place * cache.dimensions + d;
          if (number_bytes == 4) {
            float stored;
            std::memcpy(&stored, part + 4 * at, 4);
            expect(stored == tame(given, 1e30f), "a number that is kept", stored, given);
          } else if (number_bytes == 2) {
            uint16_t stored;
            std::memcpy(&stored, part + 2 * at, 2);
            expect(stored == float_to_half(tame(given, kLargestHalf)), "a half that is kept", half_to_float(stored), given);
          } else {
            const int64_t group = d / kGroup, in = d % kGroup, panel = place / 16, r = place % 16;
            const int64_t key_at = ((panel * cache.groups() + group) * 8 + in / 4) * 64 + r * 4 + in % 4;
            const int64_t scale_at = part == keys ? (panel * cache.groups() + group) * 16 + r : group * kPage + place;
            uint16_t bits;
            std::memcpy(&bits, part + cache.numbers() + 2 * scale_at, 2);
            const double scale = half_to_float(bits);
            const int integer = part == keys ? static_cast<uint8_t>(part[key_at]) - 128 : static_cast<int8_t>(part[at]);
            near(integer * scale, tame(given, 127 * kLargestHalf), 0.52 * scale + 1e-6, "an integer that is kept");
            expect(std::isfinite(scale), "a scale that is kept", scale);
          }
        }
      for (const char* part : {keys, values})
        for (int64_t i = 0; i < cache.part_bytes(); i++) expected += part[i] != 0;
      expect(changed == expected, "what lies elsewhere", static_cast<double>(changed), static_cast<double>(expected));
    }
}

// Attention against a plain softmax, in each format of the cache.
void check_attention() {
  for (int64_t number_bytes : {1, 2, 4})
    for (int turn = 0; turn < 20; turn++) {
      const int64_t size = whole(1, 80), positions = whole(1, 100), pages = (positions + kPage - 1) / kPage;
      Cache cache;
      cache.pages = pages, cache.layers = 2, cache.heads = 2;
      cache.dimensions = round_up(size, kGroup), cache.number_bytes = number_bytes;
      cache.memory.resize(pages * cache.page_bytes());
      std::vector<int32_t> table(pages);
      for (int64_t i = 0; i < pages; i++) table[i] = static_cast<int32_t>(pages - 1 - i);
      std::vector<float> keys(positions * size), values(positions * size);
      for (float& k : keys) k = normal();
      for (float& v : values) v = normal();
      for (int64_t p = 0; p < positions; p++)
        remember(cache, 1, 1, table.data(), p, &keys[p * size], &values[p * size], size);
      const int count = static_cast<int>(whole(1, kQueries));
      AttentionMemory memory;
      memory.scores.reserve(positions);
      memory.vectors.reserve(kQueries, cache.dimensions);
      std::vector<float> vectors(kQueries * cache.dimensions), outputs(vectors.size());
      Query queries[kQueries];
      for (int q = 0; q < count; q++) {
        float* vector = &vectors[q * cache.dimensions];
        for (int64_t d = 0; d < size; d++) vector[d] = normal() / std::sqrt(static_cast<float>(size));
        const int64_t end = whole(1, positions);
        queries[q] = {vector, &outputs[q * cache.dimensions], whole(0, end - 1), end};
      }
      const float cap = turn % 3 ? 0.0f : 2.0f;
      attend(cache, 1, 1, table.data(), queries, count, cap, memory);
      for (int q = 0; q < count; q++) rounded.add(queries[q].out, size);
      for (int q = 0; q < count; q++) {
        std::vector<double> weights, out(size);
        double total = 0;
        for (int64_t p = queries[q].begin; p < queries[q].end; p++) {
          double score = 0;
          for (int64_t d = 0; d < size; d++) score += static_cast<double>(queries[q].vector[d]) * keys[p * size + d];
          weights.push_back(std::exp(cap > 0 ? cap * std::tanh(score / cap) : score));
          total += weights.back();
        }
        for (int64_t p = queries[q].begin; p < queries[q].end; p++)
          for (int64_t d = 0; d < size; d++) out[d] += weights[p - queries[q].begin] / total * values[p * size + d];
        for (int64_t d = 0; d < size; d++)
          near(queries[q].out[d], out[d], number_bytes == 1 ? 0.1 : number_bytes == 2 ? 3e-3 : 1e-5, "attention");
      }
    }
}

void check_rounding() {
  const Rounding rounding;
  volatile float tiny = 1e-30f, zero = tiny * 1e-10f;
#if defined(__x86_64__) || defined(__aarch64__)
  expect(zero == 0.0f, "what is too small is zero", zero);
#endif
  (void)zero;
}

// Sums of integers that no row has.
void planted() {
  const Random random(kInt4, 16, 32);
  ActivationMemory memory;
  memory.reserve(1, 32);
  const Activations a = memory.view(32);
  quantise_row(a.floats, a, 0);
  a.sums[0] = std::numeric_limits<int32_t>::max();
  Expanded work;
  std::vector<float> out(16);
  multiply(random.m, 0, 1, a, 1, Target{out.data(), 16}, work);
}

}  // namespace

int main(int count, char** arguments) {
  if (count > 1 && !std::strcmp(arguments[1], "planted")) {
    planted();
    return 0;
  }
  check_halves();
  check_tame();
  check_functions();
  check_group<0>();
  check_group<1>();
  check_group<2>();
  check_group<3>();
  check_group<4>();
  check_dot();
  check_products();
  check_extremes();
  check_memory();
  check_attention();
  check_rounding();
  std::printf("kernels of %d lanes: %s\nexact %016llx\nrounded %016llx\n", kLanes, failures ? "WRONG" : "fine",
              static_cast<unsigned long long>(exact.sum), static_cast<unsigned long long>(rounded.sum));
  return failures ? 1 : 0;
}
