// Registers of 8-bit integers and the sums of their products. Included once for each instruction set, after lanes.h and in
// the same way; includes nothing itself.

// Bytes of a register.
constexpr int64_t kBytes = 4 * HFE_LANES;

typedef int32_t Ints __attribute__((vector_size(4 * HFE_LANES)));
typedef int32_t FourInts __attribute__((vector_size(16)));

#if HFE_LANES == 16
typedef __m512i Bytes;
#elif HFE_LANES == 8
typedef __m256i Bytes;
#else
typedef int8_t Bytes __attribute__((vector_size(16)));
typedef int16_t WideBytes __attribute__((vector_size(32)));
typedef int32_t Quads __attribute__((vector_size(64)));
#endif

HFE_INLINE Bytes load_bytes(const void* from) { return unaligned<Bytes>(static_cast<const char*>(from)); }

// The `kGroup` bytes at `from`, and zeros where a register has more.
HFE_INLINE Bytes load_group(const void* from) {
#if HFE_LANES == 16
  return _mm512_zextsi256_si512(unaligned<__m256i>(static_cast<const char*>(from)));
#else
  return load_bytes(from);
#endif
}

// Codes of a row of weights, as products take them. Each code stands for itself plus `kCodeOffset`, which the sum of the
// other factors takes off again.
#if defined(HFE_VNNI)
constexpr int32_t kCodeOffset = 128;
struct Codes {
  Bytes bytes;  // unsigned
};
HFE_INLINE Codes codes_of(Bytes bytes) { return {_mm512_xor_si512(bytes, _mm512_set1_epi8(-128))}; }
HFE_INLINE Ints add_products(Ints sums, Codes codes, Bytes inputs) {
  return Ints(_mm512_dpbusd_epi32(__m512i(sums), codes.bytes, inputs));
}
#elif HFE_LANES == 16
constexpr int32_t kCodeOffset = 0;
struct Codes {
  Bytes magnitudes;
  __mmask64 negative;
};
HFE_INLINE Codes codes_of(Bytes bytes) { return {_mm512_abs_epi8(bytes), _mm512_movepi8_mask(bytes)}; }
// Pairs of products are at most 2 * 127 * 128, which 16 bits hold.
HFE_INLINE Ints add_products(Ints sums, Codes codes, Bytes inputs) {
  const Bytes turned = _mm512_mask_sub_epi8(inputs, codes.negative, _mm512_setzero_si512(), inputs);
  const Bytes pairs = _mm512_maddubs_epi16(codes.magnitudes, turned);
  return sums + Ints(_mm512_madd_epi16(pairs, _mm512_set1_epi16(1)));
}
#elif HFE_LANES == 8
constexpr int32_t kCodeOffset = 0;
struct Codes {
  Bytes bytes, magnitudes;
};
HFE_INLINE Codes codes_of(Bytes bytes) { return {bytes, _mm256_abs_epi8(bytes)}; }
// Pairs of products are at most 2 * 127 * 128, which 16 bits hold.
HFE_INLINE Ints add_products(Ints sums, Codes codes, Bytes inputs) {
  const Bytes pairs = _mm256_maddubs_epi16(codes.magnitudes, _mm256_sign_epi8(inputs, codes.bytes));
  return sums + Ints(_mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
#else
constexpr int32_t kCodeOffset = 0;
struct Codes {
  Bytes bytes;
};
HFE_INLINE Codes codes_of(Bytes bytes) { return {bytes}; }
HFE_INLINE Ints add_products(Ints sums, Codes codes, Bytes inputs) {
  const WideBytes products = __builtin_convertvector(codes.bytes, WideBytes) *
                             __builtin_convertvector(inputs, WideBytes);
  const Quads quads = __builtin_convertvector(products, Quads);
  for (int64_t i = 0; i < 16; ++i) sums[i % 4] += quads[i];
  return sums;
}
#endif

// Groups of int4 whose packed codes a register holds.
constexpr int64_t kGroupsTogether = kLanes / 4;

// The packed codes of `count` groups, at most `kGroupsTogether`, and zeros.
HFE_INLINE Bytes load_groups(const uint8_t* from, [[maybe_unused]] int64_t count) {
#if HFE_LANES == 16
  return _mm512_maskz_loadu_epi64(static_cast<__mmask8>((1u << 2 * count) - 1u), from);
#elif HFE_LANES == 8
  return _mm256_zextsi128_si256(unaligned<__m128i>(from));
#else
  return load_bytes(from);
#endif
}

// Codes of packed groups from 0 to 15: the first half of each group, and the second.
HFE_INLINE Bytes low_nibbles(Bytes packed) {
#if HFE_LANES == 16
  return _mm512_and_si512(packed, _mm512_set1_epi8(15));
#elif HFE_LANES == 8
  return _mm256_and_si256(packed, _mm256_set1_epi8(15));
#else
  return packed & 15;
#endif
}

HFE_INLINE Bytes high_nibbles(Bytes packed) {
#if HFE_LANES == 16
  return low_nibbles(_mm512_srli_epi16(packed, 4));
#elif HFE_LANES == 8
  return low_nibbles(_mm256_srli_epi16(packed, 4));
#else
  typedef uint8_t Unsigned __attribute__((vector_size(16)));
  return Bytes(Unsigned(packed) >> 4);
#endif
}

// Sums of products of both halves of groups with inputs: four lanes a group.
HFE_INLINE Ints nibble_products(Bytes low, Bytes high, Bytes low_inputs, Bytes high_inputs) {
#if defined(HFE_VNNI)
  return Ints(_mm512_dpbusd_epi32(_mm512_dpbusd_epi32(_mm512_setzero_si512(), low, low_inputs), high, high_inputs));
#elif HFE_LANES == 16
  // Sums of four products of at most 15 * 128 fit into 16 bits.
  const Bytes pairs = _mm512_add_epi16(_mm512_maddubs_epi16(low, low_inputs), _mm512_maddubs_epi16(high, high_inputs));
  return Ints(_mm512_madd_epi16(pairs, _mm512_set1_epi16(1)));
#elif HFE_LANES == 8
  const Bytes pairs = _mm256_add_epi16(_mm256_maddubs_epi16(low, low_inputs), _mm256_maddubs_epi16(high, high_inputs));
  return Ints(_mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
#else
  return add_products(add_products(Ints{}, codes_of(low), low_inputs), codes_of(high), high_inputs);
#endif
}

HFE_INLINE Lanes to_floats(Ints sums) { return __builtin_convertvector(sums, Floats); }

// The sums over all lanes of four registers.
HFE_INLINE FourInts int_sums_of(Ints a, Ints b, Ints c, Ints d) {
#if HFE_LANES == 16
  const __m512i ab = _mm512_add_epi32(_mm512_unpacklo_epi32(__m512i(a), __m512i(b)),
                                      _mm512_unpackhi_epi32(__m512i(a), __m512i(b)));
  const __m512i cd = _mm512_add_epi32(_mm512_unpacklo_epi32(__m512i(c), __m512i(d)),
                                      _mm512_unpackhi_epi32(__m512i(c), __m512i(d)));
  const __m512i all = _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
  const __m256i half = _mm256_add_epi32(_mm512_castsi512_si256(all), _mm512_extracti32x8_epi32(all, 1));
  return FourInts(_mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1)));
#elif HFE_LANES == 8
  const __m256i all = _mm256_hadd_epi32(_mm256_hadd_epi32(__m256i(a), __m256i(b)),
                                        _mm256_hadd_epi32(__m256i(c), __m256i(d)));
  return FourInts(_mm_add_epi32(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1)));
#else
  FourInts sums = {};
  for (int64_t i = 0; i < kLanes; ++i) sums += FourInts{a[i], b[i], c[i], d[i]};
  return sums;
#endif
}
