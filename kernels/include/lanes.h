// Lanes: as many float32 numbers as a register holds, computed with at once. Included once for each instruction set,
// with HFE_LANES set to 4, 8 or 16, inside a namespace and with the compiler's target set; includes nothing itself.
//
// Left to itself the compiler makes a clamp into compares and blends, since a minimum that hands NaN through is no
// operation of its intermediate language, and converts 16-bit numbers in twice the instructions.

constexpr int64_t kLanes = HFE_LANES;

typedef float Floats __attribute__((vector_size(4 * HFE_LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * HFE_LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * HFE_LANES)));
typedef float Four __attribute__((vector_size(16)));

#if HFE_LANES == 16
#define HFE_INTRINSIC(name) _mm512_##name
#elif HFE_LANES == 8
#define HFE_INTRINSIC(name) _mm256_##name
#elif defined(__x86_64__)
#define HFE_INTRINSIC(name) _mm_##name
#endif

struct Lanes {
  Floats values;

  Lanes() = default;
  HFE_INLINE Lanes(Floats values) : values(values) {}
  // A difference, which is exact for -0 too: of a loop over the lanes the compiler makes as many instructions.
  HFE_INLINE Lanes(float value) : values(value - Floats{}) {}
};

HFE_INLINE Lanes operator+(Lanes a, Lanes b) { return a.values + b.values; }
HFE_INLINE Lanes operator-(Lanes a, Lanes b) { return a.values - b.values; }
HFE_INLINE Lanes operator-(Lanes a) { return -a.values; }
HFE_INLINE Lanes operator*(Lanes a, Lanes b) { return a.values * b.values; }
HFE_INLINE Lanes operator/(Lanes a, Lanes b) { return a.values / b.values; }

// a b + c, in one operation where the processor has it.
HFE_INLINE Lanes multiply_add(Lanes a, Lanes b, Lanes c) { return a.values * b.values + c.values; }

// `limit` where it is less (greater) than x, else x, NaN too.
#if defined(HFE_INTRINSIC)
HFE_INLINE Lanes at_most(Lanes x, Lanes limit) { return Floats(HFE_INTRINSIC(min_ps)(limit.values, x.values)); }
HFE_INLINE Lanes at_least(Lanes x, Lanes limit) { return Floats(HFE_INTRINSIC(max_ps)(limit.values, x.values)); }
#else
HFE_INLINE Lanes at_most(Lanes x, Lanes limit) { return limit.values < x.values ? limit.values : x.values; }
HFE_INLINE Lanes at_least(Lanes x, Lanes limit) { return limit.values > x.values ? limit.values : x.values; }
#endif

HFE_INLINE Lanes where_less(Lanes a, Lanes b, Lanes then, Lanes otherwise) {
  return a.values < b.values ? then.values : otherwise.values;
}

HFE_INLINE Lanes shifted_left(Lanes x, int bits) { return Floats(Words(x.values) << bits); }
HFE_INLINE Lanes magnitude(Lanes x) { return Floats(Words(x.values) & 0x7fffffffu); }
HFE_INLINE Lanes with_sign(Lanes x, Lanes sign) {
  return Floats((Words(x.values) & 0x7fffffffu) | (Words(sign.values) & 0x80000000u));
}

template <typename Vector, typename T>
HFE_INLINE Vector unaligned(const T* from) {
  Vector vector;
  memcpy(&vector, from, sizeof(vector));
  return vector;
}

// The sums over all lanes of four registers.
HFE_INLINE Four sums_of(Lanes a, Lanes b, Lanes c, Lanes d) {
#if defined(HFE_INTRINSIC)
  // In each 128 bits a0 + a2, b0 + b2, a1 + a3, b1 + b3, and then all four of them.
  const Floats ab = HFE_INTRINSIC(unpacklo_ps)(a.values, b.values) + HFE_INTRINSIC(unpackhi_ps)(a.values, b.values);
  const Floats cd = HFE_INTRINSIC(unpacklo_ps)(c.values, d.values) + HFE_INTRINSIC(unpackhi_ps)(c.values, d.values);
  const Floats all = HFE_INTRINSIC(shuffle_ps)(ab, cd, 0x44) + HFE_INTRINSIC(shuffle_ps)(ab, cd, 0xee);
#if HFE_LANES == 16
  const __m256 half = _mm512_castps512_ps256(all) + _mm512_extractf32x8_ps(all, 1);
  return Four(_mm256_castps256_ps128(half) + _mm256_extractf128_ps(half, 1));
#elif HFE_LANES == 8
  return Four(_mm256_castps256_ps128(all) + _mm256_extractf128_ps(all, 1));
#else
  return Four(all);
#endif
#else
  Four sums = {};
  for (int64_t i = 0; i < kLanes; ++i) sums += Four{a.values[i], b.values[i], c.values[i], d.values[i]};
  return sums;
#endif
}

