// Feed-forward layers.

#include "feed_forward.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "functions.h"
#include "parallel.h"
#include "unit_pipeline.h"

namespace decode_layer {
namespace {

using hfe::Ahead;
using hfe::BlockWinners;

static_assert(kFew == hfe::kFewTokens, "a pipeline takes as many tokens as products at memory speed");

// Pages of a stream that are looked up at once.
constexpr int64_t kPages = 16;

float number_at(const Numbers& numbers, int64_t index) {
  float number;
  const int64_t bytes = row_bytes(numbers.format, index);
  widen({static_cast<const char*>(numbers.data) + bytes, numbers.format}, 1, &number);
  return number;
}

// A sparse layer for up to `kFew` tokens.
class FewTokens {
 public:
  // `x` for the rows of units, `h` for those of the controller's second matrix.
  FewTokens(const SparseFeedForward& layer, const Operands& x, const Operands& h, float* y, int64_t y_stride,
            int32_t* winners)
      : layer_(layer),
        count_(x.count),
        x_(x),
        h_(h),
        y_(y),
        y_stride_(y_stride),
        winners_(winners),
        up_bytes_(row_bytes(layer.up.format, layer.up.width)),
        down_bytes_(row_bytes(layer.down.format, layer.down.width)) {}

  void run() {
    const Matrix& controller = layer_.controller_up;
    const int64_t bytes = layer_.units * controller.stride + count_ * up_bytes_;
    add_bias(layer_.bias, layer_.up.width, y_, y_stride_, count_);
    if (is_for_one_thread(layer_.blocks, bytes)) {
      work_on(0, layer_.blocks, nullptr);
    } else {
      run_on_threads(bytes);
    }
  }

  // The stages of the pipeline.

  void ask_for_up(int64_t k, const BlockWinners& winners, Ahead& ahead) const {
    for (int64_t t = 0; t < count_; ++t) ask_for(layer_.up, up_bytes_, k * layer_.units + winners.units[t], ahead);
  }

  void ask_for_down(int64_t k, const BlockWinners& winners, Ahead& ahead) const {
    for (int64_t t = 0; t < count_; ++t) {
      if (winners.hidden[t] == 0.0f) continue;
      ask_for(layer_.down, down_bytes_, k * layer_.units + winners.units[t], ahead);
    }
  }

  void multiply(int64_t k, BlockWinners& winners) const {
    for (int64_t t = 0; t < count_; ++t) {
      winners.hidden[t] = hidden_of(k * layer_.units + winners.units[t], t, winners.probabilities[t]);
    }
  }

  void add(int64_t k, const BlockWinners& winners) const { add_columns(k, winners, 0, layer_.down.width); }

  // The winners of a block, whose logits fit into `logits`, `stride` numbers for each token.
  void find_winners(int64_t k, float* logits, int64_t stride, float* bias, Ahead& ahead, BlockWinners& found) const {
    const Functions& all = functions();
    const int64_t first = k * layer_.units;
    const Numbers& given = layer_.controller_bias;
    const char* const from = static_cast<const char*>(given.data) + row_bytes(given.format, first);
    widen({from, given.format}, layer_.units, bias);
    const Matrix& controller = layer_.controller_up;
    ask_for_pages(k);
    all.block_logits[static_cast<int>(controller.format)](controller, first, layer_.units, h_, bias, logits,
                                                          stride, ahead);
    for (int64_t t = 0; t < count_; ++t) {
      const float* const of_token = logits + t * stride;
      const int64_t unit = all.winner(of_token, layer_.units);
      found.units[t] = static_cast<int32_t>(unit);
      found.probabilities[t] =
          layer_.multiply_by_controller ? all.probability(of_token, layer_.units, unit) : 1.0f;
      if (winners_) winners_[t * layer_.blocks + k] = found.units[t];
    }
  }

 private:
  // Columns that one thread adds to at least: whole groups.
  static constexpr int64_t kColumns = kGroup;

  static void ask_for(const Matrix& rows, int64_t bytes, int64_t row, Ahead& ahead) {
    ahead.add(rows.row(row), bytes);
    if (rows.scales) hfe::prefetch(rows.row_scales(row));
  }

  // The pages of the controller's rows some blocks ahead of block `k`, in time and together.
  void ask_for_pages(int64_t k) const {
    const Matrix& controller = layer_.controller_up;
    const int64_t bytes = layer_.units * controller.stride;
    const int64_t together = std::max<int64_t>(1, kPages * hfe::kPage / std::max<int64_t>(1, bytes));
    if (k % together != 0 || k + together >= layer_.blocks) return;
    hfe::touch_pages(controller.row((k + together) * layer_.units),
                     std::min(together, layer_.blocks - k - together) * bytes);
  }

  float hidden_of(int64_t row, int64_t token, float probability) const {
    float product;
    if (const Matrix& up = layer_.up; up.scales) {
      multiply_rows(up.only(row), 0, 1, x_.part(token, 1), &product, 1);
    } else {
      product = functions().unit_product[static_cast<int>(up.format)](up.row(row), up.width,
                                                                      x_.numbers + token * x_.stride);
    }
    if (layer_.inner_bias) product += number_at(layer_.inner_bias, row);
    return hfe::activate(product, layer_.activation) * probability;
  }

