// Parts of one head's attention among tokens that are hashed alike. Included by loops.h for each instruction set, after
// attend_loops.h; includes nothing itself.

// The bucket of a vector in each round, by directions (dim, rounds, half of the sum of factors).
void hash_vector(const float* vector, int64_t dim, const float* rotations, const int64_t* factors, int64_t factor_count,
                 int64_t rounds, float* room, int16_t* buckets) {
  int64_t half = 0;
  for (int64_t f = 0; f < factor_count; ++f) half += factors[f] / 2;
  const int64_t all = rounds * half;
  for (int64_t i = 0; i < all; i += kLanes) {
    Lanes sums = Lanes(0.0f);
    for (int64_t d = 0; d < dim; ++d) {
      sums = multiply_add(load_next(rotations + d * all + i, all - i), Lanes(vector[d]), sums);
    }
    store_part(room + i, sums, std::min(kLanes, all - i));
  }
  const float* rotated = room;
  for (int64_t r = 0; r < rounds; ++r) {
    int64_t bucket = 0, stride = 1;
    for (int64_t f = 0; f < factor_count; ++f) {
      // The place of the maximum of [rotated, -rotated], the first one among equals.
      const int64_t count = factors[f] / 2;
      int64_t largest = 0, smallest = 0;
      for (int64_t i = 1; i < count; ++i) {
        if (rotated[i] > rotated[largest]) largest = i;
        if (rotated[i] < rotated[smallest]) smallest = i;
      }
      bucket += stride * (rotated[largest] >= -rotated[smallest] ? largest : count + smallest);
      stride *= factors[f];
      rotated += count;
    }
    buckets[r] = static_cast<int16_t>(bucket);
  }
}

// Slots looked at together, and in how many words of 64 bits what was found of them lies.
constexpr int64_t kSlots = 64, kSlotWords = kSlots / 4;

// The latest of `count` slots that share a bucket with `wanted` in any round, at most `most` of them, the last one first;
// returns how many. Buckets of a round lie `stride` apart from those of the next.
int64_t sharing_slots(const int16_t* buckets, int64_t stride, int64_t rounds, const int16_t* wanted, int64_t count,
                      int64_t most, int32_t* slots) {
  int64_t found = 0, end = count;
  const auto shares = [=](int64_t slot) HFE_INLINED {
    bool any = false;
    for (int64_t r = 0; r < rounds; ++r) any |= buckets[r * stride + slot] == wanted[r];
    return any;
  };
  for (; end % kSlots != 0 && found < most; --end) {
    if (shares(end - 1)) slots[found++] = static_cast<int32_t>(end - 1);
  }
  alignas(64) int16_t hits[kSlots];
  uint64_t words[kSlotWords];
  for (; end > 0 && found < most; end -= kSlots) {
    const int16_t* const first = buckets + end - kSlots;
    for (int64_t i = 0; i < kSlots; ++i) hits[i] = static_cast<int16_t>(first[i] == wanted[0]);
    for (int64_t r = 1; r < rounds; ++r) {
      const int16_t* const round = first + r * stride;
      const int16_t bucket = wanted[r];
      for (int64_t i = 0; i < kSlots; ++i) hits[i] |= static_cast<int16_t>(round[i] == bucket);
    }
    memcpy(words, hits, sizeof(hits));
    uint64_t any = 0;
    for (int64_t w = 0; w < kSlotWords; ++w) any |= words[w];
    if (any == 0) continue;
    for (int64_t i = kSlots - 1; i >= 0 && found < most; --i) {
      if (hits[i]) slots[found++] = static_cast<int32_t>(end - kSlots + i);
    }
  }
  return found;
}

// Rows of a list that are asked for before they are read: they lie anywhere.
constexpr int64_t kRowsAhead = 12;

template <typename T>
HFE_INLINE const T* row_at(const void* rows, int64_t stride, int32_t slot) {
  return static_cast<const T*>(rows) + slot * stride;
}

// Products of the query, which is scaled already, with keys at some slots; with each key divided by the root of the mean
// of its squares where `normalizes`.
template <typename T>
void score_slots(const void* keys, int64_t stride, const int32_t* slots, int64_t count, int64_t dim, const float* query,
                 bool normalizes, float* scores) {
  const float inverse = 1.0f / static_cast<float>(dim);
  for (int64_t k = 0; k < count; ++k) {
    if (k + kRowsAhead < count) touch_lines(row_at<T>(keys, stride, slots[k + kRowsAhead]), dim * sizeof(T));
    const T* const key = row_at<T>(keys, stride, slots[k]);
    Lanes products = Lanes(0.0f), squares = Lanes(0.0f);
    for (int64_t i = 0; i < dim; i += kLanes) {
      const Lanes numbers = load_next(key + i, dim - i);
      products = multiply_add(numbers, load_next(query + i, dim - i), products);
      squares = multiply_add(numbers, numbers, squares);
    }
    const Four sums = sums_of(products, squares, Lanes(0.0f), Lanes(0.0f));
    scores[k] = normalizes ? sums[0] / std::sqrt(sums[1] * inverse + 1e-6f) : sums[0];
  }
}

// Scores become weights, of which there is room for whole registers; returns their sum, 0 where nothing is seen.
float weigh_slots(float* scores, int64_t count) {
  const float most = largest_of(scores, count);
  if (most == -INFINITY && see_nothing(scores, count)) {
    std::fill_n(scores, count, 0.0f);
    return 0.0f;
  }
  return exponentials(scores, count, most);
}

// sums += weight value over values at some slots.
template <typename T>
void add_slots(const void* values, int64_t stride, const int32_t* slots, int64_t count, int64_t dim,
               const float* weights, float* sums) {
  constexpr int64_t kTogether = 4 * kLanes;
  int64_t i = 0;
  for (; i + kTogether <= dim; i += kTogether) {
    Lanes totals[4];
    for (int64_t p = 0; p < 4; ++p) totals[p] = load(sums + i + p * kLanes);
    for (int64_t k = 0; k < count; ++k) {
      if (k + kRowsAhead < count) {
        touch_lines(row_at<T>(values, stride, slots[k + kRowsAhead]) + i, kTogether * sizeof(T));
      }
      const T* const value = row_at<T>(values, stride, slots[k]) + i;
      const Lanes weight = Lanes(weights[k]);
#pragma GCC unroll 4
      for (int64_t p = 0; p < 4; ++p) totals[p] = multiply_add(load(value + p * kLanes), weight, totals[p]);
    }
    for (int64_t p = 0; p < 4; ++p) store(sums + i + p * kLanes, totals[p]);
  }
  for (; i < dim; i += kLanes) {
    const int64_t some = std::min(kLanes, dim - i);
    Lanes total = load_next(sums + i, some);
    for (int64_t k = 0; k < count; ++k) {
      total = multiply_add(load_next(row_at<T>(values, stride, slots[k]) + i, some), Lanes(weights[k]), total);
    }
    store_part(sums + i, total, some);
  }
}
