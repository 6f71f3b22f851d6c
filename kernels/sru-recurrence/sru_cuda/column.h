// The recurrence over all steps of V neighbouring units of one row of the batch, forward and backward: what one thread
// does. Threads share nothing. For the host too, so that tests can run it there.
#pragma once

#include "../include/sru_cell.h"
#include "strided_iterator.h"
#include "steps.h"

namespace sru {

template <typename T, int V, bool Tanh, bool Flagged>
class ForwardColumn {
 public:
  using S = typename T::S;
  using Slot = StepInputs<T, V, Flagged>;

  HFE_INLINE ForwardColumn(const SruParams& params, const ThreadTile& tile)
      : inputs_(params, tile),
        h_(params.h, tile, tile.first()),
        states_(params.states, tile, tile.first() + (params.reverse ? 1 : 0)) {
    const S* initial = static_cast<const S*>(params.c0);
    for (int v = 0; v < V; ++v) state_[v] = initial ? initial[tile.row * params.width + tile.unit + v] : S(0);
    states_.store(state_);
    states_.advance();
  }

  HFE_INLINE void read(Slot& slot) { inputs_.read(slot); }

  // Values are selected, not multiplied: a NaN in a pad must not leak.
  HFE_INLINE void work(const Slot& slot) {
    S h[V];
    for (int v = 0; v < V; ++v) {
      const S before = slot.is_beginning() ? S(0) : state_[v];
      const Inputs<S> in = inputs_.inputs(slot, v, before);
      const Outputs<S> out = forward_step<Tanh>(inputs_.unit(v), in, gates_of(inputs_.unit(v), in));
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
  StridedIterator<typename T::H, V> h_;
  StridedIterator<S, V> states_;
  S state_[V];
};

template <typename T, int V, bool Flagged>
struct BackwardSlot {
  StepInputs<T, V, Flagged> inputs;
  AlignedVector<typename T::H, V> grad_h;
  AlignedVector<typename T::S, V> before;
  AlignedVector<typename T::G, V> grad_state;
};

// Steps are worked on from the last in time to the first.
template <typename T, int V, bool Tanh, bool Flagged>
class BackwardColumn {
 public:
  using S = typename T::S;
  using Slot = BackwardSlot<T, V, Flagged>;

  HFE_INLINE BackwardColumn(const SruBackwardParams& params, const ThreadTile& tile)
      : params_(params),
        inputs_(params, tile),
        states_(params.states, tile, last_state(params)),
        grad_states_(params.grad_states, tile, last_state(params)),
        grad_h_(params.grad_h, tile, tile.first()),
        grad_u_(params.grad_u, tile, tile.first()),
        grad_x_(params.grad_x, tile, tile.first()),
        after_(states_.load()) {
    states_.advance();
  }

  HFE_INLINE void read(Slot& slot) {
    inputs_.read(slot.inputs);
    slot.before = states_.load();
    states_.advance();
    if (params_.grad_h.data != nullptr) {
      slot.grad_h = grad_h_.load();
      grad_h_.advance();
    }
    if (params_.grad_states.data != nullptr) {
      slot.grad_state = grad_states_.load();
      grad_states_.advance();
    }
  }

  HFE_INLINE void work(const Slot& slot) {
    const bool token = slot.inputs.is_token(), begins = slot.inputs.is_beginning();
    S u0[V], u1[V], u2[V], x[V];
    for (int v = 0; v < V; ++v) {
      const S before = token && !begins ? slot.before.at(v) : S(0);
      const S at_state = carried_[v] + static_cast<S>(widen(slot.grad_state.at(v)));
      const Inputs<S> in = inputs_.inputs(slot.inputs, v, before);
      const Gradients<S> grad =
          backward_step<Tanh>(inputs_.unit(v), in, gates_of(inputs_.unit(v), in), after_.at(v),
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
  HFE_INLINE void finish(const ThreadTile& tile) const {
    const int64_t width = params_.width;
    S* partial = static_cast<S*>(params_.partial) + tile.row * 4 * width + tile.unit;
    for (int sum = 0; sum < 4; ++sum) {
      for (int v = 0; v < V; ++v) partial[sum * width + v] = sums_[sum][v];
    }
    if (params_.grad_c0 == nullptr) return;
    // The iterator has gone through all steps and is at the initial state.
    AlignedVector<typename T::G, V> given = {};
    if (params_.grad_states.data != nullptr) given = grad_states_.load();
    S* initial = static_cast<S*>(params_.grad_c0) + tile.row * width + tile.unit;
    for (int v = 0; v < V; ++v) initial[v] = carried_[v] + static_cast<S>(widen(given.at(v)));
  }

 private:
  static HFE_INLINE int64_t last_state(const SruParams& params) { return params.reverse ? 0 : params.length; }

  HFE_INLINE void write(const S (&u0)[V], const S (&u1)[V], const S (&u2)[V], const S (&x)[V]) const {
    grad_u_.store(u0, 0);
    grad_u_.store(u1, 1);
    grad_u_.store(u2, 2);
    if (params_.parts == 4) {
      grad_u_.store(x, 3);
    } else if (params_.grad_x.data != nullptr) {
      grad_x_.store(x);
    }
  }

  const SruBackwardParams& params_;
  InputReader<T, V, Flagged> inputs_;
  StridedIterator<S, V> states_;
  StridedIterator<typename T::G, V> grad_states_;
  StridedIterator<typename T::H, V> grad_h_;
  StridedIterator<typename T::U, V> grad_u_;
  StridedIterator<typename T::H, V> grad_x_;
  AlignedVector<S, V> after_;
  S carried_[V] = {};
  S sums_[4][V] = {};
};

template <int V>
HFE_INLINE ThreadTile tile_of(const SruParams& params, int64_t column, bool backwards) {
  const int64_t across = params.width / V;
  return {column / across, column % across * V, params.length, backwards};
}

// `column` counts groups of V units, those of a row of the batch in a row.
template <typename T, int V, bool Tanh, bool Flagged>
HFE_INLINE void forward_column(const SruParams& params, int64_t column) {
  const ThreadTile tile = tile_of<V>(params, column, params.reverse);
  ForwardColumn<T, V, Tanh, Flagged> work(params, tile);
  run_steps<Ring<T, V, ForwardLimits<T>>::kDepth>(work, static_cast<int>(params.length));
}

template <typename T, int V, bool Tanh, bool Flagged>
HFE_INLINE void backward_column(const SruBackwardParams& params, int64_t column) {
  const ThreadTile tile = tile_of<V>(params, column, !params.reverse);
  BackwardColumn<T, V, Tanh, Flagged> work(params, tile);
  run_steps<Ring<T, V, BackwardLimits<T>>::kDepth>(work, static_cast<int>(params.length));
  work.finish(tile);
}

// One of the gradients of v_f, v_r, b_f and b_r, from what the rows of the batch give to it, in their order.
template <typename S>
HFE_INLINE void sum_column(const SruBackwardParams& params, int64_t index) {
  const int64_t size = 4 * params.width, half = 2 * params.width;
  const S* partial = static_cast<const S*>(params.partial) + index;
  S total = 0;
#pragma unroll 8
  for (int64_t row = 0; row < params.batch; ++row) total += partial[row * size];
  S* to = static_cast<S*>(index < half ? params.grad_weight_c : params.grad_bias);
  if (to != nullptr) to[index % half] = total;
}

}  // namespace sru
