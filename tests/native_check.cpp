// The C++ kernels on their own, against long double: built and run by `make sanitize` under ASan and UBSan, where a
// read past the end of a row or a misaligned access stops the program. Every level that the processor offers.

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "../csrc/isa.h"

using namespace fastcompat;

namespace {

uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}
float of_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

// Values of a storage type in a buffer of exactly their size, and what they mean.
struct Stored {
  std::vector<unsigned char> bytes;
  std::vector<float> values;
};

Stored stored(const std::vector<float>& wanted, Dtype dtype) {
  Stored result;
  const size_t size = dtype == Dtype::kFloat32 ? 4 : 2;
  result.bytes.resize(wanted.size() * size);
  for (size_t i = 0; i < wanted.size(); ++i) {
    uint32_t bits = bits_of(wanted[i]);
    float value = wanted[i];
    if (dtype == Dtype::kBfloat16) {
      value = of_bits(bits & 0xffff0000u);
      bits >>= 16;
    } else if (dtype == Dtype::kFloat16) {
      // Truncated; below the smallest normal number it becomes zero.
      const int exponent = int((bits >> 23) & 0xff) - 127 + 15;
      const uint32_t half = exponent <= 0 ? 0 : uint32_t(exponent) << 10 | ((bits >> 13) & 0x3ff);
      value = exponent <= 0 ? 0.0f : of_bits(bits & 0xffffe000u);
      bits = ((bits >> 16) & 0x8000) | half;
    }
    std::memcpy(result.bytes.data() + i * size, &bits, size);
    result.values.push_back(value);
  }
  return result;
}

// Values of a storage type as they were written.
float read(const std::vector<unsigned char>& bytes, size_t i, Dtype dtype) {
  if (dtype == Dtype::kFloat32) {
    float x;
    std::memcpy(&x, bytes.data() + 4 * i, 4);
    return x;
  }
  uint16_t bits;
  std::memcpy(&bits, bytes.data() + 2 * i, 2);
  if (dtype == Dtype::kBfloat16) return of_bits(uint32_t(bits) << 16);
  _Float16 half;
  std::memcpy(&half, &bits, 2);
  return float(half);
}

int failures = 0;

void expect(bool holds, const char* what, const char* level, int64_t S, int64_t D, int64_t V, int dtype, double got,
            double wanted) {
  if (holds) return;
  ++failures;
  std::printf("%s: level %s S %ld D %ld V %ld dtype %d: got %.9g, wanted %.9g\n", what, level, long(S), long(D),
              long(V), dtype, got, wanted);
}

std::vector<double> statistics(const std::vector<long double>& z, int64_t target) {
  long double m = *std::max_element(z.begin(), z.end()), sum = 0, mean = 0, variance = 0, squares = 0, above = 0;
  for (long double x : z) sum += std::exp(x - m);
  const long double log_sum = m + std::log(sum);
  for (long double x : z) {
    const long double p = std::exp(x - log_sum);
    if (p > 0) mean += p * (x - log_sum);
    squares += p * p;
    above += x > z[target];
  }
  for (long double x : z) {
    const long double p = std::exp(x - log_sum);
    if (p > 0) variance += p * (x - log_sum - mean) * (x - log_sum - mean);
  }
  return {double(log_sum - z[target]), double(-mean), double(variance), double(above), double(squares)};
}

