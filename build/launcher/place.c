/* Folders: whether what is unpacked may be in one, and whether a program in it is whole. */

#include "program.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

/* Whether only we and the system's administrator can change what is at a path. */
static int is_safe(const struct stat *found) {
    if (found->st_uid != 0 && found->st_uid != geteuid())
        return 0;
    return !(found->st_mode & 022) || (found->st_mode & S_ISVTX);
}

static int make_missing(const char *path, int strict) {
    char part[PATH_MAX];
    struct stat found;
    size_t length = strlen(path);
    if (length >= sizeof part)
        return errno = ENAMETOOLONG, -1;
    for (size_t at = 1; at <= length; at++) {
        if (path[at] != '/' && path[at] != 0)
            continue;
        memcpy(part, path, at);
        part[at] = 0;
        if (!stat(part, &found)) {
            if (strict && !is_safe(&found))
                return errno = EPERM, -1; /* before anything is made there */
        } else if (mkdir(part, 0700) && errno != EEXIST) {
            return -1;
        }
    }
    return 0;
}

static int is_below_safe_folders(const char *real) {
    char part[PATH_MAX];
    struct stat found;
    strcpy(part, real);
    for (char *slash = strrchr(part, '/'); slash; slash = strrchr(part, '/')) {
        *slash = 0;
        if (stat(*part ? part : "/", &found) || !is_safe(&found))
            return 0;
    }
    return 1;
}

int open_place(const char *path, int strict, char *real, const char **reason) {
    struct stat found;
    struct statvfs system;
    int flags = O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC;
    int folder = make_missing(path, strict) ? -1 : open(path, flags);
    if (folder < 0 || fstat(folder, &found) || !realpath(path, real)) {
        *reason = errno == EPERM ? "others can write to a folder above it" : strerror(errno);
    } else if (found.st_uid != geteuid() || (found.st_mode & 022)) {
        *reason = "others can write to it";
    } else if (strict && !is_below_safe_folders(real)) {
        *reason = "others can write to a folder above it";
    } else if (!fstatvfs(folder, &system) && (system.f_flag & ST_NOEXEC)) {
        *reason = "mounted with noexec";
    } else {
        return folder;
    }
    if (folder >= 0)
        close(folder);
    return -1;
}

static int is_there(int folder, const struct entry *entry) {
    struct stat found;
    if (fstatat(folder, entry->name, &found, AT_SYMLINK_NOFOLLOW) || found.st_uid != geteuid())
        return 0;
    if (entry->kind == 'd')
        return S_ISDIR(found.st_mode) && !(found.st_mode & 022);
    if (entry->kind == 'l')
        return S_ISLNK(found.st_mode) && (uint64_t)found.st_size == entry->size;
    return S_ISREG(found.st_mode) && (uint64_t)found.st_size == entry->size &&
           found.st_mtim.tv_sec == WRITTEN && !(found.st_mode & 022);
}

int open_unpacked(const struct program *program, int place) {
    int folder = openat(place, program->folder, O_RDONLY | O_DIRECTORY | O_NOFOLLOW);
    struct stat found;
    struct entry entry;
    const unsigned char *at = program->table;
    if (folder < 0)
        return -1;
    if (fstat(folder, &found) || found.st_uid != geteuid() || (found.st_mode & 077) ||
        (flock(folder, LOCK_SH | LOCK_NB) && errno == EWOULDBLOCK)) /* it is being removed */
        return close(folder), -1;
    while (next_entry(program, &at, &entry))
        if (!is_there(folder, &entry))
            return close(folder), -1;
    return folder;
}
