// What the C++ tests share: a check that says what went wrong, and random numbers that are the same everywhere.
#pragma once

#include <cstdarg>
#include <cstdint>
#include <cstdio>

namespace fused_losses_test {

inline long checks = 0, failures = 0;

// Counts the check and prints the message of the first twenty that fail.
__attribute__((format(printf, 2, 3))) inline bool check(bool ok, const char* format, ...) {
    ++checks;
    if (ok) return true;
    if (++failures > 20) return false;
    std::va_list arguments;
    va_start(arguments, format);
    std::fputs("FAILED: ", stderr);
    std::vfprintf(stderr, format, arguments);
    std::fputc('\n', stderr);
    va_end(arguments);
    return false;
}

// The exit status of main: a program that checked nothing has failed, too.
inline int report(const char* what) {
    std::printf("%s: %ld checks, %ld failures\n", what, checks, failures);
    return failures == 0 && checks > 0 ? 0 : 1;
}

// splitmix64. The distributions of <random> differ between standard libraries.
class Random {
public:
    explicit Random(std::uint64_t seed) : state(seed) {}

    std::uint64_t bits() {
        std::uint64_t z = (state += 0x9e3779b97f4a7c15u);
        z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
        z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
        return z ^ (z >> 31);
    }
    double uniform(double low, double high) { return low + (high - low) * (double(bits() >> 11) * 0x1p-53); }
    int below(int n) { return static_cast<int>(bits() % static_cast<std::uint64_t>(n)); }
    bool one_in(int n) { return below(n) == 0; }
    // Bell-shaped enough for logits: variance 1, at most 3 in magnitude.
    double bell() { return uniform(-1, 1) + uniform(-1, 1) + uniform(-1, 1); }

private:
    std::uint64_t state;
};

}  // namespace fused_losses_test
