// The forward pass on a GPU: one thread for each column of `column.h`.

#include "../include/sru_cell.h"
#include "launch.h"
#include "sru_cuda.h"

namespace sru {
namespace {

template <typename T, int V, bool Tanh, bool Flagged>
__global__ void __launch_bounds__(kBlock, kBlocks<Flagged>)
    forward_kernel(const __grid_constant__ SruParams params, int64_t count) {
  const int64_t column = thread_index();
  if (column < count) forward_column<T, V, Tanh, Flagged>(params, column);
}

template <typename T, int V, bool Tanh, bool Flagged>
struct Forward : ForwardLimits<T> {
  static void run(const SruParams& params, cudaStream_t stream) {
    const int64_t count = params.batch * (params.width / V);
    launch(forward_kernel<T, V, Tanh, Flagged>, params, count, stream, "starting the forward pass");
  }
};

}  // namespace

void forward_cuda(const SruParams& params, int32_t device) {
  dispatch<Forward>(params, enough_threads(device), hfe::current_stream(device, kOp));
}

}  // namespace sru
