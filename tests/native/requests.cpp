// Random decoders and requests, possible and impossible, for the native engine's interface. What is possible must give
// each text the bits it has alone, one token at a time on one thread; what is not must be refused; and whatever is asked
// for, the program must end by itself. Built with AddressSanitizer and UndefinedBehaviorSanitizer.
//
//     requests [seed] [rounds]
//     requests planted            asks for more than the memory it gives: AddressSanitizer must say so
#include "network.h"

#include <sys/mman.h>
#include <unistd.h>

namespace {

constexpr int64_t kPage = 32;

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
    const auto number = [] { return chance(0.5) ? static_cast<int32_t>(whole(-3, 300)) : extreme32(); };
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
    const auto refused = [](int64_t code) { ::refused(code, "a call without its arrays"); };
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
    refused(Network::put(model, p), "a matrix of another size");
  }
  for (int turn = 0; turn < 100; turn++) {
    const Network::Part& p = n.vectors[whole(0, static_cast<int64_t>(n.vectors.size()) - 1)];
    const int64_t count = chance(0.5) ? p.outputs + whole(-1, 1) : extreme();
    if (count != p.outputs)
      refused(hanmo_model_vector(model, p.layer, p.name, p.floats(), count), "a vector of another size");
    refused(hanmo_model_vector(model, p.layer + n.layers + 1, p.name, p.floats(), p.outputs), "a vector of no layer");
    hanmo_model_sliding(model, extreme(), extreme());
    const float value = strange();
    const std::vector<float> frequencies(64, value), table(n.hidden, value);
    const int64_t pairs = extreme(), types = extreme();
    if (!hanmo_model_rotary(model, whole(0, 1), frequencies.data(), pairs, strange()) && pairs != n.rotary / 2)
      fail("frequencies of another count were not refused");
    if (types != 1) refused(hanmo_model_types(model, table.data(), types, n.hidden), "segments of another count");
    int64_t c[] = {whole(0, 2), 0, whole(0, 3), 1, 4, 4};
    c[whole(0, 5)] = extreme();
    hanmo_model_adapter(model, c[0], c[1], c[2], c[3], &value, std::min<int64_t>(c[4], 4), &value, std::min<int64_t>(c[5], 4));
    hanmo_model_adapter_free(model, extreme());
  }
  for (Network::Part p : n.matrices) {
    std::vector<char> values(p.values, p.values + p.value_bytes);
    std::vector<char> scales(p.scales, p.scales + p.scale_bytes);
    const uint16_t nan = 0x7e00;
    const uint32_t infinite = 0x7f800000;
    if (p.kind == kFloat32) std::memcpy(values.data() + 4 * whole(0, p.value_bytes / 4 - 1), &infinite, 4);
    if (p.kind == kFloat16) std::memcpy(values.data() + 2 * whole(0, p.value_bytes / 2 - 1), &nan, 2);
    if (p.kind >= kInt8) std::memcpy(scales.data() + 2 * whole(0, p.scale_bytes / 2 - 1), &nan, 2);
    p.values = values.data(), p.scales = scales.data();
    refused(Network::put(model, p), "a matrix that holds NaN");
    // one byte off what its numbers must be aligned to, as in a file that was made by others
    const int64_t size = p.kind == kFloat32 ? 4 : p.kind == kFloat16 ? 2 : 0;
    std::vector<char> shifted(p.value_bytes + 1), scales_shifted(p.scale_bytes + 1);
    p.values = shifted.data() + (size ? 1 : 0), p.scales = size ? nullptr : scales_shifted.data() + 1;
    refused(Network::put(model, p), "a matrix at an odd address");
  }
  hanmo_model_free(model);
}

