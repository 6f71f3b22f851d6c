// The recurrence on a CPU: chunks of units are divided among threads, and each is worked on by the widest instructions
// that the processor has.

#include "sru_cpu.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <type_traits>
#include <vector>

#include "../include/sru_cell.h"
#include "convert.h"
#include "cpu_dispatch.h"

namespace sru {
namespace {

using Forward = void (*)(const SruParams&, int64_t row, int64_t first, int64_t count);
using Backward = void (*)(const SruBackwardParams&, int64_t row, int64_t first, int64_t count);

// By activation: identity, tanh.
struct Passes {
  Forward forward[2];
  Backward backward[2];
};

// By dtypes: of u, and of x and h. What `any` takes goes through buffers where it is not float32.
struct Scans {
  Passes float64, any, bfloat16, float16, bfloat16_in_float32, float16_in_float32;
};

#define HFE_LOOPS "../sru_cpu/loops.h"
#include "every_instruction_set.h"

const LoopsCapability& chosen() {
  static const LoopsCapability choice = hfe::choose_capability(available(), "SRU_RECURRENCE_CPU_CAPABILITY");
  return choice;
}

// Steps of units that are worth a thread: some ten microseconds.
constexpr int64_t kGrain = 16384;

// Units in a chunk: equal parts of the width, in whole cache lines; enough chunks for all threads where that is worth
// their while.
int64_t chunk_size(const SruParams& params) {
  const int64_t most = baseline::kRowBytes / (params.states.dtype == DType::float64 ? 8 : 4);
  const int64_t rows = std::max<int64_t>(params.batch, 1);
  const int64_t worth = rows * params.width * params.length / kGrain;
  const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), std::max<int64_t>(worth, 1));
  // Chunks of all rows are a multiple of the threads, so that none waits for another.
  int64_t parts = std::max<int64_t>((params.width + most - 1) / most, 1);
  while (rows * parts % threads != 0 && rows * parts < 4 * threads) ++parts;
  const int64_t size = (params.width + parts - 1) / parts;
  return std::min(most, std::max<int64_t>(64, (size + 63) / 64 * 64));
}

template <typename P>
void for_each_chunk(const P& params, void (*work)(const P&, int64_t row, int64_t first, int64_t count)) {
  const int64_t size = chunk_size(params), chunks = (params.width + size - 1) / size;
  const int64_t grain = std::max<int64_t>(1, kGrain / (params.length * size));
  torch::stable::parallel_for(0, params.batch * chunks, grain, [&](int64_t begin, int64_t end) {
    for (int64_t index = begin; index < end; ++index) {
      const int64_t first = index % chunks * size;
      work(params, index / chunks, first, std::min(size, params.width - first));
    }
  });
}

// The partial sums of the rows of the batch, in their order.
template <typename S>
void sum_parameters(const SruBackwardParams& params) {
  const int64_t size = 4 * params.width;
  S* total = static_cast<S*>(params.partial);
  for (int64_t row = 1; row < params.batch; ++row) {
    for (int64_t i = 0; i < size; ++i) total[i] += total[row * size + i];
  }
  const int64_t half = size / 2;
  if (params.grad_weight_c) std::copy_n(total, half, static_cast<S*>(params.grad_weight_c));
  if (params.grad_bias) std::copy_n(total + half, half, static_cast<S*>(params.grad_bias));
}

// The passes for the dtypes of a call.
const Passes& passes_for(const SruParams& params, bool same_gradients) {
  const Scans& scans = chosen().functions;
  if (params.states.dtype == DType::float64) return scans.float64;
  const DType u = params.u.dtype, x = params.x ? params.x.dtype : u;
  if (!same_gradients) return scans.any;
  if (u == DType::bfloat16 && x == u) return scans.bfloat16;
  if (u == DType::float16 && x == u) return scans.float16;
  if (u == DType::bfloat16 && x == DType::float32) return scans.bfloat16_in_float32;
  if (u == DType::float16 && x == DType::float32) return scans.float16_in_float32;
  return scans.any;
}

}  // namespace

const char* cpu_capability() { return chosen().name; }

void forward_cpu(const SruParams& params) {
  const DType x = params.x ? params.x.dtype : params.u.dtype;
  for_each_chunk(params, passes_for(params, params.h.dtype == x).forward[params.tanh]);
}

void backward_cpu(const SruBackwardParams& params) {
  const DType x = params.x ? params.x.dtype : params.u.dtype;
  const bool same = params.grad_u.dtype == params.u.dtype && (!params.grad_x || params.grad_x.dtype == x) &&
                    (!params.grad_h || params.grad_h.dtype == x) &&
                    (!params.grad_states || params.grad_states.dtype == params.states.dtype);
  for_each_chunk(params, passes_for(params, same).backward[params.tanh]);
  params.states.dtype == DType::float64 ? sum_parameters<double>(params) : sum_parameters<float>(params);
}

}  // namespace sru
