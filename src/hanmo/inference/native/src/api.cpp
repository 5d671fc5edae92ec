// What Python calls. Every size, pointer and number is checked here; a call returns 0, or the number of a complaint, and
// then has changed nothing.
#include <cmath>
#include <exception>

#include "encoder.h"
#include "mapped.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

using namespace hanmo::native;

enum Complaint : int64_t {
  kFine = 0, kBadShape, kBadName, kBadSize, kNoMemory, kIncomplete, kBadCount, kBadToken, kBadPosition, kBadPage,
  kBadOrder, kNoPointer, kNotFinite, kMisaligned, kSharedPage, kBadAdapter, kBadType, kLost,
};

constexpr int64_t kAbi = 4;                     // library.py; changes with the functions below
constexpr int64_t kLargest = int64_t{1} << 31;  // no size of a model or batch comes near
constexpr int64_t kMostMemory = int64_t{1} << 46, kMostAdapters = 1 << 12, kMostRanks = 1 << 16;
constexpr int64_t kMostTokens = 1 << 20;        // of the texts of one call of an encoder

bool within(int64_t value, int64_t least, int64_t most = kLargest) { return value >= least && value <= most; }

// Whether an array can be read as what it is said to be.
bool aligned(const void* pointer, int64_t bytes) { return reinterpret_cast<uintptr_t>(pointer) % bytes == 0; }

// Whether none of these is infinite or no number: their exponents are not all ones. The bits are counted, not compared,
// so that the compiler takes many at a time.
bool finite(const float* values, int64_t count) {
  int64_t bad = 0;
  for (int64_t i = 0; i < count; i++) {
    uint32_t bits;
    std::memcpy(&bits, values + i, sizeof bits);
    bad += (bits & 0x7f800000) == 0x7f800000;
  }
  return bad == 0;
}
bool finite(const uint16_t* halves, int64_t count) {
  int64_t bad = 0;
  for (int64_t i = 0; i < count; i++) bad += (halves[i] & 0x7c00) == 0x7c00;
  return bad == 0;
}

// What a call returns: whatever it throws means that there is no memory.
template <typename Body>
int64_t guarded(const Body& body) {
  try {
    return body();
  } catch (const std::exception&) {
    return kNoMemory;
  }
}

// No product of these sizes overflows 64 bits: the largest, of a matrix with 2^31 outputs, is 2^53 bytes.
bool usable(const Shape& s) {
  if (!within(s.layers, 1, 4096) || !within(s.hidden, 1, 1 << 20) || !within(s.heads, 1, 1 << 16)) return false;
  if (!within(s.kv_heads, 1, s.heads) || s.heads % s.kv_heads || !within(s.head_size, 1, 4096)) return false;
  if (!within(s.intermediate, 1, 1 << 22) || !within(s.vocabulary, 1) || !within(s.context, 1)) return false;
  if (!within(s.rotary_size, 0, s.head_size) || s.rotary_size % 2 || !within(s.activation, 0, kGeluQuick)) return false;
  if (!within(s.window, 0) || !within(s.most_rows, 1, 1 << 16) || s.epsilon < 0) return false;
  const float numbers[] = {s.epsilon, s.embedding_scale, s.attention_scale, s.attention_cap, s.logit_cap};
  return finite(numbers, 5);
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
    if (rotary.frequencies.size() != m.shape.rotary_size / 2) return false;
  return m.embedding.values;
}

// A decoder, whose matrices have scales group by group.
bool complete(const Model& m) {
  for (const Layer& layer : m.layers)
    for (const Matrix& matrix : layer.matrices)
      if (matrix.wide()) return false;
  for (const Layer& layer : m.layers)
    if (layer.vectors[kAttentionNorm].empty() || layer.vectors[kMlpNorm].empty()) return false;
  return has_weights(m) && m.head.values && !m.head.wide() && !m.vectors[kFinalNorm].empty();
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
  return guarded([&] {
    auto model = std::make_unique<Model>(s, static_cast<int>(threads));
    model->reserve();
    watch(model.get());
    *out = model.release();
    return kFine;
  });
}

