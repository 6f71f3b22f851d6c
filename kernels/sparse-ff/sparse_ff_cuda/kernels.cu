// The sparse feed-forward on a GPU in two launches: the controller with the search for winners; and the winners' rows,
// activation and second product. Both halves of each wait for one another across the whole grid, which is therefore no
// larger than the device can run at once.

#include <cooperative_groups.h>

#include <type_traits>

#include "cuda_launch.h"
#include "dispatch.h"
#include "sparse_ff_cuda.h"

namespace sparse_ff {
namespace {

constexpr const char* kOp = "The sparse feed-forward";
constexpr int kThreads = kLanes * kWarps;

// Blocks of threads that a multiprocessor has room for, so that a grid of so many times its multiprocessors runs at once.
constexpr int kBlocks = 2;

__device__ __forceinline__ int lane() { return threadIdx.x % kLanes; }
__device__ __forceinline__ int warp() { return threadIdx.x / kLanes; }

// The sum over neighbouring `lanes`, in each of them.
__device__ __forceinline__ float lanes_sum(float value, int lanes) {
  for (int offset = lanes / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(0xffffffffu, value, offset);
  return value;
}

__device__ __forceinline__ Leader leader_opposite(const Leader& leader, int offset) {
  return {__shfl_xor_sync(0xffffffffu, leader.best, offset), __shfl_xor_sync(0xffffffffu, leader.unit, offset),
          __shfl_xor_sync(0xffffffffu, leader.total, offset)};
}

// A row's products with a group of tokens by all threads of a block. `keep(t, sum)` is called by one thread for each.
template <typename T, int V, int G, typename Keep>
__device__ __forceinline__ void block_products(const T* row, int64_t width, const TensorView& x, int64_t first, int tokens,
                                               const Keep& keep) {
  __shared__ float shares[kWarps][G];
  float sums[G];
  lane_products<T, V, G>(row, width, x, first, tokens, threadIdx.x, kThreads, sums);
#pragma unroll
  for (int t = 0; t < G; ++t) {
    const float sum = lanes_sum(sums[t], kLanes);
    if (lane() == 0) shares[warp()][t] = sum;
  }
  __syncthreads();
  if (threadIdx.x < tokens) {
    float sum = shares[0][threadIdx.x];
    for (int w = 1; w < kWarps; ++w) sum += shares[w][threadIdx.x];
    keep(threadIdx.x, sum);
  }
  __syncthreads();
}

// The same by one warp.
template <typename T, int V, int G, typename Keep>
__device__ __forceinline__ void warp_products(const T* row, int64_t width, const TensorView& x, int64_t first, int tokens,
                                              const Keep& keep) {
  float sums[G];
  lane_products<T, V, G>(row, width, x, first, tokens, lane(), kLanes, sums);
#pragma unroll
  for (int t = 0; t < G; ++t) {
    const float sum = lanes_sum(sums[t], kLanes);
    if (lane() == 0 && t < tokens) keep(t, sum);
  }
}

// `multiply(item, by_block)` for so many rows: by whole blocks where that leaves none without work for long, else by
// warps, which need not wait for one another.
template <typename Multiply>
__device__ __forceinline__ void for_rows(int64_t items, const Multiply& multiply) {
  if (items <= gridDim.x) {
    if (blockIdx.x < items) multiply(blockIdx.x, std::true_type());
    return;
  }
  const int64_t step = static_cast<int64_t>(gridDim.x) * kWarps;
  for (int64_t item = blockIdx.x + static_cast<int64_t>(warp()) * gridDim.x; item < items; item += step) {
    multiply(item, std::false_type());
  }
}

template <typename T, int V, int G, typename Keep>
__device__ __forceinline__ void products(std::true_type, const T* row, int64_t width, const TensorView& x, int64_t first,
                                         int tokens, const Keep& keep) {
  block_products<T, V, G>(row, width, x, first, tokens, keep);
}

template <typename T, int V, int G, typename Keep>
__device__ __forceinline__ void products(std::false_type, const T* row, int64_t width, const TensorView& x, int64_t first,
                                         int tokens, const Keep& keep) {
  warp_products<T, V, G>(row, width, x, first, tokens, keep);
}

template <typename T, int V, int G>
__device__ __forceinline__ void project(const SparseFfParams& params) {
  for_rows(params.rank * groups_of<G>(params.tokens), [&](int64_t item, auto by_block) {
    const int64_t row = item % params.rank, first = item / params.rank * G;
    products<T, V, G>(by_block, row_at<T>(params.controller_down, row, 0), params.width, params.x, first,
                      tokens_of<G>(params, item / params.rank),
                      [&](int t, float sum) { params.h[(first + t) * params.rank + row] = sum; });
  });
}

// The best of a block's units that these lanes see, for each token of a group. Rows are short: as many lanes as one takes
// multiply it, and a warp has several.
template <typename T, int V, int G>
__device__ __forceinline__ void lead(const SparseFfParams& params, int64_t block, int64_t first, int tokens,
                                     Leader (&leaders)[G]) {
  constexpr int kUnits = G == 1 ? kUnitsAtOnce : 1;
  const int lanes = lanes_of<V>(params.rank), rows = kThreads / lanes;
  for (int64_t start = threadIdx.x / lanes; start - threadIdx.x / lanes < params.units; start += kUnits * rows) {
    float sums[kUnits][G];
#pragma unroll
    for (int u = 0; u < kUnits; ++u) {
      const int64_t unit = start + u * rows;
      if (unit < params.units) {
        lane_products<T, V, G>(row_at<T>(params.controller_up, block, unit), params.rank, hidden_values(params), first,
                               tokens, lane() % lanes, lanes, sums[u]);
      } else {
        for (int t = 0; t < G; ++t) sums[u][t] = 0.0f;
      }
    }
#pragma unroll
    for (int u = 0; u < kUnits; ++u) {
      const int64_t unit = start + u * rows;
#pragma unroll
      for (int t = 0; t < G; ++t) {
        const float sum = lanes_sum(sums[u][t], lanes);
        if (unit < params.units) leaders[t] = merged(leaders[t], leader_of(params, block, unit, sum));
      }
    }
  }
#pragma unroll
  for (int t = 0; t < G; ++t) {
    for (int offset = kLanes / 2; offset >= lanes; offset /= 2) {
      leaders[t] = merged(leaders[t], leader_opposite(leaders[t], offset));
    }
  }
}

template <typename T, int V, int G>
__device__ __forceinline__ void find_winners(const SparseFfParams& params) {
  __shared__ Leader found[kWarps][G];
  const int64_t items = params.blocks * groups_of<G>(params.tokens);
  for (int64_t item = blockIdx.x; item < items; item += gridDim.x) {
    const int64_t block = item % params.blocks, group = item / params.blocks;
    const int tokens = tokens_of<G>(params, group);
    Leader leaders[G];
    lead<T, V, G>(params, block, group * G, tokens, leaders);
    if (lane() == 0) {
#pragma unroll
      for (int t = 0; t < G; ++t) found[warp()][t] = leaders[t];
    }
    __syncthreads();
    if (threadIdx.x < tokens) {
      Leader best = found[0][threadIdx.x];
      for (int w = 1; w < kWarps; ++w) best = merged(best, found[w][threadIdx.x]);
      keep_winner(params, block, group * G + threadIdx.x, best);
    }
    __syncthreads();
  }
}

template <typename T, int V, int G>
__global__ void __launch_bounds__(kThreads, kBlocks)
    controller_kernel(const __grid_constant__ SparseFfParams params) {
  project<T, V, G>(params);
  cooperative_groups::this_grid().sync();
  find_winners<T, V, G>(params);
}

template <typename T, int V>
__device__ __forceinline__ void multiply_winners(const SparseFfParams& params) {
  for_rows(params.tokens * params.blocks, [&](int64_t item, auto by_block) {
    const int64_t token = item / params.blocks, block = item % params.blocks;
    products<T, V, 1>(by_block, row_at<T>(params.up, block, params.winners[item]), params.width, params.x, token, 1,
                      [&](int, float product) { keep_hidden(params, block, token, product); });
  });
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
  int64_t items;  // of the larger half, at most one for each block of threads
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
    const char* const what = "starting the controller";
    params.tokens == 1 ? start(controller_kernel<T, V, 1>, what) : start(controller_kernel<T, V, kTokens>, what);
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
  const int64_t groups = params.tokens == 1 ? 1 : groups_of<kTokens>(params.tokens);
  const int64_t controller = (params.rank > params.blocks ? params.rank : params.blocks) * groups;
  by_dtype(params.controller_up.dtype, wide_controller(params), Controller{{params, controller, device}});
  const int64_t slices = (params.width + kLanes - 1) / kLanes;
  const int64_t winners = (params.blocks > slices ? params.blocks : slices) * params.tokens;
  by_dtype(params.up.dtype, wide_rows(params), Winners{{params, winners, device}});
}

}  // namespace sparse_ff
