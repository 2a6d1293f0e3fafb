// Finds the compiled kernel that stands for one of the host's, by its name.
#include <dlfcn.h>

#include <unordered_map>

#include "cuda_compiled/memory.h"

namespace cuda_emulation {

alignas(128) thread_local unsigned char compiled_shared[kSharedSize];

void bad_address(const char* memory, u64 at) {
    char text[100];
    std::snprintf(text, sizeof text, "no address in %s memory, or not aligned: %#llx, line %d of PTX", memory,
                  static_cast<unsigned long long>(at), line);
    die(text);
}

namespace {

std::unordered_map<std::string, Kernel>& kernels() {
    static auto& by_name = *new std::unordered_map<std::string, Kernel>;
    return by_name;
}

// By their addresses, as the table of symbols has it, in which functions of one file are, too.
std::unordered_map<const void*, Kernel> find_all() {
    Dl_info me{};
    dladdr(reinterpret_cast<const void*>(&bad_address), &me);
    const std::string command = std::string(FL_NM " --defined-only '") + me.dli_fname + "'";
    FILE* const symbols = popen(command.c_str(), "r");
    std::unordered_map<const void*, Kernel> found;
    char text[4096], name[4096];
    unsigned long long value = 0;
    while (symbols && std::fgets(text, sizeof text, symbols)) {
        if (std::sscanf(text, "%llx %*c %4095s", &value, name) != 2) continue;
        if (const auto kernel = kernels().find(name); kernel != kernels().end())
            found[static_cast<char*>(me.dli_fbase) + value] = kernel->second;
    }
    if (symbols) pclose(symbols);
    return found;
}

Kernel find(const void* host) {
    static const auto& all = *new std::unordered_map<const void*, Kernel>(find_all());
    const auto found = all.find(host);
    if (found == all.end()) die("a kernel that was not compiled");
    return found->second;
}

const bool is_set = (compiled_kernel = &find, ptx_version = FL_ARCHITECTURE,
                     largest_cluster = FL_ARCHITECTURE >= 90 ? largest_cluster : 1, true);

}  // namespace

CompiledKernel::CompiledKernel(const char* name, Kernel kernel) { kernels().emplace(name, kernel); }

}  // namespace cuda_emulation
