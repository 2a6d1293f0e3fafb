// One call of a Z-Error operator as plain data (2506.02154): what the entry code has checked and allocated, and what
// the CPU or CUDA driver needs. Torch-free.
//
// Every row (sample, pixel, or task of a sample) belongs to a group and has a score. Rows of a group are compared with
// the group's mean and standard deviation; those far away are dropped from the loss.
#pragma once

#include <cstdint>

#include "core/elements.h"
#include "core/row_problem.h"

namespace fused_losses {

// What a row's group and score are, and, but for the classes, its loss.
enum class Statistic : std::uint8_t {
    kClassScore,   // input: scores, or logits whose target's entry is the score; target: class
    kClassProb,    // input: minus logarithms of probabilities, which are the scores; target: class
    kBceLogit,     // input: logits; target: label 0 or 1; group: 2 task + label; score: logit
    kBceProb,      // score: sigmoid of the logit
    kMseTarget,    // input: predictions; target: numbers; one group; score: target
    kMseLoss,      // score: squared error
    kMseResidual,  // score: prediction - target
};

FL_HD bool is_class(Statistic s) { return s <= Statistic::kClassProb; }
FL_HD bool is_regression(Statistic s) { return s >= Statistic::kMseTarget; }
FL_HD bool is_binary(Statistic s) { return s == Statistic::kBceLogit || s == Statistic::kBceProb; }

// Which rows are unlikely: far from the mean on both sides, or on the low or high side only. For the binary losses the
// sides are those of label 1; label 0 is the mirror image.
enum class Tail : std::uint8_t { kBoth, kLow, kHigh };

// What a group's statistics say about its rows.
template <class T, class Mask>
struct BasicKeepInterval {
    T mean, std;  // std NaN: no statistics
    T low, high;  // kept are rows with low <= (score - mean) / std <= high
    Mask all;     // ... or all whose score is finite
};
using KeepInterval = BasicKeepInterval<double, bool>;

// Scores that the loss computes first: the rows' cross entropies without class weights.
struct EntropyScores {
    Elements logits;  // absent: the scores are given
    std::int64_t class_stride = 0;
    double label_smoothing = 0, logit_bias = 0;
    const void* logit_bias_device = nullptr;  // acc; takes the place of logit_bias
    void* scores = nullptr;                   // acc, one per row; ZProblem::input points here
};

// Rows are numbered in logical order as outer * inner + i; outputs are contiguous in that order. acc is double if
// acc_is_double, else float.
struct ZProblem {
    Statistic statistic = Statistic::kClassScore;
    bool acc_is_double = false;
    int device = -1;  // index of the CUDA device
    std::int64_t outer = 1, inner = 0, num_groups = 1;

    // Inputs
    Elements input, target;
    bool gathers = false;  // input holds logits: the score is the target's entry
    std::int64_t class_stride = 0;
    std::int64_t ignore_index = -100;  // classes
    Elements sample_weight;
    Elements values;        // classes: the rows' losses, class weights included unless row_weights is given
    Elements class_weight;  // stride.inner apart
    Elements pos_weight;    // binary: stride.inner apart, num_pos_weights of them, repeated over the tasks
    std::int64_t num_pos_weights = 1;
    EntropyScores entropy;  // classes

    // The rule
    const double* moments = nullptr;  // [3][num_groups]: count, mean, m2
    double* own_moments = nullptr;    // where not null, `moments` points here and the loss computes them first
    double thresholds[2] = {};
    Elements threshold;               // takes their place: stride.inner apart
    std::int64_t num_thresholds = 1;  // group g has threshold g % num_thresholds
    Tail tail = Tail::kBoth;
    double min_count = 2;
    bool keep_small = false;
    bool keep_all = false;  // rows of groups, whatever their scores

    // Outputs of masking
    bool* mask = nullptr;
    std::int64_t* kept_target = nullptr;  // classes: the target, ignore_index for dropped rows
    double* scores = nullptr;             // standardised; NaN for a row without a group or statistics
    // and of the loss, where Reduction::kNone fills row_values, the others loss; denominator: sum of kept weights
    Reduction reduction = Reduction::kMean;
    void* row_values = nullptr;   // acc
    void* row_weights = nullptr;  // acc; classes: each row's weight in the denominator
    void* loss = nullptr;         // acc
    void* denominator = nullptr;  // acc

    // Backward: upstream * sample_weight / denominator * slope, by mask
    Elements upstream;
    const void* divisor = nullptr;  // acc, one; null means 1
    void* grad = nullptr;           // type of input, contiguous

    FL_HD std::int64_t rows() const { return outer * inner; }
};

}  // namespace fused_losses
