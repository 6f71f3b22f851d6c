// The recurrence over some neighbouring units of one row of the batch. Included once for each instruction set, inside a
// namespace and with the compiler's target set, after scan_rows.h; includes nothing itself.
//
// Time is the outer loop: units are independent of each other, so that the loop over units becomes vector code, reads
// and writes run through memory in order, and no step waits for loads. What a chunk of units needs at all steps (state,
// parameters, sums) stays in a core's cache.

// What a chunk's units have for all steps, with neutral values for what is not given.
template <typename S>
struct Units {
  Row<S> forget_gate_weight, output_gate_weight, forget_gate_bias, output_gate_bias, dropout;
  Block<S> zeros;

  Units(const SruParams& params, int64_t row, int64_t first, int64_t count) {
    const S* weights = static_cast<const S*>(params.weight_c);
    const S* biases = static_cast<const S*>(params.bias);
    load(forget_gate_weight.buffer, weights, first, count, S(0));
    load(output_gate_weight.buffer, weights, params.width + first, count, S(0));
    load(forget_gate_bias.buffer, biases, first, count, S(0));
    load(output_gate_bias.buffer, biases, params.width + first, count, S(0));
    load(dropout.buffer, static_cast<const S*>(params.dropout), row * params.width + first, count, S(1));
    fill(zeros.buffer, kBlock, S(0));
  }

  static void load(S* to, const S* from, int64_t at, int64_t count, S neutral) {
    if (from == nullptr) {
      fill(to, count, neutral);
    } else {
      copy(to, from + at, count);
    }
  }

  Unit<S> at(int64_t i) const {
    return {forget_gate_weight.buffer[i], output_gate_weight.buffer[i], forget_gate_bias.buffer[i], output_gate_bias.buffer[i],
            dropout.buffer[i]};
  }
};

inline bool flag(const BoolView& flags, int64_t row, int64_t step, bool otherwise) {
  return flags.data == nullptr ? otherwise : flags.data[row * flags.batch_stride + step * flags.step_stride];
}

// Some units of a chunk at one step: from `start` of the chunk on, `count` of them.
struct Place {
  int64_t step, start, count;
};

// What they read.
template <typename S>
struct StepRows {
  const S *u0, *u1, *u2, *x, *before;

  Inputs<S> at(int64_t i, S scale) const { return {u0[i], u1[i], u2[i], x[i] * scale, before[i]}; }
};

// A chunk of a call's units: where its rows are, step by step.
template <typename S>
struct Chunk {
  const SruParams& params;
  const int64_t row, first, count;
  const Units<S> units;
  Block<S> u0, u1, u2, x;

  Chunk(const SruParams& params, int64_t row, int64_t first, int64_t count)
      : params(params), row(row), first(first), count(count), units(params, row, first, count) {}

  // The original scales the layer's input, not the fourth part of u.
  S scale() const { return params.x ? static_cast<S>(params.scale_x) : S(1); }
  int64_t step(int64_t index) const { return params.reverse ? params.length - 1 - index : index; }
  bool is_token(int64_t step) const { return flag(params.mask, row, step, true); }
  bool begins(int64_t step) const { return flag(params.document_start, row, step, false); }

  S* state(int64_t index, int64_t start) const {
    return static_cast<S*>(params.states.data) + offset(params.states, row, index, 0, first + start);
  }
  // c as the step finds it, zero where a document begins, and as it leaves it.
  const S* before(const Place& place) const {
    if (begins(place.step)) return units.zeros.buffer;
    return state(params.reverse ? place.step + 1 : place.step, place.start);
  }
  S* after(const Place& place) const { return state(params.reverse ? place.step : place.step + 1, place.start); }

  int64_t at(const TensorView& view, const Place& place, int64_t part = 0) const {
    return offset(view, row, place.step, part, first + place.start);
  }

  StepRows<S> inputs(const Place& place) {
    const auto part = [&](int64_t index, Block<S>& spare) {
      return read(params.u, at(params.u, place, index), place.count, spare);
    };
    const S* highway = units.zeros.buffer;
    if (params.x) {
      highway = read(params.x, at(params.x, place), place.count, x);
    } else if (params.parts == 4) {
      highway = part(3, x);
    }
    return {part(0, u0), part(1, u1), part(2, u2), highway, before(place)};
  }

  // Calls `work` for all units of a step, some at a time.
  template <typename Work>
  void for_each_block(int64_t step, const Work& work) const {
    for (int64_t start = 0; start < count; start += kBlock) {
      work(Place{step, start, count - start < kBlock ? count - start : kBlock});
    }
  }
};

// `after` may be `in.before`: with one row for all states, each step overwrites what it has read.
template <bool Tanh, typename S>
void forward_units(const Units<S>& units, const StepRows<S>& in, S scale, const Place& place, S* after, S* h) {
  HFE_INDEPENDENT
  for (int64_t i = 0; i < place.count; ++i) {
    const Outputs<S> out = forward_step<Tanh>(units.at(place.start + i), in.at(i, scale));
    after[i] = out.after;
    h[i] = out.h;
  }
}

template <bool Tanh, typename S>
void forward_chunk(const SruParams& params, int64_t row, int64_t first, int64_t count) {
  Chunk<S> chunk(params, row, first, count);
  Block<S> spare;
  const S scale = chunk.scale();
  S* initial = chunk.state(params.reverse ? params.length : 0, 0);
  Units<S>::load(initial, static_cast<const S*>(params.c0), row * params.width + first, count, S(0));
  for (int64_t index = 0; index < params.length; ++index) {
    chunk.for_each_block(chunk.step(index), [&](const Place& at) {
      const int64_t target = chunk.at(params.h, at);
      S *h = place(params.h, target, spare), *after = chunk.after(at);
      if (chunk.is_token(at.step)) {
        forward_units<Tanh>(chunk.units, chunk.inputs(at), scale, at, after, h);
      } else {
        if (after != chunk.before(at)) copy(after, chunk.before(at), at.count);
        fill(h, at.count, S(0));
      }
      finish(params.h, target, at.count, spare);
    });
  }
}
