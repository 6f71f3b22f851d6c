// The backward pass on a GPU: one thread for each column of `column.h`, then one for each parameter's sum over the
// batch, whose order does not depend on how threads run.

#include "../include/sru_cell.h"
#include "launch.h"
#include "sru_cuda.h"

namespace sru {
namespace {

template <typename T, int V, bool Tanh, bool Flagged>
__global__ void __launch_bounds__(kBlock, kBlocks<Flagged>)
    backward_kernel(const __grid_constant__ SruBackwardParams params, int64_t count) {
  const int64_t column = thread_index();
  if (column < count) backward_column<T, V, Tanh, Flagged>(params, column);
}

template <typename S>
__global__ void __launch_bounds__(kBlock) sum_kernel(const __grid_constant__ SruBackwardParams params, int64_t count) {
  const int64_t index = thread_index();
  if (index < count) sum_column<S>(params, index);
}

template <typename T, int V, bool Tanh, bool Flagged>
struct Backward : BackwardLimits<T> {
  static void run(const SruBackwardParams& params, cudaStream_t stream) {
    const int64_t count = params.batch * (params.width / V);
    launch(backward_kernel<T, V, Tanh, Flagged>, params, count, stream, "starting the backward pass");
  }
};

}  // namespace

void backward_cuda(const SruBackwardParams& params, int32_t device) {
  const cudaStream_t stream = hfe::current_stream(device, kOp);
  dispatch<Backward>(params, enough_threads(device), stream);
  if (params.grad_weight_c == nullptr && params.grad_bias == nullptr) return;
  const auto sum = params.states.dtype == DType::float64 ? sum_kernel<double> : sum_kernel<float>;
  launch(sum, params, 4 * params.width, stream, "starting the sums over the batch");
}

}  // namespace sru
