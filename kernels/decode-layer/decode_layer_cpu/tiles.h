// Products of a few rows with a few inputs. Included once for each instruction set, after rounding.h and in the same way;
// includes nothing itself.

// `work(i)` for numbers below `Count` that the compiler knows. Sums that a loop indexes, even an unrolled one, GCC keeps
// in memory; those that are indexed here alone become registers.
template <typename Work, int64_t... Numbers>
HFE_INLINE void repeat(std::integer_sequence<int64_t, Numbers...>, const Work& work) {
  (work(std::integral_constant<int64_t, Numbers>()), ...);
}

template <int64_t Count, typename Work>
HFE_INLINE void repeat(const Work& work) {
  repeat(std::make_integer_sequence<int64_t, Count>(), work);
}

// Rows that are read side by side.
constexpr int64_t kRows = 4;

// Rows and inputs of a tile, whose sums fit into the registers beside what they are made of.
struct TileSize {
  int64_t rows, inputs;

  // Rows of tiles of `some` inputs that divide `kRows` read side by side.
  constexpr int64_t side_by_side(int64_t some) const { return some == 1 || rows == kRows ? kRows : 2; }
};

constexpr TileSize kFloatTile = HFE_LANES == 16 ? TileSize{4, 4} : HFE_LANES == 8 ? TileSize{3, 4} : TileSize{2, 2};
// Of each input products take two registers.
constexpr TileSize kInt8Tile = HFE_LANES == 8 ? TileSize{4, 2} : kFloatTile;

// How far ahead of where they are read rows are asked for.
constexpr int64_t kStreamAhead = 8192;

// What is asked for while a row is read: the next lines of the stream of rows that it belongs to.
struct Stream {
  int64_t turn = 0;
  int64_t before = 0, after = 0;

  // Rows of `bytes` bytes are read `rows` at a time. Of short ones the next are asked for whole, long ones are a stream
  // each.
  Stream(int64_t stride, int64_t bytes, int64_t rows) {
    const int64_t together = rows * stride;
    if (bytes <= kStreamAhead / rows || stride < bytes) {
      after = rounded_up(kStreamAhead, std::max<int64_t>(together, 1));
    } else {
      turn = bytes - kStreamAhead / rows;
      before = kStreamAhead / rows;
      after = together - turn;
    }
  }

  Stream() = default;

  // Asks for other memory, as far into it as the place that is read is into that from `from` on.
  static Stream onto(const char* other, const char* from) {
    Stream stream;
    stream.after = reinterpret_cast<intptr_t>(other) - reinterpret_cast<intptr_t>(from);
    return stream;
  }

  HFE_INLINE void ask(const char* row, int64_t at) const { prefetch(row + at + (at < turn ? before : after)); }
};

struct Place {
  int64_t begin, end;  // numbers of the rows
  float* out;          // of the first input and row
  int64_t out_stride;
};

// Adds the sums to the results, or where a row begins, sets them.
template <int64_t Rows, int64_t Inputs>
HFE_INLINE void put(const Lanes (&sums)[Rows][Inputs], const Place& place) {
  repeat<Inputs>([&](auto n) HFE_INLINED {
    Four four;
    if constexpr (Rows == 4) {
      four = sums_of(sums[0][n], sums[1][n], sums[2][n], sums[3][n]);
    } else {
      four = sums_of(sums[0][n], sums[Rows > 1][n], sums[Rows - 1][n], sums[0][n]);
    }
    float* const out = place.out + n * place.out_stride;
    if constexpr (Rows == 4) {
      if (place.begin != 0) four += unaligned<Four>(out);
      memcpy(out, &four, sizeof(four));
    } else {
      for (int64_t r = 0; r < Rows; ++r) out[r] = place.begin == 0 ? four[r] : out[r] + four[r];
    }
  });
}

template <typename T>
struct FloatRows {
  // Numbers that are summed in one go, after which the sum is added to that of those before: their rows and inputs fit
  // into the nearest cache.
  static constexpr int64_t kPanel = 1024;
  static constexpr TileSize kTile = kFloatTile;