EXPORT int64_t hanmo_model_free(Model* model) {
  forget(model);
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
  if (!aligned(values, matrix.number_bytes()) || !aligned(scales, 2)) return kMisaligned;
  model->checked = matrix;
  std::atomic_signal_fence(std::memory_order_seq_cst);  // if reading it raises a signal, it must be known
  const bool good = (kind != kFloat32 || finite(static_cast<const float*>(values), value_bytes / 4)) &&
                    (kind != kFloat16 || finite(static_cast<const uint16_t*>(values), value_bytes / 2)) &&
                    finite(matrix.scales, matrix.scale_count());
  std::atomic_signal_fence(std::memory_order_seq_cst);
  model->checked = {};
  if (model->lost) return kLost;
  if (!good) return kNotFinite;
  (name == kEmbedding ? model->embedding : name == kHead ? model->head : model->layers[layer].matrices[name]) = matrix;
  return kFine;
}

EXPORT int64_t hanmo_model_vector(Model* model, int64_t layer, int64_t name, const float* values, int64_t count) {
  if (!model || !values) return kNoPointer;
  if (!within(name, 0, kVectorNames - 1)) return kBadName;
  if ((name >= kFinalNorm) != (layer == -1) || (layer != -1 && !within(layer, 0, model->shape.layers - 1))) return kBadName;
  if (count != expected_length(model->shape, name)) return kBadSize;
  if (!aligned(values, 4)) return kMisaligned;
  if (!finite(values, count)) return kNotFinite;
  return guarded([&] {
    Vector copy;
    copy.resize(round_up(count, 4 * kPanel));
    std::copy(values, values + count, copy.data());
    (layer == -1 ? model->vectors[name] : model->layers[layer].vectors[name]) = std::move(copy);
    return kFine;
  });
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
  if (!aligned(frequencies, 4)) return kMisaligned;
  if (!finite(frequencies, count) || !finite(&magnitude, 1)) return kNotFinite;
  return guarded([&] {
    Rotary rotary;
    rotary.frequencies.resize(count);
    std::copy(frequencies, frequencies + count, rotary.frequencies.data());
    rotary.magnitude = magnitude;
    model->rotary[sliding] = std::move(rotary);
    return kFine;
  });
}

// What an adapter adds to one product: b (a x), a of [rank, inputs] and b of [outputs, rank], as matrices of 32-bit
// floats whose memory stays the caller's. The first one with a number makes an adapter of that number.
EXPORT int64_t hanmo_model_adapter(Model* model, int64_t number, int64_t layer, int64_t name, int64_t rank,
                                   const void* a, int64_t a_bytes, const void* b, int64_t b_bytes) {
  if (!model || !a || !b) return kNoPointer;
  if (!within(number, 0, kMostAdapters - 1)) return kBadAdapter;
  if (!within(name, 0, kEmbedding - 1) || !within(layer, 0, model->shape.layers - 1)) return kBadName;
  if (!within(rank, 1, kMostRanks)) return kBadSize;
  int64_t outputs, inputs;
  expected_size(model->shape, name, outputs, inputs);
  const LowRank change{{kFloat32, rank, inputs, static_cast<const uint8_t*>(a), nullptr},
                       {kFloat32, outputs, rank, static_cast<const uint8_t*>(b), nullptr}};
  if (a_bytes != change.a.value_bytes() || b_bytes != change.b.value_bytes()) return kBadSize;
  if (!aligned(a, 4) || !aligned(b, 4)) return kMisaligned;
  if (!finite(static_cast<const float*>(a), a_bytes / 4) || !finite(static_cast<const float*>(b), b_bytes / 4))
    return kNotFinite;
  return guarded([&] {
    model->reserve_low(rank);
    if (number >= static_cast<int64_t>(model->adapters.size())) model->adapters.resize(number + 1);
    std::unique_ptr<Adapter>& adapter = model->adapters[number];
    if (!adapter) {
      auto made = std::make_unique<Adapter>();
      made->changes.resize(model->shape.layers * kEmbedding);
      adapter = std::move(made);
    }
    adapter->changes[layer * kEmbedding + name] = change;
    return kFine;
  });
}

