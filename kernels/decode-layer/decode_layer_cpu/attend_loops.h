// One head's attention, for one dtype of its keys and values, and norms. Included by loops.h for each instruction set,
// after lanes.h and exponential.h; includes nothing itself.

// Keys that are worked on together: their values are read while the next ones' keys are on their way.
constexpr int64_t kTile = 64;

// What lies ahead of a place in one head's rows: where these end, the next head's begin.
struct HeadStream {
  const char* end;
  const char* next;

  HFE_INLINE void ask(const void* at, int64_t bytes) const {
    for (int64_t i = 0; i < bytes; i += kLine) {
      const char* const ahead = static_cast<const char*>(at) + kAheadBytes + i;
      prefetch(ahead < end ? ahead : next + (ahead - end));
    }
  }
};

struct Pair {
  Lanes first, second;
};

// Twice as many numbers as a register holds. Those of bfloat16 come apart with one operation each as the even ones and
// the odd ones; `in_order` and `by_parity` translate.
template <typename T>
HFE_INLINE Pair load_pair(const T* from) {
  return {load(from), load(from + kLanes)};
}

HFE_INLINE Pair load_pair(const BFloat16* from) {
  const Words words = unaligned<Words>(from);
  return {Floats(words << 16), Floats(words & 0xffff0000u)};
}

template <typename T>
constexpr bool kByParity = std::is_same_v<T, BFloat16>;

template <bool Back>
void exchange(const float* from, int64_t dim, float* to) {
  int64_t i = 0;
  for (; i + 2 * kLanes <= dim; i += 2 * kLanes) {
    for (int64_t j = 0; j < kLanes; ++j) {
      for (int64_t odd = 0; odd < 2; ++odd) {
        if constexpr (Back) {
          to[i + 2 * j + odd] = from[i + odd * kLanes + j];
        } else {
          to[i + odd * kLanes + j] = from[i + 2 * j + odd];
        }
      }
    }
  }
  for (; i < dim; ++i) to[i] = from[i];
}

// The products of `Keys` neighbouring keys with the query, Keys at most 4; the rest are those of the first.
template <int64_t Keys, typename T>
HFE_INLINE Four scores_of(const T* keys, int64_t dim, const float* query) {
  Lanes first[4], second[4];
  for (int64_t k = 0; k < 4; ++k) first[k] = second[k] = Lanes(0.0f);
  int64_t i = 0;
  for (; i + 2 * kLanes <= dim; i += 2 * kLanes) {
    const Lanes q = load(query + i), r = load(query + i + kLanes);
#pragma GCC unroll 4
    for (int64_t k = 0; k < Keys; ++k) {
      const Pair pair = load_pair(keys + k * dim + i);
      first[k] = multiply_add(pair.first, q, first[k]);
      second[k] = multiply_add(pair.second, r, second[k]);
    }
  }
  if (i + kLanes <= dim) {
    const Lanes q = load(query + i);
    for (int64_t k = 0; k < Keys; ++k) first[k] = multiply_add(load(keys + k * dim + i), q, first[k]);
    i += kLanes;
  }
  if (i < dim) {
    const Lanes q = load_part(query + i, dim - i);
    for (int64_t k = 0; k < Keys; ++k) {
      second[k] = multiply_add(load_part(keys + k * dim + i, dim - i), q, second[k]);
    }
  }
  for (int64_t k = 0; k < Keys; ++k) first[k] = first[k] + second[k];
  return sums_of(first[0], first[1], first[2], first[3]);
}

// sums[2 * Pairs registers] += weight value over `count` values.
template <int64_t Pairs, typename T>
HFE_INLINE void add_columns(const T* values, int64_t dim, const float* weights, int64_t count, float* sums) {
  Lanes even[2 * Pairs], odd[2 * Pairs];
  for (int64_t p = 0; p < 2 * Pairs; ++p) {
    even[p] = load(sums + p * kLanes);
    odd[p] = Lanes(0.0f);
  }
  const auto add = [&](Lanes* to, int64_t k) HFE_INLINED {
    const Lanes weight = Lanes(weights[k]);
#pragma GCC unroll 4
    for (int64_t p = 0; p < Pairs; ++p) {
      const Pair pair = load_pair(values + k * dim + 2 * p * kLanes);
      to[2 * p] = multiply_add(pair.first, weight, to[2 * p]);
      to[2 * p + 1] = multiply_add(pair.second, weight, to[2 * p + 1]);
    }
  };
  int64_t k = 0;
  for (; k + 2 <= count; k += 2) {
    add(even, k);
    add(odd, k + 1);
  }
  if (k < count) add(even, k);
  for (int64_t p = 0; p < 2 * Pairs; ++p) store(sums + p * kLanes, even[p] + odd[p]);
}