  template <int64_t Rows, int64_t Inputs>
  static HFE_INLINE void sum(const Matrix& matrix, int64_t row, const Operands& x, int64_t input, const Stream* stream,
                             const Place& place) {
    const T* weights[Rows];
    const float* numbers[Inputs];
    for (int64_t r = 0; r < Rows; ++r) weights[r] = reinterpret_cast<const T*>(matrix.row(row + r));
    for (int64_t n = 0; n < Inputs; ++n) numbers[n] = x.numbers + (input + n) * x.stride;
    Lanes sums[Rows][Inputs];
    repeat<Rows>([&](auto r) HFE_INLINED { repeat<Inputs>([&](auto n) HFE_INLINED { sums[r][n] = Lanes(0.0f); }); });
    const auto add = [&](const auto& read, int64_t i) HFE_INLINED {
      Lanes given[Inputs];
      repeat<Inputs>([&](auto n) HFE_INLINED { given[n] = read(numbers[n] + i); });
      repeat<Rows>([&](auto r) HFE_INLINED {
        const Lanes w = read(weights[r] + i);
        repeat<Inputs>([&](auto n) HFE_INLINED { sums[r][n] = multiply_add(w, given[n], sums[r][n]); });
      });
    };
    const auto whole = [](const auto* from) HFE_INLINED { return load(from); };
    // A line of each row.
    constexpr int64_t kLineNumbers = kLine / static_cast<int64_t>(sizeof(T));
    int64_t i = place.begin;
    for (; i + kLineNumbers <= place.end; i += kLineNumbers) {
      if (stream) {
        for (int64_t r = 0; r < Rows; ++r) {
          stream->ask(reinterpret_cast<const char*>(weights[r]), i * static_cast<int64_t>(sizeof(T)));
        }
      }
#pragma GCC unroll 8
      for (int64_t j = 0; j < kLineNumbers; j += kLanes) add(whole, i + j);
    }
    for (; i + kLanes <= place.end; i += kLanes) add(whole, i);
    if (i < place.end) {
      add([&](const auto* from) HFE_INLINED { return load_part(from, place.end - i); }, i);
    }
    put(sums, place);
  }
};

struct Int8Rows {
  static constexpr int64_t kPanel = std::numeric_limits<int64_t>::max();
  static constexpr TileSize kTile = kInt8Tile;

  template <int64_t Rows, int64_t Inputs>
  static HFE_INLINE void sum(const Matrix& matrix, int64_t row, const Operands& x, int64_t input, const Stream* stream,
                             const Place& place) {
    const char* weights[Rows];
    const int8_t* codes[Inputs];
    for (int64_t r = 0; r < Rows; ++r) weights[r] = matrix.row(row + r);
    for (int64_t n = 0; n < Inputs; ++n) codes[n] = x.codes + (input + n) * x.code_stride;
    Ints sums[Rows][Inputs];
    repeat<Rows>([&](auto r) HFE_INLINED { repeat<Inputs>([&](auto n) HFE_INLINED { sums[r][n] = Ints{}; }); });
    const auto add = [&](const auto& read, int64_t i) HFE_INLINED {
      Given given[Inputs];
      repeat<Inputs>([&](auto n) HFE_INLINED { given[n] = given_of(read(codes[n] + i)); });
      repeat<Rows>([&](auto r) HFE_INLINED {
        const Bytes w = weights_of(read(weights[r] + i));
        repeat<Inputs>([&](auto n) HFE_INLINED {
          sums[r][n] = add_products(sums[r][n], w, given[n]);
          compute_now(sums[r][n]);
        });
      });
    };
    const auto whole = [](const auto* from) HFE_INLINED { return load_bytes(from); };
    const int64_t bytes = rounded_up(matrix.width, kGroup);
    int64_t i = 0;
    for (; i + kLine <= bytes; i += kLine) {
      if (stream) {
        for (int64_t r = 0; r < Rows; ++r) stream->ask(weights[r], i);
      }
#pragma GCC unroll 4
      for (int64_t j = 0; j < kLine; j += kBytes) add(whole, i + j);
    }
    for (; i < bytes; i += std::min(kBytes, kGroup)) {
      add([](const auto* from) HFE_INLINED { return load_group(from); }, i);
    }
    write(sums, matrix, row, x, input, place);
  }

