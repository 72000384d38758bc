// Products of a few tokens with packed weights, for CPUs: y[m][n] = sum over k of x[m][k] * w[n][k].
//
// Integers multiply integers: x is rounded to 16 bits with a scale of its own for every step of some 128 values, which
// keeps it a hundred times more exact than bf16, and an instruction multiplies 16 pairs and adds them by twos (pmaddwd).
// The sums within a step are exact in 32 bits; those over steps are fp32.
//
// A vector of 32 bytes, a unit, is seen as 16 lanes of 16 bits, each with PARTS weights (4 of 4 bits, 2 of 8; layouts:
// int4.py, int8.py). The i-th weights of all lanes are cut out together, so x is laid out by [unit][i][lane]. A unit is
// unpacked once for four tokens. A token's sum is formed in one order, whatever the number of tokens beside it, so it
// has the same bits alone and among others (compiled without contraction to fused multiply-adds, which is the
// compiler's whim).

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

namespace {

constexpr int SHORT_LANES = 16, LANES = 8, UNIT_BYTES = 32;
constexpr int64_t TILE = 4, BLOCK = 32;  // tokens whose sums stay in registers, and that are rounded together
constexpr float LARGEST = 32767;

typedef float Floats __attribute__((vector_size(UNIT_BYTES)));
typedef int32_t Words __attribute__((vector_size(UNIT_BYTES)));
typedef int16_t Shorts __attribute__((vector_size(UNIT_BYTES)));
typedef uint16_t Bits __attribute__((vector_size(UNIT_BYTES)));

template <int BITS>
constexpr int PARTS = 16 / BITS;

struct Activations {
  std::vector<int16_t> values;  // [tokens][units][PARTS][16]
  std::vector<float> scales;    // [tokens][steps]
  std::vector<Floats> sums;     // [tokens][steps], of x as rounded, a lane for every two of the 16
};

// Without their signs, floats are in the order of their bits, infinity and behind it NaN at the end.
inline float largest_of(const float* x, int64_t count) {
  int32_t largest = 0;
  for (int64_t k = 0; k < count; ++k) {
    int32_t bits;
    std::memcpy(&bits, x + k, sizeof bits);
    largest = std::max(largest, bits & std::numeric_limits<int32_t>::max());
  }
  float value;
  std::memcpy(&value, &largest, sizeof value);
  return value;
}

template <int BITS>
Activations rounded(const float* x, int64_t tokens, int64_t columns, int64_t step_size) {
  const int64_t count = tokens * columns / step_size;
  Activations out{std::vector<int16_t>(tokens * columns), std::vector<float>(count), std::vector<Floats>(count)};
  for (int64_t step = 0; step < count; ++step) {
    const float* from = x + step * step_size;
    int16_t* to = out.values.data() + step * step_size;
    const float largest = largest_of(from, step_size), scale = largest / LARGEST, inverse = LARGEST / largest;
    out.scales[step] = scale;
    if (!(inverse > 0 && inverse <= std::numeric_limits<float>::max())) {
      // Zeros, or as good as (below 1e-34): zeros they stay. Not finite: zeros times a scale that makes every sum NaN.
      out.sums[step] = Floats{} * scale;
      continue;
    }
    int32_t sums[LANES] = {};
    for (int64_t unit = 0; unit < step_size; unit += SHORT_LANES * PARTS<BITS>) {
      for (int i = 0; i < PARTS<BITS>; ++i) {
        for (int lane = 0; lane < SHORT_LANES; ++lane) {
          const int16_t value = static_cast<int16_t>(std::lrintf(from[unit + lane * PARTS<BITS> + i] * inverse));
          to[unit + i * SHORT_LANES + lane] = value;
          sums[lane / 2] += value;
        }
      }
    }
    for (int lane = 0; lane < LANES; ++lane) out.sums[step][lane] = sums[lane] * scale;
  }
  return out;
}

template <typename Vector, typename Element>
inline Vector load(const Element* from) {
  Vector vector;
  std::memcpy(&vector, from, sizeof vector);
  return vector;
}

inline float sum(Floats lanes) {
  return ((lanes[0] + lanes[4]) + (lanes[1] + lanes[5])) + ((lanes[2] + lanes[6]) + (lanes[3] + lanes[7]));
}

inline Words pair_sums(Shorts a, Shorts b) {
#ifdef __AVX2__
  return reinterpret_cast<Words>(__builtin_ia32_pmaddwd256(a, b));
#else
  Words sums;
  for (int i = 0; i < LANES; ++i) sums[i] = a[2 * i] * b[2 * i] + a[2 * i + 1] * b[2 * i + 1];
  return sums;
#endif
}

// The i-th weight of every lane: 0 .. 15 of 4 bits, signed of 8.
template <int BITS>
inline Shorts weights_of(Shorts lanes, int i) {
  if (BITS == 8) return i ? lanes >> 8 : (lanes << 8) >> 8;
  return reinterpret_cast<Shorts>((reinterpret_cast<Bits>(lanes) >> (4 * i)) & 15);
}

// A step is one group, or two groups of 32, whose values then belong to the lower and to the upper four lanes.
template <bool TWO>
inline Floats per_lane(const float* groups, int64_t step) {
  if (!TWO) return Floats{} + groups[step];
  const Words upper = {0, 0, 0, 0, -1, -1, -1, -1};
  return upper ? Floats{} + groups[2 * step + 1] : Floats{} + groups[2 * step];
}

struct Sizes {
  int64_t tokens, rows, columns, groups, step_size;
};

// One row times TOKENS tokens, from the block's `first` on.
template <int BITS, int TOKENS, bool TWO>
inline void multiply_row(const Activations& x, const char* unit, const float* scale, const float* offset, float* y,
                         Sizes size, int64_t row, int64_t first) {
  const int64_t steps = size.columns / size.step_size, units = size.step_size / (SHORT_LANES * PARTS<BITS>);
  const int16_t* values = x.values.data() + first * size.columns;
  Floats total[TOKENS] = {};
  for (int64_t step = 0; step < steps; ++step) {
    Words product[TOKENS] = {};
    for (int64_t i = 0; i < units; ++i, unit += UNIT_BYTES, values += SHORT_LANES * PARTS<BITS>) {
      const Shorts lanes = load<Shorts>(unit);
      Shorts weights[PARTS<BITS>];
      for (int part = 0; part < PARTS<BITS>; ++part) weights[part] = weights_of<BITS>(lanes, part);
      for (int token = 0; token < TOKENS; ++token) {
        const int16_t* those = values + token * size.columns;
        for (int part = 0; part < PARTS<BITS>; ++part) {
          product[token] += pair_sums(weights[part], load<Shorts>(those + part * SHORT_LANES));
        }
      }
    }
    for (int token = 0; token < TOKENS; ++token) {
      const int64_t at = (first + token) * steps + step;
      const Floats sums = __builtin_convertvector(product[token], Floats);
      if (BITS == 8) {
        total[token] += sums * x.scales[at];
      } else {
        total[token] += sums * (per_lane<TWO>(scale + row * size.groups, step) * x.scales[at]) -
                        per_lane<TWO>(offset + row * size.groups, step) * x.sums[at];
      }
    }
  }
  for (int token = 0; token < TOKENS; ++token) {
    y[(first + token) * size.rows + row] = BITS == 8 ? sum(total[token]) * scale[row] : sum(total[token]);
  }
}

// SINGLE: there is one token, as in decoding, which is a tenth faster if the compiler knows.
template <int BITS, bool TWO, bool SINGLE>
void multiply_rows(const Activations& x, const void* packed, const float* scale, const float* offset, float* y,
                   Sizes size, int64_t tokens, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t row = 0; row < size.rows; ++row) {
    const char* unit = static_cast<const char*>(packed) + row * (size.columns * BITS / 8);
    if (SINGLE) {
      multiply_row<BITS, 1, TWO>(x, unit, scale, offset, y, size, row, 0);
      continue;
    }
    int64_t token = 0;
    for (; token + TILE <= tokens; token += TILE) {
      multiply_row<BITS, TILE, TWO>(x, unit, scale, offset, y, size, row, token);
    }
    for (; token < tokens; ++token) multiply_row<BITS, 1, TWO>(x, unit, scale, offset, y, size, row, token);
  }
}

