// The backward pass of scan.h, which comes before it; included in the same way.

template <typename T>
struct GradientRows {
  typename T::U *u0, *u1, *u2;
  typename T::X* x;
  int64_t next_u, next_x;
};

// Gradients that reach the units of a step from outside, and c as the step found and left it.
template <typename T>
struct Upstream {
  const typename T::S *before, *after, *grad_state;
  const typename T::X* grad_h;
  int64_t next_before, next_grad_h;
};

template <typename V, typename S>
HFE_INLINE void add(S* to, V x) {
  store(to, load(to) + x);
}

template <bool Tanh, typename T>
void backward_units(Units<typename T::S, kBackwardColumns>& units, StepRows<T> in, typename T::S scale, Place at,
                    Upstream<T> upstream, GradientRows<T> out) {
  using S = typename T::S;
  const Vector<S> scales = scale;
  Stage<S, sizeof(typename T::U) == 2 ? 64 : kGroup> stage;
  for (int64_t start = 0; start < at.count; start += stage.kUnits) {
    const int64_t count = std::min(int64_t(stage.kUnits), at.count - start);
    if (at.ahead != 0) {
      fetch_next<stage.kUnits>(in, start);
      fetch_next<stage.kUnits>(out, start);
      fetch<stage.kUnits>(upstream.grad_h + start + upstream.next_grad_h);
      // c after the next step is c before this one.
      fetch<stage.kUnits>(upstream.before + start + upstream.next_before);
    }
    for_each_vector<S>(count, [&](const auto& access, int64_t group, int64_t i) HFE_INLINED {
      const int64_t of_chunk = at.start + start + group, of_row = start + group + i;
      const auto u1 = access.read(in.u1 + of_row), u2 = access.read(in.u2 + of_row);
      const auto before = access.read(upstream.before + of_row);
      stage.set(group + i, denominators_of(units.unit(of_chunk, i), u1, u2, before));
    });
    for_each_vector<S>(count, [&](const auto& access, int64_t group, int64_t i) HFE_INLINED {
      const int64_t of_chunk = at.start + start + group, of_row = start + group + i;
      S* carried = units.at(of_chunk, i, kState);
      const auto before = access.read(upstream.before + of_row), after = access.read(upstream.after + of_row);
      const auto grad_h = access.read(upstream.grad_h + of_row);
      const auto grad_after = load(carried) + access.read(upstream.grad_state + of_row);
      const auto grad = backward_step<Tanh>(units.unit(of_chunk, i), in.at(access, of_row, scales, before),
                                            gates_of(stage.at(group + i)), after, grad_h, grad_after);
      store(carried, grad.before);
      add(units.at(of_chunk, i, kForgetGateWeightSum), grad.u1 * before);
      add(units.at(of_chunk, i, kOutputGateWeightSum), grad.u2 * before);
      add(units.at(of_chunk, i, kForgetGateBiasSum), grad.u1);
      add(units.at(of_chunk, i, kOutputGateBiasSum), grad.u2);
      access.write(out.u0 + of_row, grad.u0);
      access.write(out.u1 + of_row, grad.u1);
      access.write(out.u2 + of_row, grad.u2);
      access.write(out.x + of_row, grad.x * scales);
    });
  }
}

// A chunk in the backward pass: what reaches it, and where its gradients go.
template <typename T>
struct BackwardChunk {
  using S = typename T::S;
  const SruBackwardParams& params;
  Chunk<T>& chunk;
  Block<typename T::U> u0, u1, u2;
  Block<typename T::X> x, grad_h;
  Block<S> grad_state;
  // Where the highway's gradient goes without a skip connection.
  alignas(64) typename T::X unwanted[kRowBytes / sizeof(typename T::S)];

  BackwardChunk(const SruBackwardParams& params, Chunk<T>& chunk) : params(params), chunk(chunk) {}

  // The part of the gradient of u that the highway's goes to, and where that is; without a skip connection nowhere.
  const TensorView& highway() const { return params.grad_x ? params.grad_x : params.grad_u; }
  int64_t highway_part() const { return params.grad_x ? 0 : 3; }
  bool has_highway() const { return params.grad_x || params.parts == 4; }

  Upstream<T> upstream(const Place& at) {
    const auto* h = static_cast<const typename T::X*>(kZeros);
    const S* state = static_cast<const S*>(kZeros);
    int64_t next_h = 0;
    if (params.grad_h) {
      h = read(params.grad_h, chunk.at(params.grad_h, at), at.count, grad_h);
      next_h = at.next(params.grad_h);
    }
    if (params.grad_states) {
      const Place left{params.reverse ? at.step : at.step + 1, 0, at.start, at.count};
      state = read(params.grad_states, chunk.at(params.grad_states, left), at.count, grad_state);
    }
    const bool begins = chunk.begins(at.step);
    const S* before = begins ? static_cast<const S*>(kZeros) : chunk.before(at);
    return {before, chunk.after(at), state, h, begins ? 0 : at.next(params.states), next_h};
  }

