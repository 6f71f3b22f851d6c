// Many tokens: block by block, so that weights pass through the cache once for all tokens of a tile. In a block, tokens
// are sorted by their winner: a unit's rows are read for all of its tokens at once, and those of a unit that nobody chose
// not at all.

#include <torch/csrc/stable/ops.h>

#include "call.h"

namespace sparse_ff {
namespace {

// Inputs and results of a tile have so many bytes at most: they are read again for every block.
constexpr int64_t kTileBytes = int64_t(4) << 20;

// Tokens of a tile. More tiles than threads need would read the weights once more.
int64_t tile_size(const SparseFfParams& params) {
  const int64_t most = std::max<int64_t>(kFew, kTileBytes / (2 * params.width * static_cast<int64_t>(sizeof(float))));
  const int64_t threads = torch::stable::get_num_threads();
  int64_t tiles = (params.tokens + most - 1) / most;
  tiles = (tiles + threads - 1) / threads * threads;
  const int64_t size = (params.tokens + tiles - 1) / tiles;
  return (size + kFew - 1) / kFew * kFew;
}

class Tile {
 public:
  Tile(const SparseFfParams& params, int64_t first, int64_t tokens)
      : params_(params),
        first_(first),
        tokens_(tokens),
        x_(params.x, first, tokens, params.width),
        y_(params.y, first, tokens, params.width),
        h_stride_(padded(params.rank)),
        h_(tokens * h_stride_),
        winners_(tokens),
        probabilities_(tokens),
        order_(tokens),
        starts_(params.units + 1),
        up_(row_functions(params.up.dtype)),
        down_(row_functions(params.down.dtype)) {}

  void run() {
    x_.read();
    y_.fill(params_.bias);
    project();
    Logits logits(params_);
    for (int64_t k = 0; k < params_.blocks; ++k) {
      find_winners(k, logits);
      sort_tokens();
      work_on(k);
    }
    y_.write();
  }

 private:
  void project() {
    const TensorView& rows = params_.controller_down;
    const RowFunctions& of = row_functions(rows.dtype);
    std::fill_n(static_cast<float*>(h_), tokens_ * h_stride_, 0.0f);
    for (int64_t t = 0; t < tokens_; t += kFew) {
      of.project(rows.data, rows.batch_stride, params_.rank, params_.width, x_.pointers() + t,
                 std::min(kFew, tokens_ - t), h_ + t * h_stride_, h_stride_);
    }
  }

  void find_winners(int64_t k, Logits& logits) {
    Ahead ahead;
    logits.take_bias(k);
    for (int64_t t = 0; t < tokens_; t += kFew) {
      logits.find_winners(k, h_ + t * h_stride_, h_stride_, std::min(kFew, tokens_ - t), ahead, &winners_[t],
                          &probabilities_[t]);
    }
    for (int64_t t = 0; t < tokens_; ++t) params_.winners[(first_ + t) * params_.blocks + k] = winners_[t];
  }

  // The tokens of each unit: order[starts[unit]] and so on, up to starts[unit + 1].
  void sort_tokens() {
    std::fill(starts_.begin(), starts_.end(), 0);
    for (const int32_t winner : winners_) ++starts_[winner + 1];
    for (int64_t n = 0; n < params_.units; ++n) starts_[n + 1] += starts_[n];
    for (int64_t t = tokens_; t-- > 0;) order_[--starts_[winners_[t] + 1]] = static_cast<int32_t>(t);
    // Each start was moved to the beginning of its unit, one place too far behind.
    std::copy(starts_.begin() + 1, starts_.end(), starts_.begin());
    starts_.back() = static_cast<int32_t>(tokens_);
  }

  void work_on(int64_t k) {
    int64_t n = next_unit(0);
    while (n < params_.units) {
      const int64_t after = next_unit(n + 1);
      if (after < params_.units) ask_for(params_.up, k, after);
      multiply(k, n);
      add(k, n);
      n = after;
    }
  }

  int64_t next_unit(int64_t n) const {
    while (n < params_.units && starts_[n] == starts_[n + 1]) ++n;
    return n;
  }

  void ask_for(const TensorView& rows, int64_t k, int64_t n) const {
    Ahead ahead;
    ahead.add(row_at(rows, k, n), params_.width * size_of(rows));
    ahead.spread(1);
    ahead.step();
  }

  // A unit's tokens, `kFew` at a time, by `work(tokens, count)`.
  template <typename Work>
  void for_each_few(int64_t n, const Work& work) const {
    for (int32_t i = starts_[n]; i < starts_[n + 1]; i += kFew) {
      work(&order_[i], std::min<int64_t>(kFew, starts_[n + 1] - i));
    }
  }

  void multiply(int64_t k, int64_t n) {
    for_each_few(n, [&](const int32_t* tokens, int64_t count) {
      const float* x[kFew];
      float products[kFew];
      for (int64_t i = 0; i < count; ++i) x[i] = x_.pointers()[tokens[i]];
      up_.multiply(row_at(params_.up, k, n), params_.width, x, count, products);
      for (int64_t i = 0; i < count; ++i) {
        float& kept = probabilities_[tokens[i]];
        kept = hidden_of(params_, products[i], k, static_cast<int32_t>(n), kept);
      }
    });
  }

  void add(int64_t k, int64_t n) {
    for_each_few(n, [&](const int32_t* tokens, int64_t count) {
      float* y[kFew];
      float hidden[kFew];
      int64_t alive = 0;
      for (int64_t i = 0; i < count; ++i) {
        const float value = probabilities_[tokens[i]];
        if (value == 0.0f) continue;
        hidden[alive] = value;
        y[alive++] = y_.pointers()[tokens[i]];
      }
      if (alive > 0) down_.add(row_at(params_.down, k, n), params_.width, hidden, y, alive);
    });
  }

  const SparseFfParams& params_;
  int64_t first_, tokens_;
  Rows x_, y_;
  int64_t h_stride_;
  Room h_;
  std::vector<int32_t> winners_;
  // Of a block: the winners' probabilities, and then what they give.
  std::vector<float> probabilities_;
  std::vector<int32_t> order_, starts_;
  const RowFunctions &up_, &down_;
};

}  // namespace

void forward_many(const SparseFfParams& params) {
  const int64_t size = tile_size(params), tiles = (params.tokens + size - 1) / size;
  torch::stable::parallel_for(0, tiles, 1, [&](int64_t begin, int64_t end) {
    for (int64_t tile = begin; tile < end; ++tile) {
      Tile(params, tile * size, std::min(size, params.tokens - tile * size)).run();
    }
  });
}

}  // namespace sparse_ff
