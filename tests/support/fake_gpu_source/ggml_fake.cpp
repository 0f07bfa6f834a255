// A GPU backend of ggml for machines without a GPU: devices that have a bounded memory of their own,
// count what is in it, refuse what does not fit, and compute on the CPU backend.
//
// FAKE_GPUS="CUDA0:512,CUDA1:256"  names and MiB; without it there are no devices
// CUDA_VISIBLE_DEVICES="1"         as CUDA reads it: those only, in that order, named anew
// GGML_CUDA_DEVICES="2"            as ggml's CUDA backend reads it: so many devices, made of those in turn
// FAKE_GPU_FAIL="CUDA1:HOW:AFTER"  after AFTER graphs (0) a graph fails: HOW is `fail` (an error of
//                                  the device), `memory` (no memory) or `abort` (as CUDA itself does
//                                  with either); several are separated by commas.  The file `fail` in
//                                  FAKE_GPU_DIR has the same text, and is read for each graph.
// FAKE_GPU_DIR=/a/folder           see fake_gpu_memory.h
#include "fake_gpu_memory.h"
#include "ggml_abi.h"

#include <memory>
#include <mutex>
#include <string>
#include <vector>

namespace {

struct Device {
    std::string name, description, pci;
    int gpu;  // its place in FAKE_GPUS
    size_t total;
    long graphs = 0;
    ggml_backend_buffer_type buffer_type;
    ggml_backend_device device;
};

std::vector<std::unique_ptr<Device>> devices;
ggml_backend_reg registry;
std::mutex counting;

Device * of(ggml_backend_dev_t device) { return static_cast<Device *>(device->context); }

std::vector<std::string> split(const std::string & text, char separator) {
    std::vector<std::string> parts;
    for (size_t start = 0; start <= text.size();) {
        size_t end = std::min(text.find(separator, start), text.size());
        parts.push_back(text.substr(start, end - start));
        start = end + 1;
    }
    return parts;
}

std::string variable(const char * name) {
    const char * value = getenv(name);
    return value ? value : "";
}

// -- buffers --------------------------------------------------------------------------------------

struct Memory {
    void * data;
    Device * device;
};

Memory * memory_of(ggml_backend_buffer_t buffer) { return static_cast<Memory *>(buffer->context); }

void free_buffer(ggml_backend_buffer_t buffer) {
    Memory * memory = memory_of(buffer);
    std::lock_guard<std::mutex> guard(counting);
    fake_gpu_own()[memory->device->gpu] -= buffer->size;
    free(memory->data);
    delete memory;
}

void * base(ggml_backend_buffer_t buffer) { return memory_of(buffer)->data; }

void memset_tensor(ggml_backend_buffer_t, ggml_tensor * tensor, uint8_t value, size_t at, size_t n) {
    memset(static_cast<char *>(tensor->data) + at, value, n);
}

void set_tensor(ggml_backend_buffer_t, ggml_tensor * tensor, const void * data, size_t at, size_t n) {
    memcpy(static_cast<char *>(tensor->data) + at, data, n);
}

void get_tensor(ggml_backend_buffer_t, const ggml_tensor * tensor, void * data, size_t at, size_t n) {
    memcpy(data, static_cast<const char *>(tensor->data) + at, n);
}

void clear(ggml_backend_buffer_t buffer, uint8_t value) { memset(base(buffer), value, buffer->size); }

const char * buffer_name(ggml_backend_buffer_type_t type) {
    return static_cast<Device *>(type->context)->name.c_str();
}

ggml_backend_buffer_t allocate(ggml_backend_buffer_type_t type, size_t size) {
    auto * device = static_cast<Device *>(type->context);
    std::lock_guard<std::mutex> guard(counting);
    uint64_t * own = &fake_gpu_own()[device->gpu];
    uint64_t used = fake_gpu_used(device->gpu);
    void * data = nullptr;
    if (used + size > device->total) {
        fprintf(stderr, "%s: out of memory: %zu MiB wanted, %zu of %zu MiB used\n", device->name.c_str(),
                size >> 20, static_cast<size_t>(used >> 20), device->total >> 20);
        return nullptr;
    }
    if (posix_memalign(&data, 128, size ? size : 128)) return nullptr;
    *own += size;
    ggml_backend_buffer_i functions = {};
    functions.free_buffer = free_buffer;
    functions.get_base = base;
    functions.memset_tensor = memset_tensor;
    functions.set_tensor = set_tensor;
    functions.get_tensor = get_tensor;
    functions.clear = clear;
    return ggml_backend_buffer_init(type, functions, new Memory{data, device}, size);
}

size_t alignment(ggml_backend_buffer_type_t) { return 128; }

// -- computing ------------------------------------------------------------------------------------

struct Stream {
    Device * device;
    ggml_backend_t cpu;
};

std::string failures() {
    std::string folder = variable("FAKE_GPU_DIR"), text = variable("FAKE_GPU_FAIL");
    FILE * file = folder.empty() ? nullptr : fopen((folder + "/fail").c_str(), "r");
    char line[256] = "";
    if (file && fgets(line, sizeof line, file)) {
        text += "," + std::string(line, strcspn(line, "\n"));
    }
    if (file) fclose(file);
    return text;
}

// GGML_STATUS_SUCCESS if the device is to work.
ggml_status failure(Device * device) {
    long number = device->graphs++;
    for (const std::string & one : split(failures(), ',')) {
        std::vector<std::string> parts = split(one, ':');
        if (parts[0] != device->name) continue;
        std::string how = parts.size() > 1 ? parts[1] : "fail";
        if (number < (parts.size() > 2 ? atol(parts[2].c_str()) : 0)) continue;
        fprintf(stderr, "%s: made to fail: %s\n", device->name.c_str(), how.c_str());
        if (how == "abort") abort();
        return how == "memory" ? GGML_STATUS_ALLOC_FAILED : GGML_STATUS_FAILED;
    }
    return GGML_STATUS_SUCCESS;
}

const char * stream_name(ggml_backend_t backend) {
    return static_cast<Stream *>(backend->context)->device->name.c_str();
}

void free_stream(ggml_backend_t backend) {
    auto * stream = static_cast<Stream *>(backend->context);
    ggml_backend_free(stream->cpu);
    delete stream;
    delete backend;
}

ggml_status compute(ggml_backend_t backend, ggml_cgraph * graph) {
    auto * stream = static_cast<Stream *>(backend->context);
    ggml_status failed = failure(stream->device);
    return failed != GGML_STATUS_SUCCESS ? failed : ggml_backend_graph_compute(stream->cpu, graph);
}

// -- the device -----------------------------------------------------------------------------------

const char * device_name(ggml_backend_dev_t device) { return of(device)->name.c_str(); }
const char * description(ggml_backend_dev_t device) { return of(device)->description.c_str(); }

void device_memory(ggml_backend_dev_t device, size_t * available, size_t * total) {
    size_t used = fake_gpu_used(of(device)->gpu);
    *total = of(device)->total;
    *available = used > *total ? 0 : *total - used;
}

enum ggml_backend_dev_type type(ggml_backend_dev_t) { return GGML_BACKEND_DEVICE_TYPE_GPU; }

void properties(ggml_backend_dev_t device, ggml_backend_dev_props * props) {
    memset(props, 0, sizeof *props);
    props->name = device_name(device);
    props->description = description(device);
    props->type = type(device);
    props->device_id = of(device)->pci.c_str();
    device_memory(device, &props->memory_free, &props->memory_total);
}

ggml_backend_dev_t cpu() { return ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU); }