void check(const Isa& isa, int64_t S, int64_t D, int64_t V, Dtype dtype, bool transformed) {
  std::mt19937 random(unsigned(S * 1000003 + D * 1009 + V));
  std::normal_distribution<float> normal;
  std::vector<float> hidden(S * D), weight(V * D), bias(V);
  for (float& x : hidden) x = normal(random);
  for (float& x : weight) x = normal(random) * 4.0f / std::sqrt(float(D));
  for (float& x : bias) x = normal(random);
  if (V > 2) bias[V / 2] = -std::numeric_limits<float>::infinity();
  std::vector<int64_t> target(S);
  for (int64_t i = 0; i < S; ++i) target[i] = i % 3 == 0 ? V - 1 : int64_t(random() % V);
  const Stored h = stored(hidden, dtype), w = stored(weight, dtype);
  const float softcap = transformed ? 5.0f : 0.0f, scale = transformed ? 0.5f : 1.0f;

  std::vector<float> out(kStatistics * S, NAN), again(kStatistics * S, NAN), nll(S, NAN);
  LinearNll call{
      h.bytes.data(), w.bytes.data(), target.data(), transformed ? bias.data() : nullptr, out.data(), S, D, V, dtype,
      softcap,        scale,          true};
  linear_nll(isa, call, 1);
  call.out = again.data();
  linear_nll(isa, call, 3);
  expect(std::memcmp(out.data(), again.data(), out.size() * sizeof(float)) == 0, "threads", isa.name, S, D, V,
         int(dtype), 0, 0);
  call.out = nll.data();
  call.all_statistics = false;
  linear_nll(isa, call, 2);

  std::vector<float> logits;
  std::vector<std::vector<double>> wanted;
  for (int64_t i = 0; i < S; ++i) {
    std::vector<long double> z(V);
    for (int64_t v = 0; v < V; ++v) {
      for (int64_t k = 0; k < D; ++k) z[v] += (long double)(h.values[i * D + k]) * w.values[v * D + k];
      if (transformed) z[v] = softcap * std::tanh((z[v] + bias[v]) * scale / softcap);
      logits.push_back(float(z[v]));
    }
    wanted.push_back(statistics(z, target[i]));
    for (int k = 0; k < kStatistics; ++k) {
      const double got = out[k * S + i], want = wanted[i][k];
      // The rank may differ where two logits are equal to float32's precision.
      const double allowed = k == 3 ? 1.0 : 2e-5 * std::max(1.0, std::abs(want));
      expect(got == want || std::abs(got - want) <= allowed, "linear_nll", isa.name, S, D, V, int(dtype), got, want);
    }
    expect(nll[i] == out[i], "nll alone", isa.name, S, D, V, int(dtype), nll[i], out[i]);
  }

  // The same logits, rounded to the type, through packed_nll; rows lie three elements further apart than they are long.
  std::vector<float> spaced(S * (V + 3), 1e9f);
  for (int64_t i = 0; i < S; ++i) std::copy_n(logits.begin() + i * V, V, spaced.begin() + i * (V + 3));
  if (dtype == Dtype::kFloat16) std::replace(spaced.begin(), spaced.end(), 1e9f, 6e4f);
  Stored rows = stored(spaced, dtype);
  rows.bytes.resize(((S - 1) * (V + 3) + V) * (dtype == Dtype::kFloat32 ? 4 : 2));
  rows.bytes.shrink_to_fit();
  std::fill(out.begin(), out.end(), NAN);
  packed_nll(isa, PackedNll{rows.bytes.data(), target.data(), out.data(), S, V, V + 3, dtype, true}, 2);
  for (int64_t i = 0; i < S; ++i) {
    const auto begin = rows.values.begin() + i * (V + 3);
    const auto want = statistics(std::vector<long double>(begin, begin + V), target[i]);
    for (int k = 0; k < kStatistics; ++k) {
      const double got = out[k * S + i];
      expect(got == want[k] || std::abs(got - want[k]) <= 2e-5 * std::max(1.0, std::abs(want[k])), "packed_nll",
             isa.name, S, D, V, int(dtype), got, want[k]);
    }
  }
}

