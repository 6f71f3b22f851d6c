// The functions of `row_functions.h`. Included once for each instruction set, after lanes.h and in the same way; includes
// nothing itself.

// Tokens that one row is multiplied with at once: their sums fit into the registers.
constexpr int64_t kTogether = HFE_LANES == 16 ? 4 : 2;

// Sums of one product that run side by side, so that no addition waits for the one before.
constexpr int64_t kSums = 4;

constexpr int64_t kStep = kSums * kLanes;

// `work.template operator()<n>(first)` for `count` tokens, n at a time.
template <typename Work>
HFE_INLINE void for_each_group(int64_t count, const Work& work) {
  int64_t first = 0;
  for (; first + kTogether <= count; first += kTogether) work(std::integral_constant<int64_t, kTogether>(), first);
  if constexpr (kTogether == 4) {
    if (count - first == 3) work(std::integral_constant<int64_t, 3>(), first);
    if (count - first == 2) work(std::integral_constant<int64_t, 2>(), first);
  }
  if (count - first == 1) work(std::integral_constant<int64_t, 1>(), first);
}

template <int64_t Tokens, bool Streamed, typename T>
HFE_INLINE void multiply_row(const T* row, int64_t width, const float* const* x, float* out, int64_t out_stride) {
  Lanes sums[Tokens][kSums];
  for (int64_t t = 0; t < Tokens; ++t) {
    for (int64_t s = 0; s < kSums; ++s) sums[t][s] = Lanes(0.0f);
  }
  int64_t i = 0;
  for (; i + kStep <= width; i += kStep) {
    if constexpr (Streamed) prefetch_ahead(row + i, kStep * sizeof(T));
#pragma GCC unroll 4
    for (int64_t s = 0; s < kSums; ++s) {
      const Lanes weights = load(row + i + s * kLanes);
#pragma GCC unroll 4
      for (int64_t t = 0; t < Tokens; ++t) {
        sums[t][s] = multiply_add(weights, load(x[t] + i + s * kLanes), sums[t][s]);
      }
    }
  }
  for (; i + kLanes <= width; i += kLanes) {
    const Lanes weights = load(row + i);
    for (int64_t t = 0; t < Tokens; ++t) sums[t][0] = multiply_add(weights, load(x[t] + i), sums[t][0]);
  }
  if (i < width) {
    const Lanes weights = load_part(row + i, width - i);
    for (int64_t t = 0; t < Tokens; ++t) {
      sums[t][1] = multiply_add(weights, load_part(x[t] + i, width - i), sums[t][1]);
    }
  }
  for (int64_t t = 0; t < Tokens; ++t) {
    const Four four = sums_of(sums[t][0], sums[t][1], sums[t][2], sums[t][3]);
    out[t * out_stride] = (four[0] + four[1]) + (four[2] + four[3]);
  }
}

template <typename T>
void multiply(const void* row, int64_t width, const float* const* x, int64_t count, float* out) {
  for_each_group(count, [&](auto tokens, int64_t first) HFE_INLINED {
    multiply_row<tokens, false>(static_cast<const T*>(row), width, x + first, out + first, 1);
  });
}

template <typename T>
void project(const void* rows, int64_t stride, int64_t count, int64_t width, const float* const* x, int64_t tokens,
             float* out, int64_t out_stride) {
  for (int64_t r = 0; r < count; ++r) {
    const T* const row = static_cast<const T*>(rows) + r * stride;
    touch_pages(row + 2 * stride, width * sizeof(T));
    for_each_group(tokens, [&](auto some, int64_t first) HFE_INLINED {
      float* const to = out + first * out_stride + r;
      if (first == 0) {
        multiply_row<some, true>(row, width, x, to, out_stride);
      } else {
        multiply_row<some, false>(row, width, x + first, to, out_stride);
      }
    });
  }
}

