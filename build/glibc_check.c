/* Stands in the executable where its loader looks for libpython, and opens the real one.

   On a system whose glibc is too old the real one cannot be opened, and the loader shows what the
   dynamic linker says, which few understand.  This library can be opened everywhere: it is linked
   with nothing, and takes what it calls of whatever the process has.  Built by glibc_check.py. */

extern const char *gnu_get_libc_version(void);
extern void *dlopen(const char *path, int flags);
extern void *dlsym(void *library, const char *name);
extern const char *dlerror(void);
extern int dladdr(const void *address, void *info);
extern long write(int file, const void *data, unsigned long size);
extern void _exit(int status) __attribute__((noreturn));

enum { PATH_BYTES = 4096, RTLD_NOW_GLOBAL = 0x102, RTLD_NOLOAD = 4 };

/* FUNCTIONS(F) is F(0, "NAME") F(1, "NAME") ...: what the loader calls.  A call jumps on. */
#define NAME(number, name) name,
static const char *const names[] = {FUNCTIONS(NAME)};
enum { COUNT = sizeof names / sizeof *names };
__attribute__((visibility("hidden"))) void *python_functions[COUNT];

#if defined(__x86_64__)
#define JUMP(number) "endbr64\n jmp *python_functions+8*" #number "(%rip)\n"
#elif defined(__aarch64__)
#define JUMP(number)                                                                               \
  "hint #34\n adrp x16, python_functions+8*" #number "\n"                                          \
  "ldr x16, [x16, #:lo12:python_functions+8*" #number "]\n br x16\n"
#else
#error "write down here how this processor jumps"
#endif
#define DEFINE(number, name)                                                                       \
  __asm__(".text\n .globl " name "\n .type " name ", %function\n" name ":\n" JUMP(number));
FUNCTIONS(DEFINE)

static void say(const char *text) {
  unsigned long size = 0;
  while (text[size]) size++;
  if (write(2, text, size) < 0) _exit(1);
}

static int number(const char **text) {
  int value = 0;
  while (**text >= '0' && **text <= '9') value = value * 10 + *(*text)++ - '0';
  return value;
}

static void check(void) {
  const char *version = gnu_get_libc_version(), *rest = version;
  int major = number(&rest);
  int minor = *rest == '.' ? (rest++, number(&rest)) : 0;
  if (major == 2 && minor < 34) { /* which has put them into libc */
    dlopen("librt.so.1", RTLD_NOW_GLOBAL);
    dlopen("libutil.so.1", RTLD_NOW_GLOBAL);
  }
  if (major > NEEDED_MAJOR || (major == NEEDED_MAJOR && minor >= NEEDED_MINOR)) return;
  say("pinaivu: this system has glibc ");
  say(version);
  say(", and this program needs glibc " NEEDED " or newer: run it on a newer system, or build it "
      "on this one (build/binary).\n");
  _exit(1);
}

static void *open_python(void) {
  static char path[PATH_BYTES];
  struct { const char *file; void *rest[3]; } here;
  int end = 0;
  if (!dladdr(names, &here)) return 0;
  for (int at = 0; here.file[at]; at++) {
    if (at + sizeof PYTHON >= PATH_BYTES) return 0;
    path[at] = here.file[at];
    if (path[at] == '/') end = at + 1;
  }
  /* Python finds what is here: older systems do not show it to others before it is initialised. */
  dlopen(here.file, RTLD_NOW_GLOBAL | RTLD_NOLOAD);
  for (unsigned at = 0; at < sizeof PYTHON; at++) path[end + at] = PYTHON[at];
  return dlopen(path, RTLD_NOW_GLOBAL);
}

__attribute__((constructor)) static void begin(void) {
  check();
  void *python = open_python();
  for (int at = 0; python && at < COUNT; at++) {
    python_functions[at] = dlsym(python, names[at]);
    if (!python_functions[at]) python = 0;
  }
  if (python) return;
  const char *error = dlerror();
  say("pinaivu: Python cannot be loaded: ");
  say(error ? error : "its path is too long");
  say("\n");
  _exit(1);
}
