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

// Codes of weights and of inputs, as products take them. A sum of products comes out too large by what `add_excess`
// makes of the input's codes; of an infinite number these are below -128 before they are stored.
#if defined(HFE_VNNI)
typedef Bytes Given;
HFE_INLINE Bytes weights_of(Bytes bytes) { return _mm512_xor_si512(bytes, _mm512_set1_epi8(-128)); }
HFE_INLINE Given given_of(Bytes bytes) { return bytes; }
// Each code of weights has 128 added.
HFE_INLINE Ints add_products(Ints sums, Bytes weights, const Given& given) {
  return Ints(_mm512_dpbusd_epi32(__m512i(sums), weights, given));
}
HFE_INLINE Ints add_excess(Ints excess, Ints codes) {
  return excess + Ints(_mm512_slli_epi32(__m512i(codes), 7));
}
#elif HFE_LANES >= 8
// An input below 0 inverts the bits of weights, which makes -w - 1 of w, so that its magnitude is missing from the sum.
// Changing the sign instead takes a slot of the units that multiply (Zen 4).
struct Given {
  Bytes magnitudes, negative;
};
HFE_INLINE Bytes weights_of(Bytes bytes) { return bytes; }
#if HFE_LANES == 16
HFE_INLINE Given given_of(Bytes bytes) {
  return {_mm512_abs_epi8(bytes), _mm512_movm_epi8(_mm512_movepi8_mask(bytes))};
}
// Pairs of products are at most 2 * 127 * 128, which 16 bits hold.
HFE_INLINE Ints add_products(Ints sums, Bytes weights, const Given& given) {
  const Bytes pairs = _mm512_maddubs_epi16(given.magnitudes, _mm512_xor_si512(weights, given.negative));
  return sums + Ints(_mm512_madd_epi16(pairs, _mm512_set1_epi16(1)));
}
HFE_INLINE Ints add_excess(Ints excess, Ints codes) {
  const __m512i bounded = _mm512_max_epi32(__m512i(codes), _mm512_set1_epi32(-128));
  return excess + Ints(_mm512_min_epi32(bounded, _mm512_setzero_si512()));
}
#else
HFE_INLINE Given given_of(Bytes bytes) {
  return {_mm256_abs_epi8(bytes), _mm256_cmpgt_epi8(_mm256_setzero_si256(), bytes)};
}
// Pairs of products are at most 2 * 127 * 128, which 16 bits hold.
HFE_INLINE Ints add_products(Ints sums, Bytes weights, const Given& given) {
  const Bytes pairs = _mm256_maddubs_epi16(given.magnitudes, _mm256_xor_si256(weights, given.negative));
  return sums + Ints(_mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
HFE_INLINE Ints add_excess(Ints excess, Ints codes) {
  const __m256i bounded = _mm256_max_epi32(__m256i(codes), _mm256_set1_epi32(-128));
  return excess + Ints(_mm256_min_epi32(bounded, _mm256_setzero_si256()));
}
#endif
#else
typedef Bytes Given;
HFE_INLINE Bytes weights_of(Bytes bytes) { return bytes; }
HFE_INLINE Given given_of(Bytes bytes) { return bytes; }
HFE_INLINE Ints add_products(Ints sums, Bytes weights, const Given& given) {
  const WideBytes products = __builtin_convertvector(weights, WideBytes) * __builtin_convertvector(given, WideBytes);
  const Quads quads = __builtin_convertvector(products, Quads);
  for (int64_t i = 0; i < 16; ++i) sums[i % 4] += quads[i];
  return sums;
}
HFE_INLINE Ints add_excess(Ints excess, Ints) { return excess; }
#endif

// Has a sum computed where it stands: GCC computes many products first and adds them later, for which there are not
// enough registers.
HFE_INLINE void compute_now([[maybe_unused]] Ints& sum) {
#if HFE_LANES == 8
  asm volatile("" : "+x"(sum));
#endif
}

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
  return add_products(add_products(Ints{}, low, low_inputs), high, high_inputs);
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
