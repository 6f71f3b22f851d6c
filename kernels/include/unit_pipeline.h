// Blocks of a sparse feed-forward layer on their way, for a few tokens, whose time is that of reading weights. They pass
// through three stages: the controller's rows, one long stream; the winner's row of the first layer; and, unless the
// activation gives 0, its row of the second one. What the later stages of a block read is asked for while the
// controller's rows of the blocks after it are read.
#pragma once

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

// Blocks from `first` to `last`. `find(block, ahead, winners)` reads the controller's rows in `steps` steps, and in each
// calls `ahead.step()`. `layer` has `ask_for_up` and `ask_for_down`, which say what is read next; `multiply`, which
// computes the hidden values; and `add`, which adds what they give. Where `all` is given, what is found is kept there and
// nothing added.
template <typename Layer, typename Find>
void run_pipeline(const Layer& layer, const Find& find, int64_t first, int64_t last, int64_t steps, BlockWinners* all) {
  BlockWinners on_the_way[2];
  const auto at = [&](int64_t k) -> BlockWinners& { return all ? all[k] : on_the_way[k % 2]; };
  Ahead ahead;
  const int64_t end = all ? last + 1 : last + 2;
  for (int64_t k = first; k < end; ++k) {
    const bool has_up = k > first && k <= last, has_down = !all && k > first + 1;
    ahead.clear();
    if (has_up) layer.ask_for_up(k - 1, at(k - 1), ahead);
    if (has_down) layer.ask_for_down(k - 2, at(k - 2), ahead);
    BlockWinners found;
    if (k < last) {
      ahead.spread(steps);
      find(k, ahead, found);
    } else {
      ahead.spread(1);
      ahead.step();
    }
    if (has_down) layer.add(k - 2, at(k - 2));
    if (has_up) layer.multiply(k - 1, at(k - 1));
    if (k < last) at(k) = found;
  }
}

}  // namespace hfe
