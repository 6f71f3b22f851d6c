// The CUDA form's threads run one after the other on the host, chosen and given as on a GPU, and add up in the same order.

#include <algorithm>
#include <set>
#include <string>
#include <type_traits>

#include "sparse_ff_cuda/dispatch.h"

namespace {

using namespace sparse_ff;

std::set<std::string> ran;

template <typename T, int V>
std::string kernel_name(const std::string& launch) {
  const char* dtype = std::is_same_v<T, float> ? "float32" : std::is_same_v<T, BFloat16> ? "bfloat16" : "float16";
  return launch + " " + dtype + " V" + std::to_string(V);
}

constexpr int kThreads = kLanes * kWarps;

// Blocks of threads of a small GPU: up to so many rows are multiplied by whole blocks, more of them by warps.
constexpr int64_t kGrid = 12;

// As shuffles add up: each lane takes the sum of its own and that of the lane opposite.
float lanes_sum(const float* lanes, int count) {
  float now[kLanes], next[kLanes];
  std::copy(lanes, lanes + count, now);
  for (int offset = count / 2; offset > 0; offset /= 2) {
    for (int lane = 0; lane < count; ++lane) next[lane] = now[lane] + now[lane ^ offset];
    std::copy(next, next + count, now);
  }
  return now[0];
}

template <typename T, int V, int G>
void products(int64_t items, const T* row, int64_t width, const TensorView& x, int64_t first, int tokens,
              float (&sums)[G]) {
  const int warps = items <= kGrid ? kWarps : 1;
  float shares[kWarps * kLanes], of_lane[kThreads][G];
  for (int lane = 0; lane < warps * kLanes; ++lane) {
    lane_products<T, V, G>(row, width, x, first, tokens, lane, warps * kLanes, of_lane[lane]);
  }
  for (int t = 0; t < G; ++t) {
    for (int lane = 0; lane < warps * kLanes; ++lane) shares[lane] = of_lane[lane][t];
    sums[t] = lanes_sum(shares, kLanes);
    for (int w = 1; w < warps; ++w) sums[t] += lanes_sum(shares + w * kLanes, kLanes);
  }
}

// The best of a block's units, as lanes, then warps find it, for each token of a group.
template <typename T, int V, int G>
void lead(const SparseFfParams& params, int64_t block, int64_t first, int tokens, Leader (&best)[G]) {
  const int lanes = lanes_of<V>(params.rank), rows = kThreads / lanes, in_warp = kLanes / lanes;
  Leader found[kThreads][G];
  for (int64_t unit = 0; unit < params.units; ++unit) {
    float of_lane[kLanes][G], shares[kLanes];
    for (int lane = 0; lane < lanes; ++lane) {
      lane_products<T, V, G>(row_at<T>(params.controller_up, block, unit), params.rank, hidden_values(params), first,
                             tokens, lane, lanes, of_lane[lane]);
    }
    for (int t = 0; t < tokens; ++t) {
      for (int lane = 0; lane < lanes; ++lane) shares[lane] = of_lane[lane][t];
      Leader& leader = found[unit % rows][t];
      leader = merged(leader, leader_of(params, block, unit, lanes_sum(shares, lanes)));
    }
  }
  for (int t = 0; t < tokens; ++t) {
    for (int w = 0; w < kWarps; ++w) {
      Leader* const of_warp = &found[w * in_warp][t];
      for (int offset = in_warp / 2; offset > 0; offset /= 2) {
        for (int i = 0; i < offset; ++i) of_warp[i * G] = merged(of_warp[i * G], of_warp[(i + offset) * G]);
      }
      best[t] = w == 0 ? of_warp[0] : merged(best[t], of_warp[0]);
    }
  }
}

struct Controller {
  const SparseFfParams& params;

  template <typename T, int V, int G>
  void run_groups() const {
    ran.insert(kernel_name<T, V>("controller") + " G" + std::to_string(G));
    const int64_t groups = groups_of<G>(params.tokens);
    float sums[G];
    for (int64_t group = 0; group < groups; ++group) {
      const int tokens = tokens_of<G>(params, group);
      for (int64_t row = 0; row < params.rank; ++row) {
        const T* const weights = row_at<T>(params.controller_down, row, 0);
        products<T, V, G>(params.rank * groups, weights, params.width, params.x, group * G, tokens, sums);
        for (int t = 0; t < tokens; ++t) params.h[(group * G + t) * params.rank + row] = sums[t];
      }
      for (int64_t block = 0; block < params.blocks; ++block) {
        Leader best[G];
        lead<T, V, G>(params, block, group * G, tokens, best);
        for (int t = 0; t < tokens; ++t) keep_winner(params, block, group * G + t, best[t]);
      }
    }
  }

  template <typename T, int V>
  void run() const {
    params.tokens == 1 ? run_groups<T, V, 1>() : run_groups<T, V, kTokens>();
  }
};

struct Winners {
  const SparseFfParams& params;

  template <typename T, int V>
  void run() const {
    ran.insert(kernel_name<T, V>("winners"));
    float sums[1];
    for (int64_t token = 0; token < params.tokens; ++token) {
      for (int64_t block = 0; block < params.blocks; ++block) {
        const int32_t winner = params.winners[token * params.blocks + block];
        const T* const row = row_at<T>(params.up, block, winner);
        products<T, V, 1>(params.tokens * params.blocks, row, params.width, params.x, token, 1, sums);
        keep_hidden(params, block, token, sums[0]);
      }
      for (int64_t column = 0; column < params.width; ++column) {
        float sum = column_sum<T>(params, token, column, 0);
        for (int w = 1; w < kWarps; ++w) sum += column_sum<T>(params, token, column, w);
        write_number(params, token, column, sum);
      }
    }
  }
};

}  // namespace

extern "C" void emulate(const SparseFfParams* params) {
  ran.clear();
  by_dtype(params->controller_up.dtype, wide_controller(*params), Controller{*params});
  by_dtype(params->up.dtype, wide_rows(*params), Winners{*params});
}

// The instantiations that the last call ran, one a line.
extern "C" const char* last_kernels() {
  static std::string text;
  text.clear();
  for (const std::string& name : ran) text += name + "\n";
  return text.c_str();
}

extern "C" int64_t size_of_params() { return sizeof(SparseFfParams); }
