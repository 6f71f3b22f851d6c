// Attention of one token a row among tokens that are hashed alike, by locality-sensitive hashing.
#pragma once

#include <cstdint>
#include <vector>

#include "attend.h"

namespace decode_layer {

struct Hashing {
  const float* rotations = nullptr;  // (head_dim, rounds, half of the sum of factors)
  std::vector<int64_t> factors;      // of the number of buckets, that of the lowest digit first
  int64_t rounds = 0;                // none where attention is to all keys
  int64_t places = 0;                // for keys that a token sees beside itself

  explicit operator bool() const { return rounds > 0; }

  // Numbers of a key: behind it two digits of each round's bucket, whether it is a token, and whether its row hashes.
  int64_t key_size(int64_t head_dim) const { return head_dim + 2 * rounds + 2; }
};

// Of (rows, heads, rounds, capacity), of which the last dimension is contiguous; -1 at padding.
struct BucketView {
  int16_t* data = nullptr;
  int64_t row_stride = 0;
  int64_t head_stride = 0;
  int64_t round_stride = 0;
};

// Keys, of `key_size` numbers each, values and buckets that lie in one place, `count` of each head.
struct HashedPart {
  KeyPart tokens;
  BucketView buckets;
};

struct HashedParams {
  int64_t rows = 0;
  int64_t heads = 0;
  int64_t head_dim = 0;
  HashedPart source, target;  // this token is not among the target's yet, which has a place for it
  const float* query_keys = nullptr;  // (rows, heads * head_dim), of this token
  const float* values = nullptr;      // the same
  const float* mask = nullptr;        // (rows, count of both and this token), added to the scores of rows that do not hash
  float* out = nullptr;               // (rows, heads * head_dim)
};

// Writes this token behind the target's, and attends to it, to those that share a bucket with it in any round, and to the
// latest others. Rows whose first key says that they do not hash attend to all.
void attend_hashed(const Hashing& hashing, const HashedParams& params);

}  // namespace decode_layer
