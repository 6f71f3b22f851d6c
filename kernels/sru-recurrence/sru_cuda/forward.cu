// The forward pass on a GPU: one thread for each column of `column.h`.

#include "../include/sru_cell.h"
#include "launch.h"
#include "sru_cuda.h"

namespace sru {
namespace {

template <typename T, int V, bool Tanh, bool Flagged>
__global__ void __launch_bounds__(kBlock, kBlocks<Flagged>) forward_kernel(const __grid_constant__ Problem problem, int64_t count) {
  const int64_t column = thread_index();
  if (column < count) forward_column<T, V, Tanh, Flagged>(problem, column);
}

template <typename T, int V, bool Tanh, bool Flagged>
struct Forward : ForwardLimits<T> {
  static void run(const Problem& problem, cudaStream_t stream) {
    const int64_t count = problem.batch * (problem.width / V);
    launch<Problem>(forward_kernel<T, V, Tanh, Flagged>, problem, count, stream, "starting the forward pass");
  }
};

}  // namespace

void forward_cuda(const Problem& problem, int32_t device) {
  dispatch<Forward>(problem, enough_threads(device), current_stream(device));
}

}  // namespace sru
