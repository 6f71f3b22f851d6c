// The unit that wins in a block of a sparse feed-forward layer. Included once for each instruction set, after lanes.h and
// exponential.h and in the same way; includes nothing itself. Room for logits is whole registers: what stands behind
// `units` of them must win against none.

// The first largest. NaN passes for the largest, as torch has it.
HFE_INLINE int64_t winner_of(const float* logits, int64_t units) {
  Lanes largest = load(logits);
  uint32_t nan = where_nan(largest);
  for (int64_t n = kLanes; n < units; n += kLanes) {
    const Lanes some = load(logits + n);
    nan |= where_nan(some);
    largest = at_least(some, largest);
  }
  float most = largest.values[0];
  for (int64_t i = 1; i < kLanes; ++i) most = std::max(most, static_cast<float>(largest.values[i]));
  for (int64_t n = 0; n < units; n += kLanes) {
    const uint32_t found = nan ? where_nan(load(logits + n)) : where_equal(load(logits + n), Lanes(most));
    if (found) return n + __builtin_ctz(found);
  }
  return 0;
}

// The softmax of the logits at the winner.
HFE_INLINE float probability_of(const float* logits, int64_t units, int64_t winner) {
  const Lanes most = Lanes(logits[winner]);
  Lanes sums = Lanes(0.0f);
  int64_t n = 0;
  for (; n + kLanes <= units; n += kLanes) sums = sums + exponential(at_least(load(logits + n) - most, Lanes(-87.0f)));
  float sum = 0.0f;
  if (n < units) {
    float numbers[kLanes];
    store(numbers, exponential(at_least(load(logits + n) - most, Lanes(-87.0f))));
    for (int64_t i = 0; n + i < units; ++i) sum += numbers[i];
  }
  const Four four = sums_of(sums, Lanes(0.0f), Lanes(0.0f), Lanes(0.0f));
  return 1.0f / (sum + four[0]);
}
