// The ceilings of a CPU: register-only FMA in fp32, dot products of bf16, and reading memory, on all threads given.
//
//     g++ -O3 -march=native -std=c++17 -pthread probe.cpp -o probe && ./probe 2
//
// prints FLOP/s of fp32, FLOP/s of bf16 (0 where the processor has none) and bytes/s.

#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

double seconds() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

constexpr int ACCUMULATORS = 12;
volatile float sink;

#if defined(__AVX512F__)
using Vector = __m512;
Vector one() { return _mm512_set1_ps(1.0000001f); }
Vector step(Vector a, Vector b) { return _mm512_fmadd_ps(a, b, b); }
#elif defined(__AVX2__) && defined(__FMA__)
using Vector = __m256;
Vector one() { return _mm256_set1_ps(1.0000001f); }
Vector step(Vector a, Vector b) { return _mm256_fmadd_ps(a, b, b); }
#else
using Vector = float;
Vector one() { return 1.0000001f; }
Vector step(Vector a, Vector b) { return a * b + b; }
#endif

double fp32(int64_t rounds) {
  Vector b = one(), x[ACCUMULATORS];
  for (auto& v : x) v = b;
  asm volatile("" : "+x"(b));
  for (int64_t i = 0; i < rounds; ++i) {
#pragma GCC unroll 12
    for (int j = 0; j < ACCUMULATORS; ++j) x[j] = step(x[j], b);
  }
  for (auto& v : x) sink = reinterpret_cast<float*>(&v)[0];
  return 2.0 * ACCUMULATORS * (sizeof(Vector) / 4) * rounds;
}

#if defined(__AVX512BF16__)
double bf16(int64_t rounds) {
  __m512 x[ACCUMULATORS];
  __m512bh a = reinterpret_cast<__m512bh>(_mm512_set1_epi32(0x3f803f80)), b = a;
  asm volatile("" : "+v"(a), "+v"(b));
  for (auto& v : x) v = _mm512_set1_ps(0);
  for (int64_t i = 0; i < rounds; ++i) {
#pragma GCC unroll 12
    for (int j = 0; j < ACCUMULATORS; ++j) x[j] = _mm512_dpbf16_ps(x[j], a, b);
  }
  for (auto& v : x) sink = reinterpret_cast<float*>(&v)[0];
  return 4.0 * ACCUMULATORS * 16 * rounds;
}
#else
double bf16(int64_t) { return 0; }
#endif

std::vector<std::vector<float>> memory;

double read(int64_t rounds, size_t thread) {
  const auto& values = memory[thread];
  for (int64_t r = 0; r < rounds; ++r) {
    float sum[64] = {};
    for (size_t i = 0; i + 64 <= values.size(); i += 64) {
      for (int j = 0; j < 64; ++j) sum[j] += values[i + j];
    }
    sink = sum[0] + sum[17] + sum[63];
  }
  return 4.0 * values.size() * rounds;
}

// The best of several runs of `work` on all threads at once, units per second.
template <typename Work>
double best(int threads, Work work) {
  double most = 0;
  for (int run = 0; run < 5; ++run) {
    std::vector<double> done(threads);
    std::vector<std::thread> pool;
    const double start = seconds();
    for (int t = 0; t < threads; ++t) pool.emplace_back([&, t] { done[t] = work(t); });
    double total = 0;
    for (int t = 0; t < threads; ++t) {
      pool[t].join();
      total += done[t];
    }
    const double rate = total / (seconds() - start);
    if (rate > most) most = rate;
  }
  return most;
}

}  // namespace

int main(int, char** arguments) {
  const int threads = std::atoi(arguments[1]);
  memory.assign(threads, std::vector<float>((size_t{1} << 28) / threads, 1.0f));
  std::printf("%g\n", best(threads, [](int) { return fp32(60'000'000); }));
  std::printf("%g\n", best(threads, [](int) { return bf16(60'000'000); }));
  std::printf("%g\n", best(threads, [](int t) { return read(1, t); }));
}