ggml_backend_t new_stream(ggml_backend_dev_t device, const char *) {
    ggml_backend_t computing = cpu() ? ggml_backend_dev_init(cpu(), nullptr) : nullptr;
    if (!computing) return nullptr;
    static ggml_guid identity = {0xfa, 0x4e, 0x67, 0x70};
    ggml_backend_i functions = {};
    functions.get_name = stream_name;
    functions.free = free_stream;
    functions.graph_compute = compute;
    return new ggml_backend{&identity, functions, device, new Stream{of(device), computing}};
}

ggml_backend_buffer_type_t buffer_type(ggml_backend_dev_t device) { return &of(device)->buffer_type; }

bool supports(ggml_backend_dev_t, const ggml_tensor * operation) {
    return cpu() && ggml_backend_dev_supports_op(cpu(), operation);
}

bool supports_buffers(ggml_backend_dev_t device, ggml_backend_buffer_type_t buffers) {
    return buffers == &of(device)->buffer_type;
}

// -- the registry ---------------------------------------------------------------------------------

// The places in FAKE_GPUS of those that CUDA would show; CUDA stops at the first that it lacks.
std::vector<int> visible(int count) {
    std::vector<int> places;
    const char * wanted = getenv("CUDA_VISIBLE_DEVICES");
    for (int place = 0; !wanted && place < count; place++) places.push_back(place);
    if (!wanted || !*wanted) return places;
    for (const std::string & one : split(wanted, ',')) {
        const std::string prefix = "GPU-fake-";
        bool named = one.compare(0, prefix.size(), prefix) == 0;
        const char * digits = one.c_str() + (named ? prefix.size() : 0);
        char * end = nullptr;
        long place = strtol(digits, &end, 10);
        if (end == digits || *end || place < 0 || place >= count) break;
        places.push_back(static_cast<int>(place));
    }
    return places;
}

