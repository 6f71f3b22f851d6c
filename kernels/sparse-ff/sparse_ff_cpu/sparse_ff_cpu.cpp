// The sparse feed-forward on a CPU.

#include "sparse_ff_cpu.h"

#include "call.h"

namespace sparse_ff {

void forward_cpu(const SparseFfParams& params) {
  if (params.tokens == 0) return;
  params.tokens <= kFew ? forward_few(params) : forward_many(params);
}

}  // namespace sparse_ff
