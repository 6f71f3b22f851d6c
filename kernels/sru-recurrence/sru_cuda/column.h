// The recurrence over all steps of V neighbouring units of one row of the batch, forward and backward: what one thread
// does. Threads share nothing. For the host too, so that tests can run it there.
#pragma once

#include "../include/sru_cell.h"
#include "memory.h"
#include "steps.h"

namespace sru {

template <typename T, int V, bool Tanh, bool Flagged>
class ForwardColumn {
 public:
  using S = typename T::S;
  using Slot = StepInputs<T, V, Flagged>;

  SRU_INLINE ForwardColumn(const Problem& problem, const Walk& walk)
      : inputs_(problem, walk),
        h_(problem.h, walk, walk.first()),
        states_(problem.states, walk, walk.first() + (problem.reverse ? 1 : 0)) {
    const S* initial = static_cast<const S*>(problem.c0);
    for (int v = 0; v < V; ++v) state_[v] = initial ? initial[walk.row * problem.width + walk.unit + v] : S(0);
    states_.store(state_);
    states_.advance();
  }

  SRU_INLINE void read(Slot& slot) { inputs_.read(slot); }

  // Values are selected, not multiplied: a NaN in a pad must not leak.
  SRU_INLINE void work(const Slot& slot) {
    S h[V];
    for (int v = 0; v < V; ++v) {
      const S before = slot.is_beginning() ? S(0) : state_[v];
      const Outputs<S> out = forward_step<Tanh>(inputs_.unit(v), inputs_.inputs(slot, v, before));
      state_[v] = slot.is_token() ? out.after : before;
      h[v] = slot.is_token() ? out.h : S(0);
    }
    h_.store(h);
    states_.store(state_);
    h_.advance();
    states_.advance();
  }

 private:
  InputReader<T, V, Flagged> inputs_;
  Cursor<typename T::H, V> h_;
  Cursor<S, V> states_;
  S state_[V];
};

template <typename T, int V, bool Flagged>
struct BackwardSlot {
  StepInputs<T, V, Flagged> inputs;
  Pack<typename T::H, V> grad_h;
  Pack<typename T::S, V> before;
  Pack<typename T::G, V> grad_state;
};

// Steps are worked on from the last in time to the first.
template <typename T, int V, bool Tanh, bool Flagged>
class BackwardColumn {
 public:
  using S = typename T::S;
  using Slot = BackwardSlot<T, V, Flagged>;

  SRU_INLINE BackwardColumn(const BackwardProblem& problem, const Walk& walk)
      : problem_(problem),
        inputs_(problem, walk),
        states_(problem.states, walk, last_state(problem)),
        grad_states_(problem.grad_states, walk, last_state(problem)),
        grad_h_(problem.grad_h, walk, walk.first()),
        grad_u_(problem.grad_u, walk, walk.first()),
        grad_x_(problem.grad_x, walk, walk.first()),
        after_(states_.load()) {
    states_.advance();
  }

  SRU_INLINE void read(Slot& slot) {
    inputs_.read(slot.inputs);
    slot.before = states_.load();
    states_.advance();
    if (problem_.grad_h.data != nullptr) {
      slot.grad_h = grad_h_.load();
      grad_h_.advance();
    }
    if (problem_.grad_states.data != nullptr) {
      slot.grad_state = grad_states_.load();
      grad_states_.advance();
    }
  }

  SRU_INLINE void work(const Slot& slot) {
    const bool token = slot.inputs.is_token(), begins = slot.inputs.is_beginning();
    S u0[V], u1[V], u2[V], x[V];
    for (int v = 0; v < V; ++v) {
      const S before = token && !begins ? slot.before.at(v) : S(0);
      const S at_state = carried_[v] + static_cast<S>(widen(slot.grad_state.at(v)));
      const Gradients<S> grad =
          backward_step<Tanh>(inputs_.unit(v), inputs_.inputs(slot.inputs, v, before), after_.at(v),
                              static_cast<S>(widen(slot.grad_h.at(v))), at_state);
      u0[v] = token ? grad.u0 : S(0);
      u1[v] = token ? grad.u1 : S(0);
      u2[v] = token ? grad.u2 : S(0);
      x[v] = token ? grad.x * inputs_.scale() : S(0);
      // Where a document begins, what came before it is not concerned.
      carried_[v] = begins ? S(0) : token ? grad.before : at_state;
      sums_[0][v] += u1[v] * before;
      sums_[1][v] += u2[v] * before;
      sums_[2][v] += u1[v];
      sums_[3][v] += u2[v];
    }
    after_ = slot.before;
    write(u0, u1, u2, x);
    grad_u_.advance();
    grad_x_.advance();
  }

