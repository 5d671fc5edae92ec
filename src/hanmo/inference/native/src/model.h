// A decoder: its shape, its weights, and the memory in which it computes.
#pragma once

#include <memory>
#include <vector>

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

struct Layer {
  Matrix matrices[kEmbedding];
  Vector vectors[kFinalNorm];
  bool sliding = false;
};

// Cosines and sines of the rotated pairs, made as far as they are needed.
struct Rotary {
  Vector frequencies, cosines, sines;
  float magnitude = 1;
  int64_t positions = 0;
  void reach(int64_t count) {
    const int64_t pairs = frequencies.size();
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

// What an adapter adds to a layer's product with x: B (A x), the scale being part of B. Both are matrices of floats.
struct LowRank {
  Matrix a, b;  // [rank, inputs], [outputs, rank]
  int64_t rank() const { return a.outputs; }
};

struct Adapter {
  std::vector<LowRank> changes;  // [layer][kEmbedding]; of rank 0 where nothing is added
};

struct ThreadMemory {
  ActivationMemory activations;  // of one or two rows
  Expanded expanded;
  AttentionMemory attention;
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
  std::vector<std::unique_ptr<Adapter>> adapters;  // by number; none where it was removed
  Matrix checked;                                  // one that is being taken in
  std::atomic<bool> lost{false};                   // whether weights are gone (mapped.h)

  Model(const Shape& shape, int threads_) : shape(shape), layers(shape.layers), team(threads_), threads(threads_) {}
  void reserve();                   // memory for calls
  void reserve_low(int64_t ranks);  // and for adapters of so many ranks
};

// Tokens of one call: those of a sequence stand together, in the order of their positions.
struct Rows {
  int64_t count;
  const int32_t *tokens, *sequences, *positions;
  const int32_t* adapters;  // -1: none; nullptr: none at all
  const int32_t* tables;  // [sequence][table_stride], page numbers
  int64_t table_stride;
  int64_t outputs;
  const int32_t* output_rows;
  float* logits;  // [outputs][vocabulary, filled up to 16]
};

void forward(Model& model, Cache& cache, const Rows& rows);

}  // namespace hanmo::native
