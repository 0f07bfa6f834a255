/* Whether the system's glibc is new enough. */

#include "program.h"

#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

static const char *const LIBRARIES[] = {
    "/lib/x86_64-linux-gnu/libc.so.6", "/lib/aarch64-linux-gnu/libc.so.6", "/lib64/libc.so.6",
    "/usr/lib64/libc.so.6", "/usr/lib/libc.so.6", "/lib/libc.so.6"};
static const char BEGINNING[] = "GNU C Library", VERSION[] = "release version ";

/* The version that a library says it is of, in the text that it prints when it is run. */
static int read_version(const char *path, unsigned version[2]) {
    struct stat found;
    char line[200] = "", *library, *text;
    int file = open(path, O_RDONLY | O_CLOEXEC);
    if (file < 0)
        return 0;
    library = fstat(file, &found) ? MAP_FAILED
                                  : mmap(NULL, found.st_size, PROT_READ, MAP_PRIVATE, file, 0);
    close(file);
    if (library == MAP_FAILED)
        return 0;
    text = memmem(library, found.st_size, BEGINNING, sizeof BEGINNING - 1);
    if (text && library + found.st_size - text >= (ptrdiff_t)sizeof line)
        memcpy(line, text, sizeof line - 1);
    munmap(library, found.st_size);
    text = strstr(line, VERSION);
    return text && sscanf(text + sizeof VERSION - 1, "%u.%u", version, version + 1) == 2;
}

void check_glibc(const struct program *program, int required) {
    const unsigned *need = program->glibc;
    unsigned has[2];
    for (size_t n = 0; n < sizeof LIBRARIES / sizeof *LIBRARIES; n++) {
        if (!read_version(LIBRARIES[n], has))
            continue;
        if (has[0] > need[0] || (has[0] == need[0] && has[1] >= need[1]))
            return;
        fail("this system has glibc %u.%u, and %u.%u or newer is needed: use a newer system (Debian "
             "12, Ubuntu 22.04), or build it from source.", has[0], has[1], need[0], need[1]);
    }
    if (required)
        fail("this system has no glibc, which is needed in version %u.%u or newer: use a system that "
             "has it (Debian 12, Ubuntu 22.04; Alpine has another C library).", need[0], need[1]);
}
