// Norms of rows. Included once for each instruction set, after rounding.h and in the same way; includes nothing itself.

HFE_INLINE float sum_of(Lanes x) {
  const Four four = sums_of(x, Lanes(0.0f), Lanes(0.0f), Lanes(0.0f));
  return four[0];
}

// The sum of term(x) over all numbers of a row.
template <typename Term>
HFE_INLINE float sum_over(const float* x, int64_t width, const Term& term) {
  Lanes sums[2] = {Lanes(0.0f), Lanes(0.0f)};
  int64_t i = 0;
  for (; i + 2 * kLanes <= width; i += 2 * kLanes) {
    sums[0] = sums[0] + term(load(x + i));
    sums[1] = sums[1] + term(load(x + i + kLanes));
  }
  float rest = 0.0f;
  for (; i < width; ++i) {
    const Lanes one = term(Lanes(x[i]));
    rest += one.values[0];
  }
  return sum_of(sums[0] + sums[1]) + rest;
}

template <typename T>
void normalize(const void* weight, const void* bias, float epsilon, bool centered, const float* x, int64_t width,
               float* y) {
  const T* const weights = static_cast<const T*>(weight);
  const T* const biases = static_cast<const T*>(bias);
  const float count = static_cast<float>(width);
  const float mean = centered ? sum_over(x, width, [](Lanes value) HFE_INLINED { return value; }) / count : 0.0f;
  const Lanes means = Lanes(mean);
  const float square = sum_over(x, width, [&](Lanes value) HFE_INLINED {
    const Lanes difference = value - means;
    return difference * difference;
  });
  const Lanes scale = Lanes(1.0f / sqrtf(square / count + epsilon));
  int64_t i = 0;
  for (; i + kLanes <= width; i += kLanes) {
    const Lanes normalized = (load(x + i) - means) * scale;
    const Lanes added = biases ? load(biases + i) : Lanes(0.0f);
    store(y + i, multiply_add(normalized, load(weights + i), added));
  }
  if (i < width) {
    const int64_t left = width - i;
    const Lanes normalized = (load_part(x + i, left) - means) * scale;
    const Lanes added = biases ? load_part(biases + i, left) : Lanes(0.0f);
    store_part(y + i, multiply_add(normalized, load_part(weights + i, left), added), left);
  }
}
