// What happens to single rows between the products: norms, rotation, the activation of the inner layer.
#pragma once

#include "model.h"

namespace hanmo::native {

// The norm of `size` numbers; `out` may be `in`. RMSNorm, or with `centred` a layer norm, which subtracts the mean.
inline void norm_row(const float* in, float* out, int64_t size, const Vector& weight, const Vector& bias, float epsilon,
                     bool centred) {
  Floats squares = all(0.0f), plain = all(0.0f);
  float mean = 0;
  const int64_t full = size / kPanel * kPanel;
  if (centred) {
    float rest = 0;
    for (int64_t i = 0; i < full; i += kPanel) plain = plain + load(in + i);
    for (int64_t i = full; i < size; i++) rest += in[i];
    mean = (sum(plain) + rest) / static_cast<float>(size);
  }
  float rest = 0;
  for (int64_t i = 0; i < full; i += kPanel) {
    const Floats v = load(in + i) - all(mean);
    squares = fma(v, v, squares);
  }
  for (int64_t i = full; i < size; i++) rest += (in[i] - mean) * (in[i] - mean);
  const float scale = 1.0f / std::sqrt((sum(squares) + rest) / static_cast<float>(size) + epsilon);
  for (int64_t i = 0; i < full; i += kPanel) {
    Floats v = (load(in + i) - all(mean)) * all(scale) * load(weight.data() + i);
    if (!bias.empty()) v = v + load(bias.data() + i);
    store(out + i, v);
  }
  for (int64_t i = full; i < size; i++)
    out[i] = (in[i] - mean) * scale * weight[i] + (bias.empty() ? 0.0f : bias[i]);
}

// Rotate the first pairs of a head's vector by the angles of a position (Su et al. 2021), in place.
inline void rotate_head(float* vector, int64_t half, const Rotary& rotary, int64_t position) {
  const float *cosines = rotary.cosines.data() + position * half, *sines = rotary.sines.data() + position * half;
  for (int64_t i = 0; i < half; i++) {
    const float a = vector[i], b = vector[i + half];
    vector[i] = a * cosines[i] - b * sines[i];
    vector[i + half] = b * cosines[i] + a * sines[i];
  }
}

// Panels of the inner product that make one group of what the next matrix reads; gates and their values alternate.
INLINE int64_t inner_panels(bool gated) { return gated ? 4 : 2; }

// One group of a row of the inner layer: the activation of what its products gave.
INLINE void activated(const float* in, bool gated, int64_t activation, Floats& first, Floats& second) {
  if (gated) {  // panels alternate: 16 gates, their 16 values
    first = activate(load(in), activation) * load(in + kPanel);
    second = activate(load(in + 2 * kPanel), activation) * load(in + 3 * kPanel);
  } else {
    first = activate(load(in), activation);
    second = activate(load(in + kPanel), activation);
  }
}

// One group of a row of the inner layer: the activation of a tile's row, quantised, or kept as floats, or both.
INLINE void activate_group(const float* in, bool gated, int64_t activation, bool quantised, bool keep,
                           const Activations& out, int64_t row, int64_t group) {
  Floats first, second;
  activated(in, gated, activation, first, second);
  if (quantised) {
    const int64_t at = row * out.row_groups + group;
    quantise_group(first, second, out.values + at * kGroup, out.scales + at, out.sums + at, out.scaled + at);
  }
  if (keep) {
    float* floats = out.floats + row * out.stride() + group * kGroup;
    store(floats, first);
    store(floats + kPanel, second);
  }
}

// Some groups from `group` on, at most a wide group of them, quantised together; `in` is overwritten.
INLINE void activate_wide(float* in, bool gated, int64_t activation, int64_t groups, const Activations& out, int64_t row,
                          int64_t group) {
  for (int64_t g = 0; g < groups; g++) {
    Floats first, second;
    activated(in + g * inner_panels(gated) * kPanel, gated, activation, first, second);
    store(in + g * kGroup, first);
    store(in + g * kGroup + kPanel, second);
  }
  const int64_t at = row * out.row_groups + group, scale = row * out.row_groups + group / kWide;
  quantise_wide(in, groups, out.values + at * kGroup, out.scales + scale, out.sums + scale, out.scaled + scale);
}

}  // namespace hanmo::native