 private:
  template <int64_t Rows, int64_t Inputs>
  static HFE_INLINE void write(const Ints (&sums)[Rows][Inputs], const Matrix& matrix, int64_t row, const Operands& x,
                               int64_t input, const Place& place) {
    Four scales = {};
    if (Rows == 4 && matrix.scale_stride == sizeof(float)) {
      scales = unaligned<Four>(matrix.row_scales(row));
    } else {
      for (int64_t r = 0; r < Rows; ++r) scales[r] = unaligned<float>(matrix.row_scales(row + r));
    }
    repeat<Inputs>([&](auto n) HFE_INLINED {
      FourInts four;
      if constexpr (Rows == 4) {
        four = int_sums_of(sums[0][n], sums[1][n], sums[2][n], sums[3][n]);
      } else {
        four = int_sums_of(sums[0][n], sums[Rows > 1][n], sums[Rows - 1][n], sums[0][n]);
      }
      four -= x.excess[input + n];
      const float scale = x.scales[(input + n) * x.scale_stride];
      const Four results = __builtin_convertvector(four, Four) * scales * scale;
      memcpy(place.out + n * place.out_stride, &results, Rows * sizeof(float));
    });
  }
};

// Scales of `kGroupsTogether` groups from `group` on, each in the lanes of its group.
HFE_INLINE Lanes group_scales(Lanes scales, int64_t group) {
#if HFE_LANES == 16
  const __m512i places = _mm512_add_epi32(_mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3),
                                          _mm512_set1_epi32(static_cast<int32_t>(group)));
  return Floats(_mm512_permutexvar_ps(places, scales.values));
#elif HFE_LANES == 8
  const __m256i places = _mm256_add_epi32(_mm256_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1),
                                          _mm256_set1_epi32(static_cast<int32_t>(group)));
  return Floats(_mm256_permutevar8x32_ps(scales.values, places));
#else
  return Lanes(scales.values[group]);
#endif
}

struct Int4Rows {
  static constexpr int64_t kPanel = std::numeric_limits<int64_t>::max();
  static constexpr TileSize kTile = kFloatTile;

  template <int64_t Rows, int64_t Inputs>
  static HFE_INLINE void sum(const Matrix& matrix, int64_t row, const Operands& x, int64_t input, const Stream* stream,
                             const Place& place) {
    const uint8_t* weights[Rows];
    const Float16* row_scales[Rows];
    for (int64_t r = 0; r < Rows; ++r) {
      weights[r] = reinterpret_cast<const uint8_t*>(matrix.row(row + r));
      row_scales[r] = reinterpret_cast<const Float16*>(matrix.row_scales(row + r));
    }
    Lanes sums[Rows][Inputs];
    for (int64_t r = 0; r < Rows; ++r) {
      for (int64_t n = 0; n < Inputs; ++n) sums[r][n] = Lanes(0.0f);
    }
    const int64_t groups = rounded_up(matrix.width, kGroup) / kGroup;
    for (int64_t first = 0; first < groups; first += kLanes) {
      const int64_t some = std::min(kLanes, groups - first);
      Lanes scales[Rows][Inputs];
      for (int64_t r = 0; r < Rows; ++r) {
        const Lanes of_row = load_next(row_scales[r] + first, some);
        for (int64_t n = 0; n < Inputs; ++n) {
          const int64_t at = (input + n) * x.scale_stride + first;
          scales[r][n] = of_row * load(x.scales + at);
          sums[r][n] = sums[r][n] - of_row * load(x.offsets + at);
        }
        if (stream) {
          const int64_t at = first * kGroup / 2;
          for (int64_t i = 0; i < some * kGroup / 2; i += kLine) {
            stream->ask(reinterpret_cast<const char*>(weights[r]), at + i);
          }
        }
      }
      const auto add = [&](const auto& read, int64_t g) HFE_INLINED {
        const int8_t* const codes = x.codes + input * x.code_stride + (first + g) * kGroup;
        Bytes low_inputs[Inputs], high_inputs[Inputs];
        for (int64_t n = 0; n < Inputs; ++n) {
          low_inputs[n] = load_bytes(codes + n * x.code_stride);
          high_inputs[n] = load_bytes(codes + n * x.code_stride + kBytes);
        }
#pragma GCC unroll 4
        for (int64_t r = 0; r < Rows; ++r) {
          const Bytes packed = read(weights[r] + (first + g) * (kGroup / 2));
          const Bytes low = low_nibbles(packed), high = high_nibbles(packed);
#pragma GCC unroll 4
          for (int64_t n = 0; n < Inputs; ++n) {
            const Lanes products = to_floats(nibble_products(low, high, low_inputs[n], high_inputs[n]));
            sums[r][n] = multiply_add(products, group_scales(scales[r][n], g), sums[r][n]);
          }
        }
      };
      if (some == kLanes) {
#pragma GCC unroll 4
        for (int64_t g = 0; g < kLanes; g += kGroupsTogether) {
          add([](const uint8_t* from) HFE_INLINED { return load_bytes(from); }, g);
        }
      } else {
        for (int64_t g = 0; g < some; g += kGroupsTogether) {
          const int64_t count = std::min(kGroupsTogether, some - g);
          if (count == kGroupsTogether) {
            add([](const uint8_t* from) HFE_INLINED { return load_bytes(from); }, g);
          } else {
            add([&](const uint8_t* from) HFE_INLINED { return load_groups(from, count); }, g);
          }
        }
      }
    }
    put(sums, place);
  }
};

