// What both passes share: how far loads run ahead of the steps that need them, and what is loaded for a step.
//
// Only the state is sequential, and what is loaded does not depend on it: loads go into a ring of registers. The deeper
// the ring, the more bytes are on their way, and it must be tens of kilobytes on each multiprocessor, however few the
// columns are.
#pragma once

#include "../include/sru_cell.h"
#include "strided_iterator.h"

namespace sru {

// dtypes of the state and the parameters, of u, of x and h, and of the states' gradients.
template <typename State, typename Input, typename Highway, typename StateGradient = State>
struct Types {
  using S = State;
  using U = Input;
  using H = Highway;
  using G = StateGradient;
};

// Units of a thread at most, as many as make accesses of 16 bytes to u in the forward pass, to the states in the
// backward pass; and registers that the ring has for each of u's parts, or for the states. In the backward pass more is
// loaded at a step, and no step waits long for the one before it. Wider or deeper, registers would not suffice.
template <typename T>
struct ForwardLimits {
  using Element = typename T::U;
  static constexpr int kWidest = hfe::kAccess / sizeof(Element), kRegisters = 16;
};

template <typename T>
struct BackwardLimits {
  using Element = typename T::S;
  static constexpr int kWidest = hfe::kAccess / sizeof(Element), kRegisters = 8;
};

// Steps that a ring holds; the fewest where elements are converted as they are loaded, which waits for them.
template <typename T, int V, typename Limits>
struct Ring {
  static constexpr int kOfStep = (sizeof(typename Limits::Element) * V + 3) / 4;
  static constexpr int kDepth = std::is_same_v<typename T::U, Any> ? 2 : Limits::kRegisters / kOfStep;
};

// The first step of a group that has been loaded, then the loads of the other group, then the group's other steps. The
// compiler waits for all loads together, and so the first step, which waits for its group, must not come after the loads
// of the other.
template <int Group, typename Column, typename Slot>
HFE_INLINE void run_group(Column& column, const Slot (&group)[Group], Slot (&other)[Group], bool load) {
  column.work(group[0]);
  if (load) {
#pragma unroll
    for (int i = 0; i < Group; ++i) column.read(other[i]);
  }
#pragma unroll
  for (int i = 1; i < Group; ++i) column.work(group[i]);
}

// Calls column.read(slot) and, later, column.work(slot) for each step.
template <int Depth, typename Column>
HFE_INLINE void run_steps(Column& column, int length) {
  constexpr int Group = Depth / 2;
  using Slot = typename Column::Slot;
  const int groups = length / Group;
  Slot even[Group] = {}, odd[Group] = {};
  if (groups > 0) {
#pragma unroll
    for (int i = 0; i < Group; ++i) column.read(even[i]);
  }
  for (int group = 0; group < groups; group += 2) {
    run_group<Group>(column, even, odd, group + 1 < groups);
    if (group + 1 < groups) run_group<Group>(column, odd, even, group + 2 < groups);
  }
#pragma unroll 1
  for (int step = groups * Group; step < length; ++step) {
    Slot slot = {};
    column.read(slot);
    column.work(slot);
  }
}

// What both passes read at a step.
template <typename T, int V, bool Flagged>
struct StepInputs {
  AlignedVector<typename T::U, V> u0, u1, u2;
  AlignedVector<typename T::H, V> highway;
  uint8_t token = true, begins = false;

  // Without flags this is known to the compiler.
  HFE_INLINE bool is_token() const { return !Flagged || token; }
  HFE_INLINE bool is_beginning() const { return Flagged && begins; }
};

template <typename T, int V, bool Flagged>
class InputReader {
 public:
  using S = typename T::S;

  HFE_INLINE InputReader(const SruParams& params, const ThreadTile& tile)
      : params_(params),
        u_(params.u, tile, tile.first()),
        highway_(params.parts == 4 ? Highway(params.u, tile, tile.first(), 3) : Highway(params.x, tile, tile.first())),
        mask_(params.mask, tile),
        document_start_(params.document_start, tile),
        // The original scales the layer's input, not the fourth part of u.
        scale_(params.x.data != nullptr ? static_cast<S>(params.scale_x) : S(1)) {
    const S* weights = static_cast<const S*>(params.weight_c);
    const S* biases = static_cast<const S*>(params.bias);
    const S* dropout = static_cast<const S*>(params.dropout);
    for (int v = 0; v < V; ++v) {
      const int64_t unit = tile.unit + v, other = params.width + unit;
      units_[v] = {weights ? weights[unit] : S(0), weights ? weights[other] : S(0), biases ? biases[unit] : S(0),
                   biases ? biases[other] : S(0), dropout ? dropout[tile.row * params.width + unit] : S(1)};
    }
  }

  HFE_INLINE void read(StepInputs<T, V, Flagged>& to) {
    to.u0 = u_.load(0);
    to.u1 = u_.load(1);
    to.u2 = u_.load(2);
    u_.advance();
    if (params_.parts == 4 || params_.x.data != nullptr) {
      to.highway = highway_.load();
      highway_.advance();
    }
    if constexpr (Flagged) read_flags(to);
  }

  // Without a highway input its place in the ring stays zero.
  HFE_INLINE Inputs<S> inputs(const StepInputs<T, V, Flagged>& step, int v, S before) const {
    return {static_cast<S>(widen(step.u0.at(v))), static_cast<S>(widen(step.u1.at(v))),
            static_cast<S>(widen(step.u2.at(v))), static_cast<S>(widen(step.highway.at(v))) * scale_, before};
  }

  HFE_INLINE const Unit<S>& unit(int v) const { return units_[v]; }
  HFE_INLINE S scale() const { return scale_; }

 private:
  HFE_INLINE void read_flags(StepInputs<T, V, Flagged>& to) {
    if (params_.mask.data != nullptr) {
      to.token = mask_.load();
      mask_.advance();
    }
    if (params_.document_start.data != nullptr) {
      to.begins = document_start_.load();
      document_start_.advance();
    }
  }

  // With four parts u and h have one dtype.
  using Highway = StridedIterator<typename T::H, V>;

  const SruParams& params_;
  StridedIterator<typename T::U, V> u_;
  Highway highway_;
  FlagIterator mask_, document_start_;
  S scale_;
  Unit<S> units_[V];
};

}  // namespace sru