template <typename T>
HFE_INLINE void add_tail(const T* values, int64_t dim, const float* weights, int64_t count, int64_t some, float* sums) {
  Lanes even = load_part(sums, some), odd = Lanes(0.0f);
  int64_t k = 0;
  for (; k + 2 <= count; k += 2) {
    even = multiply_add(load_part(values + k * dim, some), Lanes(weights[k]), even);
    odd = multiply_add(load_part(values + (k + 1) * dim, some), Lanes(weights[k + 1]), odd);
  }
  if (k < count) even = multiply_add(load_part(values + k * dim, some), Lanes(weights[k]), even);
  store_part(sums, even + odd, some);
}

template <typename T>
HFE_INLINE void add_values(const T* values, int64_t dim, const float* weights, int64_t count, float* sums) {
  constexpr int64_t kPair = 2 * kLanes;
  int64_t i = 0;
  for (; i + 2 * kPair <= dim; i += 2 * kPair) add_columns<2>(values + i, dim, weights, count, sums + i);
  if (i + kPair <= dim) {
    add_columns<1>(values + i, dim, weights, count, sums + i);
    i += kPair;
  }
  for (; i < dim; i += kLanes) add_tail(values + i, dim, weights, count, std::min(kLanes, dim - i), sums + i);
}

HFE_INLINE float largest_of(const float* numbers, int64_t count) {
  float most = -INFINITY;
  int64_t i = 0;
  if (count >= kLanes) {
    Lanes lanes = load(numbers);
    for (i = kLanes; i + kLanes <= count; i += kLanes) lanes = at_least(load(numbers + i), lanes);
    for (int64_t j = 0; j < kLanes; ++j) most = std::max(most, static_cast<float>(lanes.values[j]));
  }
  for (; i < count; ++i) most = std::max(most, numbers[i]);
  return most;
}

// Whether every score is -inf, as the mask makes it. NaN is no such score, though no maximum shows it.
HFE_INLINE bool see_nothing(const float* scores, int64_t count) {
  int64_t i = 0;
  while (i < count && scores[i] == -INFINITY) ++i;
  return i == count;
}

// Numbers become e^(number - most), 0 where that is less than a float32 can say; returns their sum. There is room for
// whole registers.
HFE_INLINE float exponentials(float* numbers, int64_t count, float most) {
  const int64_t whole = (count + kLanes - 1) / kLanes * kLanes;
  for (int64_t i = count; i < whole; ++i) numbers[i] = -INFINITY;
  Lanes sums = Lanes(0.0f);
  const Lanes least = Lanes(-87.0f);
  for (int64_t i = 0; i < whole; i += kLanes) {
    const Lanes x = load(numbers + i) - Lanes(most);
    const Lanes powers = where_less(x, least, Lanes(0.0f), exponential(at_least(x, least)));
    store(numbers + i, powers);
    sums = sums + powers;
  }
  const Four four = sums_of(sums, Lanes(0.0f), Lanes(0.0f), Lanes(0.0f));
  return four[0];
}