// int8 has one group, int4 an offset a group.
template <int BITS, bool TWO>
void multiply(const float* x, const void* packed, const float* scale, const float* offset, float* y, Sizes size,
              int threads) {
  for (int64_t first = 0; first < size.tokens; first += BLOCK, x += BLOCK * size.columns, y += BLOCK * size.rows) {
    const int64_t tokens = std::min(size.tokens - first, BLOCK);
    const Activations block = rounded<BITS>(x, tokens, size.columns, size.step_size);
    auto run = tokens == 1 ? multiply_rows<BITS, TWO, true> : multiply_rows<BITS, TWO, false>;
    run(block, packed, scale, offset, y, size, tokens, threads);
  }
}

}  // namespace

extern "C" {

// x: [tokens][columns]; packed: [rows][columns / 8]; scale, and offset = (8 + zero point) * scale:
// [rows][columns / group]; y: [tokens][rows]. A group is 32, 64, 128 or 256; columns are a multiple of it and of 64.
void int4_product(const float* x, const int32_t* packed, const float* scale, const float* offset, float* y,
                  int64_t tokens, int64_t rows, int64_t columns, int64_t group, int threads) {
  const Sizes size{tokens, rows, columns, columns / group, std::max<int64_t>(group, 64)};
  (group < 64 ? multiply<4, true> : multiply<4, false>)(x, packed, scale, offset, y, size, threads);
}

// x: [tokens][columns]; weight: [rows][columns], columns a multiple of 32; scale: [rows]; y: [tokens][rows].
void int8_product(const float* x, const int8_t* weight, const float* scale, float* y, int64_t tokens, int64_t rows,
                  int64_t columns, int threads) {
  const Sizes size{tokens, rows, columns, 1, columns % 128 ? 32 : 128};
  multiply<8, false>(x, weight, scale, nullptr, y, size, threads);
}
}
