// Elementary functions of sixteen floats, each product that is added written as fma (see lanes.h).
//
// The polynomials are least-maximum-error fits; exp2 is good to 2e-7 relative, tanh to 3e-7.
#pragma once

#include "lanes.h"

namespace hanmo::native {

// 2^x for x from -125 to 127; beyond, that of the nearer end. What is no number counts as -125.
INLINE Floats exp2(Floats x) {
  x = smaller(larger(x, all(-125.0f)), all(127.0f));
  const Ints whole = nearest(x);
  const Floats part = x - to_floats(whole);
  Floats p = all(1.535336188319500e-4f);
  p = fma(p, part, all(1.339887440266574e-3f));
  p = fma(p, part, all(9.618437357674640e-3f));
  p = fma(p, part, all(5.550332471162809e-2f));
  p = fma(p, part, all(2.402264791363012e-1f));
  p = fma(p, part, all(6.931472028550421e-1f));
  p = fma(p, part, all(1.0f));
  Floats out;
  UNROLL EACH {
    const ilanes power = (whole.at[i] + 127) << 23;
    out.at[i] = p.at[i] * reinterpret_cast<lanes>(power);
  }
  return out;
}
constexpr float kLog2E = 1.44269504088896341f;

INLINE Floats exp(Floats x) { return exp2(x * all(kLog2E)); }
INLINE Floats sigmoid(Floats x) { return all(1.0f) / (all(1.0f) + exp(all(0.0f) - x)); }
INLINE Floats tanh(Floats x) {
  const Floats size = smaller(magnitude(x), all(15.0f));
  const Floats e = exp(size + size), far = all(1.0f) - all(2.0f) / (e + all(1.0f));
  const Floats square = x * x;
  Floats near = all(-0.0058951592f);
  near = fma(near, square, all(0.0207959730f));
  near = fma(near, square, all(-0.0537838303f));
  near = fma(near, square, all(0.1333192438f));
  near = fma(near, square, all(-0.3333329856f));
  near = fma(near * square, x, x);
  Floats out;
  UNROLL EACH {
    const lanes f = x.at[i] < 0.0f ? -far.at[i] : far.at[i];
    out.at[i] = size.at[i] < 0.6f ? near.at[i] : f;
  }
  return out;
}

enum Activation : int64_t { kSilu = 0, kGeluTanh = 1, kGelu = 2, kRelu = 3, kGeluQuick = 4 };

INLINE Floats gelu_tanh(Floats x) {
  const Floats cube = x * x * x;
  return x * all(0.5f) * (all(1.0f) + tanh(all(0.7978845608f) * fma(cube, all(0.044715f), x)));
}
// x Phi(x) as max(x, 0) - |x| Phi(-|x|), the second by a least-maximum-error polynomial; good to 4e-7 absolute.
INLINE Floats gelu(Floats x) {
  const Floats size = smaller(magnitude(x), all(5.5f)), t = fma(size, all(0.363636374f), all(-1.0f));
  Floats p = all(0.0055805626f);
  p = fma(p, t, all(-0.0053275907f));
  p = fma(p, t, all(-0.0301311333f));
  p = fma(p, t, all(0.0435079262f));
  p = fma(p, t, all(0.0490752049f));
  p = fma(p, t, all(-0.1332054287f));
  p = fma(p, t, all(0.0349251479f));
  p = fma(p, t, all(0.1630588472f));
  p = fma(p, t, all(-0.2184348106f));
  p = fma(p, t, all(0.0513972230f));
  p = fma(p, t, all(0.1771654040f));
  p = fma(p, t, all(-0.2718897462f));
  p = fma(p, t, all(0.2068080455f));
  p = fma(p, t, all(-0.0945579335f));
  p = fma(p, t, all(0.0250080619f));
  p = fma(p, t, all(-0.0029797743f));
  return fma(size, p, larger(all(0.0f), x));  // in this order NaN stays NaN
}
INLINE Floats activate(Floats x, int64_t kind) {
  switch (kind) {
    case kSilu: return x * sigmoid(x);
    case kGeluTanh: return gelu_tanh(x);
    case kGelu: return gelu(x);
    case kGeluQuick: return x * sigmoid(x * all(1.702f));
    default: return larger(x, all(0.0f));
  }
}

}  // namespace hanmo::native
