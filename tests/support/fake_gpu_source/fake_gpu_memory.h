/* The memory of the fake GPUs, which several processes share as they would that of real ones.

FAKE_GPU_DIR names a folder: a process that holds memory keeps a file there, named by its process id,
with a counter in bytes for each GPU; files of processes that have ended do not count.  The file
`others` has what other programs hold, a line `GPU MIB [PID]` each; a test may write it at any time.
Without the folder a process knows of itself alone.  A GPU's number is its place in FAKE_GPUS and in
FAKE_NVML. */
#ifndef FAKE_GPU_MEMORY_H
#define FAKE_GPU_MEMORY_H

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

enum { FAKE_GPU_MAX = 16, FAKE_GPU_PATH = 4096 };

typedef struct {
    unsigned pid;
    uint64_t used[FAKE_GPU_MAX];
} fake_gpu_process;

static uint64_t * fake_gpu_own(void) {
    static uint64_t alone[FAKE_GPU_MAX];
    static uint64_t * mine;
    if (mine) return mine;
    const char * folder = getenv("FAKE_GPU_DIR");
    if (!folder) return mine = alone;
    char path[FAKE_GPU_PATH];
    snprintf(path, sizeof path, "%s/%d", folder, (int) getpid());
    int file = open(path, O_RDWR | O_CREAT | O_TRUNC, 0600);
    size_t size = sizeof alone;
    if (file < 0 || ftruncate(file, (off_t) size)) return mine = alone;
    void * found = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    close(file);
    return mine = found == MAP_FAILED ? alone : (uint64_t *) found;
}

/* Fills `found` with those that hold memory, this process included; returns how many there are. */
static int fake_gpu_processes(fake_gpu_process * found, int limit) {
    const char * folder = getenv("FAKE_GPU_DIR");
    int count = 0;
    DIR * listing = folder ? opendir(folder) : NULL;
    if (!listing) return 0;
    for (struct dirent * entry; count < limit && (entry = readdir(listing));) {
        int pid = atoi(entry->d_name);
        if (pid <= 0 || (kill(pid, 0) && errno != EPERM)) continue;
        char path[FAKE_GPU_PATH];
        snprintf(path, sizeof path, "%s/%s", folder, entry->d_name);
        FILE * file = fopen(path, "rb");
        if (!file) continue;
        found[count].pid = (unsigned) pid;
        if (fread(found[count].used, sizeof found[count].used, 1, file) == 1) count++;
        fclose(file);
    }
    closedir(listing);
    char path[FAKE_GPU_PATH];
    snprintf(path, sizeof path, "%s/others", folder);
    FILE * others = fopen(path, "r");
    for (char line[256]; others && count < limit && fgets(line, sizeof line, others);) {
        unsigned gpu, pid = 1;
        unsigned long long mib;
        if (sscanf(line, "%u %llu %u", &gpu, &mib, &pid) < 2 || gpu >= FAKE_GPU_MAX) continue;
        memset(&found[count], 0, sizeof found[count]);
        found[count].pid = pid;
        found[count++].used[gpu] = (uint64_t) mib << 20;
    }
    if (others) fclose(others);
    return count;
}

static uint64_t fake_gpu_used(int gpu) {
    if (!getenv("FAKE_GPU_DIR")) return fake_gpu_own()[gpu];
    fake_gpu_process found[256];
    uint64_t sum = 0;
    for (int i = fake_gpu_processes(found, 256); i-- > 0;) sum += found[i].used[gpu];
    return sum;
}

#endif