// The scales of a decoder's products belong to single groups: a matrix with others is no weight of it.
void wide() {
  Network n;
  Model* model = n.build(1);
  Cache* cache = nullptr;
  fine(hanmo_cache_new(model, 1, 2, &cache), "a cache");
  const int64_t name = whole(0, kLayerMatrices);
  const Network::Part part = name < kLayerMatrices ? n.matrix(0, name, kInt8Wide, n.outputs_of(name), n.inputs_of(name))
                                                   : n.matrix(-1, kHead, kInt8Wide, n.vocabulary, n.hidden);
  fine(Network::put(model, part), "a wide matrix");
  const int32_t zero = 0;
  std::vector<float> logits(up(n.vocabulary, 16));
  if (hanmo_forward(model, cache, 1, &zero, &zero, &zero, nullptr, 1, 1, &zero, 1, &zero, logits.data()) != kIncomplete)
    fail("a decoder with a wide matrix computes");
  hanmo_cache_free(cache);
  hanmo_model_free(model);
}

// One token has so many before it that its thread reads nothing else, and the next thread nothing at all.
void uneven() {
  Sizes sizes;
  sizes.hidden = sizes.intermediate = 1, sizes.gated = 0, sizes.window = 0, sizes.context = 200, sizes.most_rows = 60;
  const Network n(false, sizes);
  Model* model = n.build(3);
  Cache* cache = nullptr;
  fine(hanmo_cache_new(model, 24, 1 << whole(0, 2), &cache), "a cache");
  Request r;
  r.stride = 7, r.tables = {0, 1, 2, 3, 4, 5, 6};
  std::vector<float> logits(60 * up(n.vocabulary, 16));
  const auto row = [&](int32_t sequence, int32_t position) {
    r.tokens.push_back(0), r.sequences.push_back(sequence), r.positions.push_back(position);
    r.wanted.push_back(static_cast<int32_t>(r.wanted.size()));
  };
  for (int32_t position = 0; position < 190;) {
    for (int i = 0; i < 38; i++) row(0, position++);
    fine(r.run(model, cache, logits.data()), "a long text");
    r.tokens.clear(), r.sequences.clear(), r.positions.clear(), r.wanted.clear();
  }
  row(0, 190);
  for (int32_t text = 1; text < 18; text++) {
    r.tables.insert(r.tables.end(), 7, 6 + text);
    for (int i = 0; i < 3; i++) row(text, i);
  }
  fine(r.run(model, cache, logits.data()), "one long text and many short ones");
  hanmo_cache_free(cache);
  hanmo_model_free(model);
}

// A text of hundreds of tokens at once, so many that weights are expanded first, and the same in small pieces.
void long_text() {
  Sizes sizes;
  sizes.context = 640, sizes.most_rows = 600;
  const Network n(false, sizes);
  const int64_t width = up(n.vocabulary, 16), count = whole(250, 600), number_bytes = 1 << whole(0, 2);
  std::vector<int32_t> tokens(count);
  for (int32_t& token : tokens) token = static_cast<int32_t>(whole(0, n.vocabulary - 1));
  std::vector<float> logits[2];
  for (int small = 0; small < 2; small++) {
    Model* model = n.build(small ? 1 : whole(1, 3));
    Cache* cache = nullptr;
    fine(hanmo_cache_new(model, 20, number_bytes, &cache), "a cache");
    logits[small].resize(count * width);
    for (int64_t start = 0, piece; start < count; start += piece) {
      piece = std::min(small ? whole(1, 40) : count, count - start);
      Request r;
      r.stride = 20;
      for (int32_t page = 0; page < 20; page++) r.tables.push_back(19 - page);
      r.tokens.assign(tokens.begin() + start, tokens.begin() + start + piece);
      r.sequences.assign(piece, 0);
      for (int64_t i = 0; i < piece; i++) {
        r.positions.push_back(static_cast<int32_t>(start + i));
        r.wanted.push_back(static_cast<int32_t>(i));
      }
      fine(r.run(model, cache, logits[small].data() + start * width), "a long text");
    }
    hanmo_cache_free(cache);
    hanmo_model_free(model);
  }
  for (int64_t i = 0; i < count; i++)
    if (!same_bits(&logits[0][i * width], &logits[1][i * width], n.vocabulary))
      fail("a long text has other bits in pieces, at position " + std::to_string(i));
}