// Attention over a random forest, laid out depth first.
void check_attention(const Isa& isa, int64_t T, int H, int K, int C, int W, int window, Dtype dtype, int every = 1) {
  std::mt19937 random(unsigned(T * 1009 + C));
  std::normal_distribution<float> normal;
  std::vector<int32_t> position(T), parent(T, -1), end(T);
  for (int64_t t = 1; t < T; ++t) {
    int32_t p = int32_t(t - 1);
    for (int back = random() % 8 == 0 ? int(random() % 40) : 0; back > 0 && p >= 0; --back) p = parent[p];
    parent[t] = p;
    position[t] = p < 0 ? 0 : position[p] + 1;
  }
  for (int64_t t = T - 1; t >= 0; --t) {
    end[t] = std::max(end[t], int32_t(t + 1));
    if (parent[t] >= 0) end[parent[t]] = std::max(end[parent[t]], end[t]);
  }
  std::vector<float> query(T * H * C), key(T * K * C), value(T * K * W), sinks(H, 0.5f);
  for (auto* tensor : {&query, &key, &value}) {
    for (float& x : *tensor) x = normal(random);
  }
  const Stored q = stored(query, dtype), k = stored(key, dtype), v = stored(value, dtype);
  std::vector<unsigned char> out(T * H * W * (dtype == Dtype::kFloat32 ? 4 : 2));
  ForestAttention call{};
  call.query = q.bytes.data(), call.key = k.bytes.data(), call.value = v.bytes.data(), call.out = out.data();
  // [T, heads, width] as transformers lays them out.
  call.query_head = C, call.query_token = H * C, call.key_head = C, call.key_token = K * C;
  call.value_head = W, call.value_token = K * W;
  call.tokens = call.queries = T, call.heads = H, call.key_heads = K, call.width = C, call.value_width = W;
  call.position = position.data(), call.subtree_end = end.data(), call.sinks = sinks.data();
  call.dtype = dtype, call.scaling = 0.3f, call.window = window;
  // Of every `every`-th token only.
  std::vector<int32_t> index;
  for (int64_t t = 0; t < T; t += every) index.push_back(int32_t(t));
  const int64_t Q = int64_t(index.size());
  std::vector<unsigned char> chosen;
  if (every > 1) {
    const size_t row = q.bytes.size() / size_t(T);
    for (const int32_t t : index) chosen.insert(chosen.end(), &q.bytes[t * row], &q.bytes[t * row] + row);
    call.query = chosen.data(), call.query_index = index.data(), call.queries = Q;
    out.assign(out.size() / size_t(T) * size_t(Q), 0);
  }
  forest_attention(isa, call, 3);
  for (int64_t n = 0; n < Q; ++n) {
    const int64_t i = index[n];
    for (int h = 0; h < H; ++h) {
      std::vector<long double> wanted(W);
      long double sum = std::exp(0.5L);
      for (int64_t j = 0; j <= i; ++j) {
        if (i >= end[j] || (window > 0 && position[i] - position[j] >= window)) continue;
        long double s = 0;
        const int64_t kv = j * K + h / (H / K);
        for (int c = 0; c < C; ++c) s += (long double)(q.values[(i * H + h) * C + c]) * k.values[kv * C + c];
        const long double e = std::exp(s * 0.3L);
        sum += e;
        for (int c = 0; c < W; ++c) wanted[c] += e * v.values[kv * W + c];
      }
      for (int c = 0; c < W; ++c) {
        const float got = read(out, (n * H + h) * W + c, dtype);
        const double want = double(wanted[c] / sum), allowed = dtype == Dtype::kFloat32 ? 1e-5 : 3e-2;
        expect(std::abs(got - want) <= allowed, "forest_attention", isa.name, T, C, W, int(dtype), got, want);
      }
    }
  }
}

