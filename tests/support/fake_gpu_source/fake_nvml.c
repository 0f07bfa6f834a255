/* A libnvidia-ml.so.1 for machines without NVIDIA's driver.

FAKE_NVML="RTX 3060:12288:900,..."  name, MiB, MiB in use beside what the fake GPUs hold; or
                                    "error:CODE", which nvmlInit then returns.  Without it there is
                                    no driver.
FAKE_NVML_DRIVER, FAKE_NVML_CUDA    the driver's version (580.95.05), and the CUDA that it knows (13000)
FAKE_GPU_DIR                        see fake_gpu_memory.h */
#include "fake_gpu_memory.h"

enum { SUCCESS, UNINITIALIZED, INVALID_ARGUMENT, INSUFFICIENT_SIZE = 7, DRIVER_NOT_LOADED = 9 };

typedef struct {
    char name[96];
    unsigned long long total, used;
} gpu;
typedef struct {
    char legacy[16];
    unsigned domain, bus, device, id, subsystem;
    char text[32];
} pci;
typedef struct {
    unsigned pid;
    unsigned long long used;
    unsigned instance, compute_instance;
} process;

static gpu gpus[FAKE_GPU_MAX];
static unsigned count;
static int ready;

static int number(void * device) { return (int) ((gpu *) device - gpus); }
static int copy(char * target, unsigned size, const char * text) {
    return (unsigned) snprintf(target, size, "%s", text) < size ? SUCCESS : INSUFFICIENT_SIZE;
}

int nvmlInit_v2(void) {
    const char * wanted = getenv("FAKE_NVML");
    if (!wanted) return DRIVER_NOT_LOADED;
    int code;
    if (sscanf(wanted, "error:%d", &code) == 1) return code;
    char text[4096], *rest = NULL;
    snprintf(text, sizeof text, "%s", wanted);
    count = 0;
    for (char * one = strtok_r(text, ",", &rest); one && count < FAKE_GPU_MAX; one = strtok_r(NULL, ",", &rest)) {
        unsigned long long total = 0, used = 0;
        if (sscanf(one, "%95[^:]:%llu:%llu", gpus[count].name, &total, &used) < 2) return INVALID_ARGUMENT;
        gpus[count].total = total << 20;
        gpus[count++].used = used << 20;
    }
    ready = 1;
    return SUCCESS;
}
int nvmlInit(void) { return nvmlInit_v2(); }
int nvmlInitWithFlags(unsigned flags) { return (void) flags, nvmlInit_v2(); }
int nvmlShutdown(void) { return ready = 0, SUCCESS; }
const char * nvmlErrorString(int code) { return (void) code, "made to fail"; }

int nvmlSystemGetDriverVersion(char * target, unsigned size) {
    const char * version = getenv("FAKE_NVML_DRIVER");
    return copy(target, size, version ? version : "580.95.05");
}
int nvmlSystemGetCudaDriverVersion_v2(int * version) {
    const char * wanted = getenv("FAKE_NVML_CUDA");
    return *version = wanted ? atoi(wanted) : 13000, SUCCESS;
}
int nvmlSystemGetCudaDriverVersion(int * version) { return nvmlSystemGetCudaDriverVersion_v2(version); }

int nvmlDeviceGetCount_v2(unsigned * found) { return ready ? (*found = count, SUCCESS) : UNINITIALIZED; }
int nvmlDeviceGetHandleByIndex_v2(unsigned index, void ** device) {
    if (!ready) return UNINITIALIZED;
    if (index >= count) return INVALID_ARGUMENT;
    return *device = &gpus[index], SUCCESS;
}
int nvmlDeviceGetHandleByPciBusId_v2(const char * text, void ** device) {
    unsigned domain, bus;
    if (sscanf(text, "%x:%x", &domain, &bus) != 2 || bus < 1) return INVALID_ARGUMENT;
    return nvmlDeviceGetHandleByIndex_v2(bus - 1, device);
}
int nvmlDeviceGetIndex(void * device, unsigned * index) { return *index = (unsigned) number(device), SUCCESS; }
int nvmlDeviceGetName(void * device, char * target, unsigned size) { return copy(target, size, ((gpu *) device)->name); }
int nvmlDeviceGetUUID(void * device, char * target, unsigned size) {
    char text[32];
    snprintf(text, sizeof text, "GPU-fake-%d", number(device));
    return copy(target, size, text);
}
int nvmlDeviceGetPciInfo_v3(void * device, pci * info) {
    memset(info, 0, sizeof *info);
    info->bus = (unsigned) number(device) + 1;
    snprintf(info->legacy, sizeof info->legacy, "0000:%02x:00.0", info->bus);
    snprintf(info->text, sizeof info->text, "00000000:%02x:00.0", info->bus);
    return SUCCESS;
}

static unsigned long long used(gpu * one) {
    unsigned long long sum = one->used + (getenv("FAKE_GPU_DIR") ? fake_gpu_used(number(one)) : 0);
    return sum < one->total ? sum : one->total;
}
int nvmlDeviceGetMemoryInfo(void * device, unsigned long long * total_free_used) {
    gpu * one = device;
    total_free_used[0] = one->total;
    total_free_used[2] = used(one);
    total_free_used[1] = one->total - total_free_used[2];
    return SUCCESS;
}
int nvmlDeviceGetMemoryInfo_v2(void * device, unsigned long long * info) { /* version, total, reserved, free, used */
    gpu * one = device;
    info[1] = one->total;
    info[2] = 0;
    info[4] = used(one);
    info[3] = one->total - info[4];
    return SUCCESS;
}
int nvmlDeviceGetComputeRunningProcesses_v3(void * device, unsigned * size, process * infos) {
    fake_gpu_process found[256];
    unsigned room = *size, holding = 0;
    for (int i = fake_gpu_processes(found, 256); i-- > 0;) {
        uint64_t bytes = found[i].used[number(device)];
        if (!bytes) continue;
        if (holding < room) infos[holding] = (process){found[i].pid, bytes, ~0u, ~0u};
        holding++;
    }
    *size = holding;
    return holding > room ? INSUFFICIENT_SIZE : SUCCESS;
}
int nvmlDeviceGetGraphicsRunningProcesses_v3(void * device, unsigned * size, process * infos) {
    return (void) device, (void) infos, *size = 0, SUCCESS;
}
int nvmlDeviceGetUtilizationRates(void * device, unsigned * gpu_and_memory) {
    return (void) device, gpu_and_memory[0] = 7, gpu_and_memory[1] = 3, SUCCESS;
}
int nvmlDeviceGetTemperature(void * device, int sensor, unsigned * celsius) {
    return (void) device, (void) sensor, *celsius = 41, SUCCESS;
}
int nvmlDeviceGetPowerUsage(void * device, unsigned * milliwatts) { return (void) device, *milliwatts = 65000, SUCCESS; }
int nvmlDeviceGetEnforcedPowerLimit(void * device, unsigned * milliwatts) {
    return (void) device, *milliwatts = 170000, SUCCESS;
}
int nvmlDeviceGetCudaComputeCapability(void * device, int * major, int * minor) {
    return (void) device, *major = 8, *minor = 6, SUCCESS;
}
