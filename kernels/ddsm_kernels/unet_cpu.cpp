// A U-Net's forward pass on a CPU: a flat program of operations, run by one team of threads.
//
// Activations are [images, height, width, channels] with a row stride (`ld`), so that an operation reads and writes
// parts of a concatenation where they lie. Matrix products read their right-hand side from panels that were packed when
// the network was opened. Convolutions of 3 x 3 with stride 1 are Winograd's F(4x4, 3x3) (Lavin & Gray 2016, 4.2)
// where an image has tiles enough: a quarter of the multiplications.
//
// The number of threads changes the order of no sum; the batch decides which convolutions are Winograd's.

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

namespace {

// Lanes of a vector, and the block of a product that registers hold: ROWS x (VECTORS * LANES).
#if defined(__AVX512F__)
constexpr int LANES = 16, ROWS = 12, VECTORS = 2;
#elif defined(__AVX2__)
constexpr int LANES = 8, ROWS = 6, VECTORS = 2;
#elif defined(__aarch64__)
constexpr int LANES = 4, ROWS = 6, VECTORS = 4;
#else
constexpr int LANES = 4, ROWS = 6, VECTORS = 2;
#endif
constexpr int64_t PANEL = VECTORS * LANES;

typedef float Vector __attribute__((vector_size(4 * LANES), aligned(4)));
typedef int32_t Integers __attribute__((vector_size(4 * LANES), aligned(4)));

inline Vector load(const float* p) { return *reinterpret_cast<const Vector*>(p); }
inline void store(float* p, Vector v) { *reinterpret_cast<Vector*>(p) = v; }
// The first `n` lanes; the others are zero, or left as they are.
inline Vector load(const float* p, int64_t n) {
  if (n >= LANES) return load(p);
  Vector v{};
  std::memcpy(&v, p, n * sizeof(float));
  return v;
}
inline void store(float* p, Vector v, int64_t n) {
  if (n >= LANES) return store(p, v);
  std::memcpy(p, &v, n * sizeof(float));
}
inline int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// e^x by Cephes' polynomial, within 2 ulp; infinite from 88.4 on, not below e^-87, and NaN stays NaN.
inline Vector exponential(Vector x) {
  const Vector most = Vector{} + 89.f, least = Vector{} - 87.f;
  const Vector magic = Vector{} + 12582912.f;  // 1.5 * 2^23: adding it rounds to an integer
  x = x > most ? most : x;
  x = x < least ? least : x;
  const Vector shifted = x * 1.44269504088896341f + magic;
  const Vector n = shifted - magic;
  const Vector r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  Vector y = 1.9875691500e-4f * r + 1.3981999507e-3f;
  y = y * r + 8.3334519073e-3f;
  y = y * r + 4.1665795894e-2f;
  y = y * r + 1.6666665459e-1f;
  y = y * r + 5.0000001201e-1f;
  y = y * r * r + r + 1.f;
  const Integers exponent = ((Integers)shifted - 0x4B400000 + 127) << 23;
  return y * (Vector)exponent;
}
inline Vector silu(Vector z) { return z / (1.f + exponential(-z)); }

struct Operation {
  int64_t kind;
  const float* in;
  float* out;
  const float* weight;
  const float* bias;      // [out_channels]
  const float* residual;  // like out; may be out itself
  const float* shift;     // [batch, shift_ld]: added to every pixel of an image
  const float* zeros;     // [in_channels]
  const int32_t* pixels;  // what is read: [rows, taps] or [tiles, 36] pixels of the input, -1 outside of the image
  float* scratch;
  int64_t batch, height, width;  // of the output
  int64_t in_channels, out_channels;
  int64_t in_ld, out_ld, residual_ld, shift_ld;
  int64_t packed_columns, packed_channels;  // of the packed weights, of which this layer reads the leading ones
  int64_t taps;
  int64_t groups, heads;
  int64_t has_silu;
  int64_t block;  // tiles, or pixels of a part
  double epsilon, scale;
};

struct Team {
  int64_t thread, threads;
  int64_t first(int64_t items) const { return items * thread / threads; }
  int64_t last(int64_t items) const { return items * (thread + 1) / threads; }
};

#define BARRIER _Pragma("omp barrier")

// The panels of a right-hand side [taps, n, columns], of which a product may use fewer rows and columns.
struct Panels {
  const float* packed;
  int64_t columns, n, taps;
};

// ROWS x columns of a product with `n` lines of a panel, which are `step` apart; row(r) points to a row's values.
template <int R, int V, class Row, class Write>
inline void block_of_rows(Row row, int64_t r0, int64_t n, const float* line, int64_t step, Write write) {
  Vector sum[R][V];
  const float* a[R];
  for (int r = 0; r < R; r++) {
    a[r] = row(r0 + r);
    for (int v = 0; v < V; v++) sum[r][v] = Vector{};
  }
  for (int64_t i = 0; i < n; i++, line += step) {
    Vector b[V];
    for (int v = 0; v < V; v++) b[v] = load(line + v * LANES);
    for (int r = 0; r < R; r++) {
      const float s = a[r][i];
      for (int v = 0; v < V; v++) sum[r][v] += s * b[v];
    }
  }
  for (int r = 0; r < R; r++)
    for (int v = 0; v < V; v++) write(r0 + r, v * LANES, sum[r][v]);
}

template <int R, int V, class Row, class Write>
inline void last_rows(Row row, int64_t r0, int64_t left, int64_t n, const float* line, int64_t step, Write write) {
  if (left == R) return block_of_rows<R, V>(row, r0, n, line, step, write);
  if constexpr (R > 1) last_rows<R - 1, V>(row, r0, left, n, line, step, write);
}

template <int V, class Row, class Write>
inline void all_rows(Row row, int64_t r0, int64_t r1, int64_t n, const float* line, int64_t step, Write write) {
  constexpr int R = V == 1 ? 2 * ROWS : ROWS;  // enough sums that none waits for its last product
  for (; r0 + R <= r1; r0 += R) block_of_rows<R, V>(row, r0, n, line, step, write);
  if (r0 < r1) last_rows<R - 1, V>(row, r0, r1 - r0, n, line, step, write);
}

template <int V, class Row, class Write>
inline void with_vectors(int64_t vectors, Row row, int64_t r0, int64_t r1, int64_t n, const float* line, int64_t step,
                         Write write) {
  if (vectors == V) return all_rows<V>(row, r0, r1, n, line, step, write);
  if constexpr (V > 1) with_vectors<V - 1>(vectors, row, r0, r1, n, line, step, write);
}

// Columns [PANEL * p, ...) of rows r0 to r1 of a product with one tap; write(row, column in the panel, values) gets
// vectors, the last of which is padded.
template <class Row, class Write>
inline void multiply(Row row, int64_t r0, int64_t r1, int64_t n, Panels right, int64_t tap, int64_t columns, int64_t p,
                     Write write) {
  const int64_t c0 = p * PANEL, step = std::min(PANEL, round_up(right.columns - c0, LANES));
  const float* line = right.packed + (c0 * right.taps + tap * step) * right.n;
  with_vectors<VECTORS>(round_up(std::min(PANEL, columns - c0), LANES) / LANES, row, r0, r1, n, line, step, write);
}
inline int64_t panels_of(int64_t columns) { return (columns + PANEL - 1) / PANEL; }

// What follows every linear operation: bias, shift, residual, activation. `row` is a pixel of `image`.
inline void end(const Operation& op, int64_t image, int64_t row, int64_t c, Vector v) {
  const int64_t n = op.out_channels - c;
  if (op.bias) v += load(op.bias + c, n);
  if (op.shift) v += load(op.shift + image * op.shift_ld + c, n);
  if (op.residual) v += load(op.residual + row * op.residual_ld + c, n);
  if (op.has_silu) v = silu(v);
  store(op.out + row * op.out_ld + c, v, n);
}

// Any convolution, and every linear layer: rows are read where they lie, tap by tap. A tap's panel stays in the nearest
// cache while it meets a block of rows, whose sums wait there, too.
void convolve(const Operation& op, Team team) {
  constexpr int64_t most = ROWS * 8;
  const int64_t pixels = op.height * op.width, rows = op.batch * pixels, panels = panels_of(op.out_channels);
  const int64_t blocks = (rows + most - 1) / most, size = round_up((rows + blocks - 1) / blocks, ROWS);
  const Panels weights{op.weight, op.packed_columns, op.packed_channels, op.taps};
  const bool by_panel = blocks < 4 * team.threads;  // few rows are split unevenly, and fit into a cache
  for (int64_t i = team.first(blocks * panels); i < team.last(blocks * panels); i++) {
    const int64_t block = by_panel ? i % blocks : i / panels, p = by_panel ? i / blocks : i % panels, c0 = p * PANEL;
    const int64_t r0 = block * size, r1 = std::min(rows, r0 + size);
    auto finish = [&](int64_t r, int64_t c, Vector v) { end(op, op.shift ? r / pixels : 0, r, c0 + c, v); };
    if (!op.pixels) {
      auto row = [&](int64_t r) { return op.in + r * op.in_ld; };
      multiply(row, r0, r1, op.in_channels, weights, 0, op.out_channels, p, finish);
      continue;
    }
    float sums[most * PANEL] = {};
    for (int64_t tap = 0; tap < op.taps; tap++) {
      auto row = [&](int64_t r) {
        const int64_t pixel = op.pixels[r * op.taps + tap];
        return pixel < 0 ? op.zeros : op.in + pixel * op.in_ld;
      };
      auto add = [&](int64_t r, int64_t c, Vector v) {
        float* sum = sums + (r - r0) * PANEL + c;
        store(sum, load(sum) + v);
      };
      multiply(row, r0, r1, op.in_channels, weights, tap, op.out_channels, p, add);
    }
    for (int64_t r = r0; r < r1; r++)
      for (int64_t c = 0; c < std::min(PANEL, op.out_channels - c0); c += LANES)
        finish(r, c, load(sums + (r - r0) * PANEL + c));
  }
}

// B^T (six values to six) and A^T (six to four) of F(4, 3).
inline void transform_input(const Vector* d, Vector* out) {
  const Vector a = d[4] - 4.f * d[2], b = d[3] - 4.f * d[1], c = d[4] - d[2], e = 2.f * (d[3] - d[1]);
  out[0] = 4.f * d[0] - 5.f * d[2] + d[4];
  out[1] = a + b;
  out[2] = a - b;
  out[3] = c + e;
  out[4] = c - e;
  out[5] = 4.f * d[1] - 5.f * d[3] + d[5];
}
inline void transform_output(const Vector* m, Vector* out) {
  const Vector s = m[1] + m[2], d = m[1] - m[2], t = m[3] + m[4], e = m[3] - m[4];
  out[0] = m[0] + s + t;
  out[1] = d + 2.f * e;
  out[2] = s + 4.f * t;
  out[3] = d + 8.f * e + m[5];
}

void winograd(const Operation& op, Team team) {
  const int64_t C = op.in_channels, K = op.out_channels, columns = round_up(K, LANES), panels = panels_of(K);
  const int64_t tiles_x = (op.width + 3) / 4, of_image = (op.height + 3) / 4 * tiles_x, tiles = op.batch * of_image;
  // The 36 points of a tile lie in different sets of a cache: one line more than a multiple of a page apart.
  const int64_t point = round_up(op.block * C, 1024) + 16, out_point = round_up(op.block * columns, 1024) + 16;
  const int64_t of_point = op.packed_channels * round_up(op.packed_columns, LANES);
  float* const transformed = op.scratch;            // 36 x [block, C]
  float* const products = op.scratch + 36 * point;  // 36 x [block, columns]
  for (int64_t t0 = 0; t0 < tiles; t0 += op.block) {
    const int64_t count = std::min(op.block, tiles - t0);
    for (int64_t t = team.first(count); t < team.last(count); t++) {
      const float* source[36];
      for (int k = 0; k < 36; k++) {
        const int64_t pixel = op.pixels[(t0 + t) * 36 + k];
        source[k] = pixel < 0 ? op.zeros : op.in + pixel * op.in_ld;
      }
      for (int64_t c = 0; c < C; c += LANES) {
        Vector half[6][6], column[6], out[6];
        for (int j = 0; j < 6; j++) {
          for (int k = 0; k < 6; k++) column[k] = load(source[k * 6 + j] + c, C - c);
          transform_input(column, out);
          for (int k = 0; k < 6; k++) half[k][j] = out[k];
        }
        for (int k = 0; k < 6; k++) {
          transform_input(half[k], out);
          for (int j = 0; j < 6; j++) store(transformed + (k * 6 + j) * point + t * C + c, out[j], C - c);
        }
      }
    }
    BARRIER
    for (int64_t i = team.first(36 * panels); i < team.last(36 * panels); i++) {
      const float* a = transformed + i / panels * point;
      float* out = products + i / panels * out_point + i % panels * PANEL;
      const Panels weights{op.weight + i / panels * of_point, op.packed_columns, op.packed_channels, 1};
      auto row = [&](int64_t r) { return a + r * C; };
      auto write = [&](int64_t r, int64_t c, Vector v) { store(out + r * columns + c, v); };
      multiply(row, 0, count, C, weights, 0, K, i % panels, write);
    }
    BARRIER
    for (int64_t t = team.first(count); t < team.last(count); t++) {
      const int64_t image = (t0 + t) / of_image, y0 = (t0 + t) % of_image / tiles_x * 4, x0 = (t0 + t) % tiles_x * 4;
      for (int64_t c = 0; c < columns; c += LANES) {
        Vector half[4][6], line[6], out[4];
        for (int k = 0; k < 6; k++) {
          for (int j = 0; j < 6; j++) line[j] = load(products + (k * 6 + j) * out_point + t * columns + c);
          transform_output(line, out);
          for (int j = 0; j < 4; j++) half[j][k] = out[j];
        }
        for (int64_t j = 0; j < 4 && x0 + j < op.width; j++) {
          transform_output(half[j], out);
          for (int64_t k = 0; k < 4 && y0 + k < op.height; k++)
            end(op, image, (image * op.height + y0 + k) * op.width + x0 + j, c, out[k]);
        }
      }
    }
    BARRIER
  }
}

// A group norm, and the activation behind it. Each part of an image gives its channels' means, what rounding left of
// them, and sums of squared differences; they are merged in double by Chan, Golub & LeVeque's formula.
void normalise(const Operation& op, Team team) {
  const int64_t C = op.in_channels, D = C / op.groups, pixels = op.height * op.width;
  const int64_t parts = (pixels + op.block - 1) / op.block, items = op.batch * parts;
  for (int64_t i = team.first(items); i < team.last(items); i++) {
    const int64_t p0 = i % parts * op.block, count = std::min(op.block, pixels - p0);
    const float* x = op.in + (i / parts * pixels + p0) * op.in_ld;
    float *means = op.scratch + i * 3 * C, *rests = means + C, *squares = rests + C;
    for (int64_t c = 0; c < C; c += LANES) {
      Vector sum{}, rest{}, square{};
      for (int64_t p = 0; p < count; p++) sum += load(x + p * op.in_ld + c, C - c);
      const Vector mean = sum / static_cast<float>(count);
      for (int64_t p = 0; p < count; p++) {
        const Vector d = load(x + p * op.in_ld + c, C - c) - mean;
        rest += d;
        square += d * d;
      }
      store(means + c, mean, C - c);
      store(rests + c, rest, C - c);
      store(squares + c, square, C - c);
    }
  }
  BARRIER
  float* const centres = op.scratch + items * 3 * C + team.thread * 3 * round_up(C, LANES);
  float *const factors = centres + round_up(C, LANES), *const offsets = factors + round_up(C, LANES);
  int64_t known = -1;
  for (int64_t i = team.first(items); i < team.last(items); i++) {
    const int64_t image = i / parts, p0 = i % parts * op.block, count = std::min(op.block, pixels - p0);
    for (int64_t g = 0; image != known && g < op.groups; g++) {
      double centre = 0, squares = 0, seen = 0;
      for (int64_t part = 0; part < parts; part++) {
        const float* means = op.scratch + (image * parts + part) * 3 * C;
        const double size = static_cast<double>(std::min(op.block, pixels - part * op.block));
        for (int64_t c = g * D; c < (g + 1) * D; c++) {
          const double rest = means[C + c], difference = means[c] + rest / size - centre;
          seen += size;
          centre += difference * size / seen;
          squares += means[2 * C + c] - rest * rest / size + difference * difference * size * (seen - size) / seen;
        }
      }
      const double inverse = 1 / std::sqrt(squares / seen + op.epsilon);
      for (int64_t c = g * D; c < (g + 1) * D; c++) {
        centres[c] = static_cast<float>(centre);
        factors[c] = static_cast<float>(op.weight[c] * inverse);
        offsets[c] = static_cast<float>(op.bias[c] - (centre - centres[c]) * op.weight[c] * inverse);
      }
    }
    known = image;
    for (int64_t p = p0; p < p0 + count; p++) {
      const float* x = op.in + (image * pixels + p) * op.in_ld;
      float* out = op.out + (image * pixels + p) * op.out_ld;
      for (int64_t c = 0; c < C; c += LANES) {
        const Vector z = (load(x + c, C - c) - load(centres + c)) * load(factors + c) + load(offsets + c);
        store(out + c, op.has_silu ? silu(z) : z, C - c);
      }
    }
  }
}

// Softmax(Q K^T * scale) V for every head; the input's channels are those of Q, K and V, one after the other.
void attend(const Operation& op, Team team) {
  const int64_t C = op.out_channels, D = C / op.heads, P = op.height * op.width;
  const int64_t keys = round_up(P, LANES), values = round_up(D, LANES), size = ROWS * 4;
  float* const packed_keys = op.scratch;                                      // [batch, heads, panels, D, PANEL]
  float* const packed_values = packed_keys + op.batch * op.heads * D * keys;  // [batch, heads, panels, P, PANEL]
  float* const scores = packed_values + op.batch * op.heads * P * values + team.thread * size * keys;
  const int64_t key_panels = panels_of(P), heads = op.batch * op.heads;
  for (int64_t i = team.first(heads * key_panels); i < team.last(heads * key_panels); i++) {
    const int64_t head = i / key_panels, p0 = i % key_panels * PANEL, wide = std::min(PANEL, keys - p0);
    const float* source = op.in + head / op.heads * P * op.in_ld + head % op.heads * D;
    float* k = packed_keys + head * D * keys + p0 * D;
    float* v = packed_values + head * P * values;
    for (int64_t d = 0; d < D; d++)
      for (int64_t j = 0; j < wide; j++) k[d * wide + j] = p0 + j < P ? source[(p0 + j) * op.in_ld + C + d] : 0.f;
    for (int64_t p = p0; p < std::min(P, p0 + PANEL); p++)
      for (int64_t d = 0; d < values; d += PANEL) {
        const int64_t of_panel = std::min(PANEL, values - d);
        for (int64_t j = 0; j < of_panel; j++)
          v[d * P + p * of_panel + j] = d + j < D ? source[p * op.in_ld + 2 * C + d + j] : 0.f;
      }
  }
  BARRIER
  const int64_t blocks = (P + size - 1) / size;
  const float scale = static_cast<float>(op.scale);
  for (int64_t i = team.first(heads * blocks); i < team.last(heads * blocks); i++) {
    const int64_t head = i / blocks, r0 = i % blocks * size, r1 = std::min(P, r0 + size);
    const float* queries = op.in + head / op.heads * P * op.in_ld + head % op.heads * D;
    const Panels keys_of{packed_keys + head * D * keys, P, D, 1}, values_of{packed_values + head * P * values, D, P, 1};
    for (int64_t p = 0; p < key_panels; p++) {
      auto row = [&](int64_t r) { return queries + r * op.in_ld; };
      auto write = [&](int64_t r, int64_t c, Vector v) { store(scores + (r - r0) * keys + p * PANEL + c, v * scale); };
      multiply(row, r0, r1, D, keys_of, 0, P, p, write);
    }
    float inverse[ROWS * 4];
    for (int64_t r = r0; r < r1; r++) {
      float* row = scores + (r - r0) * keys;
      for (int64_t c = P; c < keys; c++) row[c] = row[0];
      Vector highest = load(row), total{};
      for (int64_t c = LANES; c < keys; c += LANES) {
        const Vector v = load(row + c);
        highest = v > highest ? v : highest;
      }
      float most = highest[0], sum = 0;
      for (int j = 1; j < LANES; j++) most = highest[j] > most ? highest[j] : most;
      for (int64_t c = 0; c < P; c += LANES) {
        const Vector e = exponential(load(row + c) - most);
        store(row + c, e);
        if (c + LANES <= P) total += e;
        else for (int64_t j = 0; j < P - c; j++) sum += e[j];
      }
      for (int j = 0; j < LANES; j++) sum += total[j];
      inverse[r - r0] = 1.f / sum;
    }
    float* out = op.out + head / op.heads * P * op.out_ld + head % op.heads * D;
    for (int64_t p = 0; p < panels_of(D); p++) {
      auto row = [&](int64_t r) { return scores + (r - r0) * keys; };
      auto write = [&](int64_t r, int64_t c, Vector v) {
        store(out + r * op.out_ld + p * PANEL + c, v * inverse[r - r0], D - p * PANEL - c);
      };
      multiply(row, r0, r1, P, values_of, 0, D, p, write);
    }
  }
}

// The caller's [images, channels, height, width] as rows of [channels, 3 x 3]: what a convolution reads of every pixel.
void gather(const Operation& op, Team team) {
  const int64_t C = op.in_channels, H = op.height, W = op.width, rows = op.batch * H * W;
  for (int64_t r = team.first(rows); r < team.last(rows); r++) {
    const int64_t image = r / (H * W), y0 = r / W % H - 1, x0 = r % W - 1;
    float* out = op.out + r * op.out_ld;
    for (int64_t c = 0; c < C; c++)
      for (int64_t y = y0; y < y0 + 3; y++)
        for (int64_t x = x0; x < x0 + 3; x++)
          *out++ = y < 0 || y >= H || x < 0 || x >= W ? 0.f : op.in[((image * C + c) * H + y) * W + x];
  }
}

// Back to the caller's [images, channels, height, width].
void scatter(const Operation& op, Team team) {
  const int64_t C = op.in_channels, pixels = op.height * op.width, rows = op.batch * pixels;
  for (int64_t r = team.first(rows); r < team.last(rows); r++)
    for (int64_t c = 0; c < C; c++) op.out[(r / pixels * C + c) * pixels + r % pixels] = op.in[r * op.in_ld + c];
}

}  // namespace

