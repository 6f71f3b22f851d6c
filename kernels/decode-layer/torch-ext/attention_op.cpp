// The op `attention`, and attention as `layers` calls it: weights come as one list, in an order that `settings` tells.

#include "attention_op.h"

#include "../decode_layer_cpu/attention.h"
#include "../decode_layer_cpu/weight_list.h"

namespace {

using decode_layer::AttentionLayer;
using decode_layer::BucketView;
using decode_layer::float_rows;
using decode_layer::CacheView;
using decode_layer::Hashing;
using decode_layer::KeyPart;
using decode_layer::Span;
using decode_layer::WeightList;
using decode_layer::WindowedMap;
using hfe::ScalarType;
using hfe::Tensor;

// Of settings, before the kinds of projections.
enum { kHeads, kCentered, kWindow, kKernelWidth, kModules, kFirstKind };

// Of a layer that hashes, before those: rounds, places, the number of factors, and the factors.
enum { kRounds, kPlaces, kFactorCount, kFirstFactor };

constexpr int64_t kMostBuckets = 1 << 15;  // which 16 bits tell apart, with a number for padding beside them

// Of (rows, heads, tokens, size); one row may serve all.
CacheView view_of(const Tensor& tensor, const char* name) {
  const int64_t size = tensor.size(3);
  STD_TORCH_CHECK((tensor.size(2) <= 1 || tensor.stride(2) == size) && (size == 1 || tensor.stride(3) == 1),
                  name, " must be contiguous in its last two dimensions.");
  CacheView found;
  found.format = decode_layer::format_of(tensor, name);
  STD_TORCH_CHECK(!decode_layer::is_quantized(found.format), name, " must be float32, bfloat16 or float16.");
  found.data = tensor.data_ptr();
  found.size = size;
  found.row_stride = tensor.size(0) == 1 ? 0 : tensor.stride(0);
  found.head_stride = tensor.stride(1);
  return found;
}

void check_same_dtype(const CacheView& keys, const CacheView& values, const Tensor& first, const Tensor& second,
                      const char* name) {
  STD_TORCH_CHECK(keys.format == values.format, name, " must have the same dtype, not ",
                  torch::headeronly::toString(first.scalar_type()), " and ",
                  torch::headeronly::toString(second.scalar_type()), ".");
}

CacheView room_view(const Tensor& room, const AttentionLayer& layer, int64_t filled, int64_t size, const char* name) {
  decode_layer::check_cpu(room, name);
  STD_TORCH_CHECK(room.dim() == 4 && room.size(0) == layer.rows && room.size(1) == layer.heads &&
                      room.size(2) > filled && room.size(3) == size,
                  name, " must have shape (", layer.rows, ", ", layer.heads, ", more than ", filled, ", ", size,
                  "), not ", hfe::text_of(room.sizes().data(), room.sizes().size()), ".");
  return view_of(room, name);
}

KeyPart source_part(const SourceTensors& source, int64_t rows, int64_t heads, int64_t key_size, int64_t value_size) {
  const auto view = [&](const Tensor& tensor, int64_t size, const char* name) {
    decode_layer::check_cpu(tensor, name);
    STD_TORCH_CHECK(tensor.dim() == 4 && (tensor.size(0) == rows || tensor.size(0) == 1) && tensor.size(1) == heads &&
                        tensor.size(2) == source.keys.size(2) && tensor.size(3) == size,
                    name, " must have shape (", rows, " or 1, ", heads, ", as many as keys, ", size, "), not ",
                    hfe::text_of(tensor.sizes().data(), tensor.sizes().size()), ".");
    return view_of(tensor, name);
  };
  KeyPart part;
  part.keys = view(source.keys, key_size, "keys of a source");
  part.values = view(source.values, value_size, "values of a source");
  check_same_dtype(part.keys, part.values, source.keys, source.values, "keys and values of a source");
  part.count = source.keys.size(2);
  return part;
}

// Of (rows, heads, rounds, `slots` or more); one row may serve all where `is_source`.
BucketView bucket_view(const Tensor& tensor, const AttentionLayer& layer, int64_t slots, bool is_source) {
  const char* const name = is_source ? "buckets of a source" : "buckets";
  decode_layer::check_cpu(tensor, name);
  STD_TORCH_CHECK(tensor.dim() == 4 && (tensor.size(0) == layer.rows || (is_source && tensor.size(0) == 1)) &&
                      tensor.size(1) == layer.heads && tensor.size(2) == layer.hashing.rounds &&
                      tensor.size(3) >= slots && tensor.scalar_type() == ScalarType::Short && tensor.stride(3) == 1,
                  name, " must be int16 of shape (", layer.rows, ", ", layer.heads, ", ", layer.hashing.rounds, ", ",
                  slots, " or more), contiguous in the last dimension, not ",
                  hfe::text_of(tensor.sizes().data(), tensor.sizes().size()), ".");
  BucketView found;
  found.data = static_cast<int16_t*>(tensor.data_ptr());
  found.row_stride = tensor.size(0) == 1 ? 0 : tensor.stride(0);
  found.head_stride = tensor.stride(1);
  found.round_stride = tensor.stride(2);
  return found;
}

// Reads what `settings` and `weights` begin with, and takes it off them.
Hashing hashing_of(Span<Tensor>& weights, Span<int64_t>& settings) {
  STD_TORCH_CHECK(settings.count > kFirstFactor && weights.count > 0,
                  "A layer that hashes has settings and directions of its hashing before all others.");
  Hashing hashing;
  hashing.rounds = settings.first[kRounds];
  hashing.places = settings.first[kPlaces];
  const int64_t count = settings.first[kFactorCount], used = kFirstFactor + count;
  STD_TORCH_CHECK(hashing.rounds > 0 && hashing.places > 0 && count > 0 && used <= static_cast<int64_t>(settings.count),
                  "Rounds, places and factors must be there, not ", hashing.rounds, ", ", hashing.places, " and ", count,
                  " of them.");
  int64_t buckets = 1, half = 0;
  for (int64_t i = kFirstFactor; i < used; ++i) {
    const int64_t factor = settings.first[i];
    STD_TORCH_CHECK(factor >= 2 && factor % 2 == 0 && factor <= kMostBuckets / buckets,
                    "Factors must be even, and their product at most ", kMostBuckets, ".");
    hashing.factors.push_back(factor);
    buckets *= factor;
    half += factor / 2;
  }
  const Tensor& rotations = *weights.first;
  decode_layer::check_cpu(rotations, "rotations");
  STD_TORCH_CHECK(rotations.dim() == 3 && rotations.size(1) == hashing.rounds && rotations.size(2) == half &&
                      rotations.scalar_type() == ScalarType::Float && rotations.is_contiguous(),
                  "rotations must be float32 of shape (head size, ", hashing.rounds, ", ", half, "), contiguous, not ",
                  hfe::text_of(rotations.sizes().data(), rotations.sizes().size()), ".");
  hashing.rotations = static_cast<const float*>(rotations.data_ptr());
  weights = {weights.first + 1, weights.count - 1};
  settings = {settings.first + used, settings.count - used};
  return hashing;
}

// Rows of `width` numbers one after the other, whatever dimensions of 1 stand between them.
AttentionLayer layer_of(int64_t rows, int64_t width, Span<Tensor> weights, Span<int64_t> given, double epsilon,
                        bool hashes) {
  const int64_t head_dim = hashes && weights.count > 0 && weights.first->dim() > 0 ? weights.first->size(0) : 0;
  AttentionLayer layer;
  if (hashes) layer.hashing = hashing_of(weights, given);
  const int64_t* const settings = given.first;
  const bool convolves = given.count == kFirstKind + 5;
  STD_TORCH_CHECK(convolves || given.count == kFirstKind + 4, "settings must hold ", kFirstKind + 4, " or ",
                  kFirstKind + 5, " numbers, not ", given.count, ".");
  layer.rows = rows;
  layer.width = width;
  layer.heads = settings[kHeads];
  STD_TORCH_CHECK(layer.heads > 0 && width % layer.heads == 0, "Heads must divide the width.");
  STD_TORCH_CHECK(!hashes || head_dim == width / layer.heads, "rotations must be of vectors of ", width / layer.heads,
                  " numbers, not ", head_dim, ".");
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
    STD_TORCH_CHECK(layer.query && (layer.key || hashes) && layer.value,
                    "Only the output projection may be absent, and where a layer hashes that of keys.");
  }
  layer.output = list.projection(*kind, width, width, modules);
  list.check_end();
  return layer;
}