// A matrix in a file that is mapped into memory and cut off: its model is refused from then on, others compute.
void cut_off() {
  const Network n;
  const Network::Part& whole_part = n.matrices[whole(0, n.layers - 1) * kLayerMatrices + whole(0, kLayerMatrices - 1)];
  std::FILE* file = std::tmpfile();
  if (!file || std::fwrite(whole_part.values, 1, whole_part.value_bytes, file) != size_t(whole_part.value_bytes) ||
      std::fflush(file))
    fail("no file can be written");
  void* memory = mmap(nullptr, whole_part.value_bytes, PROT_READ, MAP_PRIVATE, fileno(file), 0);
  if (memory == MAP_FAILED) fail("no file can be mapped");
  Network::Part part = whole_part;
  part.values = static_cast<char*>(memory);
  Model *model = n.build(whole(1, 3)), *twin = n.build(1), *other = n.build(2);
  Cache* cache = nullptr;
  fine(hanmo_cache_new(model, 1, 2, &cache), "a cache");
  for (Model* m : {model, twin}) fine(Network::put(m, part), "a mapped matrix");
  const int32_t zero = 0;
  std::vector<float> logits(up(n.vocabulary, 16)), expected(logits);
  const auto run = [&](Model* m, std::vector<float>& out) {
    return hanmo_forward(m, cache, 1, &zero, &zero, &zero, nullptr, 1, 1, &zero, 1, &zero, out.data());
  };
  fine(run(model, expected), "a mapped file");
  if (ftruncate(fileno(file), 0)) fail("the file cannot be cut off");
  for (int turn = 0; turn < 2; turn++)
    for (Model* m : {model, twin})
      if (run(m, logits) != kLost) fail("a file that was cut off is computed with");
  fine(run(other, logits), "another model");
  if (!same_bits(logits.data(), expected.data(), n.vocabulary)) fail("another model computes something else");
  if (part.kind == kFloat32 || part.kind == kFloat16) {  // these are read when they are taken in
    void* again = mmap(nullptr, part.value_bytes, PROT_READ, MAP_PRIVATE, fileno(file), 0);
    part.values = static_cast<char*>(again);
    if (again == MAP_FAILED || Network::put(other, part) != kLost) fail("a file that was cut off is taken in");
    munmap(again, part.value_bytes);
  }
  hanmo_cache_free(cache);
  hanmo_model_free(model);
  hanmo_model_free(twin);
  hanmo_model_free(other);
  munmap(memory, part.value_bytes);
  std::fclose(file);
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

// Logits that do not fit into the memory they are given.
void planted() {
  const Network n;
  Model* model = n.build(1);
  Cache* cache = nullptr;
  fine(hanmo_cache_new(model, 1, 2, &cache), "a cache");
  const int32_t zero = 0;
  const std::unique_ptr<float[]> logits(new float[up(n.vocabulary, 16) - 1]);
  hanmo_forward(model, cache, 1, &zero, &zero, &zero, nullptr, 1, 1, &zero, 1, &zero, logits.get());
  hanmo_cache_free(cache);
  hanmo_model_free(model);
}

}  // namespace

int main(int count, char** arguments) {
  if (count > 1 && !std::strcmp(arguments[1], "planted")) {
    planted();
    return 0;
  }
  const uint64_t seed = count > 1 ? std::strtoull(arguments[1], nullptr, 10) : 1;
  const int rounds = count > 2 ? std::atoi(arguments[2]) : 100;
  for (int round = 0; round < rounds; round++) {
    source.seed(seed * 1000003 + round);
    Network network;
    if (round % 2) network.add_adapters();
    Walk walk(network);
    walk.run(whole(2, 14));
    for (int turn = 0; turn < 5; turn++) walk.impossible();
    if (round % 4 == 0) impossible_parts(), wide();
    if (round % 8 == 0) uneven();
    if (round % 4 == 1) long_text();
    if (round % 4 == 2) cut_off();
    if (round % 32 == 0) too_large();
  }
  std::printf("%d decoders: fine\n", rounds);
  return 0;
}
