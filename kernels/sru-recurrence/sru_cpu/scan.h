// The recurrence over some neighbouring units of one row of the batch. Included once for each instruction set, after
// scan_rows.h and in the same way; includes nothing itself.
//
// Time is the outer loop: units are independent of each other and are computed many at once, and no step waits for
// loads. What a chunk of units needs at all steps (state, parameters, sums) stays in a core's cache.

// What a chunk's units have for all steps, with neutral values for what is not given; then the state or, in the
// backward pass, its gradient, and the sums of the parameters' gradients.
enum Column : int64_t {
  kForgetGateWeight, kOutputGateWeight, kForgetGateBias, kOutputGateBias, kDropout, kState, kForwardColumns,
  kForgetGateWeightSum = kForwardColumns, kOutputGateWeightSum, kForgetGateBiasSum, kOutputGateBiasSum,
  kBackwardColumns,
};

template <typename S, int64_t N>
struct Units : Table<S, N> {
  Units(const SruParams& params, int64_t row, int64_t first, int64_t count) {
    const S* weights = static_cast<const S*>(params.weight_c);
    const S* biases = static_cast<const S*>(params.bias);
    set(kForgetGateWeight, weights, first, count, S(0));
    set(kOutputGateWeight, weights, params.width + first, count, S(0));
    set(kForgetGateBias, biases, first, count, S(0));
    set(kOutputGateBias, biases, params.width + first, count, S(0));
    set(kDropout, static_cast<const S*>(params.dropout), row * params.width + first, count, S(1));
    for (int64_t column = kState; column < N; ++column) set(column, nullptr, 0, count, S(0));
  }

  void set(int64_t column, const S* from, int64_t first, int64_t count, S neutral) {
    if (from == nullptr) {
      this->fill(column, 0, count, neutral);
    } else {
      this->fill(column, count / kGroup * kGroup, count, neutral);
      Table<S, N>::set(column, count, from + first);
    }
  }

  HFE_INLINE Unit<Vector<S>> unit(int64_t group, int64_t i) {
    return {load(this->at(group, i, kForgetGateWeight)), load(this->at(group, i, kOutputGateWeight)),
            load(this->at(group, i, kForgetGateBias)), load(this->at(group, i, kOutputGateBias)),
            load(this->at(group, i, kDropout))};
  }
};

// Denominators of gates, computed for some units before anything is made of them. One pass for all would be a chain of
// some hundred cycles of dependent operations, of which a processor's registers hold no more than three at once. More
// units than stand in a cache line of float32 at a time make reads wait in the backward pass: a dozen rows compete for
// few lines of the cache.
template <typename S, int64_t Count>
struct Stage {
  static constexpr int64_t kUnits = Count;
  alignas(64) S forget[kUnits], output[kUnits];

  HFE_INLINE void set(int64_t i, const Gates<Vector<S>>& gates) {
    store(forget + i, gates.forget);
    store(output + i, gates.output);
  }
  HFE_INLINE Gates<Vector<S>> at(int64_t i) const { return {load(forget + i), load(output + i)}; }
};

// Whether there is a tensor and its rows pass through buffers.
template <typename T>
bool is_other(const TensorView& view) {
  return view && view.dtype != dtype_of<T>();
}

inline bool flag(const BoolView& flags, int64_t row, int64_t step, bool otherwise) {
  return flags.data == nullptr ? otherwise : flags.data[row * flags.batch_stride + step * flags.step_stride];
}

// Some units of a chunk at one step: from `start` of the chunk on, `count` of them. The step after it, in the order of
// the pass, is `step + ahead`; where nothing is to be fetched for it, `ahead` is 0.
struct Place {
  int64_t step, ahead, start, count;

  // How far the row of the step after this one lies ahead.
  int64_t next(const TensorView& view) const { return ahead * view.step_stride; }
};

// What they read.
template <typename T>
struct StepRows {
  const typename T::U *u0, *u1, *u2;
  const typename T::X* x;
  int64_t next_u, next_x;

  template <typename Access, typename V>
  HFE_INLINE Inputs<V> at(const Access& access, int64_t i, V scale, V before) const {
    return {access.read(u0 + i), access.read(u1 + i), access.read(u2 + i), access.read(x + i) * scale, before};
  }
};

// Asks for the rows of the next step, of inputs or of their gradients.
template <int64_t Count, typename Rows>
HFE_INLINE void fetch_next(const Rows& rows, int64_t i) {
  fetch<Count>(rows.u0 + i + rows.next_u);
  fetch<Count>(rows.u1 + i + rows.next_u);
  fetch<Count>(rows.u2 + i + rows.next_u);
  fetch<Count>(rows.x + i + rows.next_x);
}

// A chunk of a call's units: where its rows are, step by step.
template <typename T>
struct Chunk {
  using S = typename T::S;
  const SruParams& params;
  const int64_t row, first, count;
  Block<typename T::U> u0, u1, u2;
  Block<typename T::X> x;

  Chunk(const SruParams& params, int64_t row, int64_t first, int64_t count)
      : params(params), row(row), first(first), count(count) {}

  // The original scales the layer's input, not the fourth part of u.
  S scale() const { return params.x ? static_cast<S>(params.scale_x) : S(1); }
  int64_t step(int64_t index) const { return params.reverse ? params.length - 1 - index : index; }
  bool is_token(int64_t step) const { return flag(params.mask, row, step, true); }
  bool begins(int64_t step) const { return flag(params.document_start, row, step, false); }

