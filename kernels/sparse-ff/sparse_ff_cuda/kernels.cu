// The sparse feed-forward on a GPU in two launches: the controller with the search for winners; and the winners' rows,
// activation and second product. Both halves of each wait for one another across the whole grid, which is therefore no
// larger than the device can run at once.

#include <cooperative_groups.h>

#include "cuda_launch.h"
#include "dispatch.h"
#include "sparse_ff_cuda.h"

namespace sparse_ff {
namespace {

constexpr const char* kOp = "The sparse feed-forward";
constexpr int kThreads = kLanes * kWarps;

// Blocks of threads that a multiprocessor has room for, so that a grid of so many times its multiprocessors runs at once.
constexpr int kBlocks = 2;

// The sum over a warp, in every lane.
__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
  for (int offset = kLanes / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(0xffffffffu, value, offset);
  return value;
}

__device__ __forceinline__ int lane() { return threadIdx.x % kLanes; }
__device__ __forceinline__ int warp() { return threadIdx.x / kLanes; }

// One row's products with a group of tokens, in every lane.
template <typename T, int V>
__device__ __forceinline__ void warp_products(const T* row, int64_t width, const TensorView& x, int64_t first,
                                              int tokens, float (&sums)[kTokens]) {
  lane_products<T, V>(row, width, x, first, tokens, lane(), sums);
#pragma unroll
  for (int t = 0; t < kTokens; ++t) sums[t] = warp_sum(sums[t]);
}

template <typename T, int V>
__device__ __forceinline__ void project(const SparseFfParams& params) {
  const int64_t items = params.rank * groups_of(params.tokens);
  for (int64_t item = blockIdx.x * kWarps + warp(); item < items; item += gridDim.x * kWarps) {
    const int64_t row = item % params.rank, group = item / params.rank;
    const int tokens = tokens_of(params, group);
    float sums[kTokens];
    warp_products<T, V>(row_at<T>(params.controller_down, row, 0), params.width, params.x, group * kTokens, tokens, sums);
    if (lane() != 0) continue;
#pragma unroll
    for (int t = 0; t < kTokens; ++t) {
      if (t < tokens) params.h[(group * kTokens + t) * params.rank + row] = sums[t];
    }
  }
}

template <typename T, int V>
__device__ __forceinline__ void find_winners(const SparseFfParams& params) {
  __shared__ Leader found[kWarps][kTokens];
  const int64_t items = params.blocks * groups_of(params.tokens);
  for (int64_t item = blockIdx.x; item < items; item += gridDim.x) {
    const int64_t block = item % params.blocks, group = item / params.blocks;
    const int tokens = tokens_of(params, group);
    Leader leaders[kTokens];
    for (int64_t unit = warp(); unit < params.units; unit += kWarps) {
      float sums[kTokens];
      warp_products<T, V>(row_at<T>(params.controller_up, block, unit), params.rank, hidden_values(params),
                          group * kTokens, tokens, sums);
#pragma unroll
      for (int t = 0; t < kTokens; ++t) leaders[t] = merged(leaders[t], leader_of(params, block, unit, sums[t]));
    }
    if (lane() == 0) {
#pragma unroll
      for (int t = 0; t < kTokens; ++t) found[warp()][t] = leaders[t];
    }
    __syncthreads();
    if (threadIdx.x < tokens) {
      Leader best = found[0][threadIdx.x];
      for (int w = 1; w < kWarps; ++w) best = merged(best, found[w][threadIdx.x]);
      keep_winner(params, block, group * kTokens + threadIdx.x, best);
    }
    __syncthreads();
  }
}

template <typename T, int V>
__global__ void __launch_bounds__(kThreads, kBlocks)
    controller_kernel(const __grid_constant__ SparseFfParams params) {
  project<T, V>(params);
  cooperative_groups::this_grid().sync();
  find_winners<T, V>(params);
}

template <typename T, int V>
__device__ __forceinline__ void multiply_winners(const SparseFfParams& params) {
  const int64_t items = params.tokens * params.blocks;
  for (int64_t item = blockIdx.x * kWarps + warp(); item < items; item += gridDim.x * kWarps) {
    const int64_t token = item / params.blocks, block = item % params.blocks;
    float sums[kTokens];
    lane_products<T, V>(row_at<T>(params.up, block, params.winners[item]), params.width, params.x, token, 1, lane(), sums);
    const float product = warp_sum(sums[0]);
    if (lane() == 0) keep_hidden(params, block, token, product);
  }
}

template <typename T>
__device__ __forceinline__ void add_up(const SparseFfParams& params) {
  __shared__ float sums[kWarps][kLanes];
  const int64_t slices = (params.width + kLanes - 1) / kLanes;
  for (int64_t item = blockIdx.x; item < params.tokens * slices; item += gridDim.x) {
    const int64_t token = item / slices, column = item % slices * kLanes + lane();
    const bool inside = column < params.width;
    sums[warp()][lane()] = inside ? column_sum<T>(params, token, column, warp()) : 0.0f;
    __syncthreads();
    if (warp() == 0 && inside) {
      float sum = sums[0][lane()];
      for (int w = 1; w < kWarps; ++w) sum += sums[w][lane()];
      write_number(params, token, column, sum);
    }
    __syncthreads();
  }
}

template <typename T, int V>
__global__ void __launch_bounds__(kThreads, kBlocks) winners_kernel(const __grid_constant__ SparseFfParams params) {
  multiply_winners<T, V>(params);
  cooperative_groups::this_grid().sync();
  add_up<T>(params);
}

// What both launches have.
struct Launch {
  const SparseFfParams& params;
  int64_t items;  // of the larger half, in blocks of threads
  int32_t device;

  void start(void (*kernel)(SparseFfParams), const char* what) const {
    const int64_t most = hfe::multiprocessors_of(device, kOp) * kBlocks;
    const auto grid = static_cast<unsigned>(items < most ? items : most);
    void* arguments[] = {const_cast<SparseFfParams*>(&params)};
    hfe::check(cudaLaunchCooperativeKernel(reinterpret_cast<const void*>(kernel), dim3(grid), dim3(kThreads), arguments, 0,
                                           hfe::current_stream(device, kOp)),
               kOp, what);
  }
};

struct Controller : Launch {
  template <typename T, int V>
  void run() const {
    start(controller_kernel<T, V>, "starting the controller");
  }
};

struct Winners : Launch {
  template <typename T, int V>
  void run() const {
    start(winners_kernel<T, V>, "starting the winners' products");
  }
};

}  // namespace

void forward_cuda(const SparseFfParams& params, int32_t device) {
  if (params.tokens == 0) return;
  const int64_t groups = groups_of(params.tokens), slices = (params.width + kLanes - 1) / kLanes;
  const int64_t rows = (params.rank * groups + kWarps - 1) / kWarps;
  const int64_t controller = rows > params.blocks * groups ? rows : params.blocks * groups;
  by_dtype(params.controller_up.dtype, wide_controller(params), Controller{{params, controller, device}});
  const int64_t products = (params.tokens * params.blocks + kWarps - 1) / kWarps, sums = params.tokens * slices;
  by_dtype(params.up.dtype, wide_rows(params), Winners{{params, products > sums ? products : sums, device}});
}

}  // namespace sparse_ff
