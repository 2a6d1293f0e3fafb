// Memory of the kernels' own, which stays from call to call, is for one stream: its launches follow each other.
#pragma once

#include <map>
#include <mutex>
#include <optional>

#include "cuda/current_device.h"
#include "cuda/launch.h"

namespace fused_losses::cuda {

// The number of the current stream among those in use, below kTickets. None for what is captured, since graphs may run
// in several streams at once, nor for more streams than that.
inline std::optional<int> number_of_stream(const DeviceScope& device) {
    cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    unsigned long long id = 0;  // unlike the handle never used again
    const cudaStream_t stream = device.stream();
    if (cudaStreamIsCapturing(stream, &status) != cudaSuccess || status != cudaStreamCaptureStatusNone) return {};
    if (cudaStreamGetId(stream, &id) != cudaSuccess) return {};
    static std::mutex mutex;
    static auto& numbers = *new std::map<std::pair<int, unsigned long long>, int>;  // threads may outlive statics
    const std::lock_guard lock(mutex);
    const std::pair key(device.index(), id);
    if (const auto found = numbers.find(key); found != numbers.end()) return found->second;
    if (numbers.size() == kTickets) return {};
    return numbers.emplace(key, static_cast<int>(numbers.size())).first->second;
}

}  // namespace fused_losses::cuda
