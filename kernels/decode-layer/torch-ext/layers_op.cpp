// The op `layers`: all that it is given is read before the first layer runs, which streams weights through the caches.

#include "layers_op.h"

#include "attention_op.h"
#include "feed_forward_op.h"

namespace {

using decode_layer::Span;
using hfe::Tensor;

// A list that is read part by part.
template <typename T>
class SpanReader {
 public:
  SpanReader(const std::vector<T>& list, const char* name) : list_(list), name_(name) {}

  Span<T> next(int64_t count) {
    STD_TORCH_CHECK(count >= 0 && count <= static_cast<int64_t>(list_.size()) - place_, name_, " ends within a layer.");
    const Span<T> part = {list_.data() + place_, static_cast<size_t>(count)};
    place_ += count;
    return part;
  }

  void check_end() const {
    STD_TORCH_CHECK(place_ == static_cast<int64_t>(list_.size()), name_, " holds ", list_.size(), " entries, and ",
                    place_, " were read.");
  }

 private:
  const std::vector<T>& list_;
  const char* name_;
  int64_t place_ = 0;
};

}  // namespace

void layers(Tensor hidden, std::vector<Tensor> keys, std::vector<Tensor> values, std::vector<Tensor> states,
            std::optional<Tensor> mask, std::vector<Tensor> weights, std::vector<int64_t> settings,
            std::vector<double> epsilons, std::vector<int64_t> filled) {
  const size_t depth = keys.size();
  STD_TORCH_CHECK(values.size() == depth && filled.size() == depth && epsilons.size() == 2 * depth &&
                      (states.empty() || states.size() == depth),
                  "There must be as many values, states, if any, and numbers of tokens as keys, and two epsilons each.");
  SpanReader<Tensor> tensors(weights, "weights");
  SpanReader<int64_t> numbers(settings, "settings");
  std::vector<AttentionCall> attentions(depth);
  std::vector<FeedForwardCall> feed_forwards(depth);
  for (size_t i = 0; i < depth; ++i) {
    const int64_t* const counts = numbers.next(4).first;
    const Span<Tensor> attention_weights = tensors.next(counts[0]), other_weights = tensors.next(counts[2]);
    const Span<int64_t> attention_settings = numbers.next(counts[1]), other_settings = numbers.next(counts[3]);
    attentions[i] = attention_call(hidden, keys[i], values[i], states.empty() ? nullptr : &states[i],
                                   mask ? &*mask : nullptr, attention_weights, attention_settings, epsilons[2 * i],
                                   filled[i]);
    feed_forwards[i] = feed_forward_call(hidden, other_weights, other_settings, epsilons[2 * i + 1]);
  }
  tensors.check_end();
  numbers.check_end();
  for (size_t i = 0; i < depth; ++i) {
    attentions[i].run();
    feed_forwards[i].run();
  }
}
