#include "hashed.h"

#include <algorithm>
#include <cmath>

#include "functions.h"
#include "parallel.h"

namespace decode_layer {
namespace {

constexpr int64_t kBase = 256;            // of the digits of a bucket
constexpr float kOwnPenalty = 1e5f;       // a token sees itself where it sees nothing else
constexpr int64_t kMostLanes = 16;

const int16_t* buckets_at(const BucketView& view, int64_t row, int64_t head) {
  return view.data + row * view.row_stride + head * view.head_stride;
}

// The number behind all others of a row's first key.
bool hashes(const HashedParams& params, int64_t row) {
  const CacheView& keys = (params.source.tokens.count > 0 ? params.source : params.target).tokens.keys;
  float flag = 0.0f;
  widen({head_at(keys, row, 0) + row_bytes(keys.format, keys.size - 1), keys.format}, 1, &flag);
  return flag > 0.0f;
}

// Writes this token's key with what stands behind it, its value and its buckets.
void write_own(const Hashing& hashing, const HashedParams& params, int64_t row, int64_t head, const float* query,
               bool is_hashed, const int16_t* own, float* key) {
  const HashedPart& target = params.target;
  const int64_t dim = params.head_dim, size = hashing.key_size(dim), rounds = hashing.rounds;
  std::copy(query, query + dim, key);
  for (int64_t r = 0; r < rounds; ++r) {
    key[dim + r] = static_cast<float>(own[r] / kBase);
    key[dim + rounds + r] = static_cast<float>(own[r] % kBase);
    const BucketView& view = target.buckets;
    view.data[row * view.row_stride + head * view.head_stride + r * view.round_stride + target.tokens.count] = own[r];
  }
  key[size - 2] = 1.0f;
  key[size - 1] = is_hashed ? 1.0f : 0.0f;
  write_vector(target.tokens.keys, key, size, row, head, target.tokens.count);
  write_vector(target.tokens.values, params.values + (row * params.heads + head) * dim, dim, row, head,
               target.tokens.count);
}

// Slots of both parts that a head sees, each list with the latest first.
class SeenSlots {
 public:
  explicit SeenSlots(int64_t most) : room_(most), shared_(most) {}

  // This token first.
  void begin(int64_t own) {
    target = room_;
    target[0] = static_cast<int32_t>(own);
    target_count = 1;
    source_count = 0;
  }

  void see_all(int64_t source_slots, int64_t target_slots) {
    for (int64_t slot = target_slots; slot-- > 0;) target[target_count++] = static_cast<int32_t>(slot);
    source = target + target_count;
    for (int64_t slot = source_slots; slot-- > 0;) source[source_count++] = static_cast<int32_t>(slot);
  }

  void see_alike(const Hashing& hashing, const HashedPart& before, const int16_t* before_buckets,
                 const HashedPart& after, const int16_t* after_buckets, const int16_t* own) {
    const auto& find = functions().sharing_slots;
    int32_t* const shared = shared_;
    const int64_t of_target = find(after_buckets, after.buckets.round_stride, hashing.rounds, own, after.tokens.count,
                                   hashing.places, shared);
    const int64_t of_source = find(before_buckets, before.buckets.round_stride, hashing.rounds, own,
                                   before.tokens.count, hashing.places - of_target, shared + of_target);
    int64_t left = hashing.places - of_target - of_source;
    target_count += merge(shared, of_target, after_buckets, after.tokens.count, left, target + target_count);
    source = target + target_count;
    source_count = merge(shared + of_target, of_source, before_buckets, before.tokens.count, left, source);
  }

  int32_t *target = nullptr, *source = nullptr;
  int64_t target_count = 0, source_count = 0;

 private:
  // `shared` slots, and before each of them the latest others that are tokens, while `left` places remain.
  static int64_t merge(const int32_t* shared, int64_t shared_count, const int16_t* buckets, int64_t slots, int64_t& left,
                       int32_t* out) {
    int64_t count = 0, next = 0, slot = slots - 1;
    for (; slot >= 0 && left > 0; --slot) {
      if (next < shared_count && shared[next] == slot) {
        out[count++] = shared[next++];
      } else if (buckets[slot] >= 0) {
        out[count++] = static_cast<int32_t>(slot);
        --left;
      }
    }
    std::copy(shared + next, shared + shared_count, out + count);
    return count + shared_count - next;
  }

