// Arguments and results of an operator as torch hands them over: 64 bits each, in the order of the schema.
#pragma once

#include <array>
#include <bit>
#include <cstddef>
#include <string>
#include <vector>

#include "ops/tensor.h"

namespace fused_losses {

// A `float[]`: how many were given, and the first of them.
struct Numbers {
    std::array<double, 8> values{};
    std::size_t count = 0;
};

// A `Tensor` that takes the place of a `Tensor?`.
struct Required {
    OptionalTensor& tensor;
};

// torch gives its arguments away: one that is not read is never freed.
class Arguments {
public:
    explicit Arguments(const StableIValue* first) : next(first) {}

    template <class... Fields>
    void read(Fields&&... fields) {
        (take(fields), ...);
    }

private:
    template <class T>
    T pop() {
        return torch::stable::detail::to<T>(*next++);
    }

    void take(std::int64_t& x) { x = pop<std::int64_t>(); }
    void take(double& x) { x = pop<double>(); }
    void take(bool& x) { x = pop<bool>(); }
    void take(Tensor& t) { t = Tensor(pop<AtenTensorHandle>()); }
    void take(const Required& required) { required.tensor.emplace(pop<AtenTensorHandle>()); }

    void take(OptionalTensor& t) {
        StableIValue* const present = pop<StableIValue*>();
        if (!present) return;
        const auto handle = torch::stable::detail::to<AtenTensorHandle>(*present);
        delete present;
        t.emplace(handle);
    }

    // Not torch's own conversion to std::string, which leaks.
    void take(std::string& text) {
        const auto handle = pop<StringHandle>();
        std::size_t length = 0;
        const char* data = nullptr;
        check_torch(torch_string_length(handle, &length), "read a string");
        check_torch(torch_string_c_str(handle, &data), "read a string");
        text.assign(data, length);
        check_torch(torch_delete_string(handle), "delete a string");
    }

    void take(std::vector<Tensor>& tensors) {
        const auto list = pop<StableListHandle>();
        std::size_t count = 0;
        check_torch(torch_list_size(list, &count), "read a list");
        for (std::size_t i = 0; i < count; ++i) {
            StableIValue item = 0;
            check_torch(torch_list_get_item(list, i, &item), "read a list");
            tensors.emplace_back(torch::stable::detail::to<AtenTensorHandle>(item));
        }
        check_torch(torch_delete_list(list), "delete a list");
    }

    void take(Numbers& numbers) {
        const auto list = pop<StableListHandle>();
        check_torch(torch_list_size(list, &numbers.count), "read a list");
        for (std::size_t i = 0; i < std::min(numbers.count, numbers.values.size()); ++i) {
            StableIValue item = 0;
            check_torch(torch_list_get_item(list, i, &item), "read a list");
            numbers.values[i] = torch::stable::detail::to<double>(item);
        }
        check_torch(torch_delete_list(list), "delete a list");
    }

    const StableIValue* next;
};

// Hands tensors over to torch, once the arguments have been read from the same place.
class Results {
public:
    explicit Results(StableIValue* first) : next(first) {}

    template <class... Tensors>
    void push(Tensors&&... tensors) {
        ((*next++ = torch::stable::detail::from(tensors.release())), ...);
    }

private:
    StableIValue* next;
};

}  // namespace fused_losses
