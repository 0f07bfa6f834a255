/* Functions of glibc that libraries in the executable take, for systems whose glibc lacks them.

   Where glibc has one, that is found first.  Part of the library that stands in libpython's place
   (glibc_check.c), so it is linked with nothing; older_glibc.py lists what is here. */

#define _GNU_SOURCE
#include <link.h>
#include <stddef.h>
#include <sys/syscall.h>

extern long syscall(long number, ...);

enum { HERE = -100 /* AT_FDCWD */, NOFOLLOW = 0x100 /* AT_SYMLINK_NOFOLLOW */ };

/* 2.32: that more than one thread runs is always possible, and always right. */
char __libc_single_threaded = 0;

/* 2.33: before, these were functions of the headers around __xstat and its like. */
int fstatat64(int folder, const char *path, void *found, int flags) {
  return (int)syscall(SYS_newfstatat, folder, path, found, flags);
}
int stat64(const char *path, void *found) { return fstatat64(HERE, path, found, 0); }
int lstat64(const char *path, void *found) { return fstatat64(HERE, path, found, NOFOLLOW); }
int fstat64(int file, void *found) { return (int)syscall(SYS_fstat, file, found); }
int stat(const char *path, void *found) { return stat64(path, found); }
int lstat(const char *path, void *found) { return lstat64(path, found); }
int fstat(int file, void *found) { return fstat64(file, found); }
int mknodat(int folder, const char *path, unsigned mode, unsigned long device) {
  return (int)syscall(SYS_mknodat, folder, path, mode, device);
}
int mknod(const char *path, unsigned mode, unsigned long device) {
  return mknodat(HERE, path, mode, device);
}

/* 2.34: a kernel without it says so, and Python closes files one after another. */
int close_range(unsigned first, unsigned last, int flags) {
  return (int)syscall(436, first, last, flags);
}

/* 2.35: which library a function is in, and where what unwinds its stack is. */
struct place { /* struct dl_find_object */
  unsigned long long flags;
  char *start, *end;
  void *library, *eh_frame;
  unsigned long long reserved[7];
};
struct search {
  const char *address;
  struct place *place;
};

static int look(struct dl_phdr_info *library, size_t size, void *data) {
  struct search *search = data;
  char *base = (char *)library->dlpi_addr, *start = 0, *end = 0, *eh_frame = 0;
  (void)size;
  for (int at = 0; at < library->dlpi_phnum; at++) {
    const ElfW(Phdr) *part = &library->dlpi_phdr[at];
    char *from = base + part->p_vaddr, *to = from + part->p_memsz;
    if (part->p_type == PT_GNU_EH_FRAME) eh_frame = from;
    if (part->p_type != PT_LOAD) continue;
    if (search->address >= from && search->address < to) start = from, end = to;
  }
  if (!start || !eh_frame) return 0;
  *search->place = (struct place){.start = start, .end = end, .eh_frame = eh_frame};
  return 1;
}

int find_object(void *address, struct place *place) __asm__("_dl_find_object");
int find_object(void *address, struct place *place) {
  struct search search = {address, place};
  return dl_iterate_phdr(look, &search) ? 0 : -1;
}

/* 2.36 */
extern long getrandom(void *data, size_t size, unsigned flags);
unsigned arc4random(void) {
  unsigned value = 0;
  while (getrandom(&value, sizeof value, 0) != sizeof value) continue;
  return value;
}
