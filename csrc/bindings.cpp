// fused_losses._C: what this build is. It links no torch, so it imports under any torch and can say which one
// is needed.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "losses/names.h"
#include "losses/needs.h"
#include "losses/stats_count.h"

namespace py = pybind11;

namespace {

std::vector<std::string> split_at_commas(const std::string& text) {
    std::vector<std::string> parts;
    std::istringstream stream(text);
    for (std::string part; std::getline(stream, part, ',');) parts.push_back(part);
    return parts;
}

// The FL_* strings are compile definitions set by CMakeLists.txt.
py::dict build_info() {
    py::dict info;
    info["version"] = FL_VERSION;
    info["torch"] = FL_TORCH_VERSION;
    info["torch_minimum"] = FL_TORCH_MINIMUM;
#ifdef FL_CUDA_VERSION
    info["cuda"] = FL_CUDA_VERSION;
    info["cuda_architectures"] = split_at_commas(FL_CUDA_ARCHITECTURES);
#else
    info["cuda"] = py::none();
    info["cuda_architectures"] = py::list();
#endif
    info["compiler"] = FL_COMPILER;
    info["isa"] = split_at_commas(FL_ISA_NAMES);
    info["build_type"] = FL_BUILD_TYPE;
    return info;
}

template <class Losses>
int find_loss(Losses among, const std::string& loss) {
    const int index = fused_losses::index_of(among, loss);
    if (index < 0) throw std::invalid_argument("loss must be one of the names in loss_names(), got '" + loss + "'");
    return index;
}

py::dict loss_needs(const std::string& loss) {
    const fused_losses::LossNeeds needs = fused_losses::needs_of(find_loss(fused_losses::AllLosses{}, loss));
    py::dict result;
    result["num_params"] = needs.num_params;
    result["min_classes"] = needs.min_classes;
    result["has_margin"] = needs.has_margin;
    return result;
}

int stats_count(const std::string& loss, const std::vector<double>& params, bool soft_target) {
    using namespace fused_losses;
    const int index = find_loss(CompiledLosses{}, loss);
    const std::size_t expected = needs_of(index).num_params;
    if (params.size() != expected)
        throw std::invalid_argument(loss + ": params must hold " + std::to_string(expected) + " numbers, got " +
                                    std::to_string(params.size()));
    return stats_count_of(index, class_factors_of(index, params.data(), soft_target));
}

std::int64_t most_classes_without_stats(const std::string& loss) {
    return fused_losses::most_classes_without_stats(find_loss(fused_losses::CompiledLosses{}, loss));
}

}  // namespace

PYBIND11_MODULE(_C, m) {
    m.def("build_info", &build_info, "How this copy of fused_losses was built.");
    m.def("loss_names", &fused_losses::loss_names, "Names of the losses compiled into the operator library.");
    m.def("loss_needs", &loss_needs, py::arg("loss"), "What a loss asks of its arguments.");
    m.def("stats_count", &stats_count, py::arg("loss"), py::arg("params"), py::arg("soft_target"),
          "Numbers per row that row_loss_with_stats leaves for the gradient.");
    m.def("most_classes_without_stats", &most_classes_without_stats, py::arg("loss"),
          "It leaves none on CUDA for rows of up to so many classes, but of float64.");
}
