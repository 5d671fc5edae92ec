// An encoder: all tokens of a text see each other. Its weights are those of a `Model` (model.h); it needs no cache.
#pragma once

#include "model.h"

namespace hanmo::native {

// Texts of one call, one after the other.
struct Texts {
  int64_t count;
  const int32_t* lengths;  // tokens of each, at least one
  const int32_t* tokens;
  const int32_t* types;    // of the tokens; null: all zero
  float* states;           // [token][hidden], what the last layer says
};

// Throws std::bad_alloc before anything is computed, if at all.
void encode(Model& model, const Texts& texts);

}  // namespace hanmo::native