// One head: `query` is scaled already. What keys add to the sums in `out`, not yet divided by the total, goes on from what
// was seen before them. Keys and values are read once, tile by tile; what was added up is scaled down where a larger score
// comes. NaN in a score makes the whole result NaN.
//
// It begins with a line of the cache: by where its loops lie, attention with keys in float32 takes 10 % more or less.
template <typename T>
__attribute__((aligned(64))) void attend_head(const void* all_keys, const void* all_values, const void* next_keys,
                                              const void* next_values, int64_t count, int64_t dim,
                                              const float* given_query, const float* mask, float* room, float* out,
                                              SoftmaxTotals& totals) {
  const T *keys = static_cast<const T*>(all_keys), *values = static_cast<const T*>(all_values);
  const HeadStream key_stream = {reinterpret_cast<const char*>(keys + count * dim), static_cast<const char*>(next_keys)};
  const HeadStream value_stream = {reinterpret_cast<const char*>(values + count * dim),
                               static_cast<const char*>(next_values)};
  float *const query = room, *const sums = room + dim;
  if constexpr (kByParity<T>) {
    exchange<false>(given_query, dim, query);
    exchange<false>(out, dim, sums);
  } else {
    std::copy(given_query, given_query + dim, query);
    std::copy(out, out + dim, sums);
  }
  alignas(64) float weights[kTile];
  float most = totals.most, total = totals.sum;
  const int64_t row_bytes = dim * static_cast<int64_t>(sizeof(T));
  for (int64_t first = 0; first < count; first += kTile, keys += kTile * dim, values += kTile * dim) {
    const int64_t tile = std::min(kTile, count - first);
    int64_t k = 0;
    for (; k + 4 <= tile; k += 4) {
      key_stream.ask(keys + k * dim, 4 * row_bytes);
      const Four four = scores_of<4>(keys + k * dim, dim, query);
      memcpy(weights + k, &four, sizeof(four));
    }
    for (; k < tile; ++k) weights[k] = scores_of<1>(keys + k * dim, dim, query)[0];
    if (mask != nullptr) {
      for (k = 0; k < tile; ++k) weights[k] += mask[first + k];
    }
    const float larger = std::max(most, largest_of(weights, tile));
    if (larger == -INFINITY && see_nothing(weights, tile)) continue;
    if (larger > most) {
      const float factor = most == -INFINITY ? 0.0f : std::exp(most - larger);
      for (int64_t i = 0; i < dim; ++i) sums[i] *= factor;
      total *= factor;
      most = larger;
    }
    total += exponentials(weights, tile, most);
    for (k = 0; k < tile; k += 16) {
      const int64_t some = std::min<int64_t>(16, tile - k);
      value_stream.ask(values + k * dim, some * row_bytes);
      add_values(values + k * dim, dim, weights + k, some, sums);
    }
  }
  totals = {most, total};
  if constexpr (kByParity<T>) {
    exchange<true>(sums, dim, out);
  } else {
    std::copy(sums, sums + dim, out);
  }
}

// One row of `width` numbers; `bias` may be null.
void normalize_row(const float* x, int64_t width, bool is_centered, float epsilon, const float* weight,
                   const float* bias, float* out) {
  const auto sum_of = [&](const auto& term) HFE_INLINED {
    Lanes sums[2] = {Lanes(0.0f), Lanes(0.0f)};
    int64_t i = 0;
    for (; i + 2 * kLanes <= width; i += 2 * kLanes) {
      sums[0] = sums[0] + term(load(x + i));
      sums[1] = sums[1] + term(load(x + i + kLanes));
    }
    float rest = 0.0f;
    for (; i < width; ++i) rest += term(Lanes(x[i])).values[0];
    const Four four = sums_of(sums[0], sums[1], Lanes(0.0f), Lanes(0.0f));
    return four[0] + four[1] + rest;
  };
  float mean = 0.0f;
  if (is_centered) mean = sum_of([](Lanes number) HFE_INLINED { return number; }) / static_cast<float>(width);
  const float squares = sum_of([=](Lanes number) HFE_INLINED {
    const Lanes distance = number - Lanes(mean);
    return distance * distance;
  });
  const float scale = 1.0f / std::sqrt(squares / static_cast<float>(width) + epsilon);
  for (int64_t i = 0; i < width; ++i) out[i] = (x[i] - mean) * scale * weight[i];
  if (bias == nullptr) return;
  for (int64_t i = 0; i < width; ++i) out[i] += bias[i];
}

// Finite numbers beyond the largest of float16 become that one; infinite ones and NaN stay as they are.
HFE_INLINE Lanes within_float16(Lanes x) {
  const Lanes most = Lanes(65504.0f);
  return where_less(magnitude(x), Lanes(INFINITY), at_most(at_least(x, -most), most), x);
}

void narrow_finite(const float* from, int64_t count, void* to) {
  Float16* const numbers = static_cast<Float16*>(to);
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(numbers + i, within_float16(load(from + i)));
  if (i < count) store_part(numbers + i, within_float16(load_part(from + i, count - i)), count - i);
}