// A tile as a function of its own, compiled once.
template <typename Kind, int64_t Rows, int64_t Inputs>
void tile(const Matrix& matrix, int64_t row, const Operands& x, int64_t input, const Stream* stream,
          const Place& place) {
  Kind::template sum<Rows, Inputs>(matrix, row, x, input, stream, place);
}

// `work(inputs, first)` for inputs from `first` to `last`, as many at a time as a tile has.
template <typename Kind, typename Work>
HFE_INLINE void for_each_inputs(int64_t first, int64_t last, const Work& work) {
  constexpr int64_t kInputs = Kind::kTile.inputs;
  for (; first + kInputs <= last; first += kInputs) work(std::integral_constant<int64_t, kInputs>(), first);
  if constexpr (kInputs == 4) {
    if (last - first == 3) work(std::integral_constant<int64_t, 3>(), first);
    if (last - first == 2) work(std::integral_constant<int64_t, 2>(), first);
  }
  if (last - first == 1) work(std::integral_constant<int64_t, 1>(), first);
}

// `work(begin, end)` for the panels of rows of `width` numbers: at least one, in which results are set.
template <typename Kind, typename Work>
HFE_INLINE void for_each_panel(int64_t width, const Work& work) {
  int64_t begin = 0;
  do {
    const int64_t end = width - begin > Kind::kPanel ? begin + Kind::kPanel : width;
    work(begin, end);
    begin = end;
  } while (begin < width);
}

// Products of `Rows` rows with a few inputs; `out` is that of the first row and input.
template <typename Kind, int64_t Rows>
HFE_INLINE void multiply_rows_by_few(const Matrix& matrix, int64_t row, const Operands& x, const Stream& stream,
                                     float* out, int64_t out_stride) {
  for_each_inputs<Kind>(0, x.count, [&](auto inputs, int64_t input) HFE_INLINED {
    constexpr int64_t kTileRows = std::min(Rows, Kind::kTile.side_by_side(inputs));
    for (int64_t r = 0; r < Rows; r += kTileRows) {
      for_each_panel<Kind>(matrix.width, [&](int64_t begin, int64_t end) HFE_INLINED {
        const Place place = {begin, end, out + input * out_stride + r, out_stride};
        tile<Kind, kTileRows, inputs>(matrix, row + r, x, input, input == 0 ? &stream : nullptr, place);
      });
    }
  });
}