// Settings of cross attention, before the kinds of both maps and their convolutions.
enum { kCrossHeads, kCrossCentered, kCrossWindow, kCrossKernelWidth, kCrossMaps };

// Modules, kind of the map and kind of its convolution.
WindowedMap windowed_map(WeightList& list, const int64_t* kinds, int64_t width, int64_t window, int64_t kernel_width) {
  WindowedMap found;
  found.map = list.projection(kinds[1], width, width, kinds[0]);
  found.conv = list.convolution(kinds[2], width, kinds[0], window, kernel_width);
  STD_TORCH_CHECK(found.map || !found.conv, "A convolution of cross attention needs a map before it.");
  return found;
}

}  // namespace

Hidden::Hidden(const Tensor& tensor) {
  STD_TORCH_CHECK(tensor.dim() >= 2 && tensor.size(0) > 0, "hidden must have shape (rows, width).");
  rows = tensor.size(0);
  width = tensor.size(tensor.dim() - 1);
  STD_TORCH_CHECK(width > 0, "hidden must have at least one number a row.");
  data = float_rows(tensor, rows, width, "hidden");
}

AttentionCall attention_call(int64_t rows, int64_t width, const Tensor& keys, const Tensor& values,
                             const NextState& next_state, const SourceTensors* source, const Tensor* mask,
                             Span<Tensor> weights, Span<int64_t> settings, double epsilon, int64_t filled,
                             const Tensor* buckets) {
  STD_TORCH_CHECK(filled >= 0, "filled must not be negative.");
  AttentionCall call;
  const bool hashes = buckets != nullptr;
  call.layer = layer_of(rows, width, weights, settings, epsilon, hashes);
  const int64_t heads = call.layer.heads, value_size = width / heads;
  const int64_t key_size = hashes ? call.layer.hashing.key_size(value_size) : value_size;
  if (call.layer.window > 1) call.step.state = next_state((call.layer.window - 1) * width);
  if (source) call.step.source = source_part(*source, rows, heads, key_size, value_size);
  if (mask) call.step.mask = float_rows(*mask, rows, call.step.source.count + filled + 1, "mask");
  call.step.keys = room_view(keys, call.layer, filled, key_size, "keys");
  call.step.values = room_view(values, call.layer, filled, value_size, "values");
  check_same_dtype(call.step.keys, call.step.values, keys, values, "keys and values");
  call.step.filled = filled;
  if (hashes) {
    STD_TORCH_CHECK(call.step.source.count > 0 || (!source && filled > 0),
                    "A layer that hashes begins behind a token, whose key says whether its row does.");
    call.step.buckets = bucket_view(*buckets, call.layer, filled + 1, false);
    if (source) call.step.source_buckets = bucket_view(*source->buckets, call.layer, call.step.source.count, true);
  }
  return call;
}

