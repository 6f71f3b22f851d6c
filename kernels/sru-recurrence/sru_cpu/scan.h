// The recurrence over some neighbouring units of one row of the batch. This file is included once for each instruction
// set, inside a namespace and with the compiler's target set; it must not include anything itself.
//
// Time is the outer loop: units are independent of each other, so that the loop over units becomes vector code, reads
// and writes run through memory in order, and no step waits for loads. What a chunk of units needs at all steps (state,
// parameters, sums) stays in a core's cache.

// Units that are worked on together at most: rows of 8 KiB, long enough for the processor's prefetching. At 1,024 the
// backward pass lost a quarter of its speed on tensors beyond the last cache.
constexpr int64_t kChunk = 2048;

// Rows in the state's dtype: those of the problem themselves where they have it, else converted to or from a buffer.
template <typename S>
struct Row {
  alignas(64) S buffer[kChunk];
};

template <typename S>
constexpr Kind kind_of() {
  return sizeof(S) == 8 ? Kind::float64 : Kind::float32;
}

inline int64_t offset(const Rows& rows, int64_t row, int64_t step, int64_t part, int64_t first) {
  return row * rows.batch_stride + step * rows.step_stride + part * rows.part_stride + first;
}

template <typename S>
const S* read(const Rows& rows, int64_t at, int64_t count, Row<S>& spare) {
  if (rows.kind == kind_of<S>()) return static_cast<const S*>(rows.data) + at;
  S* __restrict to = spare.buffer;
  if (rows.kind == Kind::bfloat16) {
    const uint16_t* __restrict from = static_cast<const uint16_t*>(rows.data) + at;
    for (int64_t i = 0; i < count; ++i) to[i] = from_bfloat16(from[i]);
  } else if (rows.kind == Kind::float16) {
    const uint16_t* __restrict from = static_cast<const uint16_t*>(rows.data) + at;
    for (int64_t i = 0; i < count; ++i) to[i] = from_float16(from[i]);
  } else if (rows.kind == Kind::float32) {
    const float* __restrict from = static_cast<const float*>(rows.data) + at;
    for (int64_t i = 0; i < count; ++i) to[i] = from[i];
  } else {
    const double* __restrict from = static_cast<const double*>(rows.data) + at;
    for (int64_t i = 0; i < count; ++i) to[i] = static_cast<S>(from[i]);
  }
  return to;
}

// Where to write a row; `finish` brings it to its place if that is a buffer.
template <typename S>
S* place(const Rows& rows, int64_t at, Row<S>& spare) {
  return rows.kind == kind_of<S>() ? static_cast<S*>(rows.data) + at : spare.buffer;
}

template <typename S>
void finish(const Rows& rows, int64_t at, int64_t count, const Row<S>& spare) {
  if (rows.kind == kind_of<S>()) return;
  const S* __restrict from = spare.buffer;
  if (rows.kind == Kind::bfloat16) {
    uint16_t* __restrict to = static_cast<uint16_t*>(rows.data) + at;
    for (int64_t i = 0; i < count; ++i) to[i] = to_bfloat16(static_cast<float>(from[i]));
  } else if (rows.kind == Kind::float16) {
    uint16_t* __restrict to = static_cast<uint16_t*>(rows.data) + at;
    for (int64_t i = 0; i < count; ++i) to[i] = to_float16(static_cast<float>(from[i]));
  } else if (rows.kind == Kind::float32) {
    float* __restrict to = static_cast<float*>(rows.data) + at;
    for (int64_t i = 0; i < count; ++i) to[i] = static_cast<float>(from[i]);
  } else {
    double* __restrict to = static_cast<double*>(rows.data) + at;
    for (int64_t i = 0; i < count; ++i) to[i] = from[i];
  }
}

template <typename S>
void fill(S* __restrict to, int64_t count, S value) {
  for (int64_t i = 0; i < count; ++i) to[i] = value;
}

template <typename S>
void copy(S* __restrict to, const S* __restrict from, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = from[i];
}

// What a chunk's units have for all steps, with neutral values for what is not given.
template <typename S>
struct Units {
  Row<S> forget_weight, reset_weight, forget_bias, reset_bias, dropout, zeros;

  Units(const Problem& problem, int64_t row, int64_t first, int64_t count) {
    const S* weights = static_cast<const S*>(problem.weight_c);
    const S* biases = static_cast<const S*>(problem.bias);
    const S* masks = static_cast<const S*>(problem.dropout);
    load(forget_weight, weights, first, count, S(0));
    load(reset_weight, weights, problem.width + first, count, S(0));
    load(forget_bias, biases, first, count, S(0));
    load(reset_bias, biases, problem.width + first, count, S(0));
    load(dropout, masks, row * problem.width + first, count, S(1));
    fill(zeros.buffer, count, S(0));
  }

  static void load(Row<S>& to, const S* from, int64_t at, int64_t count, S neutral) {
    if (from == nullptr) {
      fill(to.buffer, count, neutral);
    } else {
      copy(to.buffer, from + at, count);
    }
  }

