#pragma once

#include <vector>

#include "attention_op.h"

#include "../decode_layer_cpu/feed_forward.h"
#include "../decode_layer_cpu/weight_list.h"

// What a feed-forward layer was given, found to fit together.
struct FeedForwardCall {
  int64_t rows = 0;
  int64_t width = 0;
  decode_layer::Norm norm;
  bool is_sparse = false;
  decode_layer::SparseFeedForward sparse;
  decode_layer::DenseFeedForward dense;
  decode_layer::RecurrentBranch branch;
  decode_layer::State state;

  void run(decode_layer::Streams streams) const;
};

// `next_epsilon` gives that of the norm and then, with a branch of recurrences, that of its norm.
FeedForwardCall feed_forward_call(int64_t rows, int64_t width, decode_layer::Span<hfe::Tensor> weights,
                                  decode_layer::Span<int64_t> settings, const std::function<double()>& next_epsilon,
                                  const NextState& next_state);

// hidden += layer(norm(hidden)), in place; see decode_layer/layers.py.
void feed_forward(hfe::Tensor hidden, std::vector<hfe::Tensor> weights, std::vector<int64_t> settings, double epsilon);
