// The functions of `functions.h`. Included once for each instruction set, in the way of lanes.h.

#include "lanes.h"
#include "exponential.h"
#include "winner.h"
#include "numbers.h"
#include "integers.h"
#include "rounding.h"
#include "tiles.h"
#include "gating.h"
#include "unit_loops.h"
#include "attend_loops.h"
#include "hash_loops.h"

// `work(rows, first)` for rows from `first` to `last`, `Rows` at a time and then one by one.
template <int64_t Rows, typename Work>
HFE_INLINE void for_each_rows(int64_t first, int64_t last, const Work& work) {
  for (; first + Rows <= last; first += Rows) work(std::integral_constant<int64_t, Rows>(), first);
  for (; first < last; ++first) work(std::integral_constant<int64_t, 1>(), first);
}

// Row by row through the weights, each read once.
template <typename Kind>
void multiply_few(const Matrix& matrix, int64_t first, int64_t last, const Operands& x, float* out,
                  int64_t out_stride) {
  const Stream stream(matrix.stride, row_bytes(matrix.format, matrix.width), kRows);
  for_each_rows<kRows>(first, last, [&](auto rows, int64_t row) HFE_INLINED {
    multiply_rows_by_few<Kind, rows>(matrix, row, x, stream, out + row, out_stride);
  });
}

// So many bytes of inputs stay in the cache while all rows are multiplied with them.
constexpr int64_t kInputBytes = 1 << 18;

// Tiles of inputs beyond the first find rows in the cache, and ask for as many bytes of other weights.
class OtherStreams {
 public:
  OtherStreams(hfe::Upcoming* upcoming, const char* rows, int64_t bytes) {
    while (upcoming && count_ < kMost) {
      const char* const at = upcoming->take(bytes);
      if (!at) return;
      streams_[count_++] = Stream::onto(at, rows);
    }
  }

  const Stream* of(int64_t index) const { return index < count_ ? streams_ + index : nullptr; }

 private:
  static constexpr int64_t kMost = 3;
  Stream streams_[kMost];
  int64_t count_ = 0;
};

template <typename Kind>
void multiply_many(const Matrix& matrix, int64_t first, int64_t last, const Operands& x, float* out,
                   int64_t out_stride) {
  constexpr TileSize kTile = Kind::kTile;
  const Stream stream(matrix.stride, row_bytes(matrix.format, matrix.width), kTile.rows);
  const bool rounded = matrix.format == Format::int8 || matrix.format == Format::int4;
  const OtherStreams others(x.upcoming, matrix.row(first), (last - first) * matrix.stride);
  const OtherStreams* const meanwhile = &others;
  const int64_t panel = std::clamp<int64_t>(matrix.width, 1, Kind::kPanel);
  const int64_t together = std::max(kFew, kInputBytes / (panel * (rounded ? 1 : 4)) / kTile.inputs * kTile.inputs);
  for (int64_t input = 0; input < x.count; input += together) {
    const int64_t last_input = std::min(input + together, x.count);
    for_each_panel<Kind>(matrix.width, [&](int64_t begin, int64_t end) HFE_INLINED {
      for_each_rows<kTile.rows>(first, last, [&](auto rows, int64_t row) HFE_INLINED {
        for_each_inputs<Kind>(input, last_input, [&](auto inputs, int64_t i) HFE_INLINED {
          const Place place = {begin, end, out + i * out_stride + row, out_stride};
          const Stream* const asked = i == 0 ? &stream : meanwhile->of(i / Kind::kTile.inputs - 1);
          tile<Kind, rows, inputs>(matrix, row, x, i, asked, place);
        });
      });
    });
  }
}

template <typename Kind>
void multiply(const Matrix& matrix, int64_t first, int64_t last, const Operands& x, float* out, int64_t out_stride) {
  if (x.count <= kFew) {
    multiply_few<Kind>(matrix, first, last, x, out, out_stride);
  } else {
    multiply_many<Kind>(matrix, first, last, x, out, out_stride);
  }
}

template <typename T>
void add_floats(const void* row, const void*, int64_t width, float factor, float* y) {
  const T* const weights = static_cast<const T*>(row);
  const Lanes factors = Lanes(factor);
  int64_t i = 0;
#pragma GCC unroll 4
  for (; i + kLanes <= width; i += kLanes) store(y + i, multiply_add(factors, load(weights + i), load(y + i)));
  if (i < width) {
    const Lanes rest = multiply_add(factors, load_part(weights + i, width - i), load_part(y + i, width - i));
    store_part(y + i, rest, width - i);
  }
}

