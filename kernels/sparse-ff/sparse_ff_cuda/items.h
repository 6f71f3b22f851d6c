// What single threads of the CUDA form do, for the host too, so that tests can run it there. Lanes of one or more warps
// share the products of a row, the threads of a block share the search for winners and the sums over blocks of units; how
// they add up is in `kernels.cu`.
#pragma once

#include <cstdint>

#include "../include/sparse_ff_unit.h"
#include "aligned_vector.h"

namespace sparse_ff {

using hfe::AlignedVector;

constexpr int kLanes = 32;
constexpr int kWarps = 8;

// Tokens that one row is multiplied with at once, where there are more than one.
constexpr int kTokens = 4;

// Memory answers late: what a thread is to read next is asked for together. Rows of the controller's second matrix that
// lanes multiply at once with a single token, accesses to one row, and winners of which a thread adds up a number.
constexpr int kUnitsAtOnce = 4;
constexpr int kAccessesAtOnce = 4;
constexpr int kWinnersAtOnce = 8;

constexpr float kInfinity = __builtin_huge_valf();

// Tokens go in groups of G: 1 or `kTokens`.
template <int G>
HFE_INLINE int64_t groups_of(int64_t tokens) {
  return (tokens + G - 1) / G;
}

template <int G>
HFE_INLINE int tokens_of(const SparseFfParams& params, int64_t group) {
  const int64_t left = params.tokens - group * G;
  return static_cast<int>(left < G ? left : G);
}

// Lanes, a power of two and at most a warp, that read a row of `width` numbers in one access of V each if they can.
template <int V>
HFE_INLINE int lanes_of(int64_t width) {
  int lanes = 1;
  while (lanes < kLanes && static_cast<int64_t>(lanes) * V < width) lanes *= 2;
  return lanes;
}

// V neighbouring numbers of any dtype, at a place that allows accesses so wide.
template <int V, typename T>
HFE_INLINE void read_as(const void* data, int64_t index, float (&to)[V]) {
  const auto found = *reinterpret_cast<const AlignedVector<T, V>*>(static_cast<const T*>(data) + index);
#pragma unroll
  for (int v = 0; v < V; ++v) to[v] = widen(found.at(v));
}

// One lane's share of the products of a row with inputs of type X.
template <typename T, typename X, int V, int G>
HFE_INLINE void add_products(const T* row, int64_t width, const TensorView& x, int64_t first, int tokens, int lane,
                             int lanes, float (&sums)[G]) {
#pragma unroll(G == 1 ? kAccessesAtOnce : 1)
  for (int64_t i = static_cast<int64_t>(lane) * V; i < width; i += lanes * V) {
    const auto weights = *reinterpret_cast<const AlignedVector<T, V>*>(row + i);
#pragma unroll
    for (int t = 0; t < G; ++t) {
      if (t >= tokens) break;
      float numbers[V];
      read_as<V, X>(x.data, (first + t) * x.batch_stride + i, numbers);
#pragma unroll
      for (int v = 0; v < V; ++v) sums[t] += widen(weights.at(v)) * numbers[v];
    }
  }
}

// The share of one of `lanes` lanes in the products of one row with the inputs of `tokens` tokens, the first of which is
// at `first`. The dtype of x is asked for once, since nothing is read ahead across a branch.
template <typename T, int V, int G>
HFE_INLINE void lane_products(const T* row, int64_t width, const TensorView& x, int64_t first, int tokens, int lane,
                              int lanes, float (&sums)[G]) {
  for (int t = 0; t < G; ++t) sums[t] = 0.0f;
  if (x.dtype == DType::float32) {
    add_products<T, float, V, G>(row, width, x, first, tokens, lane, lanes, sums);
  } else if (x.dtype == DType::bfloat16) {
    add_products<T, BFloat16, V, G>(row, width, x, first, tokens, lane, lanes, sums);
  } else {
    add_products<T, Float16, V, G>(row, width, x, first, tokens, lane, lanes, sums);
  }
}

template <typename T>
HFE_INLINE const T* row_at(const TensorView& view, int64_t block, int64_t unit) {
  return static_cast<const T*>(view.data) + row_of(view, block, unit);
}

// The controller's hidden values as the input of its second matrix.
HFE_INLINE TensorView hidden_values(const SparseFfParams& params) {
  TensorView view;
  view.data = params.h;
  view.batch_stride = params.rank;
  return view;
}

// The best of some units: its logit, its place (-1: there is none yet), and the sum of exp(logit - best) over them.
struct Leader {
  float best = -kInfinity;
  int32_t unit = -1;
  float total = 0.0f;
};

HFE_INLINE Leader merged(const Leader& a, const Leader& b) {
  if (a.unit < 0) return b;
  if (b.unit < 0) return a;
  const bool second = wins(b.best, b.unit, a.best, a.unit);
  Leader winner = second ? b : a;
  const Leader loser = second ? a : b;
  // Of infinite logits that are equal the difference is none.
  winner.total += loser.total * (loser.best == winner.best ? 1.0f : expf(loser.best - winner.best));
  return winner;
}

HFE_INLINE Leader leader_of(const SparseFfParams& params, int64_t block, int64_t unit, float product) {
  const float bias = number_at(params.controller_bias, row_of(params.controller_bias, block, 0) + unit);
  return {product + bias, static_cast<int32_t>(unit), 1.0f};
}

// A block's winner for one token. A softmax with an infinite maximum is NaN.
HFE_INLINE void keep_winner(const SparseFfParams& params, int64_t block, int64_t token, const Leader& leader) {
  const bool finite = leader.best - leader.best == 0.0f;
  const float probability = finite ? 1.0f / leader.total : leader.best - leader.best;
  params.winners[token * params.blocks + block] = leader.unit;
  params.hidden[token * params.blocks + block] = params.multiply_by_controller ? probability : 1.0f;
}

// What a winner gives, from its row's product with the input.
HFE_INLINE void keep_hidden(const SparseFfParams& params, int64_t block, int64_t token, float product) {
  const int64_t at = token * params.blocks + block;
  const TensorView& bias = params.inner_bias;
  if (bias) product += number_at(bias, row_of(bias, block, 0) + params.winners[at]);
  params.hidden[at] *= activate(product, params.activation);
}

// A warp's share of one number of the result: every `kWarps`th block's.
template <typename T>
HFE_INLINE float column_sum(const SparseFfParams& params, int64_t token, int64_t column, int warp) {
  float sum = 0.0f;
  for (int64_t first = warp; first < params.blocks; first += kWarps * kWinnersAtOnce) {
    float values[kWinnersAtOnce];
    T numbers[kWinnersAtOnce] = {};
#pragma unroll
    for (int i = 0; i < kWinnersAtOnce; ++i) {
      const int64_t k = first + i * kWarps;
      values[i] = k < params.blocks ? params.hidden[token * params.blocks + k] : 0.0f;
    }
#pragma unroll
    for (int i = 0; i < kWinnersAtOnce; ++i) {
      const int64_t k = first + i * kWarps;
      if (values[i] == 0.0f) continue;  // what ReLU has killed is not read
      numbers[i] = row_at<T>(params.down, k, params.winners[token * params.blocks + k])[column];
    }
#pragma unroll
    for (int i = 0; i < kWinnersAtOnce; ++i) sum += values[i] * widen(numbers[i]);
  }
  return sum;
}

HFE_INLINE void write_number(const SparseFfParams& params, int64_t token, int64_t column, float sum) {
  if (params.bias) sum += number_at(params.bias, column);
  set_number(params.y, token * params.y.batch_stride + column, sum);
}

}  // namespace sparse_ff