  Room<int32_t> room_, shared_;
};

// Work of one thread on some heads.
class HashedHeads {
 public:
  HashedHeads(const Hashing& hashing, const HashedParams& params)
      : hashing_(hashing), params_(params), size_(hashing.key_size(params.head_dim)),
        most_(std::max(hashing.places, params.source.tokens.count + params.target.tokens.count) + 1),
        slots_(most_), scores_(most_ + kMostLanes), key_(size_), query_(params.head_dim), own_(hashing.rounds),
        rotated_(rotated_count()) {}

  void attend(int64_t row, int64_t head) {
    const int64_t dim = params_.head_dim, place = (row * params_.heads + head) * dim;
    const float* const query = params_.query_keys + place;
    const bool is_hashed = hashes(params_, row);
    const Functions& all = functions();
    all.hash_vector(query, dim, hashing_.rotations, hashing_.factors.data(),
                    static_cast<int64_t>(hashing_.factors.size()), hashing_.rounds, rotated_, own_);
    write_own(hashing_, params_, row, head, query, is_hashed, own_, key_);
    const HashedPart &source = params_.source, &target = params_.target;
    slots_.begin(target.tokens.count);
    if (is_hashed) {
      slots_.see_alike(hashing_, source, buckets_at(source.buckets, row, head), target,
                       buckets_at(target.buckets, row, head), own_);
    } else {
      slots_.see_all(source.tokens.count, target.tokens.count);
    }
    const float scale = 1.0f / std::sqrt(static_cast<float>(dim));
    for (int64_t d = 0; d < dim; ++d) query_[d] = query[d] * scale;
    float* const scores = scores_;
    const int64_t count = slots_.target_count + slots_.source_count;
    score(target, row, head, slots_.target, slots_.target_count, is_hashed, scores);
    score(source, row, head, slots_.source, slots_.source_count, is_hashed, scores + slots_.target_count);
    if (is_hashed) {
      scores[0] -= kOwnPenalty;
    } else if (params_.mask != nullptr) {
      add_mask(row, scores);
    }
    const float sum = all.weigh_slots(scores, count);
    float* const out = params_.out + place;
    std::fill_n(out, dim, 0.0f);
    add(target, row, head, slots_.target, slots_.target_count, scores, out);
    add(source, row, head, slots_.source, slots_.source_count, scores + slots_.target_count, out);
    const float inverse = sum == 0.0f ? 0.0f : 1.0f / sum;
    for (int64_t d = 0; d < dim; ++d) out[d] *= inverse;
  }

 private:
  int64_t rotated_count() const {
    int64_t half = 0;
    for (const int64_t factor : hashing_.factors) half += factor / 2;
    return half * hashing_.rounds;
  }

  void score(const HashedPart& part, int64_t row, int64_t head, const int32_t* slots, int64_t count, bool is_hashed,
             float* scores) {
    if (count == 0) return;
    const CacheView& keys = part.tokens.keys;
    functions().score_slots[static_cast<int>(keys.format)](head_at(keys, row, head), keys.size, slots, count,
                                                           params_.head_dim, query_, is_hashed, scores);
  }

  void add(const HashedPart& part, int64_t row, int64_t head, const int32_t* slots, int64_t count, const float* weights,
           float* out) {
    if (count == 0) return;
    const CacheView& values = part.tokens.values;
    functions().add_slots[static_cast<int>(values.format)](head_at(values, row, head), values.size, slots, count,
                                                           params_.head_dim, weights, out);
  }

  void add_mask(int64_t row, float* scores) const {
    const int64_t before = params_.source.tokens.count;
    const float* const mask = params_.mask + row * (before + params_.target.tokens.count + 1);
    for (int64_t i = 0; i < slots_.target_count; ++i) scores[i] += mask[before + slots_.target[i]];
    for (int64_t i = 0; i < slots_.source_count; ++i) scores[slots_.target_count + i] += mask[slots_.source[i]];
  }

  const Hashing& hashing_;
  const HashedParams& params_;
  int64_t size_, most_;
  SeenSlots slots_;
  Room<float> scores_, key_, query_;
  Room<int16_t> own_;
  Room<float> rotated_;
};

}  // namespace

void attend_hashed(const Hashing& hashing, const HashedParams& params) {
  const int64_t slots = params.source.tokens.count + params.target.tokens.count;
  const int64_t bytes = 2 * slots * hashing.rounds + 8 * hashing.places * params.head_dim;
  for_each_part(params.rows * params.heads, bytes, [&](int64_t begin, int64_t end) {
    HashedHeads heads(hashing, params);
    for (int64_t i = begin; i < end; ++i) heads.attend(i / params.heads, i % params.heads);
  });
}

}  // namespace decode_layer
