// Numbers rounded to 8 bits, and in other formats. Included once for each instruction set, after integers.h and in the
// same way; includes nothing itself.

// The next numbers of a row that has `left` more, and zeros.
template <typename T>
HFE_INLINE Lanes load_next(const T* from, int64_t left) {
  return left >= kLanes ? load(from) : left > 0 ? load_part(from, left) : Lanes(0.0f);
}

// The nearest integers, ties to even, whose magnitude is below 2^22.
HFE_INLINE Ints to_integers(Lanes x) {
#if HFE_LANES == 16
  return Ints(_mm512_cvtps_epi32(x.values));
#elif HFE_LANES == 8
  return Ints(_mm256_cvtps_epi32(x.values));
#elif defined(__x86_64__)
  return Ints(_mm_cvtps_epi32(x.values));
#else
  Ints integers;
  for (int64_t i = 0; i < kLanes; ++i) integers[i] = static_cast<int32_t>(lrintf(x.values[i]));
  return integers;
#endif
}

// Integers as `kLanes` bytes; what bytes do not hold becomes the nearest that they do.
HFE_INLINE void store_bytes(int8_t* to, Ints integers) {
#if HFE_LANES == 16
  const __m128i bytes = _mm512_cvtsepi32_epi8(__m512i(integers));
  memcpy(to, &bytes, kLanes);
#elif HFE_LANES == 8
  const __m128i halves = _mm_packs_epi32(_mm256_castsi256_si128(__m256i(integers)),
                                         _mm256_extracti128_si256(__m256i(integers), 1));
  const __m128i bytes = _mm_packs_epi16(halves, halves);
  memcpy(to, &bytes, kLanes);
#else
  for (int64_t i = 0; i < kLanes; ++i) to[i] = static_cast<int8_t>(std::max(-128, std::min(127, integers[i])));
#endif
}

HFE_INLINE float largest_of(Lanes x) {
#if HFE_LANES == 16
  return _mm512_reduce_max_ps(x.values);
#else
  float most = x.values[0];
  for (int64_t i = 1; i < kLanes; ++i) most = std::max(most, static_cast<float>(x.values[i]));
  return most;
#endif
}

// By what numbers are multiplied before they are rounded, for the largest magnitude among them: 127 times its
// reciprocal, as torch divides a number by a tensor.
HFE_INLINE Lanes inverse_of(Lanes most) {
  return where_less(Lanes(0.0f), most, Lanes(1.0f) / most * Lanes(127.0f), Lanes(0.0f));
}

// Work on all numbers of a row: `work(numbers, index)`, `kLanes` at a time, and zeros behind the last.
template <typename Work>
HFE_INLINE void for_each_lanes(const float* numbers, int64_t width, const Work& work) {
  int64_t i = 0;
#pragma GCC unroll 4
  for (; i + kLanes <= width; i += kLanes) work(load(numbers + i), i);
  if (i < width) work(load_part(numbers + i, width - i), i);
}

void round_int8(const float* numbers, int64_t width, int8_t* codes, float* scale, int32_t* excess) {
  // As integers the bits of magnitudes have the order of the numbers, and those of NaN stand above all.
  Ints most = {};
  for_each_lanes(numbers, width, [&](Lanes x, int64_t) HFE_INLINED {
    const Ints bits = Ints(magnitude(x).values);
    most = bits > most ? bits : most;
  });
  int32_t largest_bits = 0;
  for (int64_t i = 0; i < kLanes; ++i) largest_bits = std::max(largest_bits, static_cast<int32_t>(most[i]));
  const float largest = same_bits<float>(largest_bits);
  *scale = largest / 127.0f;
  const Lanes inverse = inverse_of(Lanes(largest));
  const int64_t lanes = rounded_up(width, kLanes);
  Ints sums = {};
  for_each_lanes(numbers, width, [&](Lanes x, int64_t i) HFE_INLINED {
    const Ints integers = to_integers(x * inverse);
    store_bytes(codes + i, integers);
    sums = add_excess(sums, integers);
  });
  std::fill(codes + lanes, codes + rounded_up(width, kCodePadding), int8_t(0));
  *excess = int_sums_of(sums, Ints{}, Ints{}, Ints{})[0];
}

// Where the codes of a group's first half are, and how far behind them those of its second.
HFE_INLINE int64_t place_of_group(int64_t group) {
  return group / kGroupsTogether * 2 * kBytes + group % kGroupsTogether * kGroup / 2;
}

void round_int4(const float* numbers, int64_t width, int8_t* codes, float* scales, float* offsets) {
  const int64_t groups = rounded_up(width, kGroup) / kGroup, all = rounded_up(width, kCodePadding) / kGroup;
  uint32_t nan = 0;
  for (int64_t g = 0; g < groups; ++g) {
    Lanes most = Lanes(0.0f);
    for (int64_t i = g * kGroup; i < (g + 1) * kGroup; i += kLanes) {
      const Lanes x = load_next(numbers + i, width - i);
      most = at_least(magnitude(x), most);
      nan |= where_nan(x);
    }
    scales[g] = largest_of(most);
  }
  std::fill(scales + groups, scales + all, 0.0f);
  // An input with NaN has no product that is not.
  if (nan) scales[0] = __builtin_nanf("");
  // The inverses, in the place of what comes there later.
  for (int64_t g = 0; g < all; g += kLanes) {
    const Lanes most = load(scales + g);
    store(offsets + g, inverse_of(most));
    store(scales + g, most / Lanes(127.0f));
  }
  for (int64_t g = 0; g < groups; ++g) {
    const Lanes inverse = Lanes(offsets[g]);
    int8_t* const place = codes + place_of_group(g);
    Ints sums = {};
#pragma GCC unroll 8
    for (int64_t i = 0; i < kGroup; i += kLanes) {
      const int64_t at = g * kGroup + i;
      const Ints integers = to_integers(load_next(numbers + at, width - at) * inverse);
      store_bytes(place + (i < kGroup / 2 ? i : i - kGroup / 2 + kBytes), integers);
      sums += integers;
    }
    offsets[g] = 8.0f * scales[g] * static_cast<float>(int_sums_of(sums, Ints{}, Ints{}, Ints{})[0]);
  }
  for (int64_t g = groups; g < rounded_up(groups, kGroupsTogether); ++g) {
    std::fill_n(codes + place_of_group(g), kGroup / 2, int8_t(0));
    std::fill_n(codes + place_of_group(g) + kBytes, kGroup / 2, int8_t(0));
  }
}
