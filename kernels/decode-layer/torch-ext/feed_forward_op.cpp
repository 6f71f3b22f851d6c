// The op `feed_forward`: its weights come as one list, in an order that `settings` tells.

#include "feed_forward_op.h"

namespace {

using decode_layer::Activation;
using decode_layer::Span;
using hfe::Tensor;

// Of settings.
enum { kCentered, kSparse, kActivation, kMultiplyByController, kBias, kInnerBias, kRecurrences, kSettings };

}  // namespace

FeedForwardCall feed_forward_call(int64_t rows, int64_t width, Span<Tensor> weights, Span<int64_t> given,
                                  const std::function<double()>& next_epsilon, const NextState& next_state) {
  STD_TORCH_CHECK(given.count == kSettings || given.count == kRecurrences, "settings must hold ",
                  static_cast<int>(kRecurrences), " or ", static_cast<int>(kSettings), " numbers, not ", given.count, ".");
  const int64_t* const settings = given.first;
  const int64_t recurrences = given.count == kSettings ? settings[kRecurrences] : 0;
  STD_TORCH_CHECK(settings[kActivation] >= 0 && settings[kActivation] <= 3, "An activation is a number from 0 to 3, not ",
                  settings[kActivation], ".");
  STD_TORCH_CHECK(recurrences >= 0, "The number of SRUs must not be negative.");
  FeedForwardCall call;
  call.rows = rows;
  call.width = width;
  decode_layer::WeightList list(weights);
  call.norm = list.norm(call.width, settings[kCentered] != 0, next_epsilon());
  const bool has_bias = settings[kBias] != 0, has_inner_bias = settings[kInnerBias] != 0;
  call.is_sparse = settings[kSparse] != 0;
  if (call.is_sparse) {
    call.sparse = list.sparse(call.width, has_bias, has_inner_bias);
    call.sparse.multiply_by_controller = settings[kMultiplyByController] != 0;
  } else {
    call.dense = list.dense(call.width, has_bias, has_inner_bias);
  }
  call.sparse.activation = call.dense.activation = static_cast<Activation>(settings[kActivation]);
  if (recurrences > 0) {
    call.branch = list.branch(call.width, recurrences, settings[kCentered] != 0, next_epsilon());
    call.state = next_state(call.branch.state_size());
  }
  list.check_end();
  return call;
}

void FeedForwardCall::run(decode_layer::Streams streams) const {
  const decode_layer::Room<float> normalized(rows * width);
  decode_layer::Room<float> beside;
  if (branch) {
    beside = decode_layer::Room<float>(rows * width);
    decode_layer::run_branch(branch, streams.from, rows, state.data, state.stride, beside);
  }
  decode_layer::normalize(norm, streams.from, rows, width, normalized);
  decode_layer::Inputs inputs(normalized, width, rows, width);
  if (is_sparse) {
    decode_layer::add_feed_forward(sparse, inputs, streams.to, width, nullptr);
  } else {
    decode_layer::add_feed_forward(dense, inputs, streams.to, width);
  }
  if (!branch) return;
  for (int64_t i = 0; i < rows * width; ++i) streams.to[i] += beside[i];
}

void feed_forward(Tensor hidden, std::vector<Tensor> weights, std::vector<int64_t> settings, double epsilon) {
  STD_TORCH_CHECK(hidden.dim() >= 2 && hidden.size(0) > 0, "hidden must have shape (rows, width).");
  const int64_t width = hidden.size(hidden.dim() - 1);
  STD_TORCH_CHECK(width > 0, "hidden must have at least one number a row.");
  float* const data = decode_layer::float_rows(hidden, hidden.size(0), hidden.numel() / hidden.size(0), "hidden");
  const auto no_state = [](int64_t) -> decode_layer::State {
    STD_TORCH_CHECK(false, "A branch of recurrences has a state: call `layers`.");
  };
  feed_forward_call(hidden.numel() / width, width, {weights.data(), weights.size()}, {settings.data(), settings.size()},
                    [=] { return epsilon; }, no_state)
      .run({data, data});
}