// Logits of four units, whose rows are `stride` apart; `last` at most, so that where there are fewer the last is computed
// once more: it cannot win against itself.
template <int64_t Tokens, typename T>
HFE_INLINE void four_units(const T* rows, int64_t stride, int64_t last, int64_t rank, const float* h, int64_t h_stride,
                           Four bias, float* logits, int64_t logits_stride) {
  const T* const row[4] = {rows, rows + std::min<int64_t>(last, 1) * stride, rows + std::min<int64_t>(last, 2) * stride,
                           rows + std::min<int64_t>(last, 3) * stride};
  Lanes sums[Tokens][4];
  for (int64_t t = 0; t < Tokens; ++t) {
    for (int64_t u = 0; u < 4; ++u) sums[t][u] = Lanes(0.0f);
  }
  const auto add = [&](const auto& read, int64_t i) HFE_INLINED {
    Lanes weights[4];
    for (int64_t u = 0; u < 4; ++u) weights[u] = read(row[u] + i);
#pragma GCC unroll 4
    for (int64_t t = 0; t < Tokens; ++t) {
      const Lanes hidden = load(h + t * h_stride + i);
#pragma GCC unroll 4
      for (int64_t u = 0; u < 4; ++u) sums[t][u] = multiply_add(weights[u], hidden, sums[t][u]);
    }
  };
  int64_t i = 0;
  for (; i + kLanes <= rank; i += kLanes) add([](const T* from) HFE_INLINED { return load(from); }, i);
  if (i < rank) add([&](const T* from) HFE_INLINED { return load_part(from, rank - i); }, i);
  for (int64_t t = 0; t < Tokens; ++t) {
    const Four four = sums_of(sums[t][0], sums[t][1], sums[t][2], sums[t][3]) + bias;
    memcpy(logits + t * logits_stride, &four, sizeof(four));
  }
}

template <typename T>
void unit_logits(const void* rows, int64_t stride, int64_t units, int64_t rank, const float* h, int64_t h_stride,
                 int64_t tokens, const float* bias, float* logits, Ahead& ahead) {
  const int64_t logits_stride = padded(units), four_bytes = 4 * stride * static_cast<int64_t>(sizeof(T));
  touch_pages(static_cast<const T*>(rows) + units * stride + kAheadBytes / sizeof(T), units / 4 * four_bytes);
  for_each_group(tokens, [&](auto some, int64_t first) HFE_INLINED {
    const T* row = static_cast<const T*>(rows);
    const float* const hidden = h + first * h_stride;
    float* const to = logits + first * logits_stride;
    int64_t n = 0;
    for (; n + 4 <= units; n += 4, row += 4 * stride) {
      if (first == 0) {
        prefetch_ahead(row, four_bytes);
        ahead.step();
      }
      four_units<some>(row, stride, 3, rank, hidden, h_stride, unaligned<Four>(bias + n), to + n, logits_stride);
    }
    if (n == units) return;
    if (first == 0) ahead.step();
    four_units<some>(row, stride, units - n - 1, rank, hidden, h_stride, unaligned<Four>(bias + n), to + n,
                     logits_stride);
  });
}

template <int64_t Tokens, typename T>
HFE_INLINE void add_row(const T* row, int64_t width, const float* scales, float* const* y) {
  Lanes scale[Tokens];
  for (int64_t t = 0; t < Tokens; ++t) scale[t] = Lanes(scales[t]);
  int64_t i = 0;
#pragma GCC unroll 2
  for (; i + kLanes <= width; i += kLanes) {
    const Lanes weights = load(row + i);
#pragma GCC unroll 4
    for (int64_t t = 0; t < Tokens; ++t) store(y[t] + i, multiply_add(scale[t], weights, load(y[t] + i)));
  }
  if (i < width) {
    const Lanes weights = load_part(row + i, width - i);
    for (int64_t t = 0; t < Tokens; ++t) {
      store_part(y[t] + i, multiply_add(scale[t], weights, load_part(y[t] + i, width - i)), width - i);
    }
  }
}

template <typename T>
void add(const void* row, int64_t width, const float* scales, float* const* y, int64_t count) {
  for_each_group(count, [&](auto tokens, int64_t first) HFE_INLINED {
    add_row<tokens>(static_cast<const T*>(row), width, scales + first, y + first);
  });
}

int64_t winner(const float* logits, int64_t units) { return winner_of(logits, units); }

float probability(const float* logits, int64_t units, int64_t winner) { return probability_of(logits, units, winner); }

template <typename T>
RowFunctions row_functions_of() {
  return {project<T>, unit_logits<T>, multiply<T>, add<T>, widen_all<T>, narrow_all<T>};
}

Functions all_functions() {
  return {row_functions_of<float>(), row_functions_of<BFloat16>(), row_functions_of<Float16>(), winner, probability};
}
