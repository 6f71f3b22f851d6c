#pragma once

#include <vector>

#include "../decode_layer_cpu/feed_forward.h"
#include "../decode_layer_cpu/weight_list.h"

// What a call of `feed_forward` was given, found to fit together.
struct FeedForwardCall {
  int64_t rows = 0;
  int64_t width = 0;
  float* hidden = nullptr;
  decode_layer::Norm norm;
  bool is_sparse = false;
  decode_layer::SparseFeedForward sparse;
  decode_layer::DenseFeedForward dense;

  void run() const;
};

FeedForwardCall feed_forward_call(const hfe::Tensor& hidden, decode_layer::Span<hfe::Tensor> weights,
                                  decode_layer::Span<int64_t> settings, double epsilon);

// hidden += layer(norm(hidden)), in place; see decode_layer/layers.py.
void feed_forward(hfe::Tensor hidden, std::vector<hfe::Tensor> weights, std::vector<int64_t> settings, double epsilon);
