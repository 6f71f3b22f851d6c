// The op `attention`: its weights come as one list, in an order that `settings` tells.

#include "attention_op.h"

#include "../decode_layer_cpu/attention.h"
#include "../decode_layer_cpu/weight_list.h"

namespace {

using decode_layer::AttentionLayer;
using decode_layer::float_rows;
using decode_layer::CacheView;
using decode_layer::Span;
using decode_layer::WeightList;
using hfe::ScalarType;
using hfe::Tensor;

// Of settings, before the kinds of projections.
enum { kHeads, kCentered, kWindow, kKernelWidth, kModules, kFirstKind };

CacheView cache_view(const Tensor& room, const AttentionLayer& layer, int64_t filled, const char* name) {
  decode_layer::check_cpu(room, name);
  const int64_t head_dim = layer.width / layer.heads;
  STD_TORCH_CHECK(room.dim() == 4 && room.size(0) == layer.rows && room.size(1) == layer.heads &&
                      room.size(2) > filled && room.size(3) == head_dim,
                  name, " must have shape (", layer.rows, ", ", layer.heads, ", more than ", filled, ", ", head_dim,
                  "), not ", hfe::text_of(room.sizes().data(), room.sizes().size()), ".");
  STD_TORCH_CHECK(room.stride(2) == head_dim && (head_dim == 1 || room.stride(3) == 1), name,
                  " must be contiguous in its last two dimensions.");
  CacheView found;
  found.format = decode_layer::format_of(room, name);
  STD_TORCH_CHECK(!decode_layer::is_quantized(found.format), name, " must be float32, bfloat16 or float16.");
  found.data = room.data_ptr();
  found.row_stride = room.stride(0);
  found.head_stride = room.stride(1);
  return found;
}

// Rows of `width` numbers one after the other, whatever dimensions of 1 stand between them.
AttentionLayer layer_of(int64_t rows, int64_t width, Span<Tensor> weights, Span<int64_t> given, double epsilon) {
  const int64_t* const settings = given.first;
  const bool convolves = given.count == kFirstKind + 5;
  STD_TORCH_CHECK(convolves || given.count == kFirstKind + 4, "settings must hold ", kFirstKind + 4, " or ",
                  kFirstKind + 5, " numbers, not ", given.count, ".");
  AttentionLayer layer;
  layer.rows = rows;
  layer.width = width;
  layer.heads = settings[kHeads];
  STD_TORCH_CHECK(layer.heads > 0 && width % layer.heads == 0, "Heads must divide the width.");
  WeightList list(weights);
  layer.norm = list.norm(width, settings[kCentered] != 0, epsilon);
  const int64_t *kind = settings + kFirstKind, modules = settings[kModules];
  if (convolves) {
    layer.window = settings[kWindow];
    layer.shared = list.projection(*kind++, width, width, modules);
    const int64_t kernel_width = settings[kKernelWidth];
    layer.query = list.convolution(*kind++, width, modules, layer.window, kernel_width);
    layer.key = list.convolution(*kind++, width, modules, layer.window, kernel_width);
    layer.value = list.convolution(*kind++, width, modules, layer.window, 1);
    STD_TORCH_CHECK(layer.shared && layer.query && layer.value,
                    "Only the key's convolution and the output projection may be absent.");
  } else {
    layer.query = list.projection(*kind++, width, width, modules);
    layer.key = list.projection(*kind++, width, width, modules);
    layer.value = list.projection(*kind++, width, width, modules);
    STD_TORCH_CHECK(layer.query && layer.key && layer.value, "Only the output projection may be absent.");
  }
  layer.output = list.projection(*kind, width, width, modules);
  list.check_end();
  return layer;
}

}  // namespace

void AttentionCall::run() const { decode_layer::attention(layer, hidden, keys, values, state, mask, filled); }

AttentionCall attention_call(const Tensor& hidden, const Tensor& keys, const Tensor& values, const Tensor* state,
                             const Tensor* mask, Span<Tensor> weights, Span<int64_t> settings, double epsilon,
                             int64_t filled) {
  STD_TORCH_CHECK(hidden.dim() >= 2 && hidden.size(0) > 0, "hidden must have shape (rows, width).");
  const int64_t rows = hidden.size(0), width = hidden.size(hidden.dim() - 1);
  STD_TORCH_CHECK(width > 0, "hidden must have at least one number a row.");
  STD_TORCH_CHECK(filled >= 0, "filled must not be negative.");
  AttentionCall call;
  call.layer = layer_of(rows, width, weights, settings, epsilon);
  call.hidden = float_rows(hidden, rows, width, "hidden");
  if (call.layer.window > 1) {
    STD_TORCH_CHECK(state != nullptr, "A layer of convolutions needs a state.");
    call.state = float_rows(*state, rows, (call.layer.window - 1) * width, "state");
  }
  if (mask) call.mask = float_rows(*mask, rows, filled + 1, "mask");
  call.keys = cache_view(keys, call.layer, filled, "keys");
  call.values = cache_view(values, call.layer, filled, "values");
  STD_TORCH_CHECK(call.keys.format == call.values.format, "keys and values must have the same dtype, not ",
                  torch::headeronly::toString(keys.scalar_type()), " and ",
                  torch::headeronly::toString(values.scalar_type()), ".");
  call.filled = filled;
  return call;
}

void attention(Tensor hidden, Tensor keys, Tensor values, std::optional<Tensor> state, std::optional<Tensor> mask,
               std::vector<Tensor> weights, std::vector<int64_t> settings, double epsilon, int64_t filled) {
  attention_call(hidden, keys, values, state ? &*state : nullptr, mask ? &*mask : nullptr,
                 {weights.data(), weights.size()}, {settings.data(), settings.size()}, epsilon, filled)
      .run();
}