void add_device(const std::string & specification, int gpu, const std::string & visible_name) {
    size_t colon = specification.find(':');
    auto device = std::make_unique<Device>();
    device->name = visible_name.empty() ? specification.substr(0, colon) : visible_name;
    device->description = "Fake GPU";
    device->gpu = gpu;
    device->total = colon == std::string::npos ? 0 : strtoull(specification.c_str() + colon + 1, nullptr, 10) << 20;
    char pci[16];
    snprintf(pci, sizeof pci, "0000:%02x:00.0", gpu + 1);
    device->pci = pci;
    ggml_backend_buffer_type_i buffers = {};
    buffers.get_name = buffer_name;
    buffers.alloc_buffer = allocate;
    buffers.get_alignment = alignment;
    device->buffer_type = {buffers, &device->device, device.get()};
    ggml_backend_device_i functions = {};
    functions.get_name = device_name;
    functions.get_description = description;
    functions.get_memory = device_memory;
    functions.get_type = type;
    functions.get_props = properties;
    functions.init_backend = new_stream;
    functions.get_buffer_type = buffer_type;
    functions.supports_op = supports;
    functions.supports_buft = supports_buffers;
    device->device = {functions, &registry, device.get()};
    devices.push_back(std::move(device));
}

const char * registry_name(ggml_backend_reg_t) { return "CUDA"; }
size_t device_count(ggml_backend_reg_t) { return devices.size(); }
ggml_backend_dev_t device_at(ggml_backend_reg_t, size_t index) { return &devices[index]->device; }

// llama.cpp gives every backend that has this function the number of threads that it was given.
void set_threads(ggml_backend_t backend, int threads) {
    auto * stream = static_cast<Stream *>(backend->context);
    ggml_backend_reg_t registry_of_cpu = ggml_backend_dev_backend_reg(cpu());
    auto set = reinterpret_cast<ggml_backend_set_n_threads_t>(
        ggml_backend_reg_get_proc_address(registry_of_cpu, "ggml_backend_set_n_threads"));
    if (set) set(stream->cpu, threads);
}

void * function(ggml_backend_reg_t, const char * name) {
    bool known = !strcmp(name, "ggml_backend_set_n_threads");
    return known ? reinterpret_cast<void *>(set_threads) : nullptr;
}

}  // namespace

extern "C" __attribute__((visibility("default"))) ggml_backend_reg_t ggml_backend_init(void) {
    registry.api_version = FAKE_GPU_API_VERSION;
    registry.iface = {registry_name, device_count, device_at, function};
    std::string wanted = variable("FAKE_GPUS");
    if (!devices.empty() || wanted.empty()) return &registry;
    std::vector<std::string> all = split(wanted, ',');
    bool renamed = getenv("CUDA_VISIBLE_DEVICES") || getenv("GGML_CUDA_DEVICES");
    std::vector<int> places = visible(std::min<int>(static_cast<int>(all.size()), FAKE_GPU_MAX));
    size_t wanted_count = strtoul(variable("GGML_CUDA_DEVICES").c_str(), nullptr, 10);
    size_t count = wanted_count && !places.empty() ? wanted_count : places.size();
    for (size_t number = 0; number < count; number++) {
        int place = places[number % places.size()];
        add_device(all[place], place, renamed ? "CUDA" + std::to_string(number) : "");
    }
    return &registry;
}
