// What Python calls. Every size, pointer and number is checked here; a call returns 0, or the number of a complaint.
#include <cmath>
#include <cstdlib>
#include <new>

#include "encoder.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

using namespace hanmo::native;

enum Complaint : int64_t {
  kFine = 0, kBadShape, kBadName, kBadSize, kNoMemory, kIncomplete, kBadCount, kBadToken, kBadPosition, kBadPage,
  kBadOrder, kNoPointer, kBadType,
};

constexpr int64_t kAbi = 2;                 // library.py; changes with the functions below
constexpr int64_t kLargest = int64_t{1} << 31;  // no size of a model or batch comes near
constexpr int64_t kMostTokens = 1 << 20;    // of the texts of one call of an encoder

bool within(int64_t value, int64_t least, int64_t most = kLargest) { return value >= least && value <= most; }

bool usable(const Shape& s) {
  if (!within(s.layers, 1, 4096) || !within(s.hidden, 1, 1 << 20) || !within(s.heads, 1, 1 << 16)) return false;
  if (!within(s.kv_heads, 1, s.heads) || s.heads % s.kv_heads || !within(s.head_size, 1, 4096)) return false;
  if (!within(s.intermediate, 1, 1 << 22) || !within(s.vocabulary, 1) || !within(s.context, 1)) return false;
  if (!within(s.rotary_size, 0, s.head_size) || s.rotary_size % 2 || !within(s.activation, 0, kGeluQuick)) return false;
  return within(s.window, 0) && within(s.most_rows, 1, 1 << 16) && std::isfinite(s.epsilon) && s.epsilon >= 0;
}

// Outputs and inputs that a matrix must have.
void expected_size(const Shape& s, int64_t name, int64_t& outputs, int64_t& inputs) {
  outputs = inputs = s.hidden;
  if (name == kQueryKeyValue) outputs = s.query_width() + 2 * s.kv_width();
  if (name == kOutput) inputs = s.query_width();
  if (name == kGateUp) outputs = s.filled_intermediate() * (s.gated ? 2 : 1);
  if (name == kDown) inputs = s.intermediate;
  if (name == kEmbedding || name == kHead) outputs = s.vocabulary;
}

int64_t expected_length(const Shape& s, int64_t name) {
  switch (name) {
    case kQueryNorm: case kKeyNorm: return s.head_size;
    case kQueryKeyValueBias: return s.query_width() + 2 * s.kv_width();
    case kGateUpBias: return s.filled_intermediate() * (s.gated ? 2 : 1);
    case kHeadBias: return s.vocabulary;
    case kPositions: return s.context * s.hidden;
    default: return s.hidden;
  }
}

// What decoders and encoders must have.
bool has_weights(const Model& m) {
  for (const Layer& layer : m.layers)
    for (const Matrix& matrix : layer.matrices)
      if (!matrix.values) return false;
  if (m.shape.rotary_size == 0 && m.vectors[kPositions].empty()) return false;
  for (const Rotary& rotary : m.rotary)
    if (static_cast<int64_t>(rotary.frequencies.size()) != m.shape.rotary_size / 2) return false;
  return m.embedding.values;
}

bool complete(const Model& m) {
  for (const Layer& layer : m.layers)
    if (layer.vectors[kAttentionNorm].empty() || layer.vectors[kMlpNorm].empty()) return false;
  return has_weights(m) && m.head.values && !m.vectors[kFinalNorm].empty();
}

}  // namespace

EXPORT int64_t hanmo_abi() { return kAbi; }

// sizes: the whole numbers of Shape in their order; numbers: its floats.
EXPORT int64_t hanmo_model_new(const int64_t* sizes, const float* numbers, int64_t threads, Model** out) {
  if (!sizes || !numbers || !out) return kNoPointer;
  Shape s;
  s.layers = sizes[0], s.hidden = sizes[1], s.heads = sizes[2], s.kv_heads = sizes[3], s.head_size = sizes[4];
  s.intermediate = sizes[5], s.vocabulary = sizes[6], s.context = sizes[7], s.rotary_size = sizes[8];
  s.activation = sizes[9], s.gated = sizes[10], s.layer_norm = sizes[11], s.window = sizes[12], s.most_rows = sizes[13];
  s.epsilon = numbers[0], s.embedding_scale = numbers[1], s.attention_scale = numbers[2];
  s.attention_cap = numbers[3], s.logit_cap = numbers[4];
  if (!usable(s) || !within(threads, 1, 1024)) return kBadShape;
  try {
    auto model = std::make_unique<Model>(s, static_cast<int>(threads));
    model->reserve();
    *out = model.release();
  } catch (const std::bad_alloc&) {
    return kNoMemory;
  }
  return kFine;
}

