// The CUDA form's threads run one after the other on the host, chosen and given as on a GPU, and add up in the same order.
//

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

// As shuffles add up: each lane takes the sum of its own and that of the lane opposite.
float warp_sum(const float (&lanes)[kLanes]) {
  float now[kLanes], next[kLanes];
  std::copy(lanes, lanes + kLanes, now);
  for (int offset = kLanes / 2; offset > 0; offset /= 2) {
    for (int lane = 0; lane < kLanes; ++lane) next[lane] = now[lane] + now[lane ^ offset];
    std::copy(next, next + kLanes, now);
  }
  return now[0];
}

template <typename T, int V>
void warp_products(const T* row, int64_t width, const TensorView& x, int64_t first, int tokens, float (&sums)[kTokens]) {
  float of_lane[kTokens], by_token[kTokens][kLanes];
  for (int lane = 0; lane < kLanes; ++lane) {
    lane_products<T, V>(row, width, x, first, tokens, lane, of_lane);
    for (int t = 0; t < kTokens; ++t) by_token[t][lane] = of_lane[t];
  }
  for (int t = 0; t < kTokens; ++t) sums[t] = warp_sum(by_token[t]);
}

struct Controller {
  const SparseFfParams& params;

  template <typename T, int V>
  void run() const {
    ran.insert(kernel_name<T, V>("controller"));
    float sums[kTokens];
    for (int64_t group = 0; group < groups_of(params.tokens); ++group) {
      const int tokens = tokens_of(params, group);
      for (int64_t row = 0; row < params.rank; ++row) {
        const T* const weights = row_at<T>(params.controller_down, row, 0);
        warp_products<T, V>(weights, params.width, params.x, group * kTokens, tokens, sums);
        for (int t = 0; t < tokens; ++t) params.h[(group * kTokens + t) * params.rank + row] = sums[t];
      }
      for (int64_t block = 0; block < params.blocks; ++block) {
        Leader found[kWarps][kTokens];
        for (int64_t unit = 0; unit < params.units; ++unit) {
          warp_products<T, V>(row_at<T>(params.controller_up, block, unit), params.rank, hidden_values(params),
                              group * kTokens, tokens, sums);
          for (int t = 0; t < tokens; ++t) {
            Leader& leader = found[unit % kWarps][t];
            leader = merged(leader, leader_of(params, block, unit, sums[t]));
          }
        }
        for (int t = 0; t < tokens; ++t) {
          Leader best = found[0][t];
          for (int w = 1; w < kWarps; ++w) best = merged(best, found[w][t]);
          keep_winner(params, block, group * kTokens + t, best);
        }
      }
    }
  }
};

struct Winners {
  const SparseFfParams& params;

  template <typename T, int V>
  void run() const {
    ran.insert(kernel_name<T, V>("winners"));
    float sums[kTokens];
    for (int64_t token = 0; token < params.tokens; ++token) {
      for (int64_t block = 0; block < params.blocks; ++block) {
        const int32_t winner = params.winners[token * params.blocks + block];
        warp_products<T, V>(row_at<T>(params.up, block, winner), params.width, params.x, token, 1, sums);
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