EXPORT int64_t hanmo_model_adapter_free(Model* model, int64_t number) {
  if (!model) return kNoPointer;
  if (!within(number, 0, static_cast<int64_t>(model->adapters.size()) - 1) || !model->adapters[number]) return kBadAdapter;
  model->adapters[number].reset();
  return kFine;
}

// number_bytes: the format of the cache's numbers, see attention.h.
EXPORT int64_t hanmo_cache_new(const Model* model, int64_t pages, int64_t number_bytes, Cache** out) {
  if (!model || !out) return kNoPointer;
  if (!within(pages, 1) || (number_bytes != 1 && number_bytes != 2 && number_bytes != 4)) return kBadCount;
  const Shape& s = model->shape;
  return guarded([&]() -> int64_t {
    auto cache = std::make_unique<Cache>();
    cache->pages = pages, cache->layers = s.layers, cache->heads = s.kv_heads;
    cache->dimensions = s.filled_head(), cache->number_bytes = number_bytes;
    if (cache->page_bytes() > kMostMemory / pages) return kNoMemory;
    cache->memory.resize(pages * cache->page_bytes());  // zeros: pages are read to their end
    cache->written.resize(pages);
    *out = cache.release();
    return kFine;
  });
}

EXPORT int64_t hanmo_cache_free(Cache* cache) {
  delete cache;
  return kFine;
}

// Copy a page: two sequences that part inside it need one each.
EXPORT int64_t hanmo_cache_copy(Cache* cache, int64_t from, int64_t to) {
  if (!cache) return kNoPointer;
  if (!within(from, 0, cache->pages - 1) || !within(to, 0, cache->pages - 1)) return kBadPage;
  const int64_t size = cache->page_bytes();
  char* memory = cache->memory.data();
  if (from != to) std::memcpy(memory + to * size, memory + from * size, size);
  return kFine;
}

namespace {

Complaint check_rows(const Model& model, const Rows& rows, int64_t table_count) {
  const Shape& s = model.shape;
  for (int64_t row = 0; row < rows.count; row++) {
    const int32_t position = rows.positions[row], sequence = rows.sequences[row];
    if (!within(rows.tokens[row], 0, s.vocabulary - 1)) return kBadToken;
    if (!within(sequence, 0, table_count - 1)) return kBadPage;
    if (!within(position, 0, s.context - 1) || position / kPage >= rows.table_stride) return kBadPosition;
    if (row && sequence == rows.sequences[row - 1] && position - 1 != rows.positions[row - 1]) return kBadOrder;
    if (row && sequence < rows.sequences[row - 1]) return kBadOrder;
    if (!rows.adapters || rows.adapters[row] == -1) continue;
    if (!within(rows.adapters[row], 0, static_cast<int64_t>(model.adapters.size()) - 1)) return kBadAdapter;
    if (!model.adapters[rows.adapters[row]]) return kBadAdapter;
  }
  for (int64_t i = 0; i < rows.outputs; i++)
    if (!within(rows.output_rows[i], 0, rows.count - 1)) return kBadCount;
  return kFine;
}

// Calls body(page, written) for each page that a call reads, of each of its sequences; ends where it complains.
template <typename Body>
Complaint for_pages(const Rows& rows, const Body& body) {
  for (int64_t begin = 0, end; begin < rows.count; begin = end) {
    const int32_t sequence = rows.sequences[begin];
    for (end = begin + 1; end < rows.count && rows.sequences[end] == sequence;) end++;
    const int32_t* table = rows.tables + sequence * rows.table_stride;
    const int64_t first = rows.positions[begin] / kPage, last = rows.positions[end - 1] / kPage;
    for (int64_t i = 0; i <= last; i++)
      if (const Complaint complaint = body(table[i], i >= first)) return complaint;
  }
  return kFine;
}

// Every page is there; and one that is written to belongs to one place of one sequence.
Complaint check_pages(Cache& cache, const Rows& rows) {
  const int64_t call = ++cache.calls;
  const auto write = [&](int32_t page, bool written) {
    if (!within(page, 0, cache.pages - 1)) return kBadPage;
    if (written && cache.written[page] == call) return kSharedPage;
    if (written) cache.written[page] = call;
    return kFine;
  };
  const auto read = [&](int32_t page, bool written) {
    return !written && cache.written[page] == call ? kSharedPage : kFine;
  };
  const Complaint complaint = for_pages(rows, write);
  return complaint ? complaint : for_pages(rows, read);
}

}  // namespace