// Which lanes of `a` equal those of `b`, and which are NaN: one bit each, the first lane's the lowest.
#if HFE_LANES == 16
HFE_INLINE uint32_t where_equal(Lanes a, Lanes b) { return _mm512_cmp_ps_mask(a.values, b.values, _CMP_EQ_OQ); }
HFE_INLINE uint32_t where_nan(Lanes a) { return _mm512_cmp_ps_mask(a.values, a.values, _CMP_UNORD_Q); }
#elif HFE_LANES == 8
HFE_INLINE uint32_t where_equal(Lanes a, Lanes b) {
  return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(a.values, b.values, _CMP_EQ_OQ)));
}
HFE_INLINE uint32_t where_nan(Lanes a) {
  return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(a.values, a.values, _CMP_UNORD_Q)));
}
#else
HFE_INLINE uint32_t where_equal(Lanes a, Lanes b) {
  uint32_t bits = 0;
  for (int64_t i = 0; i < kLanes; ++i) bits |= static_cast<uint32_t>(a.values[i] == b.values[i]) << i;
  return bits;
}
HFE_INLINE uint32_t where_nan(Lanes a) { return ~where_equal(a, a) & ((1u << kLanes) - 1u); }
#endif

HFE_INLINE Lanes load(const float* from) { return unaligned<Floats>(from); }
HFE_INLINE void store(float* to, Lanes x) { memcpy(to, &x.values, sizeof(x.values)); }

HFE_INLINE Lanes load(const BFloat16* from) {
#if HFE_LANES == 16
  return Floats(_mm512_slli_epi32(_mm512_cvtepu16_epi32(unaligned<__m256i>(from)), 16));
#elif HFE_LANES == 8
  // Both halves of the register see all numbers; a shuffle in each puts its four where they belong.
  const __m256i both = _mm256_broadcastsi128_si256(unaligned<__m128i>(from));
  const __m256i places = _mm256_setr_epi8(-1, -1, 0, 1, -1, -1, 2, 3, -1, -1, 4, 5, -1, -1, 6, 7,  //
                                          -1, -1, 8, 9, -1, -1, 10, 11, -1, -1, 12, 13, -1, -1, 14, 15);
  return Floats(_mm256_shuffle_epi8(both, places));
#else
  return Floats(__builtin_convertvector(unaligned<Halves>(from), Words) << 16);
#endif
}

// As `to_bfloat16` does it, but for the bits of a NaN: rounded in the upper halves of the words, which are all ones
// then.
HFE_INLINE void store(BFloat16* to, Lanes x) {
  const Words bits = Words(x.values);
  const Words rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) | Words(x.values != x.values);
#if HFE_LANES == 8
  const __m256i places = _mm256_setr_epi8(2, 3, 6, 7, 10, 11, 14, 15, -1, -1, -1, -1, -1, -1, -1, -1,  //
                                          2, 3, 6, 7, 10, 11, 14, 15, -1, -1, -1, -1, -1, -1, -1, -1);
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_shuffle_epi8(__m256i(rounded), places), 0x08);
  const __m128i halves = _mm256_castsi256_si128(packed);
#else
  const Halves halves = __builtin_convertvector(rounded >> 16, Halves);
#endif
  memcpy(to, &halves, sizeof(halves));
}

// One after the other where the processor has no instruction for it.
HFE_INLINE Lanes load(const Float16* from) {
#if HFE_LANES == 16
  return Floats(_mm512_cvtph_ps(__m256i(unaligned<Halves>(from))));
#elif HFE_LANES == 8
  return Floats(_mm256_cvtph_ps(__m128i(unaligned<Halves>(from))));
#else
  Lanes x;
  for (int64_t i = 0; i < kLanes; ++i) x.values[i] = from_float16(from[i].bits);
  return x;
#endif
}

HFE_INLINE void store(Float16* to, Lanes x) {
#if HFE_LANES == 16
  const __m256i halves = _mm512_cvtps_ph(x.values, _MM_FROUND_TO_NEAREST_INT);
  memcpy(to, &halves, sizeof(halves));
#elif HFE_LANES == 8
  const __m128i halves = _mm256_cvtps_ph(x.values, _MM_FROUND_TO_NEAREST_INT);
  memcpy(to, &halves, sizeof(halves));
#else
  for (int64_t i = 0; i < kLanes; ++i) to[i].bits = to_float16(x.values[i]);
#endif
}

// The first `count` numbers, and zeros; nothing behind them is touched.
template <typename T>
HFE_INLINE Lanes load_part(const T* from, int64_t count) {
#if HFE_LANES == 16
  const uint16_t mask = static_cast<uint16_t>((1u << count) - 1u);
  if constexpr (std::is_same_v<T, float>) {
    return Floats(_mm512_maskz_loadu_ps(mask, from));
  } else if constexpr (std::is_same_v<T, Float16>) {
    return Floats(_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, from)));
  } else {
    return Floats(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, from)), 16));
  }
#else
  T numbers[kLanes] = {};
  memcpy(numbers, from, count * sizeof(T));
  return load(numbers);
#endif
}

template <typename T>
HFE_INLINE void store_part(T* to, Lanes x, int64_t count) {
#if HFE_LANES == 16
  if constexpr (std::is_same_v<T, float>) {
    _mm512_mask_storeu_ps(to, static_cast<uint16_t>((1u << count) - 1u), x.values);
    return;
  }
#endif
  T numbers[kLanes];
  store(numbers, x);
  memcpy(to, numbers, count * sizeof(T));
}

#undef HFE_INTRINSIC