  // What is known once all steps are done.
  SRU_INLINE void finish(const Walk& walk) const {
    const int64_t width = problem_.width;
    S* partial = static_cast<S*>(problem_.partial) + walk.row * 4 * width + walk.unit;
    for (int sum = 0; sum < 4; ++sum) {
      for (int v = 0; v < V; ++v) partial[sum * width + v] = sums_[sum][v];
    }
    if (problem_.grad_c0 == nullptr) return;
    // The cursor has gone through all steps and is at the initial state.
    Pack<typename T::G, V> given = {};
    if (problem_.grad_states.data != nullptr) given = grad_states_.load();
    S* initial = static_cast<S*>(problem_.grad_c0) + walk.row * width + walk.unit;
    for (int v = 0; v < V; ++v) initial[v] = carried_[v] + static_cast<S>(widen(given.at(v)));
  }

 private:
  static SRU_INLINE int64_t last_state(const Problem& problem) { return problem.reverse ? 0 : problem.length; }

  SRU_INLINE void write(const S (&u0)[V], const S (&u1)[V], const S (&u2)[V], const S (&x)[V]) const {
    grad_u_.store(u0, 0);
    grad_u_.store(u1, 1);
    grad_u_.store(u2, 2);
    if (problem_.parts == 4) {
      grad_u_.store(x, 3);
    } else if (problem_.grad_x.data != nullptr) {
      grad_x_.store(x);
    }
  }

  const BackwardProblem& problem_;
  InputReader<T, V, Flagged> inputs_;
  Cursor<S, V> states_;
  Cursor<typename T::G, V> grad_states_;
  Cursor<typename T::H, V> grad_h_;
  Cursor<typename T::U, V> grad_u_;
  Cursor<typename T::H, V> grad_x_;
  Pack<S, V> after_;
  S carried_[V] = {};
  S sums_[4][V] = {};
};

template <int V>
SRU_INLINE Walk walk_of(const Problem& problem, int64_t column, bool backwards) {
  const int64_t across = problem.width / V;
  return {column / across, column % across * V, problem.length, backwards};
}

// `column` counts groups of V units, those of a row of the batch in a row.
template <typename T, int V, bool Tanh, bool Flagged>
SRU_INLINE void forward_column(const Problem& problem, int64_t column) {
  const Walk walk = walk_of<V>(problem, column, problem.reverse);
  ForwardColumn<T, V, Tanh, Flagged> work(problem, walk);
  run_steps<Ring<T, V, ForwardLimits<T>>::kDepth>(work, static_cast<int>(problem.length));
}

template <typename T, int V, bool Tanh, bool Flagged>
SRU_INLINE void backward_column(const BackwardProblem& problem, int64_t column) {
  const Walk walk = walk_of<V>(problem, column, !problem.reverse);
  BackwardColumn<T, V, Tanh, Flagged> work(problem, walk);
  run_steps<Ring<T, V, BackwardLimits<T>>::kDepth>(work, static_cast<int>(problem.length));
  work.finish(walk);
}

// One of the gradients of v_f, v_r, b_f and b_r, from what the rows of the batch give to it, in their order.
template <typename S>
SRU_INLINE void sum_column(const BackwardProblem& problem, int64_t index) {
  const int64_t size = 4 * problem.width, half = 2 * problem.width;
  const S* partial = static_cast<const S*>(problem.partial) + index;
  S total = 0;
#pragma unroll 8
  for (int64_t row = 0; row < problem.batch; ++row) total += partial[row * size];
  S* to = static_cast<S*>(index < half ? problem.grad_weight_c : problem.grad_bias);
  if (to != nullptr) to[index % half] = total;
}

}  // namespace sru
