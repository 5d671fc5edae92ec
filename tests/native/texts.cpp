// Random encoders and texts, possible and impossible, as `requests` does with decoders: the states of a text must be
// the bits it has alone on one thread, whatever other texts there are.
//
//     texts [seed] [rounds]
#include "network.h"

namespace {

// Arrays of one call.
struct Texts {
  std::vector<int32_t> lengths, tokens, types;

  Texts(const Network& n, int64_t count) {
    const bool long_ones = chance(0.5);
    for (int64_t text = 0; text < count; text++) {
      const int64_t length = whole(1, std::min<int64_t>(n.context, long_ones ? n.context : 6));
      lengths.push_back(static_cast<int32_t>(length));
      for (int64_t i = 0; i < length; i++) {
        tokens.push_back(static_cast<int32_t>(whole(0, n.vocabulary - 1)));
        if (n.type_count) types.push_back(static_cast<int32_t>(whole(0, n.type_count - 1)));
      }
    }
    if (chance(0.3)) types.clear();
  }
  int64_t total() const { return static_cast<int64_t>(tokens.size()); }
  int64_t run(Model* model, float* states) const {
    return hanmo_encode(model, static_cast<int64_t>(lengths.size()), lengths.data(), total(), tokens.data(),
                        types.empty() ? nullptr : types.data(), states);
  }
};

void compare(const Network& n, Model* model, Model* alone, const Texts& texts) {
  const std::unique_ptr<float[]> states(new float[texts.total() * n.hidden]);
  fine(texts.run(model, states.get()), "some texts");
  int64_t begin = 0;
  for (size_t text = 0; text < texts.lengths.size(); text++) {
    const int32_t length = texts.lengths[text];
    const std::unique_ptr<float[]> own(new float[length * n.hidden]);
    const int32_t* types = texts.types.empty() ? nullptr : texts.types.data() + begin;
    fine(hanmo_encode(alone, 1, &length, length, texts.tokens.data() + begin, types, own.get()), "a text");
    if (!same_bits(own.get(), states.get() + begin * n.hidden, length * n.hidden))
      fail("text " + std::to_string(text) + " has other bits alone");
    begin += length;
  }
}

void impossible(const Network& n, Model* model) {
  const Texts good(n, whole(1, 4));
  std::vector<float> states(good.total() * n.hidden);
  const auto any = [](const std::vector<int32_t>& of) { return whole(0, static_cast<int64_t>(of.size()) - 1); };
  const auto number = [] { return chance(0.5) ? static_cast<int32_t>(whole(-3, 300)) : extreme32(); };
  for (int turn = 0; turn < 20; turn++) {
    Texts bad = good;
    const int64_t text = any(bad.lengths), row = any(bad.tokens), types = std::max<int64_t>(n.type_count, 1);
    bool must_fail = false;
    switch (whole(0, 2)) {
      case 0: bad.tokens[row] = number(); must_fail = bad.tokens[row] < 0 || bad.tokens[row] >= n.vocabulary; break;
      case 1:
        bad.types.assign(bad.tokens.size(), 0);
        bad.types[row] = number();
        must_fail = bad.types[row] < 0 || bad.types[row] >= types;
        break;
      default: bad.lengths[text] = number(); must_fail = bad.lengths[text] != good.lengths[text];
    }
    if (!bad.run(model, states.data()) && must_fail) fail("impossible texts were not refused");
  }
  const int64_t count = static_cast<int64_t>(good.lengths.size()), total = good.total();
  const int32_t *lengths = good.lengths.data(), *tokens = good.tokens.data();
  const auto odd = [](const auto* p) { return (decltype(p))(reinterpret_cast<const char*>(p) + 1); };
  const auto refused = [](int64_t code) { ::refused(code, "a call without its arrays"); };
  refused(hanmo_encode(nullptr, count, lengths, total, tokens, nullptr, states.data()));
  refused(hanmo_encode(model, count, nullptr, total, tokens, nullptr, states.data()));
  refused(hanmo_encode(model, count, lengths, total, nullptr, nullptr, states.data()));
  refused(hanmo_encode(model, count, lengths, total, tokens, nullptr, nullptr));
  refused(hanmo_encode(model, count, odd(lengths), total, tokens, nullptr, states.data()));
  refused(hanmo_encode(model, count, lengths, total, odd(tokens), nullptr, states.data()));
  refused(hanmo_encode(model, count, lengths, total, tokens, odd(tokens), states.data()));
  refused(hanmo_encode(model, count, lengths, total, tokens, nullptr, const_cast<float*>(odd(states.data()))));
  for (int turn = 0; turn < 20; turn++) {
    const int64_t texts = extreme(), rows = extreme();
    if (texts != count && texts <= count) refused(hanmo_encode(model, texts, lengths, total, tokens, nullptr, states.data()));
    if (rows != total) refused(hanmo_encode(model, count, lengths, rows, tokens, nullptr, states.data()));
    refused(hanmo_encode(model, total + 1 + (extreme() & 0xffff), lengths, total, tokens, nullptr, states.data()));
  }
  Model* empty = nullptr;
  fine(hanmo_model_new(n.sizes.data(), n.numbers.data(), 1, &empty), "a network");
  refused(good.run(empty, states.data()));
  hanmo_model_free(empty);
}

}  // namespace

int main(int count, char** arguments) {
  const uint64_t seed = count > 1 ? std::strtoull(arguments[1], nullptr, 10) : 1;
  const int rounds = count > 2 ? std::atoi(arguments[2]) : 100;
  for (int round = 0; round < rounds; round++) {
    source.seed(seed * 1000003 + round);
    const Network network(true);
    Model *model = network.build(whole(1, 5)), *alone = network.build(1);
    for (int64_t texts : {whole(1, 3), whole(2, 40)}) compare(network, model, alone, Texts(network, texts));
    impossible(network, model);
    hanmo_model_free(alone);
    hanmo_model_free(model);
  }
  std::printf("%d encoders: fine\n", rounds);
  return 0;
}
