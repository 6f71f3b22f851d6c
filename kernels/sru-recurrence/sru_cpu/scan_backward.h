// The backward pass of scan.h, which comes before it; included in the same way.

// What the backward pass keeps of a chunk from step to step: the gradient at the state, from all later steps, and the
// sums of the parameters' gradients.
template <typename S>
struct Sums {
  Row<S> carried, forget_gate_weight, output_gate_weight, forget_gate_bias, output_gate_bias;

  explicit Sums(int64_t count) {
    for (Row<S>* sum : {&carried, &forget_gate_weight, &output_gate_weight, &forget_gate_bias, &output_gate_bias}) {
      fill(sum->buffer, count, S(0));
    }
  }
};

template <typename S>
struct GradientRows {
  S *u0, *u1, *u2, *x;
};

// Gradients that reach the units of a step from outside, and c as the step left it.
template <typename S>
struct Upstream {
  const S *after, *grad_h, *grad_state;
};

template <bool Tanh, typename S>
void backward_units(const Units<S>& units, const StepRows<S>& in, S scale, const Place& place,
                    const Upstream<S>& upstream, Sums<S>& sums, const GradientRows<S>& out) {
  S *__restrict u0 = out.u0, *__restrict u1 = out.u1, *__restrict u2 = out.u2, *__restrict x = out.x;
  S* __restrict carried = sums.carried.buffer + place.start;
  S* __restrict forget_gate_weight = sums.forget_gate_weight.buffer + place.start;
  S* __restrict output_gate_weight = sums.output_gate_weight.buffer + place.start;
  S* __restrict forget_gate_bias = sums.forget_gate_bias.buffer + place.start;
  S* __restrict output_gate_bias = sums.output_gate_bias.buffer + place.start;
  HFE_INDEPENDENT
  for (int64_t i = 0; i < place.count; ++i) {
    const Inputs<S> inputs = in.at(i, scale);
    const Gradients<S> grad = backward_step<Tanh>(units.at(place.start + i), inputs, upstream.after[i],
                                                  upstream.grad_h[i], carried[i] + upstream.grad_state[i]);
    u0[i] = grad.u0;
    u1[i] = grad.u1;
    u2[i] = grad.u2;
    x[i] = grad.x * scale;
    carried[i] = grad.before;
    forget_gate_weight[i] += grad.u1 * inputs.before;
    output_gate_weight[i] += grad.u2 * inputs.before;
    forget_gate_bias[i] += grad.u1;
    output_gate_bias[i] += grad.u2;
  }
}

template <typename S>
void add_row(S* __restrict to, const S* __restrict from, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] += from[i];
}

// A chunk in the backward pass: what reaches it, and where its gradients go.
template <typename S>
struct BackwardChunk {
  const SruBackwardParams& params;
  const Chunk<S>& chunk;
  Block<S> u0, u1, u2, x, grad_h, grad_state;

  BackwardChunk(const SruBackwardParams& params, const Chunk<S>& chunk) : params(params), chunk(chunk) {}

  // The part of the gradient of u that the highway's goes to, and where that is; without a skip connection nowhere.
  const TensorView& highway() const { return params.grad_x ? params.grad_x : params.grad_u; }
  int64_t highway_part() const { return params.grad_x ? 0 : 3; }
  bool has_highway() const { return params.grad_x || params.parts == 4; }

  Upstream<S> upstream(const Place& at) {
    const S *h = chunk.units.zeros.buffer, *state = chunk.units.zeros.buffer;
    if (params.grad_h) h = read(params.grad_h, chunk.at(params.grad_h, at), at.count, grad_h);
    if (params.grad_states) {
      const Place left{params.reverse ? at.step : at.step + 1, at.start, at.count};
      state = read(params.grad_states, chunk.at(params.grad_states, left), at.count, grad_state);
    }
    return {chunk.after(at), h, state};
  }

  GradientRows<S> results(const Place& at) {
    const auto part = [&](int64_t index, Block<S>& spare) {
      return place(params.grad_u, chunk.at(params.grad_u, at, index), spare);
    };
    S* x_row = has_highway() ? place(highway(), chunk.at(highway(), at, highway_part()), x) : x.buffer;
    return {part(0, u0), part(1, u1), part(2, u2), x_row};
  }

  void finish_results(const Place& at) {
    const TensorView& u = params.grad_u;
    finish(u, chunk.at(u, at, 0), at.count, u0);
    finish(u, chunk.at(u, at, 1), at.count, u1);
    finish(u, chunk.at(u, at, 2), at.count, u2);
    if (has_highway()) finish(highway(), chunk.at(highway(), at, highway_part()), at.count, x);
  }
};

template <bool Tanh, typename S>
void backward_steps(const SruBackwardParams& params, Chunk<S>& chunk, Sums<S>& sums) {
  BackwardChunk<S> gradients(params, chunk);
  const S scale = chunk.scale();
  for (int64_t index = params.length - 1; index >= 0; --index) {
    chunk.for_each_block(chunk.step(index), [&](const Place& at) {
      const GradientRows<S> out = gradients.results(at);
      const Upstream<S> upstream = gradients.upstream(at);
      S* carried = sums.carried.buffer + at.start;
      if (chunk.is_token(at.step)) {
        backward_units<Tanh>(chunk.units, chunk.inputs(at), scale, at, upstream, sums, out);
      } else {
        for (S* row : {out.u0, out.u1, out.u2, out.x}) fill(row, at.count, S(0));
        add_row(carried, upstream.grad_state, at.count);
      }
      // The step started from zero: what came before it is not concerned.
      if (chunk.begins(at.step)) fill(carried, at.count, S(0));
      gradients.finish_results(at);
    });
  }
}

template <bool Tanh, typename S>
void backward_chunk(const SruBackwardParams& params, int64_t row, int64_t first, int64_t count) {
  Chunk<S> chunk(params, row, first, count);
  Sums<S> sums(count);
  backward_steps<Tanh>(params, chunk, sums);
  S* partial = static_cast<S*>(params.partial) + row * 4 * params.width + first;
  for (const Row<S>* sum : {&sums.forget_gate_weight, &sums.output_gate_weight, &sums.forget_gate_bias, &sums.output_gate_bias}) {
    copy(partial, sum->buffer, count);
    partial += params.width;
  }
  if (params.grad_c0 == nullptr) return;
  S* initial = static_cast<S*>(params.grad_c0) + row * params.width + first;
  copy(initial, sums.carried.buffer, count);
  if (!params.grad_states) return;
  Block<S> spare;
  chunk.for_each_block(params.reverse ? params.length : 0, [&](const Place& at) {
    const S* grad = read(params.grad_states, chunk.at(params.grad_states, at), at.count, spare);
    add_row(initial + at.start, grad, at.count);
  });
}

// Everything of this instruction set that `sru_cpu.cpp` calls.
inline Scans scans() {
  return {{forward_chunk<false, float>, forward_chunk<true, float>},
          {forward_chunk<false, double>, forward_chunk<true, double>},
          {backward_chunk<false, float>, backward_chunk<true, float>},
          {backward_chunk<false, double>, backward_chunk<true, double>}};
}