EXPORT int64_t hanmo_model_free(Model* model) {
  delete model;
  return kFine;
}

// The memory of values and scales stays the caller's and must outlive the model. layer: -1 for what belongs to none.
EXPORT int64_t hanmo_model_matrix(Model* model, int64_t layer, int64_t name, int64_t kind, int64_t outputs,
                                  int64_t inputs, const void* values, int64_t value_bytes, const void* scales,
                                  int64_t scale_bytes) {
  if (!model || !values) return kNoPointer;
  if (!within(name, 0, kMatrixNames - 1) || !within(kind, 0, kInt8Wide)) return kBadName;
  if ((name >= kEmbedding) != (layer == -1) || (layer != -1 && !within(layer, 0, model->shape.layers - 1))) return kBadName;
  int64_t want_outputs, want_inputs;
  expected_size(model->shape, name, want_outputs, want_inputs);
  if (outputs != want_outputs || inputs != want_inputs) return kBadSize;
  const Matrix matrix{kind, outputs, inputs, static_cast<const uint8_t*>(values), static_cast<const uint16_t*>(scales)};
  if (value_bytes != matrix.value_bytes() || scale_bytes != 2 * matrix.scale_count()) return kBadSize;
  if (matrix.quantised() && !scales) return kNoPointer;
  (name == kEmbedding ? model->embedding : name == kHead ? model->head : model->layers[layer].matrices[name]) = matrix;
  return kFine;
}

EXPORT int64_t hanmo_model_vector(Model* model, int64_t layer, int64_t name, const float* values, int64_t count) {
  if (!model || !values) return kNoPointer;
  if (!within(name, 0, kVectorNames - 1)) return kBadName;
  if ((name >= kFinalNorm) != (layer == -1) || (layer != -1 && !within(layer, 0, model->shape.layers - 1))) return kBadName;
  if (count != expected_length(model->shape, name)) return kBadSize;
  try {
    Vector& vector = layer == -1 ? model->vectors[name] : model->layers[layer].vectors[name];
    vector.assign(round_up(count, 4 * kPanel), 0.0f);
    std::copy(values, values + count, vector.begin());
  } catch (const std::bad_alloc&) {
    return kNoMemory;
  }
  return kFine;
}

EXPORT int64_t hanmo_model_sliding(Model* model, int64_t layer, int64_t sliding) {
  if (!model) return kNoPointer;
  if (!within(layer, 0, model->shape.layers - 1)) return kBadName;
  if (sliding && model->shape.window < 1) return kBadShape;
  model->layers[layer].sliding = sliding != 0;
  return kFine;
}

EXPORT int64_t hanmo_model_rotary(Model* model, int64_t sliding, const float* frequencies, int64_t count,
                                  float magnitude) {
  if (!model || !frequencies) return kNoPointer;
  if (!within(sliding, 0, 1)) return kBadName;
  if (count != model->shape.rotary_size / 2) return kBadSize;
  Rotary& rotary = model->rotary[sliding];
  try {
    rotary.frequencies.assign(frequencies, frequencies + count);
  } catch (const std::bad_alloc&) {
    return kNoMemory;
  }
  rotary.magnitude = magnitude;
  rotary.positions = 0;
  return kFine;
}

EXPORT int64_t hanmo_cache_new(const Model* model, int64_t pages, int64_t number_bytes, Cache** out) {
  if (!model || !out) return kNoPointer;
  if (!within(pages, 1) || (number_bytes != 2 && number_bytes != 4)) return kBadCount;
  const Shape& s = model->shape;
  auto cache = std::make_unique<Cache>(Cache{pages, s.layers, s.kv_heads, s.filled_head(), number_bytes, nullptr});
  if (cache->page_bytes() > (int64_t{1} << 46) / pages) return kNoMemory;
  cache->memory = static_cast<char*>(std::calloc(pages, cache->page_bytes()));  // zeros: pages are read to their end
  if (!cache->memory) return kNoMemory;
  *out = cache.release();
  return kFine;
}