extern "C" {

int64_t ddsm_size_of_operation() { return sizeof(Operation); }

int64_t ddsm_lanes() { return LANES; }
int64_t ddsm_rows() { return ROWS; }

// weights [columns, n, taps] -> panels of [taps, n, PANEL], zero beyond the last column
void ddsm_pack(const float* weights, int64_t columns, int64_t n, int64_t taps, float* packed) {
#pragma omp parallel for
  for (int64_t c0 = 0; c0 < columns; c0 += PANEL) {
    const int64_t wide = std::min(PANEL, round_up(columns, LANES) - c0);
    float* panel = packed + c0 * n * taps;
    for (int64_t tap = 0; tap < taps; tap++)
      for (int64_t i = 0; i < n; i++)
        for (int64_t j = 0; j < wide; j++)
          panel[(tap * n + i) * wide + j] = c0 + j < columns ? weights[((c0 + j) * n + i) * taps + tap] : 0.f;
  }
}

// weights [columns, n, 3, 3] -> the same panels for each of the 36 points of G g G^T
void ddsm_pack_winograd(const float* weights, int64_t columns, int64_t n, float* packed) {
  const double G[6][3] = {{1. / 4, 0, 0},           {-1. / 6, -1. / 6, -1. / 6}, {-1. / 6, 1. / 6, -1. / 6},
                          {1. / 24, 1. / 12, 1. / 6}, {1. / 24, -1. / 12, 1. / 6}, {0, 0, 1}};
  const int64_t of_point = n * round_up(columns, LANES);
#pragma omp parallel for
  for (int64_t c0 = 0; c0 < columns; c0 += PANEL) {
    const int64_t wide = std::min(PANEL, round_up(columns, LANES) - c0);
    for (int64_t i = 0; i < n; i++)
      for (int64_t j = 0; j < wide; j++) {
        double half[6][3] = {};
        for (int a = 0; a < 6 && c0 + j < columns; a++)
          for (int b = 0; b < 3; b++)
            for (int k = 0; k < 3; k++) half[a][b] += G[a][k] * weights[(((c0 + j) * n + i) * 3 + k) * 3 + b];
        for (int a = 0; a < 6; a++)
          for (int b = 0; b < 6; b++) {
            double point = 0;
            for (int k = 0; k < 3; k++) point += half[a][k] * G[b][k];
            packed[(a * 6 + b) * of_point + c0 * n + i * wide + j] = static_cast<float>(point);
          }
      }
  }
}

void ddsm_run(const Operation* operations, int64_t count, int64_t threads) {
#pragma omp parallel num_threads(static_cast<int>(threads))
  {
    const Team team{omp_get_thread_num(), omp_get_num_threads()};
    for (int64_t i = 0; i < count; i++) {
      const Operation& op = operations[i];
      switch (op.kind) {
        case 0: gather(op, team); break;
        case 1: scatter(op, team); break;
        case 2: convolve(op, team); break;
        case 3: winograd(op, team); break;
        case 4: normalise(op, team); break;
        case 5: attend(op, team); break;
      }
      BARRIER
    }
  }
}

}
