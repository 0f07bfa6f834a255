/* Reads the program that this file carries: its place, and the table of its files. */

#include "program.h"

#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#define FOOTER_BYTES 64
#define MAX_TABLE_BYTES (1 << 20)

void fail(const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    fputs("pinaivu: ", stderr);
    vfprintf(stderr, format, arguments);
    fputc('\n', stderr);
    exit(1);
}

static uint64_t number(const unsigned char *at, int bytes) {
    uint64_t value = 0;
    while (bytes--)
        value = value << 8 | at[bytes];
    return value;
}

/* The place of the program, and its digest as the name of its folder. */
static uint64_t find(int file, uint64_t end, uint64_t *size, char *folder) {
    static const char marks[][9] = {"pnvgguf1", "pnvbknd1", "pnvprog1"};
    unsigned char footer[FOOTER_BYTES];
    while (end >= FOOTER_BYTES &&
           pread(file, footer, FOOTER_BYTES, end - FOOTER_BYTES) == FOOTER_BYTES) {
        uint64_t offset = number(footer + 8, 8), before = number(footer + 56, 8);
        int mark = 0;
        while (mark < 3 && memcmp(footer, marks[mark], 8))
            mark++;
        *size = number(footer + 16, 8);
        if (mark == 3 || offset > end || *size > end - offset || before >= end)
            break;
        if (mark == 2) {
            int at = sprintf(folder, "program-");
            for (int n = 0; n < 12; n++)
                at += sprintf(folder + at, "%02x", footer[24 + n]);
            return offset;
        }
        end = before;
    }
    fail("the executable is damaged, or not all of it is there: get it again.");
    return 0;
}

void open_program(struct program *program) {
    int file = open("/proc/self/exe", O_RDONLY | O_CLOEXEC);
    struct stat found;
    if (file < 0 || fstat(file, &found))
        fail("the executable cannot read itself (%s): is /proc mounted?", strerror(errno));
    uint64_t size, offset = find(file, found.st_size, &size, program->folder);
    uint64_t page = offset % sysconf(_SC_PAGESIZE);
    const unsigned char *start =
        mmap(NULL, size + page, PROT_READ, MAP_PRIVATE, file, offset - page);
    if (start == MAP_FAILED)
        fail("the executable cannot read itself (%s).", strerror(errno));
    start += page;
    uint64_t length = size < 4 ? 0 : number(start, 4);
    if (length == 0 || length > MAX_TABLE_BYTES || length > size - 4)
        fail("the executable is damaged: get it again.");
    program->table = start + 4;
    program->end = program->packed = start + 4 + length;
    program->packed_bytes = size - 4 - length;
    close(file);
}

/* Reads the entry at `*at`, and moves on; 0 at the end. */
int next_entry(const struct program *program, const unsigned char **at, struct entry *entry) {
    if (*at == program->end)
        return 0;
    uint64_t room = program->end - *at, length = room < 11 ? 0 : number(*at + 9, 2);
    if (length == 0 || length > room - 11 || length >= sizeof entry->name)
        fail("the executable is damaged: get it again.");
    entry->kind = **at;
    entry->size = number(*at + 1, 8);
    memcpy(entry->name, *at + 11, length);
    entry->name[length] = 0;
    *at += 11 + length;
    return 1;
}
