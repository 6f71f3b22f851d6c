// The recurrence on a CPU: chunks of units are divided among threads, and each is worked on by the widest instructions
// that the processor has.

#include "sru_cpu.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "../include/sru_cell.h"
#include "convert.h"

namespace sru {
namespace {

using Forward = void (*)(const Problem&, int64_t row, int64_t first, int64_t count);
using Backward = void (*)(const BackwardProblem&, int64_t row, int64_t first, int64_t count);

// By activation: identity, tanh.
struct Scans {
  Forward forward_float[2], forward_double[2];
  Backward backward_float[2], backward_double[2];
};

#define SRU_PRAGMA(text) _Pragma(#text)

// The iterations of the loop that follows write to different places and read what no other writes.
#if defined(__clang__)
#define SRU_INDEPENDENT SRU_PRAGMA(clang loop vectorize(assume_safety))
#else
#define SRU_INDEPENDENT SRU_PRAGMA(GCC ivdep)
#endif

namespace baseline {
#include "scan_rows.h"
#include "scan.h"
#include "scan_backward.h"
}

#if defined(__x86_64__)
#if defined(__clang__)
#define SRU_BEGIN_TARGET(names) SRU_PRAGMA(clang attribute push(__attribute__((target(names))), apply_to = function))
#define SRU_END_TARGET _Pragma("clang attribute pop")
#define SRU_PREFER_WIDE ""
#else
#define SRU_BEGIN_TARGET(names) _Pragma("GCC push_options") SRU_PRAGMA(GCC target(names))
#define SRU_END_TARGET _Pragma("GCC pop_options")
#define SRU_PREFER_WIDE ",prefer-vector-width=512"
#endif

SRU_BEGIN_TARGET("avx2,fma")
namespace avx2 {
#include "scan_rows.h"
#include "scan.h"
#include "scan_backward.h"
}
SRU_END_TARGET

SRU_BEGIN_TARGET("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma" SRU_PREFER_WIDE)
namespace avx512 {
#include "scan_rows.h"
#include "scan.h"
#include "scan_backward.h"
}
SRU_END_TARGET
#endif

struct Choice {
  const char* name;
  Scans scans;
};

// Every instruction set that this build and this processor have, the widest first.
std::vector<Choice> available() {
  std::vector<Choice> choices;
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl")) {
    choices.push_back({"avx512", avx512::scans()});
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) choices.push_back({"avx2", avx2::scans()});
#endif
  choices.push_back({"baseline", baseline::scans()});
  return choices;
}

// The widest, or the one that the environment names, so that tests can reach each.
Choice choose() {
  const std::vector<Choice> choices = available();
  const char* wanted = std::getenv("SRU_RECURRENCE_CPU_CAPABILITY");
  if (wanted == nullptr) return choices.front();
  std::string names;
  for (const Choice& choice : choices) {
    if (std::strcmp(choice.name, wanted) == 0) return choice;
    names += names.empty() ? choice.name : std::string(", ") + choice.name;
  }
  STD_TORCH_CHECK(false, "SRU_RECURRENCE_CPU_CAPABILITY is ", wanted, ", but here it is one of ", names, ".");
}

const Choice& chosen() {
  static const Choice choice = choose();
  return choice;
}

// Steps of units that are worth a thread: some ten microseconds.
constexpr int64_t kGrain = 16384;

// Units in a chunk: equal parts of the width, in whole cache lines; enough chunks for all threads where that is worth
// their while.
int64_t chunk_size(const Problem& problem) {
  const int64_t most = baseline::kRowBytes / (problem.states.kind == Kind::float64 ? 8 : 4);
  const int64_t rows = std::max<int64_t>(problem.batch, 1);
  const int64_t worth = rows * problem.width * problem.length / kGrain;
  const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), std::max<int64_t>(worth, 1));
  // Chunks of all rows are a multiple of the threads, so that none waits for another.
  int64_t parts = std::max<int64_t>((problem.width + most - 1) / most, 1);
  while (rows * parts % threads != 0 && rows * parts < 4 * threads) ++parts;
  const int64_t size = (problem.width + parts - 1) / parts;
  return std::min(most, std::max<int64_t>(64, (size + 63) / 64 * 64));
}

template <typename P>
void for_each_chunk(const P& problem, void (*work)(const P&, int64_t row, int64_t first, int64_t count)) {
  const int64_t size = chunk_size(problem), chunks = (problem.width + size - 1) / size;
  const int64_t grain = std::max<int64_t>(1, kGrain / (problem.length * size));
  torch::stable::parallel_for(0, problem.batch * chunks, grain, [&](int64_t begin, int64_t end) {
    for (int64_t index = begin; index < end; ++index) {
      const int64_t first = index % chunks * size;
      work(problem, index / chunks, first, std::min(size, problem.width - first));
    }
  });
}

// The partial sums of the rows of the batch, in their order.
template <typename S>
void sum_parameters(const BackwardProblem& problem) {
  const int64_t size = 4 * problem.width;
  S* total = static_cast<S*>(problem.partial);
  for (int64_t row = 1; row < problem.batch; ++row) {
    for (int64_t i = 0; i < size; ++i) total[i] += total[row * size + i];
  }
  const int64_t half = size / 2;
  if (problem.grad_weight_c) std::copy_n(total, half, static_cast<S*>(problem.grad_weight_c));
  if (problem.grad_bias) std::copy_n(total + half, half, static_cast<S*>(problem.grad_bias));
}

}  // namespace

const char* cpu_capability() { return chosen().name; }

void forward_cpu(const Problem& problem) {
  const Scans& scans = chosen().scans;
  const bool wide = problem.states.kind == Kind::float64;
  for_each_chunk(problem, (wide ? scans.forward_double : scans.forward_float)[problem.tanh]);
}

void backward_cpu(const BackwardProblem& problem) {
  const Scans& scans = chosen().scans;
  const bool wide = problem.states.kind == Kind::float64;
  for_each_chunk(problem, (wide ? scans.backward_double : scans.backward_float)[problem.tanh]);
  wide ? sum_parameters<double>(problem) : sum_parameters<float>(problem);
}

}  // namespace sru
