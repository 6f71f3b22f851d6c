// The op `layers`: all that it is given is read before the first layer runs, which streams weights through the caches.

#include "layers_op.h"

#include <algorithm>
#include <utility>
#include <variant>

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

  bool is_at_end() const { return place_ == static_cast<int64_t>(list_.size()); }

  void check_end() const {
    STD_TORCH_CHECK(is_at_end(), name_, " holds ", list_.size(), " entries, and ",
                    place_, " were read.");
  }

 private:
  const std::vector<T>& list_;
  const char* name_;
  int64_t place_ = 0;
};

// Kinds of parts, as `settings` has them.
enum Kind : int64_t {
  kAttention,
  kFeedForward,
  kAttentionBehindSource,
  kCrossAttention,
  kHashedAttention,
  kHashedBehindSource,
  kKinds
};

// What a layer is made of.
using Part = std::variant<AttentionCall, CrossAttentionCall, FeedForwardCall>;

void add(hfe::Upcoming& upcoming, const decode_layer::Matrix& matrix) {
  upcoming.add(matrix.data, matrix.rows * matrix.stride);
}

void add(hfe::Upcoming& upcoming, const decode_layer::Projection& projection) {
  add(upcoming, projection.gating);
  add(upcoming, projection.matrix);
}

// What a part reads first.
hfe::Upcoming first_weights(const Part& part) {
  hfe::Upcoming upcoming;
  if (const auto* attention = std::get_if<AttentionCall>(&part)) {
    const auto& layer = attention->layer;
    if (layer.window > 0) {
      for (const auto* one : {&layer.shared, &layer.query, &layer.key, &layer.value}) add(upcoming, *one);
    }
  } else if (const auto* cross = std::get_if<CrossAttentionCall>(&part)) {
    add(upcoming, cross->layer.query.map);
    add(upcoming, cross->layer.query.conv);
  } else if (const auto& feed_forward = std::get<FeedForwardCall>(part); feed_forward.is_sparse) {
    if (feed_forward.branch) {
      add(upcoming, feed_forward.branch.in.matrix);
      for (const auto& layer : feed_forward.branch.layers) add(upcoming, layer.matrix);
      add(upcoming, feed_forward.branch.out.matrix);
    }
    add(upcoming, feed_forward.sparse.controller_down);
    add(upcoming, feed_forward.sparse.controller_up);
  }
  return upcoming;
}

void run(Part& part, decode_layer::Streams streams, hfe::Upcoming upcoming) {
  if (auto* attention = std::get_if<AttentionCall>(&part)) {
    attention->step.upcoming = &upcoming;
    decode_layer::attention(attention->layer, streams, attention->step);
  } else if (auto* cross = std::get_if<CrossAttentionCall>(&part)) {
    cross->step.upcoming = &upcoming;
    decode_layer::cross_attention(cross->layer, streams, cross->step);
  } else {
    std::get<FeedForwardCall>(part).run(streams);
  }
}

}  // namespace

void layers(Tensor hidden, std::vector<Tensor> keys, std::vector<Tensor> values, std::vector<Tensor> states,
            std::optional<Tensor> mask, std::vector<Tensor> weights, std::vector<int64_t> settings,
            std::vector<double> epsilons, std::vector<int64_t> filled, std::optional<Tensor> second,
            std::vector<Tensor> source_keys, std::vector<Tensor> source_values, std::optional<Tensor> cross_mask,
            std::vector<Tensor> buckets, std::vector<Tensor> source_buckets) {
  const Hidden first_stream(hidden);
  const int64_t rows = first_stream.rows, width = first_stream.width;
  float* second_stream = nullptr;
  if (second) {
    second_stream = decode_layer::float_rows(*second, rows, width, "second");
    const int64_t distance = second_stream - first_stream.data;
    STD_TORCH_CHECK(distance >= rows * width || -distance >= rows * width, "hidden and second must not overlap.");
  }
  SpanReader<Tensor> tensors(weights, "weights"), all_keys(keys, "keys"), all_values(values, "values");
  SpanReader<Tensor> all_states(states, "states");
  SpanReader<Tensor> all_source_keys(source_keys, "source_keys"), all_source_values(source_values, "source_values");
  SpanReader<Tensor> all_buckets(buckets, "buckets"), all_source_buckets(source_buckets, "source_buckets");
  SpanReader<int64_t> numbers(settings, "settings"), counts(filled, "filled");
  SpanReader<double> norms(epsilons, "epsilons");
  const NextState next_state = [&](int64_t size) {
    decode_layer::State state;
    state.data = decode_layer::float_rows(*all_states.next(1).first, rows, size, state.stride, "A state");
    return state;
  };
  const auto next_epsilon = [&] { return *norms.next(1).first; };
  const auto next_source = [&] {
    return SourceTensors{*all_source_keys.next(1).first, *all_source_values.next(1).first};
  };
  std::vector<Part> parts;
  while (!numbers.is_at_end()) {
    const int64_t* const head = numbers.next(3).first;
    const Span<Tensor> part_weights = tensors.next(head[1]);
    const Span<int64_t> part_settings = numbers.next(head[2]);
    STD_TORCH_CHECK(head[0] >= 0 && head[0] < kKinds, "A part is of kind 0 to ", kKinds - 1, ", not ", head[0], ".");
    if (head[0] == kFeedForward) {
      parts.emplace_back(feed_forward_call(rows, width, part_weights, part_settings, next_epsilon, next_state));
    } else if (head[0] == kCrossAttention) {
      parts.emplace_back(cross_attention_call(rows, width, next_source(), next_state,
                                              cross_mask ? &*cross_mask : nullptr, part_weights, part_settings,
                                              next_epsilon()));
    } else {
      const bool hashes = head[0] == kHashedAttention || head[0] == kHashedBehindSource;
      std::optional<SourceTensors> source;
      if (head[0] == kAttentionBehindSource || head[0] == kHashedBehindSource) source.emplace(next_source());
      if (source && hashes) source->buckets = all_source_buckets.next(1).first;
      parts.emplace_back(attention_call(rows, width, *all_keys.next(1).first, *all_values.next(1).first, next_state,
                                        source ? &*source : nullptr, mask ? &*mask : nullptr, part_weights,
                                        part_settings, next_epsilon(), *counts.next(1).first,
                                        hashes ? all_buckets.next(1).first : nullptr));
    }
  }
  for (const auto* list : {&tensors, &all_keys, &all_values, &all_states, &all_source_keys, &all_source_values,
                           &all_buckets, &all_source_buckets}) {
    list->check_end();
  }
  counts.check_end();
  norms.check_end();
  float *to = first_stream.data, *from = second_stream ? second_stream : to;
  for (size_t i = 0; i < parts.size(); ++i) {
    run(parts[i], {from, to}, i + 1 < parts.size() ? first_weights(parts[i + 1]) : hfe::Upcoming());
    std::swap(from, to);
  }
  // An odd number of parts leaves each stream in the place of the other.
  if (second_stream && parts.size() % 2 == 1) {
    std::swap_ranges(first_stream.data, first_stream.data + rows * width, second_stream);
  }
}