void check_elementwise(const Isa& isa, int64_t T, int D, Dtype dtype, std::mt19937& random) {
  std::normal_distribution<float> normal;
  std::vector<float> x(T * D), residual(T * D), weight(D), cosine(T * D), sine(T * D);
  for (auto* tensor : {&x, &residual, &weight, &cosine, &sine}) {
    for (float& value : *tensor) value = normal(random);
  }
  const Stored a = stored(x, dtype), b = stored(residual, dtype), w = stored(weight, dtype);
  const Stored c = stored(cosine, dtype), s = stored(sine, dtype);
  const double allowed = dtype == Dtype::kFloat32 ? 1e-5 : 2e-2;
  std::vector<unsigned char> out(a.bytes.size()), sum(a.bytes.size()), rotated = a.bytes;

  RmsNorm norm{{const_cast<unsigned char*>(a.bytes.data()), D, 0}, {out.data(), D, 0}};
  norm.residual = b.bytes.data(), norm.sum = sum.data(), norm.weight = w.bytes.data();
  norm.tokens = T, norm.heads = 1, norm.width = D, norm.dtype = dtype, norm.eps = 1e-5f, norm.offset = 0.5f;
  rms_norm(isa, norm, 3);
  for (int64_t t = 0; t < T; ++t) {
    long double squares = 0;
    for (int d = 0; d < D; ++d) {
      const float total = read(sum, t * D + d, dtype);
      const double want = double(a.values[t * D + d]) + b.values[t * D + d];
      expect(std::abs(total - want) <= allowed * (1 + std::abs(want)), "sum", isa.name, T, D, 0, int(dtype), total,
             want);
      squares += (long double)(total)*total;
    }
    for (int d = 0; d < D; ++d) {
      const long double scale = 1 / std::sqrt(squares / D + 1e-5L);
      const double want = double(read(sum, t * D + d, dtype) * scale * (0.5L + w.values[d]));
      const float got = read(out, t * D + d, dtype);
      expect(std::abs(got - want) <= allowed * (1 + std::abs(want)), "rms_norm", isa.name, T, D, 0, int(dtype), got,
             want);
    }
  }

  Gated gate{a.bytes.data(), b.bytes.data(), out.data(), T, D, D, dtype, Activation::kSilu};
  for (const Activation activation : {Activation::kSilu, Activation::kGeluTanh}) {
    gate.activation = activation;
    gated(isa, gate, 3);
    for (int64_t i = 0; i < T * D; ++i) {
      const long double g = a.values[i];
      const long double u = 0.7978845608028654L * (g + 0.044715L * g * g * g);
      const long double act = activation == Activation::kSilu ? g / (1 + std::exp(-g)) : g / 2 * (1 + std::tanh(u));
      const double want = double(act * b.values[i]);
      const float got = read(out, i, dtype);
      expect(std::abs(got - want) <= allowed * (1 + std::abs(want)), "gated", isa.name, T, D, int(activation),
             int(dtype), got, want);
    }
  }

  const int R = std::min(D / 2 * 2, kMaxRotated);
  if (R == 0) return;
  // The angles' rows are R apart.
  const Rotate turn{{rotated.data(), D, 0}, c.bytes.data(), s.bytes.data(), T, 1, R, dtype, dtype};
  rotate(isa, turn, 3);
  for (int64_t t = 0; t < T; ++t) {
    for (int d = 0; d < D; ++d) {
      const int half = R / 2;
      double want = a.values[t * D + d];
      if (d < R) {
        const float other = d < half ? -a.values[t * D + d + half] : a.values[t * D + d - half];
        want = want * c.values[t * R + d] + double(other) * s.values[t * R + d];
      }
      const float got = read(rotated, t * D + d, dtype);
      expect(std::abs(got - want) <= allowed * (1 + std::abs(want)), "rotate", isa.name, T, D, R, int(dtype), got,
             want);
    }
  }
}

}  // namespace

int main() {
  int levels = 0;
  for (const Isa* isa : {&kAvx512Bf16, &kAvx512, &kAvx2, &kPortable}) {
    if (!isa->offered()) continue;
    ++levels;
    for (const Dtype dtype : {Dtype::kFloat32, Dtype::kBfloat16, Dtype::kFloat16}) {
      // One of everything; blocks of tokens, groups of 6 rows and chunks of 96 from below, at and above; odd widths.
      for (const int64_t S : {1, 15, 65}) {
        for (const int64_t D : {1, 2, 33, 260}) {
          for (const int64_t V : {1, 6, 7, 97, 211}) check(*isa, S, D, V, dtype, (S + D + V) % 2 == 0);
        }
      }
      check(*isa, 3, 8, 2049, dtype, true);
      check(*isa, 3, 8, 4099, dtype, false);
      check_attention(*isa, 1, 2, 1, 8, 8, 0, dtype);
      check_attention(*isa, 65, 3, 3, 33, 20, 0, dtype);
      check_attention(*isa, 131, 4, 2, 64, 64, 7, dtype);
      check_attention(*isa, 200, 2, 1, 16, 40, 0, dtype);
      check_attention(*isa, 200, 2, 1, 16, 40, 9, dtype, 3);
      std::mt19937 random(7);
      for (const int D : {1, 15, 16, 33, 576}) check_elementwise(*isa, 9, D, dtype, random);
    }
  }
  std::printf("%d levels, %d failures\n", levels, failures);
  return failures == 0 ? 0 : 1;
}
