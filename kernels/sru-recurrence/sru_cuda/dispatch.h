// Which column function a call runs: by dtypes, by activation and by the number of units that a thread takes. Plain C++,
// so that tests can run it without a GPU.
#pragma once

#include <algorithm>
#include <cstdint>

#include "column.h"

namespace sru {

template <typename... Views>
bool all_of_dtype(DType dtype, const Views&... views) {
  return ((!views || views.dtype == dtype) && ...);
}

// Whether rows allow accesses to `units` neighbouring elements, in accesses of up to 16 bytes.
inline bool is_aligned(const TensorView& view, int64_t units) {
  const int64_t size = size_of(view.dtype), access = std::min(units * size, static_cast<int64_t>(hfe::kAccess));
  const int64_t strides = view.batch_stride | view.step_stride | view.part_stride;
  return !view || (static_cast<int64_t>(reinterpret_cast<uintptr_t>(view.data)) | strides * size) % access == 0;
}

template <typename... Views>
bool all_aligned(int64_t units, const Views&... views) {
  return (is_aligned(views, units) && ...);
}

inline bool allows(const SruParams& params, int64_t units) {
  return all_aligned(units, params.u, params.x, params.h, params.states);
}

inline bool allows(const SruBackwardParams& params, int64_t units) {
  return all_aligned(units, params.u, params.x, params.states, params.grad_h, params.grad_states, params.grad_u,
                     params.grad_x);
}

// What `forward_column` and `backward_column` need to know of a call.
struct Layout {
  DType u, h;
  bool uniform;  // x, h and their gradients have one dtype, and so have u and its gradient
  int64_t widest;  // units of a thread at most
};

inline Layout layout_of(const SruParams& params) {
  const DType u = params.u.dtype, h = params.h.dtype;
  const bool uniform = all_of_dtype(h, params.x) && (params.parts == 3 || u == h);
  return {u, h, uniform, static_cast<int64_t>(hfe::kAccess) / size_of(u)};
}

inline Layout layout_of(const SruBackwardParams& params) {
  const DType u = params.u.dtype, h = params.x ? params.x.dtype : params.grad_h ? params.grad_h.dtype : u;
  const bool uniform = all_of_dtype(h, params.grad_h, params.grad_x) && all_of_dtype(u, params.grad_u) &&
                       all_of_dtype(params.states.dtype, params.grad_states) && (params.parts == 3 || u == h);
  return {u, h, uniform, static_cast<int64_t>(hfe::kAccess) / size_of(params.states.dtype)};
}

// Units that a thread takes: the most that divide a row evenly and that addresses allow. More of them take fewer
// instructions for each byte; but neighbouring addresses are read together anyway, so it is worth more that there are
// `enough` threads: with few, each step waits for the one before it.
template <typename Params>
int units_per_thread(const Params& params, int64_t widest, int64_t enough) {
  for (int64_t units = widest; units > 1; units /= 2) {
    const bool fits = params.width % units == 0 && allows(params, units);
    if (fits && params.batch * params.width / units >= enough) return static_cast<int>(units);
  }
  return 1;
}

// What else a kernel is made for.
struct Options {
  bool tanh, flagged;
};

// `Run<T, V, Tanh, Flagged>::run(arguments...)` for a call's types, units of a thread and options; `kWidest` is the
// largest V.
template <template <typename, int, bool, bool> class Run, typename T, int V, typename... Arguments>
void by_options(Options options, Arguments&&... arguments) {
  if (options.flagged) {
    options.tanh ? Run<T, V, true, true>::run(arguments...) : Run<T, V, false, true>::run(arguments...);
  } else {
    options.tanh ? Run<T, V, true, false>::run(arguments...) : Run<T, V, false, false>::run(arguments...);
  }
}

template <template <typename, int, bool, bool> class Run, typename T, int V = Run<T, 1, false, false>::kWidest,
          typename... Arguments>
void by_units(int units, Options options, Arguments&&... arguments) {
  if constexpr (V > 1) {
    if (units < V) return by_units<Run, T, V / 2>(units, options, arguments...);
  }
  by_options<Run, T, V>(options, arguments...);
}

template <template <typename, int, bool, bool> class Run, typename U, typename... Arguments>
bool by_half(const Layout& layout, Arguments&&... arguments) {
  if (layout.h == layout.u) {
    by_units<Run, Types<float, U, U>>(arguments...);
    return true;
  }
  if (layout.h != DType::float32) return false;
  by_units<Run, Types<float, U, float>>(arguments...);
  return true;
}

template <template <typename, int, bool, bool> class Run, typename... Arguments>
bool by_dtypes(const Layout& layout, Arguments&&... arguments) {
  if (!layout.uniform) return false;
  if (layout.u == DType::bfloat16) return by_half<Run, hfe::BFloat16>(layout, arguments...);
  if (layout.u == DType::float16) return by_half<Run, hfe::Float16>(layout, arguments...);
  if (layout.h != layout.u) return false;
  if (layout.u == DType::float32) {
    by_units<Run, Types<float, float, float>>(arguments...);
  } else {
    by_units<Run, Types<double, double, double>>(arguments...);
  }
  return true;
}

// Runs a call; `enough` threads keep the machine busy.
template <template <typename, int, bool, bool> class Run, typename P, typename... Arguments>
void dispatch(const P& params, int64_t enough, Arguments&&... arguments) {
  const Layout layout = layout_of(params);
  const int units = units_per_thread(params, layout.widest, enough);
  const Options options{params.tanh, params.mask.data != nullptr || params.document_start.data != nullptr};
  if (by_dtypes<Run>(layout, units, options, params, arguments...)) return;
  if (params.states.dtype == DType::float64) {
    by_options<Run, Types<double, Any, Any, Any>, 1>(options, params, arguments...);
  } else {
    by_options<Run, Types<float, Any, Any, Any>, 1>(options, params, arguments...);
  }
}

}  // namespace sru
