// Up to `kFew` tokens: blocks pass through a pipeline, see unit_pipeline.h.

#include <torch/csrc/stable/ops.h>

#include "call.h"

namespace sparse_ff {
namespace {

using Winners = hfe::BlockWinners;

class FewTokens {
 public:
  explicit FewTokens(const SparseFfParams& params)
      : params_(params),
        x_(params.x, 0, params.tokens, params.width),
        y_(params.y, 0, params.tokens, params.width),
        h_stride_(padded(params.rank)),
        h_(params.tokens * h_stride_),
        up_(row_functions(params.up.dtype)),
        down_(row_functions(params.down.dtype)) {
    x_.read();
    std::fill_n(static_cast<float*>(h_), params.tokens * h_stride_, 0.0f);
  }

  void run() {
    const int64_t threads = torch::stable::get_num_threads();
    const int64_t bytes = params_.units * params_.rank * size_of(params_.controller_up) +
                          params_.tokens * params_.width * size_of(params_.up);
    const int64_t grain = std::max<int64_t>(1, kGrainBytes / bytes);
    y_.fill(params_.bias);
    if (threads == 1 || params_.blocks <= grain) {
      project(0, params_.rank);
      work_on(0, params_.blocks, nullptr);
    } else {
      run_on_threads(grain);
    }
    y_.write();
  }

  // The stages of the pipeline.

  void ask_for_up(int64_t k, const Winners& winners, Ahead& ahead) const {
    for (int64_t t = 0; t < params_.tokens; ++t) {
      ahead.add(row_at(params_.up, k, winners.units[t]), params_.width * size_of(params_.up));
    }
  }

  void ask_for_down(int64_t k, const Winners& winners, Ahead& ahead) const {
    for (int64_t t = 0; t < params_.tokens; ++t) {
      if (winners.hidden[t] == 0.0f) continue;
      ahead.add(row_at(params_.down, k, winners.units[t]), params_.width * size_of(params_.down));
    }
  }

  void multiply(int64_t k, Winners& winners) const {
    for (int64_t t = 0; t < params_.tokens; ++t) {
      float product = 0.0f;
      up_.multiply(row_at(params_.up, k, winners.units[t]), params_.width, x_.pointers() + t, 1, &product);
      winners.hidden[t] = hidden_of(params_, product, k, winners.units[t], winners.probabilities[t]);
    }
  }

  void add(int64_t k, const Winners& winners) const { add_rows(k, winners, 0, params_.width); }

 private:
  // Bytes that are worth a thread: some ten microseconds.
  static constexpr int64_t kGrainBytes = 1 << 18;

  void project(int64_t first, int64_t last) {
    const TensorView& rows = params_.controller_down;
    row_functions(rows.dtype)
        .project(row_at(rows, first, 0), rows.batch_stride, last - first, params_.width, x_.pointers(), params_.tokens,
                 h_ + first, h_stride_);
  }

  // Blocks are divided among threads, and then the columns of y: each is summed in the order of the blocks, as one
  // thread does it.
  void run_on_threads(int64_t grain) {
    const int64_t row_bytes = params_.width * size_of(params_.controller_down);
    torch::stable::parallel_for(0, params_.rank, std::max<int64_t>(1, kGrainBytes / row_bytes),
                                [&](int64_t first, int64_t last) { project(first, last); });
    std::vector<Winners> all(params_.blocks);
    torch::stable::parallel_for(0, params_.blocks, grain,
                                [&](int64_t first, int64_t last) { work_on(first, last, all.data()); });
    const int64_t lines = (params_.width + kPadding - 1) / kPadding;
    const int64_t line_bytes = params_.blocks * params_.tokens * kPadding * size_of(params_.down);
    torch::stable::parallel_for(0, lines, std::max<int64_t>(1, kGrainBytes / line_bytes), [&](int64_t first, int64_t last) {
      const int64_t column = first * kPadding, end = std::min(params_.width, last * kPadding);
      for (int64_t k = 0; k < params_.blocks; ++k) add_rows(k, all[k], column, end - column);
    });
  }

  // Blocks from `first` to `last`. Where `all` is given, what they give is kept there and not added to y.
  void work_on(int64_t first, int64_t last, Winners* all) {
    Logits logits(params_);
    const auto find = [&](int64_t k, Ahead& ahead, Winners& found) {
      logits.take_bias(k);
      logits.find_winners(k, h_, h_stride_, params_.tokens, ahead, found.units, found.probabilities);
      for (int64_t t = 0; t < params_.tokens; ++t) params_.winners[t * params_.blocks + k] = found.units[t];
    };
    hfe::run_pipeline(*this, find, first, last, (params_.units + 3) / 4, params_.tokens, all);
  }

  void add_rows(int64_t k, const Winners& winners, int64_t column, int64_t count) const {
    for (int64_t t = 0; t < params_.tokens; ++t) {
      if (winners.hidden[t] == 0.0f) continue;
      float* const y = y_.pointers()[t] + column;
      down_.add(row_at(params_.down, k, winners.units[t]) + column * size_of(params_.down), count, &winners.hidden[t],
                &y, 1);
    }
  }

  const SparseFfParams& params_;
  Rows x_, y_;
  int64_t h_stride_;
  Room h_;
  const RowFunctions &up_, &down_;
};

}  // namespace

void forward_few(const SparseFfParams& params) { FewTokens(params).run(); }

}  // namespace sparse_ff