  S* state(int64_t index, int64_t start) const {
    return static_cast<S*>(params.states.data) + offset(params.states, row, index, 0, first + start);
  }
  // c as the step finds it, wherever a document begins, and as it leaves it.
  S* before(const Place& place) const { return state(params.reverse ? place.step + 1 : place.step, place.start); }
  S* after(const Place& place) const { return state(params.reverse ? place.step : place.step + 1, place.start); }

  int64_t at(const TensorView& view, const Place& place, int64_t part = 0) const {
    return offset(view, row, place.step, part, first + place.start);
  }

  StepRows<T> inputs(const Place& place) {
    using X = typename T::X;
    const auto part = [&](int64_t index, auto& spare) {
      return read(params.u, at(params.u, place, index), place.count, spare);
    };
    const X* highway = static_cast<const X*>(kZeros);
    int64_t next_x = 0;
    if (params.x) {
      highway = read(params.x, at(params.x, place), place.count, x);
      next_x = place.next(params.x);
    } else if (params.parts == 4) {
      highway = reinterpret_cast<const X*>(part(3, x_of_u()));
      next_x = place.next(params.u);
    }
    return {part(0, u0), part(1, u1), part(2, u2), highway, place.next(params.u), next_x};
  }

  // With four parts U and X are the same.
  Block<typename T::U>& x_of_u() { return reinterpret_cast<Block<typename T::U>&>(x); }

  // Calls `work` for all units of a step: at once, or some at a time where rows pass through buffers.
  template <typename Work>
  HFE_INLINE void for_each_block(int64_t step, bool buffered, const Work& work, int64_t ahead = 0) const {
    const int64_t most = buffered ? kBlock : count;
    if (buffered || params.length * count < kFetchUnits) ahead = 0;
    for (int64_t start = 0; start < count; start += most) {
      work(Place{step, ahead, start, std::min(most, count - start)});
    }
  }
};

// Where the results of some units go.
template <typename T>
struct ResultRows {
  typename T::S* after;
  typename T::X* h;
  int64_t next_after, next_h;
};

// Rows are passed by value: in registers, that no write can change.
template <bool Tanh, bool AllStates, typename T>
void forward_units(Units<typename T::S, kForwardColumns>& units, StepRows<T> in, typename T::S scale, Place at,
                   ResultRows<T> rows) {
  using S = typename T::S;
  const Vector<S> scales = scale;
  Stage<S, sizeof(typename T::U) == 2 || kLanes == 8 ? 64 : kGroup> stage;
  for (int64_t start = 0; start < at.count; start += stage.kUnits) {
    const int64_t count = std::min(int64_t(stage.kUnits), at.count - start);
    if (at.ahead != 0) {
      fetch_next<stage.kUnits>(in, start);
      fetch<stage.kUnits>(rows.h + start + rows.next_h);
      if constexpr (AllStates) fetch<stage.kUnits>(rows.after + start + rows.next_after);
    }
    for_each_vector<S>(count, [&](const auto& access, int64_t group, int64_t i) HFE_INLINED {
      const int64_t of_chunk = at.start + start + group, of_row = start + group + i;
      const auto u1 = access.read(in.u1 + of_row), u2 = access.read(in.u2 + of_row);
      const auto before = load(units.at(of_chunk, i, kState));
      stage.set(group + i, denominators_of(units.unit(of_chunk, i), u1, u2, before));
    });
    for_each_vector<S>(count, [&](const auto& access, int64_t group, int64_t i) HFE_INLINED {
      const int64_t of_chunk = at.start + start + group, of_row = start + group + i;
      S* state = units.at(of_chunk, i, kState);
      const auto inputs = in.at(access, of_row, scales, load(state));
      const auto out = forward_step<Tanh>(units.unit(of_chunk, i), inputs, gates_of(stage.at(group + i)));
      store(state, out.after);
      if constexpr (AllStates) access.write(rows.after + of_row, out.after);
      access.write(rows.h + of_row, out.h);
    });
  }
}

template <bool Tanh, typename T>
void forward_chunk(const SruParams& params, int64_t row, int64_t first, int64_t count) {
  using S = typename T::S;
  using U = typename T::U;
  using X = typename T::X;
  Chunk<T> chunk(params, row, first, count);
  Units<S, kForwardColumns> units(params, row, first, count);
  Block<X> spare;
  const bool buffered = is_other<U>(params.u) || is_other<X>(params.x) || is_other<X>(params.h);
  const bool all_states = params.states.step_stride != 0;
  units.set(kState, static_cast<const S*>(params.c0), row * params.width + first, count, S(0));
  if (all_states) units.get(kState, 0, count, chunk.state(params.reverse ? params.length : 0, 0));
  for (int64_t index = 0; index < params.length; ++index) {
    const int64_t step = chunk.step(index);
    if (chunk.begins(step)) units.fill(kState, 0, count, S(0));
    const auto compute = [&](const Place& at) {
      const int64_t target = chunk.at(params.h, at);
      X* h = place(params.h, target, spare);
      S* after = all_states ? chunk.after(at) : nullptr;
      if (chunk.is_token(at.step)) {
        const auto run = all_states ? forward_units<Tanh, true, T> : forward_units<Tanh, false, T>;
        run(units, chunk.inputs(at), chunk.scale(), at, {after, h, at.next(params.states), at.next(params.h)});
      } else {
        if (all_states) units.get(kState, at.start, at.start + at.count, after);
        write_all(h, at.count, X{});
      }
      finish(params.h, target, at.count, spare);
    };
    chunk.for_each_block(step, buffered, compute, index + 1 < params.length ? chunk.step(index + 1) - step : 0);
  }
  if (!all_states) units.get(kState, 0, count, chunk.state(0, 0));
}
