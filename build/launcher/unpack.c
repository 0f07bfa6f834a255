/* Unpacks the program into a new folder, which gets its name once it is whole. */

#include "program.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "zstd.h"

#define CHUNK_BYTES (1 << 20)
#define TRIES 100

struct stream {
    ZSTD_DCtx *context;
    ZSTD_inBuffer in;
    size_t left; /* 0 at the end of the frame, whose checksum is right then */
    unsigned char *chunk;
};

/* Reads `size` bytes into `chunk`; -1 and EBADMSG if there are not so many. */
static int take(struct stream *stream, size_t size) {
    ZSTD_outBuffer out = {stream->chunk, size, 0};
    do {
        size_t before = out.pos + stream->in.pos;
        stream->left = ZSTD_decompressStream(stream->context, &out, &stream->in);
        if (ZSTD_isError(stream->left) || (out.pos < size && out.pos + stream->in.pos == before))
            return errno = EBADMSG, -1;
    } while (out.pos < size);
    return 0;
}

static int write_file(int folder, struct stream *stream, const struct entry *entry) {
    static const struct timespec times[2] = {{0, UTIME_NOW}, {WRITTEN, 0}};
    int mode = entry->kind == 'x' ? 0500 : 0400;
    int file = openat(folder, entry->name, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, mode);
    if (file < 0)
        return -1;
    for (uint64_t left = entry->size, size; left; left -= size) {
        size = left < CHUNK_BYTES ? left : CHUNK_BYTES;
        if (take(stream, size))
            return close(file), errno = EBADMSG, -1;
        for (size_t done = 0; done < size;) {
            ssize_t written = write(file, stream->chunk + done, size - done);
            if (written < 0 && errno != EINTR)
                return close(file), -1;
            done += written > 0 ? written : 0;
        }
    }
    int failed = futimens(file, times);
    return close(file) || failed ? -1 : 0;
}

static int write_entry(int folder, struct stream *stream, const struct entry *entry) {
    if (entry->kind == 'd')
        return mkdirat(folder, entry->name, 0700);
    if (entry->kind != 'l')
        return write_file(folder, stream, entry);
    if (entry->size >= PATH_MAX || take(stream, entry->size))
        return errno = EBADMSG, -1;
    stream->chunk[entry->size] = 0;
    return symlinkat((char *)stream->chunk, folder, entry->name);
}

static int write_all(const struct program *program, int folder) {
    struct stream stream = {ZSTD_createDCtx(), {program->packed, program->packed_bytes, 0}, 1,
                            malloc(CHUNK_BYTES + 1)};
    struct entry entry;
    const unsigned char *at = program->table;
    int failed = 0;
    if (!stream.context || !stream.chunk)
        fail("there is not enough memory.");
    while (!failed && next_entry(program, &at, &entry))
        failed = write_entry(folder, &stream, &entry);
    if (!failed && stream.left)
        failed = take(&stream, 0) || stream.left ? (errno = EBADMSG, -1) : 0;
    ZSTD_freeDCtx(stream.context);
    free(stream.chunk);
    return failed;
}

/* Removes what `write_all` has written, and the folder. */
static void remove_all(const struct program *program, int place, int folder, const char *name) {
    struct entry entry;
    const unsigned char *at = program->table;
    while (next_entry(program, &at, &entry))
        unlinkat(folder, entry.name, 0);
    for (int more = 1; more;) { /* folders are listed before those in them */
        more = 0;
        for (at = program->table; next_entry(program, &at, &entry);)
            if (entry.kind == 'd' && !unlinkat(folder, entry.name, AT_REMOVEDIR))
                more = 1;
    }
    unlinkat(place, name, AT_REMOVEDIR);
}

static void other_name(char *name, const char *beginning) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    sprintf(name, "%s%d-%lx", beginning, getpid(), (unsigned long)now.tv_nsec);
}

/* Gives the new folder its name.  Another process may have been faster, whose folder is as good;
 * one that is damaged is moved aside.  The folder that has the name, locked, else -1. */
static int give_name(const struct program *program, int place, int folder, const char *name) {
    char aside[64];
    for (int tries = 0; tries < TRIES; tries++) {
        if (!renameat(place, name, place, program->folder))
            return flock(folder, LOCK_SH), folder;
        if (errno != EEXIST && errno != ENOTEMPTY)
            return -1;
        int theirs = open_unpacked(program, place);
        if (theirs >= 0) {
            remove_all(program, place, folder, name);
            close(folder);
            return theirs;
        }
        other_name(aside, ".old-");
        renameat(place, program->folder, place, aside);
    }
    errno = EBUSY;
    return -1;
}

int unpack(const struct program *program, int place) {
    char name[64];
    other_name(name, ".new-");
    if (mkdirat(place, name, 0700))
        return -1;
    int folder = openat(place, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW);
    if (folder < 0)
        return -1;
    flock(folder, LOCK_EX | LOCK_NB); /* one that nobody holds was left behind */
    int named = write_all(program, folder) ? -1 : give_name(program, place, folder, name);
    if (named < 0) {
        int reason = errno;
        remove_all(program, place, folder, name);
        close(folder);
        errno = reason;
    }
    return named;
}
