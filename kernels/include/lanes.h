// Lanes: as many float32 numbers as a register holds, computed with at once. Included once for each instruction set,
// with HFE_LANES set to 4, 8 or 16, inside a namespace and with the compiler's target set; includes nothing itself.
//
// Left to itself the compiler makes a clamp into compares and blends, since a minimum that hands NaN through is no
// operation of its intermediate language, and converts 16-bit numbers in twice the instructions.

constexpr int64_t kLanes = HFE_LANES;

typedef float Floats __attribute__((vector_size(4 * HFE_LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * HFE_LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * HFE_LANES)));

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
  HFE_INLINE Lanes(float value) {
    for (int64_t i = 0; i < kLanes; ++i) values[i] = value;
  }
};

HFE_INLINE Lanes operator+(Lanes a, Lanes b) { return a.values + b.values; }
HFE_INLINE Lanes operator-(Lanes a, Lanes b) { return a.values - b.values; }
HFE_INLINE Lanes operator-(Lanes a) { return -a.values; }
HFE_INLINE Lanes operator*(Lanes a, Lanes b) { return a.values * b.values; }
HFE_INLINE Lanes operator/(Lanes a, Lanes b) { return a.values / b.values; }

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

HFE_INLINE Lanes load(const float* from) { return unaligned<Floats>(from); }
HFE_INLINE void store(float* to, Lanes x) { memcpy(to, &x.values, sizeof(x.values)); }

HFE_INLINE Lanes load(const BFloat16* from) {
#if HFE_LANES == 8
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

#undef HFE_INTRINSIC
