// What a sparse feed-forward layer needs beyond products of matrices. Included once for each instruction set, after
// tiles.h and in the same way; includes nothing itself.

// Logits of a block's units, rows from `first` on of the controller, for up to `kFew` inputs. A step of `ahead` for each
// `kRows` units.
template <typename Kind>
void block_logits(const Matrix& controller, int64_t first, int64_t units, const Operands& x, const float* bias,
                  float* logits, int64_t logits_stride, Ahead& ahead) {
  const Stream stream(controller.stride, row_bytes(controller.format, controller.width), kRows);
  // Short rows are one stream, which the processor sees by itself.
  const bool is_left = controller.stride <= kStreamAhead / kRows;
  int64_t n = 0;
  if (x.count == 1) {
    for (; n + kRows <= units; n += kRows) {
      ahead.step();
      for_each_panel<Kind>(controller.width, [&](int64_t begin, int64_t end) HFE_INLINED {
        const Place place = {begin, end, logits + n, logits_stride};
        Kind::template sum<kRows, 1>(controller, first + n, x, 0, is_left ? nullptr : &stream, place);
      });
    }
  }
  for (; n + kRows <= units; n += kRows) {
    ahead.step();
    multiply_rows_by_few<Kind, kRows>(controller, first + n, x, stream, logits + n, logits_stride);
  }
  for (; n < units; ++n) {
    ahead.step();
    multiply_rows_by_few<Kind, 1>(controller, first + n, x, stream, logits + n, logits_stride);
  }
  for (int64_t t = 0; t < x.count; ++t) {
    float* const to = logits + t * logits_stride;
    for (n = 0; n + kLanes <= units; n += kLanes) store(to + n, load(to + n) + load(bias + n));
    for (; n < units; ++n) to[n] += bias[n];
  }
}

// The product of a unit's row with an input. Its sums run side by side: one alone, in which each addition waits for the
// one before, takes longer than reading the row.
template <typename T>
float unit_product(const void* row, int64_t width, const float* x) {
  constexpr int64_t kSums = 4, kStep = kSums * kLanes;
  const T* const weights = static_cast<const T*>(row);
  Lanes sums[kSums];
  repeat<kSums>([&](auto s) HFE_INLINED { sums[s] = Lanes(0.0f); });
  int64_t i = 0;
#pragma GCC unroll 2
  for (; i + kStep <= width; i += kStep) {
    repeat<kSums>([&](auto s) HFE_INLINED {
      sums[s] = multiply_add(load(weights + i + s * kLanes), load(x + i + s * kLanes), sums[s]);
    });
  }
  for (; i + kLanes <= width; i += kLanes) sums[0] = multiply_add(load(weights + i), load(x + i), sums[0]);
  if (i < width) sums[1] = multiply_add(load_part(weights + i, width - i), load_part(x + i, width - i), sums[1]);
  const Four four = sums_of(sums[0], sums[1], sums[2], sums[3]);
  return (four[0] + four[1]) + (four[2] + four[3]);
}

int64_t winner(const float* logits, int64_t units) { return winner_of(logits, units); }

float probability(const float* logits, int64_t units, int64_t winner) { return probability_of(logits, units, winner); }

// x / (1 + e^-of); beyond 87 the exponential is that of 87.
HFE_INLINE Lanes by_sigmoid(Lanes x, Lanes of) {
  const Lanes bounded = at_most(at_least(-of, Lanes(-87.0f)), Lanes(87.0f));
  return x / (Lanes(1.0f) + exponential(bounded));
}

// The error function by Abramowitz and Stegun, 7.1.26, to 1.5e-7.
HFE_INLINE Lanes error_function(Lanes x) {
  const Lanes size = magnitude(x);
  const Lanes t = Lanes(1.0f) / (Lanes(1.0f) + Lanes(0.3275911f) * size);
  Lanes sum = Lanes(1.061405429f);
  sum = multiply_add(sum, t, Lanes(-1.453152027f));
  sum = multiply_add(sum, t, Lanes(1.421413741f));
  sum = multiply_add(sum, t, Lanes(-0.284496736f));
  sum = multiply_add(sum, t, Lanes(0.254829592f));
  const Lanes rest = sum * t * exponential(at_least(-(size * size), Lanes(-87.0f)));
  return with_sign(Lanes(1.0f) - rest, x);
}

HFE_INLINE Lanes activated(Lanes x, Activation activation) {
  switch (activation) {
    case Activation::relu: return where_less(x, Lanes(0.0f), Lanes(0.0f), x);
    case Activation::gelu: return Lanes(0.5f) * x * (Lanes(1.0f) + error_function(x * Lanes(0.70710678f)));
    case Activation::silu: return by_sigmoid(x, x);
    default: return by_sigmoid(x, Lanes(1.59576912f) * (x + Lanes(0.044715f) * x * x * x));
  }
}

void activate_all(float* x, int64_t count, Activation activation) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(x + i, activated(load(x + i), activation));
  if (i < count) store_part(x + i, activated(load_part(x + i, count - i), activation), count - i);
}