CrossAttentionCall cross_attention_call(int64_t rows, int64_t width, const SourceTensors& source,
                                        const NextState& next_state, const Tensor* mask, Span<Tensor> weights,
                                        Span<int64_t> given, double epsilon) {
  STD_TORCH_CHECK(given.count == kCrossMaps + 6, "settings of cross attention must hold ", kCrossMaps + 6,
                  " numbers, not ", given.count, ".");
  const int64_t* const settings = given.first;
  CrossAttentionCall call;
  decode_layer::CrossAttentionLayer& layer = call.layer;
  layer.rows = rows;
  layer.width = width;
  layer.heads = settings[kCrossHeads];
  STD_TORCH_CHECK(layer.heads > 0 && width % layer.heads == 0, "Heads must divide the width.");
  layer.window = settings[kCrossWindow];
  WeightList list(weights);
  layer.norm = list.norm(width, settings[kCrossCentered] != 0, epsilon);
  const int64_t kernel_width = settings[kCrossKernelWidth];
  layer.query = windowed_map(list, settings + kCrossMaps, width, layer.window, kernel_width);
  layer.output = windowed_map(list, settings + kCrossMaps + 3, width, layer.window, kernel_width);
  list.check_end();
  const int64_t state_size = (layer.window - 1) * width;
  if (layer.query.conv && state_size > 0) call.step.query_state = next_state(state_size);
  if (layer.output.conv && state_size > 0) call.step.output_state = next_state(state_size);
  call.step.source = source_part(source, rows, layer.heads, width / layer.heads, width / layer.heads);
  if (mask) call.step.mask = float_rows(*mask, rows, call.step.source.count, "cross_mask");
  return call;
}

void attention(Tensor hidden, Tensor keys, Tensor values, std::optional<Tensor> state, std::optional<Tensor> mask,
               std::vector<Tensor> weights, std::vector<int64_t> settings, double epsilon, int64_t filled) {
  const Hidden rows(hidden);
  const auto next_state = [&](int64_t size) {
    STD_TORCH_CHECK(state.has_value(), "A layer of convolutions needs a state.");
    return decode_layer::State{float_rows(*state, rows.rows, size, "state"), size};
  };
  const AttentionCall call =
      attention_call(rows.rows, rows.width, keys, values, next_state, nullptr, mask ? &*mask : nullptr,
                     {weights.data(), weights.size()}, {settings.data(), settings.size()}, epsilon, filled);
  decode_layer::attention(call.layer, {rows.data, rows.data}, call.step);
}
