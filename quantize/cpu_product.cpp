// Products of a few tokens with packed weights, for CPUs: y[m][n] = sum over k of x[m][k] * w[n][k], all sums in fp32.
//
// A word of 32 bits holds 8 weights of 4 bits or 4 of 8 (int4.py, int8.py); a vector of 8 words is a block. The i-th
// weights of its words are cut out together, so x must come in that order: [tokens][blocks][i][word]. Each weight is
// unpacked once and used for all tokens. A token's sum is formed in one order, whatever the number of tokens beside it,
// so it has the same bits alone and among others.

#include <cstdint>
#include <cstring>

namespace {

constexpr int LANES = 8;
constexpr int MAX_TOKENS = 16;

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Words __attribute__((vector_size(4 * LANES)));

template <typename Vector, typename Element>
inline Vector load(const Element* from) {
  Vector vector;
  std::memcpy(&vector, from, sizeof vector);
  return vector;
}

inline float sum(Floats lanes) {
  return ((lanes[0] + lanes[4]) + (lanes[1] + lanes[5])) + ((lanes[2] + lanes[6]) + (lanes[3] + lanes[7]));
}

// The i-th of the BITS wide weights of every word. Those of 4 bits are cut out where they stand, 16^i times too large, which
// saves the shift: x comes divided by as much, and both are exact. The last one would meet the sign.
template <int BITS>
inline Floats weights_of(Words words, int i) {
  if (BITS == 8) return __builtin_convertvector((words << (24 - 8 * i)) >> 24, Floats);
  const Words cut = i < 7 ? words & (15 << (4 * i)) : (words >> 28) & 15;
  return __builtin_convertvector(cut, Floats);
}

// The product of one block with one token's part of x.
template <int BITS>
inline Floats block_product(const Floats* weights, const float* x) {
  Floats even = weights[0] * load<Floats>(x);
  Floats odd = weights[1] * load<Floats>(x + LANES);
  for (int i = 2; i < 32 / BITS; i += 2) {
    even += weights[i] * load<Floats>(x + i * LANES);
    odd += weights[i + 1] * load<Floats>(x + (i + 1) * LANES);
  }
  return even + odd;
}

// A step is one group, or two groups of 32, whose values then belong to the lower and to the upper four lanes.
template <bool TWO>
inline Floats per_lane(const float* groups, int64_t step) {
  if (!TWO) return Floats{} + groups[step];
  const Words upper = {0, 0, 0, 0, -1, -1, -1, -1};
  return upper ? Floats{} + groups[2 * step + 1] : Floats{} + groups[2 * step];
}

// TOKENS: how many, known to the compiler; 0: `tokens`.
template <int TOKENS, bool TWO>
void int4_rows(const float* x, const float* x_sums, const int32_t* packed, const float* scale, const float* offset,
               float* y, int64_t tokens, int64_t rows, int64_t columns, int64_t group, int threads) {
  const int64_t blocks = columns / 64, groups = columns / group, count = TOKENS ? TOKENS : tokens;
  const int64_t steps = TWO ? groups / 2 : groups, blocks_a_step = blocks / steps;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t row = 0; row < rows; ++row) {
    const int32_t* words = packed + row * blocks * LANES;
    Floats total[TOKENS ? TOKENS : MAX_TOKENS] = {};
    for (int64_t step = 0; step < steps; ++step) {
      const Floats scales = per_lane<TWO>(scale + row * groups, step);
      const Floats offsets = per_lane<TWO>(offset + row * groups, step);
      Floats product[TOKENS ? TOKENS : MAX_TOKENS] = {};
      for (int64_t block = step * blocks_a_step; block < (step + 1) * blocks_a_step; ++block) {
        const Words word = load<Words>(words + block * LANES);
        Floats weights[8];
        for (int i = 0; i < 8; ++i) weights[i] = weights_of<4>(word, i);
        for (int64_t token = 0; token < count; ++token) {
          product[token] += block_product<4>(weights, x + (token * blocks + block) * 64);
        }
      }
      for (int64_t token = 0; token < count; ++token) {
        const Floats sums = load<Floats>(x_sums + (token * steps + step) * LANES);
        total[token] += product[token] * scales - offsets * sums;
      }
    }
    for (int64_t token = 0; token < count; ++token) y[token * rows + row] = sum(total[token]);
  }
}

template <int TOKENS>
void int8_rows(const float* x, const int8_t* weight, const float* scale, float* y, int64_t tokens, int64_t rows,
               int64_t columns, int threads) {
  const int64_t blocks = columns / 32, count = TOKENS ? TOKENS : tokens;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t row = 0; row < rows; ++row) {
    Floats total[TOKENS ? TOKENS : MAX_TOKENS] = {};
    for (int64_t block = 0; block < blocks; ++block) {
      const Words word = load<Words>(weight + row * columns + block * 32);
      Floats weights[4];
      for (int i = 0; i < 4; ++i) weights[i] = weights_of<8>(word, i);
      for (int64_t token = 0; token < count; ++token) {
        total[token] += block_product<8>(weights, x + (token * blocks + block) * 32);
      }
    }
    for (int64_t token = 0; token < count; ++token) y[token * rows + row] = sum(total[token]) * scale[row];
  }
}

}  // namespace

extern "C" {

// x: [tokens][columns / 64][8][8], divided by 16^i for i < 7; x_sums: [tokens][steps][8], sums of the undivided x over a
// step's blocks and i, where a step has as many weights as a group, but at least 64; packed: [rows][columns / 8]; scale, and offset = (8 + zero point) * scale: [rows][columns / group]; y: [tokens][rows]. At most 16 tokens.
void int4_product(const float* x, const float* x_sums, const int32_t* packed, const float* scale, const float* offset,
                  float* y, int64_t tokens, int64_t rows, int64_t columns, int64_t group, int threads) {
  auto run = group < 64 ? (tokens == 1 ? int4_rows<1, true> : int4_rows<0, true>)
                        : (tokens == 1 ? int4_rows<1, false> : int4_rows<0, false>);
  run(x, x_sums, packed, scale, offset, y, tokens, rows, columns, group, threads);
}

// x: [tokens][columns / 32][4][8]; weight: [rows][columns]; scale: [rows]; y: [tokens][rows]. At most 16 tokens.
void int8_product(const float* x, const int8_t* weight, const float* scale, float* y, int64_t tokens, int64_t rows,
                  int64_t columns, int threads) {
  auto run = tokens == 1 ? int8_rows<1> : int8_rows<0>;
  run(x, weight, scale, y, tokens, rows, columns, threads);
}
}
