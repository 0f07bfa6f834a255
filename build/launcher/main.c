/* The beginning of the executable: it unpacks the program once, and runs it from there.
 *
 * What follows it in the file is described in pinaivu_box/appended.py.  The program is one of these
 * (build/program.py makes it):
 *
 *     the length of the table (u32)
 *     the table: for each file its kind (u8) and size (u64), its name and before that its length (u16)
 *     the contents of all files, one after another, in one zstd frame
 *
 * with kinds 'd' folder, 'f' file, 'x' program and 'l' symbolic link (its content is its target);
 * integers are little-endian.  Its folder is named by the digest that the footer has.  A folder is
 * complete before it gets that name, by one rename, and each start looks whether all files are there
 * with the size and the time that they got: whatever was changed, removed or cut off is unpacked
 * anew.  Each process that runs from a folder holds a shared lock on it, so that who removes the
 * folders of other versions (build/executable_hook.py) sees which are in use.
 */

#include "program.h"

#include <errno.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define VARIABLE "PINAIVU_LAUNCHED" /* for the hook: fresh (0 or 1), lock's descriptor, this file */
#define PROGRAM "pinaivu"

static char reasons[4096]; /* why places could not be used */

static void give_up(const char *place, const char *reason) {
    size_t used = strlen(reasons);
    snprintf(reasons + used, sizeof reasons - used, "%s%s (%s)", used ? ", " : "", place, reason);
}

/* Starts the program in the folder; returns if that is not possible. */
static void start(const struct program *program, const char *place, int fresh, int folder,
                  char **arguments) {
    char self[PATH_MAX] = "", file[PATH_MAX + 64], value[PATH_MAX + 40];
    if (readlink("/proc/self/exe", self, sizeof self - 1) < 0)
        fail("the executable cannot find itself: is /proc mounted?");
    snprintf(value, sizeof value, "%d:%d:%s", fresh, folder, self);
    snprintf(file, sizeof file, "%s/%s/%s", place, program->folder, PROGRAM);
    setenv(VARIABLE, value, 1);
    execv(file, arguments);
    unsetenv(VARIABLE);
    if (errno == ENOENT) /* the loader that the program names is not there */
        fail("this system has no glibc, which it needs: use one that has it, such as Debian 12 or "
             "Ubuntu 22.04 (Alpine has another C library).");
}

/* Runs the program from below `path`, and unpacks it first if need be; returns if that is not
 * possible. */
static void run_from(const struct program *program, const char *path, int strict,
                     char **arguments) {
    char real[PATH_MAX];
    const char *reason;
    int place = open_place(path, strict, real, &reason), fresh = 0;
    if (place < 0) {
        give_up(path, reason);
        return;
    }
    int folder = open_unpacked(program, place);
    if (folder < 0) {
        folder = unpack(program, place);
        fresh = 1;
    }
    if (folder < 0 && errno == EBADMSG)
        fail("the executable is damaged: get it again.");
    if (folder >= 0)
        start(program, real, fresh, folder, arguments);
    give_up(path, strerror(errno));
    close(folder);
    close(place);
}

int main(int count, char **arguments) {
    const char *cache = getenv("XDG_CACHE_HOME"), *home = getenv("HOME"), *tmp = getenv("TMPDIR");
    const char *shared[] = {tmp, "/tmp", "/var/tmp"};
    struct program program = {0};
    char path[PATH_MAX];
    (void)count;
    open_program(&program);
    /* In a container, all folders may be below some that anybody can write to. */
    for (int strict = 1; strict >= 0; strict--) {
        reasons[0] = path[0] = 0;
        if (cache && cache[0] == '/')
            snprintf(path, sizeof path, "%s/pinaivu", cache);
        else if (home && home[0] == '/')
            snprintf(path, sizeof path, "%s/.cache/pinaivu", home);
        if (path[0])
            run_from(&program, path, strict, arguments);
        for (int n = 0; n < 3; n++) {
            if (!shared[n] || shared[n][0] != '/')
                continue;
            snprintf(path, sizeof path, "%s/pinaivu-%u", shared[n], (unsigned)geteuid());
            run_from(&program, path, strict, arguments);
        }
    }
    fail("the executable cannot be unpacked anywhere: %s.  Set XDG_CACHE_HOME or TMPDIR to a folder "
         "of yours with 200 MB free, on a disk from which programs may run.", reasons);
}
