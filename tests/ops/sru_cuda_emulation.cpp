// The CUDA form's columns run one after the other on the host, chosen and given as on a GPU. Each instantiation that the
// dispatcher holds makes itself known when the library is loaded, so that tests can tell which of them they have run.

#include <set>
#include <string>
#include <type_traits>

#include "sru_cuda/dispatch.h"

namespace {

std::set<std::string>& kernels() {
  static std::set<std::string> names;
  return names;
}

std::string last;

template <typename T>
std::string dtype_name() {
  if (std::is_same_v<T, sru::Any>) return "any";
  if (std::is_same_v<T, double>) return "float64";
  if (std::is_same_v<T, float>) return "float32";
  return std::is_same_v<T, hfe::BFloat16> ? "bfloat16" : "float16";
}

template <typename T, int V, bool Tanh, bool Flagged>
std::string kernel_name(const std::string& pass) {
  return pass + " " + dtype_name<typename T::U>() + " " + dtype_name<typename T::H>() + " " +
         dtype_name<typename T::S>() + " V" + std::to_string(V) + (Tanh ? " tanh" : " identity") +
         (Flagged ? " flags" : " no-flags");
}

template <typename T, int V, bool Tanh, bool Flagged>
struct Forward : sru::ForwardLimits<T> {
  static inline const bool known = kernels().insert(kernel_name<T, V, Tanh, Flagged>("forward")).second;

  static void run(const sru::SruParams& params) {
    static_cast<void>(&known);
    last = kernel_name<T, V, Tanh, Flagged>("forward");
    const int64_t count = params.batch * (params.width / V);
    for (int64_t column = 0; column < count; ++column) sru::forward_column<T, V, Tanh, Flagged>(params, column);
  }
};

template <typename T, int V, bool Tanh, bool Flagged>
struct Backward : sru::BackwardLimits<T> {
  static inline const bool known = kernels().insert(kernel_name<T, V, Tanh, Flagged>("backward")).second;

  static void run(const sru::SruBackwardParams& params) {
    static_cast<void>(&known);
    last = kernel_name<T, V, Tanh, Flagged>("backward");
    const int64_t count = params.batch * (params.width / V);
    for (int64_t column = 0; column < count; ++column) sru::backward_column<T, V, Tanh, Flagged>(params, column);
  }
};

template <typename S>
void sum(const sru::SruBackwardParams& params) {
  for (int64_t index = 0; index < 4 * params.width; ++index) sru::sum_column<S>(params, index);
}

}  // namespace

extern "C" void emulate_forward(const sru::SruParams* params, int64_t enough) {
  sru::dispatch<Forward>(*params, enough);
}

extern "C" void emulate_backward(const sru::SruBackwardParams* params, int64_t enough) {
  sru::dispatch<Backward>(*params, enough);
  params->states.dtype == sru::DType::float64 ? sum<double>(*params) : sum<float>(*params);
}

// The instantiation that ran last, and all that there are, one a line.
extern "C" const char* last_kernel() { return last.c_str(); }

extern "C" const char* all_kernels() {
  static std::string text;
  text.clear();
  for (const std::string& name : kernels()) text += name + "\n";
  return text.c_str();
}

extern "C" int64_t sizes_of_params() { return sizeof(sru::SruParams) * 1000 + sizeof(sru::SruBackwardParams); }
