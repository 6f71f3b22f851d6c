// Which column function a call runs: by dtypes, by activation and by the number of units that a thread takes. Plain C++,
// so that tests can run it without a GPU.
#pragma once

#include <cstdint>
#include <initializer_list>

#include "column.h"

namespace sru {

template <typename... Rest>
bool all_of_kind(Kind kind, const Rest&... rows) {
  return ((!rows || rows.kind == kind) && ...);
}

// What `forward_column` and `backward_column` need to know of a call.
struct Layout {
  Kind u, h;
  bool uniform;  // x, h and their gradients have one dtype, and so have u and its gradient
  int64_t aligned;  // bytes: the largest power of two, up to 16, that divides all addresses and strides
  int64_t widest;  // units of a thread at most
};

inline int64_t alignment_of(std::initializer_list<const Rows*> all) {
  int64_t bits = kAccess;
  for (const Rows* rows : all) {
    if (!*rows) continue;
    const int64_t strides = rows->batch_stride | rows->step_stride | rows->part_stride;
    bits |= static_cast<int64_t>(reinterpret_cast<uintptr_t>(rows->data)) | strides * size_of(rows->kind);
  }
  return bits & -bits;
}

inline Layout layout_of(const Problem& problem) {
  const Kind u = problem.u.kind, h = problem.h.kind;
  const bool uniform = all_of_kind(h, problem.x) && (problem.parts == 3 || u == h);
  return {u, h, uniform, alignment_of({&problem.u, &problem.x, &problem.h, &problem.states}),
          static_cast<int64_t>(kAccess) / size_of(u)};
}

inline Layout layout_of(const BackwardProblem& problem) {
  const Kind u = problem.u.kind, h = problem.x ? problem.x.kind : problem.grad_h ? problem.grad_h.kind : u;
  const bool uniform = all_of_kind(h, problem.grad_h, problem.grad_x) && all_of_kind(u, problem.grad_u) &&
                       all_of_kind(problem.states.kind, problem.grad_states) && (problem.parts == 3 || u == h);
  return {u, h, uniform,
          alignment_of({&problem.u, &problem.x, &problem.states, &problem.grad_h, &problem.grad_states,
                        &problem.grad_u, &problem.grad_x}),
          static_cast<int64_t>(kAccess) / size_of(problem.states.kind)};
}

// Units that a thread takes: the most, or two, or one. More of them take fewer instructions for each byte; but
// neighbouring addresses are read together anyway, so it is worth more that there are `enough` threads: with few, each
// step waits for the one before it. A row must divide evenly, and addresses must allow accesses of the whole width, up
// to 16 bytes.
inline int units_per_thread(const Problem& problem, const Layout& layout, int64_t enough) {
  for (const int64_t units : {layout.widest, int64_t{2}}) {
    const int64_t width = units * size_of(problem.states.kind), access = kAccess;
    const bool fits = layout.aligned >= (width < access ? width : access) && problem.width % units == 0;
    if (fits && problem.batch * problem.width / units >= enough) return static_cast<int>(units);
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

template <template <typename, int, bool, bool> class Run, typename T, typename... Arguments>
void by_units(int units, Options options, Arguments&&... arguments) {
  constexpr int kWidest = Run<T, 1, false, false>::kWidest;
  if (units == 1) return by_options<Run, T, 1>(options, arguments...);
  if (units == 2) return by_options<Run, T, 2>(options, arguments...);
  if constexpr (kWidest > 2) by_options<Run, T, kWidest>(options, arguments...);
}

template <template <typename, int, bool, bool> class Run, typename U, typename... Arguments>
bool by_half(const Layout& layout, Arguments&&... arguments) {
  if (layout.h == layout.u) {
    by_units<Run, Types<float, U, U>>(arguments...);
    return true;
  }
  if (layout.h != Kind::float32) return false;
  by_units<Run, Types<float, U, float>>(arguments...);
  return true;
}

template <template <typename, int, bool, bool> class Run, typename... Arguments>
bool by_kinds(const Layout& layout, Arguments&&... arguments) {
  if (!layout.uniform) return false;
  if (layout.u == Kind::bfloat16) return by_half<Run, BFloat16>(layout, arguments...);
  if (layout.u == Kind::float16) return by_half<Run, Float16>(layout, arguments...);
  if (layout.h != layout.u) return false;
  if (layout.u == Kind::float32) {
    by_units<Run, Types<float, float, float>>(arguments...);
  } else {
    by_units<Run, Types<double, double, double>>(arguments...);
  }
  return true;
}

// Runs a call; `enough` threads keep the machine busy.
template <template <typename, int, bool, bool> class Run, typename P, typename... Arguments>
void dispatch(const P& problem, int64_t enough, Arguments&&... arguments) {
  const Layout layout = layout_of(problem);
  const int units = units_per_thread(problem, layout, enough);
  const Options options{problem.tanh, problem.mask.data != nullptr || problem.reset.data != nullptr};
  if (by_kinds<Run>(layout, units, options, problem, arguments...)) return;
  if (problem.states.kind == Kind::float64) {
    by_options<Run, Types<double, Any, Any, Any>, 1>(options, problem, arguments...);
  } else {
    by_options<Run, Types<float, Any, Any, Any>, 1>(options, problem, arguments...);
  }
}

}  // namespace sru