  void add_columns(int64_t k, const BlockWinners& winners, int64_t first, int64_t count) const {
    for (int64_t t = 0; t < count_; ++t) {
      if (winners.hidden[t] == 0.0f) continue;
      add_part_of_row(layer_.down, k * layer_.units + winners.units[t], first, count, winners.hidden[t],
                      y_ + t * y_stride_ + first);
    }
  }

  void work_on(int64_t first, int64_t last, BlockWinners* all) {
    const int64_t stride = rounded_up(layer_.units, kCodePadding / kGroup);
    const Room<float> bias(stride), logits(count_ * stride);
    std::fill_n(static_cast<float*>(logits), count_ * stride, -std::numeric_limits<float>::infinity());
    const auto find = [&](int64_t k, Ahead& ahead, BlockWinners& found) {
      find_winners(k, logits, stride, bias, ahead, found);
    };
    hfe::run_pipeline(*this, find, first, last, (layer_.units + 3) / 4, count_, all);
  }

  // Blocks are divided among threads, and then the columns of y: each is summed in the order of the blocks, as one
  // thread does it.
  void run_on_threads(int64_t bytes) {
    std::vector<BlockWinners> all(layer_.blocks);
    for_each_part(layer_.blocks, bytes, [&](int64_t first, int64_t last) { work_on(first, last, all.data()); });
    const int64_t width = layer_.down.width, groups = (width + kColumns - 1) / kColumns;
    for_each_part(groups, layer_.blocks * count_ * row_bytes(layer_.down.format, kColumns),
                  [&](int64_t first, int64_t last) {
                    const int64_t column = first * kColumns, end = std::min(width, last * kColumns);
                    for (int64_t k = 0; k < layer_.blocks; ++k) add_columns(k, all[k], column, end - column);
                  });
  }

  const SparseFeedForward& layer_;
  int64_t count_;
  Operands x_, h_;
  float* y_;
  int64_t y_stride_;
  int32_t* winners_;
  int64_t up_bytes_, down_bytes_;
};

void apply(const LinearMap& map, const float* x, int64_t count, float* out) {
  Inputs inputs(x, map.matrix.width, count, map.matrix.width);
  multiply(map.matrix, inputs, out, map.matrix.rows);
  add_bias(map.bias, map.matrix.rows, out, map.matrix.rows, count);
}

float sigmoid(float x) { return 1.0f / (1.0f + std::exp(-x)); }

}  // namespace

void run_branch(const RecurrentBranch& branch, const float* x, int64_t count, float* state, int64_t state_stride,
                float* out) {
  const int64_t width = branch.in.matrix.width, units = branch.units();
  const Room<float> normalized(count * width), hidden(count * units), maps(count * 3 * units);
  normalize(branch.norm, x, count, width, normalized);
  apply(branch.in, normalized, count, hidden);
  const float highway = std::sqrt(3.0f);
  for (const LinearMap& layer : branch.layers) {
    apply(layer, hidden, count, maps);
    for (int64_t i = 0; i < count; ++i) {
      const float* const of_token = maps + i * 3 * units;
      float *const h = hidden + i * units, *const c = state + i * state_stride;
      for (int64_t j = 0; j < units; ++j) {
        const float candidate = of_token[j], skip = highway * h[j];
        c[j] = candidate + (c[j] - candidate) * sigmoid(of_token[units + j]);
        h[j] = skip + (c[j] - skip) * sigmoid(of_token[2 * units + j]);
      }
    }
    state += units;
  }
  apply(branch.out, hidden, count, out);
}

void add_feed_forward(const DenseFeedForward& layer, Inputs& inputs, float* y, int64_t y_stride) {
  const int64_t units = layer.up.rows, width = layer.down.rows, count = inputs.count();
  const Room<float> hidden(count * units), results(count * width);
  multiply(layer.up, inputs, hidden, units);
  add_bias(layer.inner_bias, units, hidden, units, count);
  functions().activate(hidden, count * units, layer.activation);
  Inputs of_down(hidden, units, count, units);
  multiply(layer.down, of_down, results, width);
  add_bias(layer.bias, width, results, width, count);
  for (int64_t i = 0; i < count; ++i) {
    add_bias({results + i * width, Format::float32}, width, y + i * y_stride, y_stride, 1);
  }
}

void add_feed_forward(const SparseFeedForward& layer, Inputs& inputs, float* y, int64_t y_stride, int32_t* winners) {
  const int64_t count = inputs.count(), rank = layer.controller_down.rows;
  const Room<float> h(count * rank);
  hfe::touch_pages(layer.controller_down.row(0), rank * layer.controller_down.stride);
  multiply(layer.controller_down, inputs, h, rank);
  hfe::touch_pages(layer.controller_up.row(0), std::min(kPages * hfe::kPage, layer.controller_up.rows * layer.controller_up.stride));
  Inputs of_h(h, rank, count, rank);
  const Operands x = inputs.operands(layer.up.format), hidden = of_h.operands(layer.controller_up.format);
  const int64_t groups = (count + kFew - 1) / kFew;
  for_each_part(groups, kGrainBytes, [&](int64_t first, int64_t last) {
    for (int64_t token = first * kFew; token < std::min(count, last * kFew); token += kFew) {
      const int64_t some = std::min(kFew, count - token);
      FewTokens(layer, x.part(token, some), hidden.part(token, some), y + token * y_stride, y_stride,
                winners ? winners + token * layer.blocks : nullptr)
          .run();
    }
  });
}

}  // namespace decode_layer
