// A bit for each class of a row in words of 32, written and read a vector of classes at a time.
#pragma once

#include "cpu/vec.h"

namespace fused_losses {
inline namespace FL_ISA {

template <class A>
constexpr int kVectorsPerWord = 32 / Vec<A>::size;

// Takes the bits of vector 0, 1, ... in turn.
template <class A>
class BitWriter {
public:
    FL_HD explicit BitWriter(std::uint32_t* words) : to(words) {}

    FL_HD void add(Vec<A> nonzero) {
        word |= nonzero_bits(nonzero) << (vectors * Vec<A>::size);
        if (++vectors == kVectorsPerWord<A>) flush();
    }

    FL_HD void finish() {
        if (vectors > 0) flush();
    }

private:
    FL_HD void flush() {
        *to++ = word;
        word = 0;
        vectors = 0;
    }

    std::uint32_t* to;
    std::uint32_t word = 0;
    int vectors = 0;  // in the word
};

template <class A>
FL_HD Mask<A> bits_of_vector(const std::uint32_t* words, std::int64_t k) {
    const int shift = static_cast<int>(k % kVectorsPerWord<A>) * Vec<A>::size;
    return from_bits<A>(words[k / kVectorsPerWord<A>] >> shift);
}

}  // namespace FL_ISA
}  // namespace fused_losses
