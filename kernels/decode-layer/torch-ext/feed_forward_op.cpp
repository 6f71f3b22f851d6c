// The op `feed_forward`: its weights come as one list, in an order that `settings` tells.

#include "feed_forward_op.h"

namespace {

using decode_layer::Activation;
using decode_layer::Span;
using hfe::Tensor;

// Of settings.
enum { kCentered, kSparse, kActivation, kMultiplyByController, kBias, kInnerBias, kSettings };

}  // namespace

FeedForwardCall feed_forward_call(const Tensor& hidden, Span<Tensor> weights, Span<int64_t> given, double epsilon) {
  STD_TORCH_CHECK(hidden.dim() >= 2 && hidden.size(0) > 0, "hidden must have shape (rows, width).");
  STD_TORCH_CHECK(given.count == kSettings, "settings must hold ", static_cast<int>(kSettings), " numbers, not ",
                  given.count, ".");
  const int64_t* const settings = given.first;
  STD_TORCH_CHECK(settings[kActivation] >= 0 && settings[kActivation] <= 3, "An activation is a number from 0 to 3, not ",
                  settings[kActivation], ".");
  FeedForwardCall call;
  call.width = hidden.size(hidden.dim() - 1);
  STD_TORCH_CHECK(call.width > 0, "hidden must have at least one number a row.");
  call.rows = hidden.numel() / call.width;
  call.hidden = decode_layer::float_rows(hidden, hidden.size(0), hidden.numel() / hidden.size(0), "hidden");
  decode_layer::WeightList list(weights);
  call.norm = list.norm(call.width, settings[kCentered] != 0, epsilon);
  const bool has_bias = settings[kBias] != 0, has_inner_bias = settings[kInnerBias] != 0;
  call.is_sparse = settings[kSparse] != 0;
  if (call.is_sparse) {
    call.sparse = list.sparse(call.width, has_bias, has_inner_bias);
    call.sparse.multiply_by_controller = settings[kMultiplyByController] != 0;
  } else {
    call.dense = list.dense(call.width, has_bias, has_inner_bias);
  }
  call.sparse.activation = call.dense.activation = static_cast<Activation>(settings[kActivation]);
  list.check_end();
  return call;
}

void FeedForwardCall::run() const {
  const decode_layer::Room<float> normalized(rows * width);
  decode_layer::normalize(norm, hidden, rows, width, normalized);
  decode_layer::Inputs inputs(normalized, width, rows, width);
  if (is_sparse) {
    decode_layer::add_feed_forward(sparse, inputs, hidden, width, nullptr);
  } else {
    decode_layer::add_feed_forward(dense, inputs, hidden, width);
  }
}

void feed_forward(Tensor hidden, std::vector<Tensor> weights, std::vector<int64_t> settings, double epsilon) {
  feed_forward_call(hidden, {weights.data(), weights.size()}, {settings.data(), settings.size()}, epsilon).run();
}