void add_int8(const void* row, const void* scales, int64_t width, float factor, float* y) {
  const int8_t* const codes = static_cast<const int8_t*>(row);
  float scale;
  memcpy(&scale, scales, sizeof(scale));
  const Lanes factors = Lanes(factor * scale);
  int64_t i = 0;
#pragma GCC unroll 4
  for (; i + kLanes <= width; i += kLanes) store(y + i, multiply_add(factors, load_codes(codes + i), load(y + i)));
  // Rows are filled up to whole groups.
  if (i < width) {
    store_part(y + i, multiply_add(factors, load_codes(codes + i), load_part(y + i, width - i)), width - i);
  }
}

// `kLanes` numbers of a group of packed codes, from number `first` on.
HFE_INLINE Lanes load_nibbles(const uint8_t* group, int64_t first) {
  const int64_t shift = first < kGroup / 2 ? 0 : 4;
  const uint8_t* const from = group + first % (kGroup / 2);
#if HFE_LANES == 16
  const __m128i bytes = _mm_and_si128(_mm_srli_epi16(unaligned<__m128i>(from), shift), _mm_set1_epi8(15));
  return Floats(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_sub_epi8(bytes, _mm_set1_epi8(8)))));
#elif HFE_LANES == 8
  const __m128i packed = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from));
  const __m128i bytes = _mm_and_si128(_mm_srli_epi16(packed, shift), _mm_set1_epi8(15));
  return Floats(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_sub_epi8(bytes, _mm_set1_epi8(8)))));
#else
  Lanes x;
  for (int64_t i = 0; i < kLanes; ++i) x.values[i] = static_cast<float>((from[i] >> shift & 15) - 8);
  return x;
#endif
}

void add_int4(const void* row, const void* scales, int64_t width, float factor, float* y) {
  const uint8_t* group = static_cast<const uint8_t*>(row);
  const Float16* const scale = static_cast<const Float16*>(scales);
  const int64_t all = (width + kGroup - 1) / kGroup;
  for (int64_t first = 0; first < all; first += kLanes) {
    const int64_t groups = std::min(kLanes, all - first);
    float factors[kLanes];
    store(factors, Lanes(factor) * load_next(scale + first, groups));
    for (int64_t g = 0; g < groups; ++g, group += kGroup / 2, y += kGroup, width -= kGroup) {
      const Lanes of_group = Lanes(factors[g]);
#pragma GCC unroll 8
      for (int64_t i = 0; i < kGroup; i += kLanes) {
        const Lanes numbers = load_nibbles(group, i);
        if (width - i >= kLanes) {
          store(y + i, multiply_add(of_group, numbers, load(y + i)));
        } else if (width > i) {
          store_part(y + i, multiply_add(of_group, numbers, load_part(y + i, width - i)), width - i);
        }
      }
    }
  }
}

Functions all_functions() {
  return {
      {multiply<FloatRows<float>>, multiply<FloatRows<BFloat16>>, multiply<FloatRows<Float16>>, multiply<Int8Rows>,
       multiply<Int4Rows>},
      {add_floats<float>, add_floats<BFloat16>, add_floats<Float16>, add_int8, add_int4},
      {widen_all<float>, widen_all<BFloat16>, widen_all<Float16>},
      {narrow_all<float>, narrow_all<BFloat16>, narrow_all<Float16>},
      narrow_finite,
      round_int8,
      round_int4,
      {gate<float>, gate<BFloat16>, gate<Float16>, gate_int8},
      {multiply_inward<float>, multiply_inward<BFloat16>, multiply_inward<Float16>},
      inward_tiles,
      {block_logits<FloatRows<float>>, block_logits<FloatRows<BFloat16>>, block_logits<FloatRows<Float16>>,
       block_logits<Int8Rows>, block_logits<Int4Rows>},
      {unit_product<float>, unit_product<BFloat16>, unit_product<Float16>},
      winner,
      probability,
      activate_all,
      {attend_head<float>, attend_head<BFloat16>, attend_head<Float16>},
      normalize_row,
      hash_vector,
      sharing_slots,
      {score_slots<float>, score_slots<BFloat16>, score_slots<Float16>},
      weigh_slots,
      {add_slots<float>, add_slots<BFloat16>, add_slots<Float16>},
  };
}