  Unit<S> at(int64_t i) const {
    return {forget_weight.buffer[i], reset_weight.buffer[i], forget_bias.buffer[i], reset_bias.buffer[i],
            dropout.buffer[i]};
  }
};

inline bool flag(const Flags& flags, int64_t row, int64_t step, bool otherwise) {
  return flags.data == nullptr ? otherwise : flags.data[row * flags.batch_stride + step * flags.step_stride];
}

// What one step of a chunk reads.
template <typename S>
struct StepRows {
  const S *u0, *u1, *u2, *x, *before;

  Inputs<S> at(int64_t i, S scale) const { return {u0[i], u1[i], u2[i], x[i] * scale, before[i]}; }
};

// A chunk of a problem: where its rows are, step by step.
template <typename S>
struct Chunk {
  const Problem& problem;
  const int64_t row, first, count;
  const Units<S> units;
  Row<S> u0, u1, u2, x;

  Chunk(const Problem& problem, int64_t row, int64_t first, int64_t count)
      : problem(problem), row(row), first(first), count(count), units(problem, row, first, count) {}

  // The original scales the layer's input, not the fourth part of u.
  S scale() const { return problem.x ? static_cast<S>(problem.scale_x) : S(1); }
  int64_t step(int64_t index) const { return problem.reverse ? problem.length - 1 - index : index; }
  bool is_token(int64_t step) const { return flag(problem.mask, row, step, true); }
  bool begins(int64_t step) const { return flag(problem.reset, row, step, false); }

  S* state(int64_t index) const {
    return static_cast<S*>(problem.states.data) + offset(problem.states, row, index, 0, first);
  }
  S* before(int64_t step) const { return state(problem.reverse ? step + 1 : step); }
  S* after(int64_t step) const { return state(problem.reverse ? step : step + 1); }

  int64_t at(const Rows& rows, int64_t step, int64_t part = 0) const { return offset(rows, row, step, part, first); }

  StepRows<S> inputs(int64_t step) {
    const Rows& u = problem.u;
    const S* highway = units.zeros.buffer;
    if (problem.x) {
      highway = read(problem.x, at(problem.x, step), count, x);
    } else if (problem.parts == 4) {
      highway = read(u, at(u, step, 3), count, x);
    }
    return {read(u, at(u, step, 0), count, u0), read(u, at(u, step, 1), count, u1),
            read(u, at(u, step, 2), count, u2), highway, begins(step) ? units.zeros.buffer : before(step)};
  }
};

template <bool Tanh, typename S>
void forward_units(const Units<S>& units, const StepRows<S>& in, S scale, int64_t count, S* __restrict after,
                   S* __restrict h) {
  SRU_INDEPENDENT
  for (int64_t i = 0; i < count; ++i) {
    const Outputs<S> out = forward_step<Tanh>(units.at(i), in.at(i, scale));
    after[i] = out.after;
    h[i] = out.h;
  }
}

template <bool Tanh, typename S>
void forward_chunk(const Problem& problem, int64_t row, int64_t first, int64_t count) {
  Chunk<S> chunk(problem, row, first, count);
  Row<S> spare;
  const S scale = chunk.scale();
  Units<S>::load(spare, static_cast<const S*>(problem.c0), row * problem.width + first, count, S(0));
  copy(chunk.before(chunk.step(0)), spare.buffer, count);
  for (int64_t index = 0; index < problem.length; ++index) {
    const int64_t step = chunk.step(index), at = chunk.at(problem.h, step);
    S* h = place(problem.h, at, spare);
    if (chunk.is_token(step)) {
      forward_units<Tanh>(chunk.units, chunk.inputs(step), scale, count, chunk.after(step), h);
    } else {
      copy(chunk.after(step), chunk.begins(step) ? chunk.units.zeros.buffer : chunk.before(step), count);
      fill(h, count, S(0));
    }
    finish(problem.h, at, count, spare);
  }
}

// What the backward pass keeps of a chunk from step to step.
template <typename S>
struct Sums {
  Row<S> carried, forget_weight, reset_weight, forget_bias, reset_bias;
};

template <typename S>
struct GradientRows {
  S *u0, *u1, *u2, *x;
};

template <bool Tanh, typename S>
void backward_units(const Units<S>& units, const StepRows<S>& in, S scale, int64_t count, const S* after,
                    const S* grad_h, const S* grad_state, Sums<S>& sums, const GradientRows<S>& out) {
  S *__restrict u0 = out.u0, *__restrict u1 = out.u1, *__restrict u2 = out.u2, *__restrict x = out.x;
  S *__restrict carried = sums.carried.buffer;
  S *__restrict forget_weight = sums.forget_weight.buffer, *__restrict reset_weight = sums.reset_weight.buffer;
  S *__restrict forget_bias = sums.forget_bias.buffer, *__restrict reset_bias = sums.reset_bias.buffer;
  SRU_INDEPENDENT
  for (int64_t i = 0; i < count; ++i) {
    const Inputs<S> inputs = in.at(i, scale);
    const Gradients<S> grad =
        backward_step<Tanh>(units.at(i), inputs, after[i], grad_h[i], carried[i] + grad_state[i]);
    u0[i] = grad.u0;
    u1[i] = grad.u1;
    u2[i] = grad.u2;
    x[i] = grad.x * scale;
    carried[i] = grad.before;
    forget_weight[i] += grad.u1 * inputs.before;
    reset_weight[i] += grad.u2 * inputs.before;
    forget_bias[i] += grad.u1;
    reset_bias[i] += grad.u2;
  }
}

