// The backward pass on a GPU: one thread for each column of `column.h`, then one for each parameter's sum over the
// batch, whose order does not depend on how threads run.

#include "../include/sru_cell.h"
#include "launch.h"
#include "sru_cuda.h"

namespace sru {
namespace {

template <typename T, int V, bool Tanh, bool Flagged>
__global__ void __launch_bounds__(kBlock, kBlocks<Flagged>)
    backward_kernel(const __grid_constant__ BackwardProblem problem, int64_t count) {
  const int64_t column = thread_index();
  if (column < count) backward_column<T, V, Tanh, Flagged>(problem, column);
}

template <typename S>
__global__ void __launch_bounds__(kBlock) sum_kernel(const __grid_constant__ BackwardProblem problem, int64_t count) {
  const int64_t index = thread_index();
  if (index < count) sum_column<S>(problem, index);
}

template <typename T, int V, bool Tanh, bool Flagged>
struct Backward : BackwardLimits<T> {
  static void run(const BackwardProblem& problem, cudaStream_t stream) {
    const int64_t count = problem.batch * (problem.width / V);
    launch<BackwardProblem>(backward_kernel<T, V, Tanh, Flagged>, problem, count, stream, "starting the backward pass");
  }
};

}  // namespace

void backward_cuda(const BackwardProblem& problem, int32_t device) {
  const cudaStream_t stream = current_stream(device);
  dispatch<Backward>(problem, enough_threads(device), stream);
  if (problem.grad_weight_c == nullptr && problem.grad_bias == nullptr) return;
  const auto sum = problem.states.kind == Kind::float64 ? sum_kernel<double> : sum_kernel<float>;
  launch<BackwardProblem>(sum, problem, 4 * problem.width, stream, "starting the sums over the batch");
}

}  // namespace sru
