// naive_losses.h for the Python tests (tests/naive.py), a shared library.
#include "naive_losses.h"

using namespace fused_losses_test;

extern "C" {

int naive_count() { return static_cast<int>(naive_losses().size()); }
const char* naive_name(int loss) { return naive_losses()[loss].name; }
double naive_hand_worked(int loss) { return naive_losses()[loss].hand_worked; }
double naive_at_zero(int loss) { return naive_losses()[loss].at_zero; }

// Value and gradient [classes] of one row.
double naive_row_loss(int loss, const double* params, int classes, const double* logits, int target, double* grad) {
    NaiveRow row;
    row.logits.assign(logits, logits + classes);
    row.y = target;
    const NaiveResult result = naive_row(naive_losses()[loss], params, row);
    for (int j = 0; j < classes; ++j) grad[j] = static_cast<double>(result.grad[j]);
    return static_cast<double>(result.value);
}
}
