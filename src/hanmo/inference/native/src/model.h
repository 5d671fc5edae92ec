// A decoder: its shape, its weights, and the memory in which it computes.
#pragma once

#include <memory>

#include "attention.h"
#include "team.h"

namespace hanmo::native {

struct Shape {
  int64_t layers, hidden, heads, kv_heads, head_size, intermediate, vocabulary, context;
  int64_t rotary_size;      // dimensions of a head that are rotated; 0: positions are learned
  int64_t activation;       // Activation
  int64_t gated;            // whether the activation multiplies a second product
  int64_t layer_norm;       // whether norms subtract the mean
  int64_t window;           // positions a sliding layer sees
  int64_t most_rows;        // tokens of one call
  float epsilon, embedding_scale, attention_scale, attention_cap, logit_cap;

  int64_t query_width() const { return heads * head_size; }
  int64_t kv_width() const { return kv_heads * head_size; }
  int64_t filled_head() const { return round_up(head_size, kGroup); }
  int64_t filled_intermediate() const { return round_up(intermediate, kGroup); }
};

enum MatrixName : int64_t { kQueryKeyValue = 0, kOutput, kGateUp, kDown, kEmbedding, kHead, kMatrixNames };
enum VectorName : int64_t {
  kAttentionNorm = 0, kAttentionNormBias, kMlpNorm, kMlpNormBias,
  kAttentionOutNorm, kAttentionOutNormBias, kMlpOutNorm, kMlpOutNormBias,  // after a sublayer (Gemma)
  kQueryNorm, kKeyNorm,
  kQueryKeyValueBias, kOutputBias, kGateUpBias, kDownBias,
  kFinalNorm, kFinalNormBias, kHeadBias, kPositions, kEmbeddingNorm, kEmbeddingNormBias, kVectorNames
};

typedef std::vector<float> Vector;  // empty: not there

struct Layer {
  Matrix matrices[kEmbedding];
  Vector vectors[kFinalNorm];
  bool sliding = false;
};

// Cosines and sines of the rotated pairs, made as far as they are needed.
struct Rotary {
  std::vector<float> frequencies, cosines, sines;
  float magnitude = 1;
  int64_t positions = 0;
  void reach(int64_t count) {
    const int64_t pairs = static_cast<int64_t>(frequencies.size());
    if (count <= positions) return;
    count = round_up(count, 512);
    cosines.resize(count * pairs);
    sines.resize(count * pairs);
    for (int64_t p = positions; p < count; p++)
      for (int64_t i = 0; i < pairs; i++) {
        const float angle = static_cast<float>(p) * frequencies[i];
        cosines[p * pairs + i] = std::cos(angle) * magnitude;
        sines[p * pairs + i] = std::sin(angle) * magnitude;
      }
    positions = count;
  }
};

// Rows of activations with their own memory.
struct ActivationMemory {
  std::vector<float> floats, scales, scaled;
  std::vector<int8_t> values;
  std::vector<int32_t> sums;
  int64_t row_groups = 0;

  void reserve(int64_t rows, int64_t widest) {
    row_groups = widest / kGroup;
    floats.resize(rows * widest);
    values.resize(rows * widest);
    scales.resize(rows * row_groups);
    scaled.resize(rows * row_groups);
    sums.resize(rows * row_groups);
  }
  Activations view(int64_t inputs) {
    return {round_up(inputs, kGroup) / kGroup, row_groups, floats.data(), values.data(), scales.data(), sums.data(),
            scaled.data()};
  }
};

struct ThreadMemory {
  ActivationMemory activations;  // of one or two rows
  Unpacked unpacked;
  Scores scores;
  Vector row, tile, queries, outputs;
};

struct Model {
  Shape shape;
  std::vector<Layer> layers;
  Matrix embedding, head;
  Vector vectors[kVectorNames];  // those that belong to no layer
  Rotary rotary[2];              // of full and of sliding layers
  Vector types;                  // of an encoder's segments, [type][hidden]
  int64_t type_count = 0;
  Team team;
  ActivationMemory activations, gated;
  Vector x, qkv, attended, sublayer;
  std::vector<ThreadMemory> threads;

  Model(const Shape& shape, int threads_) : shape(shape), layers(shape.layers), team(threads_), threads(threads_) {}
  void reserve();
};

// Tokens of one call: those of a sequence stand together, in the order of their positions.
struct Rows {
  int64_t count;
  const int32_t *tokens, *sequences, *positions;
  const int32_t* tables;  // [sequence][table_stride], page numbers
  int64_t table_stride;
  int64_t outputs;
  const int32_t* output_rows;
  float* logits;  // [outputs][vocabulary, filled up to 16]
};

void forward(Model& model, const Cache& cache, const Rows& rows);

}  // namespace hanmo::native