template <typename S>
void add_row(S* __restrict to, const S* __restrict from, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] += from[i];
}

// Where a chunk's gradients go at one step.
template <typename S>
struct GradientChunk {
  const BackwardProblem& problem;
  const Chunk<S>& chunk;
  Row<S> u0, u1, u2, x;

  GradientChunk(const BackwardProblem& problem, const Chunk<S>& chunk) : problem(problem), chunk(chunk) {}

  GradientRows<S> rows(int64_t step) {
    const Rows& u = problem.grad_u;
    S* highway = x.buffer;  // without a skip connection nobody looks at it
    if (problem.grad_x) {
      highway = place(problem.grad_x, chunk.at(problem.grad_x, step), x);
    } else if (problem.parts == 4) {
      highway = place(u, chunk.at(u, step, 3), x);
    }
    return {place(u, chunk.at(u, step, 0), u0), place(u, chunk.at(u, step, 1), u1),
            place(u, chunk.at(u, step, 2), u2), highway};
  }

  void finish_rows(int64_t step) {
    const Rows& u = problem.grad_u;
    const int64_t count = chunk.count;
    finish(u, chunk.at(u, step, 0), count, u0);
    finish(u, chunk.at(u, step, 1), count, u1);
    finish(u, chunk.at(u, step, 2), count, u2);
    if (problem.grad_x) {
      finish(problem.grad_x, chunk.at(problem.grad_x, step), count, x);
    } else if (problem.parts == 4) {
      finish(u, chunk.at(u, step, 3), count, x);
    }
  }
};

template <bool Tanh, typename S>
void backward_steps(const BackwardProblem& problem, Chunk<S>& chunk, Sums<S>& sums) {
  GradientChunk<S> gradients(problem, chunk);
  Row<S> grad_h_row, grad_state_row;
  const S *zeros = chunk.units.zeros.buffer, scale = chunk.scale();
  const int64_t count = chunk.count;
  for (int64_t index = problem.length - 1; index >= 0; --index) {
    const int64_t step = chunk.step(index);
    const S *grad_h = zeros, *grad_state = zeros;
    if (problem.grad_states) {
      const int64_t at = chunk.at(problem.grad_states, problem.reverse ? step : step + 1);
      grad_state = read(problem.grad_states, at, count, grad_state_row);
    }
    const GradientRows<S> out = gradients.rows(step);
    if (chunk.is_token(step)) {
      if (problem.grad_h) grad_h = read(problem.grad_h, chunk.at(problem.grad_h, step), count, grad_h_row);
      backward_units<Tanh>(chunk.units, chunk.inputs(step), scale, count, chunk.after(step), grad_h, grad_state,
                           sums, out);
    } else {
      for (S* row : {out.u0, out.u1, out.u2, out.x}) fill(row, count, S(0));
      add_row(sums.carried.buffer, grad_state, count);
    }
    // The step started from zero: what came before it is not concerned.
    if (chunk.begins(step)) fill(sums.carried.buffer, count, S(0));
    gradients.finish_rows(step);
  }
}

template <bool Tanh, typename S>
void backward_chunk(const BackwardProblem& problem, int64_t row, int64_t first, int64_t count) {
  Chunk<S> chunk(problem, row, first, count);
  Sums<S> sums;
  for (Row<S>* sum : {&sums.carried, &sums.forget_weight, &sums.reset_weight, &sums.forget_bias, &sums.reset_bias}) {
    fill(sum->buffer, count, S(0));
  }
  backward_steps<Tanh>(problem, chunk, sums);
  S* partial = static_cast<S*>(problem.partial) + row * 4 * problem.width + first;
  for (const Row<S>* sum : {&sums.forget_weight, &sums.reset_weight, &sums.forget_bias, &sums.reset_bias}) {
    copy(partial, sum->buffer, count);
    partial += problem.width;
  }
  if (problem.grad_c0 == nullptr) return;
  S* initial = static_cast<S*>(problem.grad_c0) + row * problem.width + first;
  copy(initial, sums.carried.buffer, count);
  if (!problem.grad_states) return;
  Row<S> spare;
  const int64_t at = chunk.at(problem.grad_states, problem.reverse ? problem.length : 0);
  add_row(initial, read(problem.grad_states, at, count, spare), count);
}

// Everything of this instruction set that `sru_cpu.cpp` calls.
inline Scans scans() {
  return {{forward_chunk<false, float>, forward_chunk<true, float>},
          {forward_chunk<false, double>, forward_chunk<true, double>},
          {backward_chunk<false, float>, backward_chunk<true, float>},
          {backward_chunk<false, double>, backward_chunk<true, double>}};
}
