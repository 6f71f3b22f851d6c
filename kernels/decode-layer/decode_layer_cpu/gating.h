// Products of multiplicative layers. Included once for each instruction set, after tiles.h and in the same way; includes
// nothing itself.

// `kLanes` codes as numbers.
HFE_INLINE Lanes load_codes(const int8_t* from) {
#if HFE_LANES == 16
  return Floats(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(unaligned<__m128i>(from))));
#elif HFE_LANES == 8
  return Floats(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)))));
#else
  Lanes x;
  for (int64_t i = 0; i < kLanes; ++i) x.values[i] = static_cast<float>(from[i]);
  return x;
#endif
}

// Bytes of what is read next that are asked for at once.
constexpr int64_t kMostAhead = 1024;

// out[s * out_stride + i] = x[first + i] * gating[s, first + i] for `count` inputs.
template <typename T>
void gate(const Matrix& gating, int64_t first, int64_t count, const float* x, float* out, int64_t out_stride) {
  for (int64_t s = 0; s < gating.rows; ++s, out += out_stride) {
    const T* const row = reinterpret_cast<const T*>(gating.row(s)) + first;
    touch_lines(row + count, std::min<int64_t>(kMostAhead, count * sizeof(T)));
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) store(out + i, load(x + first + i) * load(row + i));
    if (i < count) store_part(out + i, load_part(x + first + i, count - i) * load_part(row + i, count - i), count - i);
  }
}

void gate_int8(const Matrix& gating, int64_t first, int64_t count, const float* x, float* out, int64_t out_stride) {
  for (int64_t s = 0; s < gating.rows; ++s, out += out_stride) {
    const int8_t* const row = reinterpret_cast<const int8_t*>(gating.row(s)) + first;
    float scale;
    memcpy(&scale, gating.row_scales(s), sizeof(scale));
    const Lanes scales = Lanes(scale);
    touch_lines(row + count, std::min(kMostAhead, count));
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) store(out + i, load(x + first + i) * (load_codes(row + i) * scales));
    // Rows are filled up to whole groups.
    if (i < count) {
      store_part(out + i, load_part(x + first + i, count - i) * (load_codes(row + i) * scales), count - i);
    }
  }
}

// Modules whose sums fit into the registers, for `kColumns` registers of columns each; of fewer `kFewModules` are worked
// on together, and then one.
constexpr int64_t kColumns = 2;
constexpr int64_t kModules = HFE_LANES == 16 ? 8 : HFE_LANES == 8 ? 6 : 4;
constexpr int64_t kFewModules = 4;

// A part of the products of some gated inputs with their rows of the projection: y += gated . rows.
template <typename T>
struct Inward {
  const T* rows;
  int64_t stride, depth;
  const float* gated;
  int64_t gated_stride;
  float* y;
  int64_t y_stride;

  template <int64_t Modules, int64_t Columns, typename Read, typename Write>
  HFE_INLINE void tile(const Read& read, const Write& write, Ahead& ahead) const {
    Lanes sums[Modules][Columns];
    for (int64_t s = 0; s < Modules; ++s) {
      for (int64_t c = 0; c < Columns; ++c) sums[s][c] = read(y + s * y_stride + c * kLanes);
    }
    const T* row = rows;
    for (int64_t i = 0; i < depth; ++i, row += stride) {
      ahead.step();
      Lanes weights[Columns];
#pragma GCC unroll 2
      for (int64_t c = 0; c < Columns; ++c) weights[c] = read(row + c * kLanes);
#pragma GCC unroll 8
      for (int64_t s = 0; s < Modules; ++s) {
        const Lanes factor = Lanes(gated[s * gated_stride + i]);
#pragma GCC unroll 2
        for (int64_t c = 0; c < Columns; ++c) sums[s][c] = multiply_add(factor, weights[c], sums[s][c]);
      }
    }
    for (int64_t s = 0; s < Modules; ++s) {
      for (int64_t c = 0; c < Columns; ++c) write(y + s * y_stride + c * kLanes, sums[s][c]);
    }
  }

  // `left` columns, at most those of a tile.
  template <int64_t Modules>
  void columns(int64_t left, Ahead& ahead) const {
    const auto read = [](const auto* from) HFE_INLINED { return load(from); };
    const auto write = [](float* to, Lanes x) HFE_INLINED { store(to, x); };
    if (left >= kColumns * kLanes) return tile<Modules, kColumns>(read, write, ahead);
    if (left >= kLanes) return tile<Modules, 1>(read, write, ahead);
    tile<Modules, 1>([&](const auto* from) HFE_INLINED { return load_part(from, left); },
                     [&](float* to, Lanes x) HFE_INLINED { store_part(to, x, left); }, ahead);
  }
};

// Tiles of all columns; a step of `ahead` for each input of each tile.
int64_t inward_tiles(int64_t modules, int64_t width) {
  const int64_t rest = modules % kModules;
  const int64_t of_modules = modules / kModules + rest / kFewModules + rest % kFewModules;
  return of_modules * ((width + kColumns * kLanes - 1) / (kColumns * kLanes));
}

// y[s * width + j] += sum over `count` inputs of gated[s, i] projection[first + i, j], for columns from `begin` to `end`
template <typename T>
void multiply_inward(const Matrix& projection, int64_t first, int64_t count, int64_t begin, int64_t end,
                     const float* gated, int64_t gated_stride, int64_t modules, float* y, Ahead& ahead) {
  const int64_t width = projection.width;
  const char* const next = projection.row(first + count);
  // The rows after these are asked for while these are multiplied.
  const int64_t steps = (width + kLanes - 1) / kLanes * ((modules + kModules - 1) / kModules);
  const int64_t bytes = rounded_up(count * projection.stride / steps + 1, kLine);
  int64_t asked = 0;
  for (int64_t column = begin; column < end;) {
    const int64_t left = end - column;
    for (int64_t s = 0, some; s < modules; s += some) {
      const int64_t more = std::min(2 * bytes, count * projection.stride - asked);
      touch_lines(next + asked, more);
      asked += std::max<int64_t>(0, more);
      const Inward<T> part = {reinterpret_cast<const T*>(projection.row(first)) + column,
                              projection.stride / static_cast<int64_t>(sizeof(T)),
                              count,
                              gated + s * gated_stride,
                              gated_stride,
                              y + s * width + column,
                              width};
      if (modules - s >= kModules) {
        some = kModules;
        part.template columns<kModules>(left, ahead);
      } else if (modules - s >= kFewModules) {
        some = kFewModules;
        part.template columns<kFewModules>(left, ahead);
      } else {
        some = 1;
        part.template columns<1>(left, ahead);
      }
    }
    column += left >= kColumns * kLanes ? kColumns * kLanes : kLanes;
  }
}