// adapters: of each row, -1 for none; or no address if no row has one.
EXPORT int64_t hanmo_forward(Model* model, Cache* cache, int64_t count, const int32_t* tokens, const int32_t* sequences,
                             const int32_t* positions, const int32_t* adapters, int64_t table_count,
                             int64_t table_stride, const int32_t* tables, int64_t outputs, const int32_t* output_rows,
                             float* logits) {
  if (!model || !cache || !tokens || !sequences || !positions || !tables) return kNoPointer;
  for (const void* address : {tokens, sequences, positions, adapters, tables, output_rows})
    if (!aligned(address, 4)) return kMisaligned;
  if (!aligned(logits, 4)) return kMisaligned;
  if (!complete(*model)) return kIncomplete;
  if (model->lost) return kLost;
  const Shape& s = model->shape;
  if (!within(count, 1, s.most_rows) || !within(outputs, 0, count) || (outputs && (!output_rows || !logits))) return kBadCount;
  if (!within(table_count, 1, s.most_rows) || !within(table_stride, 1)) return kBadCount;
  if (cache->layers != s.layers || cache->heads != s.kv_heads || cache->dimensions != s.filled_head()) return kBadShape;
  if (adapters && std::all_of(adapters, adapters + count, [](int32_t number) { return number == -1; })) adapters = nullptr;
  const Rows rows{count,       tokens, sequences, positions, adapters, tables, table_stride,
                  outputs,     output_rows, logits};
  if (const Complaint complaint = check_rows(*model, rows, table_count)) return complaint;
  if (const Complaint complaint = check_pages(*cache, rows)) return complaint;
  return guarded([&] {
    forward(*model, *cache, rows);
    return model->lost ? kLost : kFine;
  });
}

// The embeddings of an encoder's segments, `count` numbers [type][hidden]; none where there are no segments.
EXPORT int64_t hanmo_model_types(Model* model, const float* values, int64_t types, int64_t count) {
  if (!model || !values) return kNoPointer;
  if (!within(types, 1, 1 << 16)) return kBadCount;
  if (count != types * model->shape.hidden) return kBadSize;
  if (!aligned(values, 4)) return kMisaligned;
  if (!finite(values, count)) return kNotFinite;
  return guarded([&] {
    Vector copy;
    copy.resize(count);
    std::copy(values, values + count, copy.data());
    model->types = std::move(copy);
    model->type_count = types;
    return kFine;
  });
}

// States of all tokens of `count` texts, one text after the other. types: null where all are zero.
EXPORT int64_t hanmo_encode(Model* model, int64_t count, const int32_t* lengths, int64_t total, const int32_t* tokens,
                            const int32_t* types, float* states) {
  if (!model || !lengths || !tokens || !states) return kNoPointer;
  for (const void* address : {lengths, tokens, types})
    if (!aligned(address, 4)) return kMisaligned;
  if (!aligned(states, 4)) return kMisaligned;
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
  return guarded([&] {
    encode(*model, Texts{count, lengths, tokens, types, states});
    return model->lost ? kLost : kFine;
  });
}