  GradientRows<T> results(const Place& at) {
    const auto part = [&](int64_t index, auto& spare) {
      return place(params.grad_u, chunk.at(params.grad_u, at, index), spare);
    };
    auto* x_row = has_highway() ? place(highway(), chunk.at(highway(), at, highway_part()), x) : unwanted;
    const int64_t next_x = has_highway() ? at.next(highway()) : 0;
    return {part(0, u0), part(1, u1), part(2, u2), x_row, at.next(params.grad_u), next_x};
  }

  void finish_results(const Place& at) {
    const TensorView& u = params.grad_u;
    finish(u, chunk.at(u, at, 0), at.count, u0);
    finish(u, chunk.at(u, at, 1), at.count, u1);
    finish(u, chunk.at(u, at, 2), at.count, u2);
    if (has_highway()) finish(highway(), chunk.at(highway(), at, highway_part()), at.count, x);
  }
};

template <bool Tanh, typename T>
void backward_steps(const SruBackwardParams& params, Chunk<T>& chunk,
                    Units<typename T::S, kBackwardColumns>& units) {
  using S = typename T::S;
  using U = typename T::U;
  using X = typename T::X;
  BackwardChunk<T> gradients(params, chunk);
  const bool buffered = is_other<U>(params.u) || is_other<U>(params.grad_u) || is_other<X>(params.x) ||
                        is_other<X>(params.grad_x) || is_other<X>(params.grad_h) || is_other<S>(params.grad_states);
  for (int64_t index = params.length - 1; index >= 0; --index) {
    const int64_t step = chunk.step(index);
    const auto compute = [&](const Place& at) {
      const GradientRows<T> out = gradients.results(at);
      const Upstream<T> upstream = gradients.upstream(at);
      if (chunk.is_token(at.step)) {
        backward_units<Tanh, T>(units, chunk.inputs(at), chunk.scale(), at, upstream, out);
      } else {
        for (U* row : {out.u0, out.u1, out.u2}) write_all(row, at.count, U{});
        write_all(out.x, at.count, X{});
        units.add(kState, at.start, at.start + at.count, upstream.grad_state);
      }
      // The step started from zero: what came before it is not concerned.
      if (chunk.begins(at.step)) units.fill(kState, at.start, at.start + at.count, S(0));
      gradients.finish_results(at);
    };
    chunk.for_each_block(step, buffered, compute, index > 0 ? chunk.step(index - 1) - step : 0);
  }
}

template <bool Tanh, typename T>
void backward_chunk(const SruBackwardParams& params, int64_t row, int64_t first, int64_t count) {
  using S = typename T::S;
  Chunk<T> chunk(params, row, first, count);
  Units<S, kBackwardColumns> units(params, row, first, count);
  backward_steps<Tanh>(params, chunk, units);
  S* partial = static_cast<S*>(params.partial) + row * 4 * params.width + first;
  for (int64_t column = kForgetGateWeightSum; column <= kOutputGateBiasSum; ++column) {
    units.get(column, 0, count, partial);
    partial += params.width;
  }
  if (params.grad_c0 == nullptr) return;
  if (params.grad_states) {
    Block<S> spare;
    chunk.for_each_block(params.reverse ? params.length : 0, true, [&](const Place& at) {
      const S* grad = read(params.grad_states, chunk.at(params.grad_states, at), at.count, spare);
      units.add(kState, at.start, at.start + at.count, grad);
    });
  }
  units.get(kState, 0, count, static_cast<S*>(params.grad_c0) + row * params.width + first);
}

// The passes for one set of dtypes.
template <typename T>
Passes passes() {
  return {{forward_chunk<false, T>, forward_chunk<true, T>}, {backward_chunk<false, T>, backward_chunk<true, T>}};
}

// Everything of this instruction set that `sru_cpu.cpp` calls. With four lanes rows of 16 bits pass through buffers.
inline Scans all_functions() {
  const Passes float64 = passes<Types<double, double, double>>(), any = passes<Types<float, float, float>>();
#if HFE_LANES == 4
  return {float64, any, any, any, any, any};
#else
  return {float64, any, passes<Types<float, BFloat16, BFloat16>>(), passes<Types<float, Float16, Float16>>(),
          passes<Types<float, BFloat16, float>>(), passes<Types<float, Float16, float>>()};
#endif
}
