// The kernels of the native engine against plain loops in double precision, on the machine this is compiled for.
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
float normal() { return std::normal_distribution<float>()(source); }

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
  if (m.kind == kInt8)
    return half_to_float(m.scales[at * 16 + r]) * (m.values[at * 512 + step * 64 + r * 4 + i % 4] - 128.0);
  const uint8_t both = m.values[at * 256 + step / 2 * 64 + r * 4 + i % 4];
  const int nibble = step % 2 ? both >> 4 : both & 15;
  if (m.kind == kInt4) return half_to_float(m.scales[at * 16 + r]) * (nibble - 8.0);
  return half_to_float(m.scales[at * 32 + r]) * static_cast<double>(nibble) + half_to_float(m.scales[at * 32 + 16 + r]);
}

void check_products() {
  for (int64_t kind = kFloat32; kind <= kInt4Minimum; kind++)
    for (int64_t turn = 0; turn < 12; turn++) {
      const int64_t outputs = whole(1, 90), inputs = whole(1, 130), rows = turn ? whole(1, 30) : 1;
      Matrix m{kind, outputs, inputs, nullptr, nullptr};
      Buffer<uint8_t> values;
      Buffer<uint16_t> scales;
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
      ActivationMemory memory;
      memory.reserve(rows, round_up(inputs, kGroup));
      const Activations a = memory.view(inputs);
      for (int64_t row = 0; row < rows; row++) {
        for (int64_t k = 0; k < inputs; k++) a.floats[row * a.stride() + k] = normal();
        quantise_row(a.floats + row * a.stride(), a, row);
      }
      Expanded work;
      work.reserve(inputs);
      const int64_t width = m.width();
      std::vector<float> out(rows * width), single(width), looked_up(round_up(inputs, kGroup));
      multiply(m, 0, m.panels(), a, rows, Target{out.data(), width}, work);
      for (int64_t row = 0; row < rows; row++) {
        multiply(m, 0, m.panels(), a.from(row), 1, Target{single.data(), width}, work);
        expect(!std::memcmp(single.data(), out.data() + row * width, width * 4), "a row alone has other bits");
        for (int64_t n = 0; n < outputs; n++) {
          double sum = 0, size = 0;
          for (int64_t k = 0; k < inputs; k++) {
            const int64_t at = row * a.stride() + k, g = row * a.row_groups + k / kGroup;
            const double x = m.quantised() ? a.values[at] * static_cast<double>(a.scales[g]) : a.floats[at];
            sum += weight(m, n, k) * x;
            size += std::abs(weight(m, n, k) * x);
          }
          near(out[row * width + n], sum, 1e-5 * size + 1e-6, "product");
        }
      }
      for (int64_t n = 0; n < outputs; n++) {
        m.row(n, looked_up.data());
        for (int64_t k = 0; k < inputs; k++) near(looked_up[k], weight(m, n, k), 1e-6, "row");
      }
    }
}

// Weights and activations of the greatest size: no sum may saturate.
void check_extremes() {
  for (int64_t kind : {kInt8, kInt4, kInt4Minimum})
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
        quantise_row(a.floats, a, 0);
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
      for (float& x : in) x = std::uniform_real_distribution<float>(least, most)(source);
      store(out, ours(load(in)));
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
  const float nan = std::numeric_limits<float>::quiet_NaN(), infinite = std::numeric_limits<float>::infinity();
  for (float x : {nan, infinite, -infinite, 3e38f, -3e38f, 1e-44f})
    for (int64_t kind = kSilu; kind <= kGeluQuick; kind++) store(out, activate(all(x), kind));  // anything, but no crash
  store(out, exp2(all(nan)));
  expect(out[0] > 0 && out[0] < 1e-37f, "exp2 of what is no number", out[0]);
}

void check_halves() {
  for (int bits = 0; bits < 65536; bits += 16) {
    uint16_t halves[16];
    float one[16];
    for (int i = 0; i < 16; i++) halves[i] = static_cast<uint16_t>(bits + i);
    store(one, load_halves(halves));
    for (int i = 0; i < 16; i++) {
      const int exponent = halves[i] >> 10 & 31, fraction = halves[i] & 1023;
      if (exponent == 31) continue;
      const double size = exponent ? std::ldexp(1024 + fraction, exponent - 25) : std::ldexp(fraction, -24);
      near(one[i], halves[i] & 0x8000 ? -size : size, 0, "half");
      near(half_to_float(halves[i]), one[i], 0, "one half");
      expect(float_to_half(one[i]) == halves[i], "half and back", float_to_half(one[i]), halves[i]);
    }
  }
}

void check_groups() {
  float x[kGroup];
  int8_t values[kGroup];
  float scale, scaled;
  int32_t total;
  const float nan = std::numeric_limits<float>::quiet_NaN(), infinite = std::numeric_limits<float>::infinity();
  for (int turn = 0; turn < 2000; turn++) {
    const float size = std::exp2(static_cast<float>(whole(-90, 120)));
    for (float& v : x) v = normal() * size;
    if (turn % 4 == 1) x[whole(0, kGroup - 1)] = turn % 8 == 1 ? nan : -infinite;
    quantise_group(load(x), load(x + kPanel), values, &scale, &total, &scaled);
    int sum = 0;
    for (int i = 0; i < kGroup; i++) {
      sum += values[i];
      expect(values[i] >= -127, "an integer of 8 bits", values[i]);
      if (turn % 4 != 1) near(values[i] * static_cast<double>(scale), x[i], 0.51 * scale + 1e-30, "quantised");
    }
    expect(sum == total, "sum of integers", total, sum);
    expect(std::isnan(scale) == (turn % 4 == 1), "scale of what is no number", scale);
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
          near(queries[q].out[d], out[d], number_bytes == 1 ? 0.06 : number_bytes == 2 ? 3e-3 : 1e-5, "attention");
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

}  // namespace

int main() {
  check_halves();
  check_functions();
  check_groups();
  check_products();
  check_extremes();
  check_attention();
  check_rounding();
  std::printf("kernels of %d lanes: %s\n", kLanes, failures ? "WRONG" : "fine");
  return failures ? 1 : 0;
}
