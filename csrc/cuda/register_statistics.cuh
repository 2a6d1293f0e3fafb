// Statistics of a row that has been brought to shared memory: it is read there once more, before registers hold it, so
// that statistics take none from the loss.
#pragma once

#include "cuda/register_words.cuh"
#include "cuda/statistics_output.cuh"

namespace fused_losses::cuda {

// A part of a row (statistics_output.cuh). Words, Place: see register_words.cuh.
template <class Words, class Place>
class PartOfWords {
    using Access = typename Words::OneAccess;

    struct AccessPlace {
        const Place& of;
        const int k;
        static constexpr int left = 1;

        FL_DEVICE auto from() const { return of.from() + k * of.step(); }
        FL_DEVICE int first() const { return Words::class_of(of, k * Words::kNumbers); }
        static FL_DEVICE int step() { return 1; }
        static FL_DEVICE int extra() { return -1; }
        static FL_DEVICE void has_been_read() {}
    };

public:
    FL_DEVICE explicit PartOfWords(const Place& p) : place(p) {}

    FL_DEVICE float logit_of(int cls) const { return to_acc(place.logits()[cls]); }

    FL_DEVICE float largest_but(int cls) const {
        float top = Words::kLowest;
        each_access([&](Access& access, const AccessPlace& at) {
            float beside = Words::kLowest;
            access.set_apart(beside, cls, at);
            top = std::fmax(top, access.largest());
        });
        const int beside = place.exists ? place.extra() : -1;
        return beside < 0 || beside == cls ? top : std::fmax(top, logit_of(beside));
    }

    template <class Body>
    FL_DEVICE void each(Body body) const {
        each_access([&](const Access& access, const AccessPlace& at) {
            float z[Access::kHeld];
            access.widen(z);
            body(z, at.first());
        });
        const int beside = place.exists ? place.extra() : -1;
        if (beside < 0) return;
        const float only[] = {logit_of(beside)};
        body(only, beside);
    }

private:
    template <class Body>
    FL_DEVICE void each_access(Body body) const {
#pragma unroll 1
        for (int k = 0; place.exists && k * place.step() < place.left; ++k) {
            const AccessPlace at{place, k};
            Access access;
            access.read(at);
            body(access, at);
        }
    }

    const Place& place;
};

}  // namespace fused_losses::cuda
