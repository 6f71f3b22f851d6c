// Blocks of a sparse feed-forward layer on their way, for a few tokens, whose time is that of reading weights. They pass
// through three stages: the controller's rows, one long stream; the winner's row of the first layer; and, unless the
// activation gives 0, its row of the second one. What the later stages of a block read is asked for while the
// controller's rows of the blocks after it are read.
#pragma once

#include <algorithm>
#include <cstdint>

#include "ahead.h"

namespace hfe {

// Tokens that are worked on together.
constexpr int64_t kFewTokens = 8;

// What a block found for its tokens.
struct BlockWinners {
  int32_t units[kFewTokens];
  float probabilities[kFewTokens];  // of the winners, or 1
  float hidden[kFewTokens];         // what they give
};

// Blocks from `first` to `last`, for `tokens` tokens. `find(block, ahead, winners)` reads the controller's rows in `steps`
// steps, and in each calls `ahead.step()`. `layer` has `ask_for_up` and `ask_for_down`, which say what is read next;
// `multiply`, which computes the hidden values; and `add`, which adds what they give. Where `all` is given, what is found
// is kept there and nothing added.
//
// Blocks go through a stage together, as many as there is room for: their rows lie on pages that the processor has to
// look up, some 0.3 us each by itself, and 0.06 us where eight are asked for at once.
template <typename Layer, typename Find>
void run_pipeline(const Layer& layer, const Find& find, int64_t first, int64_t last, int64_t steps, int64_t tokens,
                  BlockWinners* all) {
  BlockWinners on_the_way[3][kFewTokens];
  const int64_t together = std::max<int64_t>(1, kFewTokens / tokens);
  const int64_t groups = (last - first + together - 1) / together;
  // `work(k, winners)` for the blocks of a group, if it exists.
  const auto for_each = [&](int64_t group, const auto& work) {
    if (group < 0 || group >= groups) return;
    const int64_t begin = first + group * together, end = std::min(last, begin + together);
    for (int64_t k = begin; k < end; ++k) work(k, all ? all[k] : on_the_way[group % 3][k - begin]);
  };
  Ahead ahead;
  for (int64_t group = 0; group < groups + (all ? 1 : 2); ++group) {
    const int64_t adds = all ? -1 : group - 2;
    ahead.clear();
    for_each(group - 1, [&](int64_t k, const BlockWinners& winners) { layer.ask_for_up(k, winners, ahead); });
    for_each(adds, [&](int64_t k, const BlockWinners& winners) { layer.ask_for_down(k, winners, ahead); });
    if (group < groups) {
      ahead.spread(steps * std::min(together, last - first - group * together));
      for_each(group, [&](int64_t k, BlockWinners& winners) { find(k, ahead, winners); });
    } else {
      ahead.spread(1);
      ahead.step();
    }
    for_each(adds, [&](int64_t k, const BlockWinners& winners) { layer.add(k, winners); });
    for_each(group - 1, [&](int64_t k, BlockWinners& winners) { layer.multiply(k, winners); });
  }
}

}  // namespace hfe