EXPORT int64_t hanmo_cache_free(Cache* cache) {
  if (cache) std::free(cache->memory);
  delete cache;
  return kFine;
}

// Copy a page: two sequences that part inside it need one each.
EXPORT int64_t hanmo_cache_copy(const Cache* cache, int64_t from, int64_t to) {
  if (!cache) return kNoPointer;
  if (!within(from, 0, cache->pages - 1) || !within(to, 0, cache->pages - 1)) return kBadPage;
  const int64_t size = cache->page_bytes();
  if (from != to) std::memcpy(cache->memory + to * size, cache->memory + from * size, size);
  return kFine;
}

EXPORT int64_t hanmo_forward(Model* model, const Cache* cache, int64_t count, const int32_t* tokens,
                             const int32_t* sequences, const int32_t* positions, int64_t table_count,
                             int64_t table_stride, const int32_t* tables, int64_t outputs, const int32_t* output_rows,
                             float* logits) {
  if (!model || !cache || !tokens || !sequences || !positions || !tables) return kNoPointer;
  if (!complete(*model)) return kIncomplete;
  const Shape& s = model->shape;
  if (!within(count, 1, s.most_rows) || !within(outputs, 0, count) || (outputs && (!output_rows || !logits))) return kBadCount;
  if (!within(table_count, 1, s.most_rows) || !within(table_stride, 1)) return kBadCount;
  if (cache->layers != s.layers || cache->heads != s.kv_heads || cache->dimensions != s.filled_head()) return kBadShape;
  for (int64_t row = 0; row < count; row++) {
    if (!within(tokens[row], 0, s.vocabulary - 1)) return kBadToken;
    if (!within(sequences[row], 0, table_count - 1)) return kBadPage;
    if (!within(positions[row], 0, s.context - 1) || positions[row] / kPage >= table_stride) return kBadPosition;
    if (row && sequences[row] == sequences[row - 1] && positions[row] != positions[row - 1] + 1) return kBadOrder;
    if (row && sequences[row] < sequences[row - 1]) return kBadOrder;
  }
  for (int64_t row = 0; row < count; row++)
    for (int64_t page = 0; page <= positions[row] / kPage; page++)
      if (!within(tables[sequences[row] * table_stride + page], 0, cache->pages - 1)) return kBadPage;
  for (int64_t i = 0; i < outputs; i++)
    if (!within(output_rows[i], 0, count - 1)) return kBadCount;
  try {
    forward(*model, *cache, Rows{count, tokens, sequences, positions, tables, table_stride, outputs, output_rows, logits});
  } catch (const std::bad_alloc&) {
    return kNoMemory;
  }
  return kFine;
}

// The embeddings of an encoder's segments, [type][hidden]; none where there are no segments.
EXPORT int64_t hanmo_model_types(Model* model, const float* values, int64_t types) {
  if (!model || !values) return kNoPointer;
  if (!within(types, 1, 1 << 16)) return kBadCount;
  try {
    model->types.assign(values, values + types * model->shape.hidden);
  } catch (const std::bad_alloc&) {
    return kNoMemory;
  }
  model->type_count = types;
  return kFine;
}

// States of all tokens of `count` texts, one text after the other. types: null where all are zero.
EXPORT int64_t hanmo_encode(Model* model, int64_t count, const int32_t* lengths, int64_t total, const int32_t* tokens,
                            const int32_t* types, float* states) {
  if (!model || !lengths || !tokens || !states) return kNoPointer;
  if (!has_weights(*model)) return kIncomplete;
  const Shape& s = model->shape;
  if (!within(total, 1, kMostTokens) || !within(count, 1, total)) return kBadCount;
  int64_t sum = 0;
  for (int64_t text = 0; text < count; text++) {
    if (!within(lengths[text], 1, s.context)) return kBadPosition;
    sum += lengths[text];
  }
  if (sum != total) return kBadCount;
  for (int64_t row = 0; row < total; row++) {
    if (!within(tokens[row], 0, s.vocabulary - 1)) return kBadToken;
    if (types && !within(types[row], 0, std::max<int64_t>(model->type_count, 1) - 1)) return kBadType;
  }
  try {
    encode(*model, Texts{count, lengths, tokens, types, states});
  } catch (const std::bad_alloc&) {
    return kNoMemory;
  }
  return kFine;
}
