// The op `feed_forward`: its weights come as one list, in an order that `settings` tells.

#include "feed_forward_op.h"

#include "../decode_layer_cpu/feed_forward.h"
#include "../decode_layer_cpu/weight_list.h"

namespace {

using decode_layer::Activation;
using hfe::Tensor;

// Of settings.
enum { kCentered, kSparse, kActivation, kMultiplyByController, kBias, kInnerBias, kSettings };

}  // namespace

void feed_forward(Tensor hidden, std::vector<Tensor> weights, std::vector<int64_t> settings, double epsilon) {
  STD_TORCH_CHECK(hidden.dim() >= 2 && hidden.size(0) > 0, "hidden must have shape (rows, width).");
  const int64_t width = hidden.size(hidden.dim() - 1), rows = hidden.numel() / width;
  STD_TORCH_CHECK(settings.size() == kSettings, "settings must hold ", static_cast<int>(kSettings), " numbers, not ",
                  settings.size(), ".");
  STD_TORCH_CHECK(settings[kActivation] >= 0 && settings[kActivation] <= 3, "An activation is a number from 0 to 3, not ",
                  settings[kActivation], ".");
  const Activation activation = static_cast<Activation>(settings[kActivation]);
  float* const numbers = decode_layer::float_rows(hidden, hidden.size(0), hidden.numel() / hidden.size(0), "hidden");
  decode_layer::WeightList list(weights);
  const decode_layer::Norm norm = list.norm(width, settings[kCentered] != 0, epsilon);
  const decode_layer::Room<float> normalized(rows * width);
  decode_layer::Inputs inputs(normalized, width, rows, width);
  if (settings[kSparse] != 0) {
    decode_layer::SparseFeedForward layer = list.sparse(width, settings[kBias] != 0, settings[kInnerBias] != 0);
    layer.activation = activation;
    layer.multiply_by_controller = settings[kMultiplyByController] != 0;
    list.check_end();
    decode_layer::normalize(norm, numbers, rows, width, normalized);
    decode_layer::add_feed_forward(layer, inputs, numbers, width, nullptr);
  } else {
    decode_layer::DenseFeedForward layer = list.dense(width, settings[kBias] != 0, settings[kInnerBias] != 0);
    layer.activation = activation;
    list.check_end();
    decode_layer::normalize(norm, numbers, rows, width, normalized);
    decode_layer::add_feed_forward(layer, inputs, numbers, width);
  }
}
