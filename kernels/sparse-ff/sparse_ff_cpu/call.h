// What both forms of a call, for few tokens and for many, begin and end with.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <vector>

#include "../include/sparse_ff_unit.h"
#include "room.h"
#include "row_functions.h"

namespace sparse_ff {

using Room = hfe::Room<float>;

inline int64_t size_of(const TensorView& view) { return hfe::size_of(view.dtype); }

inline const char* row_at(const TensorView& view, int64_t block, int64_t unit) {
  return static_cast<const char*>(view.data) + row_of(view, block, unit) * size_of(view);
}

// The rows of some tokens' input or output in float32: in place, or in room of their own.
class Rows {
 public:
  Rows(const TensorView& view, int64_t first, int64_t tokens, int64_t width)
      : view_(view), width_(width), first_(first), room_(view.dtype == DType::float32 ? 0 : tokens * padded(width)) {
    for (int64_t t = 0; t < tokens; ++t) {
      const bool in_place = view.dtype == DType::float32;
      rows_.push_back(in_place ? static_cast<float*>(view.data) + (first + t) * view.batch_stride
                               : static_cast<float*>(room_) + t * padded(width));
    }
  }

  void read() {
    if (view_.dtype == DType::float32) return;
    const RowFunctions& of = row_functions(view_.dtype);
    for (size_t t = 0; t < rows_.size(); ++t) of.widen(row_at(view_, first_ + t, 0), width_, rows_[t]);
  }

  void write() const {
    if (view_.dtype == DType::float32) return;
    const RowFunctions& of = row_functions(view_.dtype);
    for (size_t t = 0; t < rows_.size(); ++t) {
      of.narrow(rows_[t], width_, const_cast<char*>(row_at(view_, first_ + t, 0)));
    }
  }

  // Each row starts as `bias`, or as zeros.
  void fill(const TensorView& bias) {
    for (float* row : rows_) {
      if (bias) {
        row_functions(bias.dtype).widen(bias.data, width_, row);
      } else {
        std::fill_n(row, width_, 0.0f);
      }
    }
  }

  float* const* pointers() const { return rows_.data(); }

 private:
  TensorView view_;
  int64_t width_, first_;
  Room room_;
  std::vector<float*> rows_;
};

// A block's biases and the logits of up to `kFew` tokens.
class Logits {
 public:
  explicit Logits(const SparseFfParams& params)
      : params_(params), of_(row_functions(params.controller_up.dtype)), stride_(padded(params.units)), bias_(stride_),
        logits_(kFew * stride_) {
    // What is left of the last units wins against no unit.
    std::fill_n(static_cast<float*>(bias_), stride_, -std::numeric_limits<float>::infinity());
    std::fill_n(static_cast<float*>(logits_), kFew * stride_, -std::numeric_limits<float>::infinity());
  }

  void take_bias(int64_t block) {
    const TensorView& bias = params_.controller_bias;
    row_functions(bias.dtype).widen(row_at(bias, block, 0), params_.units, bias_);
    // Four units are computed at a time: the last once more, with its own bias.
    const int64_t last = params_.units - 1;
    for (int64_t n = params_.units; n < (params_.units + 3) / 4 * 4; ++n) bias_[n] = bias_[last];
  }

  // The winners of up to `kFew` tokens in a block whose biases were taken, and the winners' probabilities where they are
  // wanted, else 1.
  void find_winners(int64_t block, const float* h, int64_t h_stride, int64_t tokens, Ahead& ahead, int32_t* winners,
                    float* probabilities) {
    const TensorView& rows = params_.controller_up;
    of_.logits(row_at(rows, block, 0), rows.step_stride, params_.units, params_.rank, h, h_stride, tokens, bias_,
               logits_, ahead);
    const Functions& all = functions();
    for (int64_t t = 0; t < tokens; ++t) {
      const float* const logits = logits_ + t * stride_;
      const int64_t found = all.winner(logits, params_.units);
      winners[t] = static_cast<int32_t>(found);
      probabilities[t] = params_.multiply_by_controller ? all.probability(logits, params_.units, found) : 1.0f;
    }
  }

 private:
  const SparseFfParams& params_;
  const RowFunctions& of_;
  int64_t stride_;
  Room bias_, logits_;
};

// What a winner gives, from its row's product with the input.
inline float hidden_of(const SparseFfParams& params, float product, int64_t block, int32_t winner, float probability) {
  const TensorView& bias = params.inner_bias;
  const float sum = bias ? product + number_at(bias, row_of(bias, block, 0) + winner) : product;
  return activate(sum, params.activation) * probability;
}

void forward_few(const SparseFfParams& params);
void forward_many(const SparseFfParams& params);

}  // namespace sparse_ff
