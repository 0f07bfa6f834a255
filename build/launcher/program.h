/* The program that the executable carries, and the folder that it is unpacked into. */

#define _GNU_SOURCE
#include <stddef.h>
#include <stdint.h>

#define WRITTEN 946684800 /* the time of each file that is unpacked: 2000-01-01 */

struct program {
    const unsigned char *table, *end, *packed;
    size_t packed_bytes;
    char folder[40]; /* its folder's name, from its digest */
};

struct entry {
    char kind; /* 'd' folder, 'f' file, 'x' program, 'l' symbolic link (its content is its target) */
    uint64_t size;
    char name[512];
};

/* Ends with a sentence. */
void fail(const char *format, ...) __attribute__((noreturn, format(printf, 1, 2)));

/* Finds the program in this file; fails if there is none. */
void open_program(struct program *program);

/* Reads the entry of the table at `*at`, and moves on; 0 at the end. */
int next_entry(const struct program *program, const unsigned char **at, struct entry *entry);

/* Opens a folder that what is unpacked may be in, and makes it and what is missing above it; `real`
 * becomes its path without symbolic links.  If it is not ours alone, -1, and `reason` says why.  If
 * `strict`, nobody else may be able to put another folder in its place either. */
int open_place(const char *path, int strict, char *real, const char **reason);

/* The unpacked program, locked, if it is whole, else -1.  The descriptor outlives the start of the
 * program, and the lock with it. */
int open_unpacked(const struct program *program, int place);

/* Unpacks the program; its folder, locked, or -1 and errno. */
int unpack(const struct program *program, int place);
