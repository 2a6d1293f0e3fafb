// Checks that something ends its process.
#pragma once

#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdio>
#include <functional>
#include <string>

#include "check.h"

namespace fused_losses_test {

// ... with a message that holds `text`.
inline void expect_death(const std::string& text, const std::function<void()>& run) {
    int ends[2];
    if (!check(pipe(ends) == 0, "no pipe")) return;
    std::fflush(nullptr);
    const pid_t child = fork();
    if (child == 0) {
        dup2(ends[1], STDERR_FILENO);
        signal(SIGABRT, SIG_DFL);
        run();
        _exit(0);
    }
    close(ends[1]);
    std::string message;
    char part[4096];
    for (ssize_t size; (size = read(ends[0], part, sizeof part)) > 0;) message.append(part, std::size_t(size));
    close(ends[0]);
    int status = 0;
    waitpid(child, &status, 0);
    check(!WIFEXITED(status) || WEXITSTATUS(status) != 0, "what should die ended well: %s", text.c_str());
    check(message.find(text) != std::string::npos, "not the message '%s': %s", text.c_str(), message.c_str());
}

}  // namespace fused_losses_test
