// The CUDA form's columns run one after the other on the host, chosen and given as on a GPU.

#include "sru_cuda/dispatch.h"

namespace {

template <typename T, int V, bool Tanh, bool Flagged>
struct Forward : sru::ForwardLimits<T> {
  static void run(const sru::Problem& problem, int& units) {
    units = V;
    const int64_t count = problem.batch * (problem.width / V);
    for (int64_t column = 0; column < count; ++column) sru::forward_column<T, V, Tanh, Flagged>(problem, column);
  }
};

template <typename T, int V, bool Tanh, bool Flagged>
struct Backward : sru::BackwardLimits<T> {
  static void run(const sru::BackwardProblem& problem, int& units) {
    units = V;
    const int64_t count = problem.batch * (problem.width / V);
    for (int64_t column = 0; column < count; ++column) sru::backward_column<T, V, Tanh, Flagged>(problem, column);
  }
};

template <typename S>
void sum(const sru::BackwardProblem& problem) {
  for (int64_t index = 0; index < 4 * problem.width; ++index) sru::sum_column<S>(problem, index);
}

}  // namespace

// Both return the number of units that a thread takes.
extern "C" int emulate_forward(const sru::Problem* problem, int64_t enough) {
  int units = 0;
  sru::dispatch<Forward>(*problem, enough, units);
  return units;
}

extern "C" int emulate_backward(const sru::BackwardProblem* problem, int64_t enough) {
  int units = 0;
  sru::dispatch<Backward>(*problem, enough, units);
  problem->states.kind == sru::Kind::float64 ? sum<double>(*problem) : sum<float>(*problem);
  return units;
}

extern "C" int64_t sizes_of_problems() { return sizeof(sru::Problem) * 1000 + sizeof(sru::BackwardProblem); }
