/* A stand-in for libcuda or libamdhip64, built with the vendors' own headers: "device" memory is the host's, copies
 * happen at once, and every call but the exchange of a thread's capture mode, which is around all others, leaves a line.
 * The compiler checks the signatures, this file the order of calls.
 *
 * -DHIP builds AMD's; -DBATCH=0 leaves the batched copy out, 1 has the form of CUDA 12.8, 2 that of CUDA 13 (HIP: 1).
 */
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#ifdef HIP
#define __HIP_PLATFORM_AMD__ 1
#include <hip/hip_runtime_api.h>
#define RESULT hipError_t
#define OK hipSuccess
#define INVALID hipErrorInvalidValue
#define NO_CONTEXT hipErrorNotInitialized
#define NOT_READY hipErrorNotReady
#define ALREADY hipErrorHostMemoryAlreadyRegistered
#define CAPTURING hipErrorStreamCaptureUnsupported
#else
#include <cuda.h>
#define RESULT CUresult
#define OK CUDA_SUCCESS
#define INVALID CUDA_ERROR_INVALID_VALUE
#define NO_CONTEXT CUDA_ERROR_INVALID_CONTEXT
#define NOT_READY CUDA_ERROR_NOT_READY
#define ALREADY CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED
#define CAPTURING CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED
#endif

static char lines[1 << 20];
static size_t used;
static char failing[64];
static int failure;
static size_t handles = 16;
static void *registered[64];
static __thread size_t current[8]; /* the devices or contexts that this thread has entered */
static __thread int entered;
static int capturing, spoiled; /* a graph, by another thread and in the default mode */
static __thread int mode;      /* of this thread towards captures: 0 is the default, 2 relaxed */

const char *stub_lines(void) { return lines; }
size_t stub_current(void) { return entered ? current[entered - 1] : 0; }
void stub_clear(void) { used = 0, lines[0] = 0; }
void stub_reset(void) { stub_clear(), memset(registered, 0, sizeof registered), failing[0] = 0, capturing = spoiled = 0; }
void stub_capture(void) { capturing = 1; }
int stub_spoiled(void) { return spoiled; }
int stub_mode(void) { return mode; }
void stub_fail(const char *name, int code) { snprintf(failing, sizeof failing, "%s", name), failure = code; }

/* The result of a call: a wished-for failure, or none. */
static RESULT note(const char *name, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    if (used < sizeof lines - 256) {
        used += snprintf(lines + used, 64, "%s ", name);
        used += vsnprintf(lines + used, 128, format, arguments);
        used += snprintf(lines + used, 4, "\n");
    }
    va_end(arguments);
    return failure && !strcmp(name, failing) ? (RESULT)failure : OK;
}

/* Of a call that no thread may make outside of a context, nor beside a capture unless it says that it knows. */
static RESULT inside(RESULT result) {
    if (!entered) return NO_CONTEXT;
    return capturing && mode != 2 ? spoiled = 1, CAPTURING : result;
}

static RESULT exchange(int *wanted) {
    int before = mode;
    return *wanted < 0 || *wanted > 2 ? INVALID : (mode = *wanted, *wanted = before, OK);
}

static RESULT pin(void *address, size_t size, int flags, const char *name) {
    RESULT result = note(name, "%p %zu %d", address, size, flags);
    int at = 0;
    if ((result = inside(result))) return result;
    for (int i = 0; i < 64; i++) {
        if (registered[i] == address) return ALREADY;
        if (!registered[i]) at = i;
    }
    registered[at] = address;
    return OK;
}

static RESULT unpin(void *address, const char *name) {
    RESULT result = inside(note(name, "%p", address));
    for (int i = 0; !result && i < 64; i++)
        if (registered[i] == address) return registered[i] = 0, OK;
    return result ? result : INVALID;
}

static RESULT move(void *target, const void *source, size_t size, void *stream, const char *name) {
    RESULT result = inside(note(name, "%p %p %zu %zu", target, source, size, (size_t)stream));
    if (!result) memcpy(target, source, size);
    return result;
}

static RESULT move_all(void **targets, void **sources, size_t *sizes, size_t count, void *stream, const char *name) {
    RESULT result = inside(note(name, "%zu %zu", count, (size_t)stream));
    if (!stream || !count || count > 4096) return INVALID; /* not the legacy default stream; and see driver.py */
    for (size_t i = 0; !result && i < count; i++) memcpy(targets[i], sources[i], sizes[i]);
    return result;
}

static RESULT make(void **handle, unsigned flags, const char *name) {
    *handle = (void *)++handles;
    return inside(note(name, "%u", flags));
}

#ifdef HIP

hipError_t hipGetDevice(int *device) { return *device = stub_current(), note("GetDevice", "%d", *device); }
hipError_t hipSetDevice(int device) { return entered = 1, *current = device, note("SetDevice", "%d", device); }
hipError_t hipStreamCreateWithFlags(hipStream_t *stream, unsigned flags) { return make((void **)stream, flags, "Stream"); }
hipError_t hipEventCreateWithFlags(hipEvent_t *event, unsigned flags) { return make((void **)event, flags, "Event"); }
hipError_t hipThreadExchangeStreamCaptureMode(hipStreamCaptureMode *mode) { return exchange((int *)mode); }
hipError_t hipEventRecord(hipEvent_t event, hipStream_t stream) {
    return inside(note("EventRecord", "%zu %zu", (size_t)event, (size_t)stream));
}
hipError_t hipEventQuery(hipEvent_t event) { return inside(note("EventQuery", "%zu", (size_t)event)); }
hipError_t hipEventSynchronize(hipEvent_t event) { return inside(note("EventSynchronize", "%zu", (size_t)event)); }
hipError_t hipStreamWaitEvent(hipStream_t stream, hipEvent_t event, unsigned flags) {
    return inside(note("StreamWaitEvent", "%zu %zu %u", (size_t)stream, (size_t)event, flags));
}
hipError_t hipMemcpyAsync(void *target, const void *source, size_t size, hipMemcpyKind kind, hipStream_t stream) {
    return kind == hipMemcpyDefault ? move(target, source, size, stream, "MemcpyAsync") : INVALID;
}
hipError_t hipHostRegister(void *address, size_t size, unsigned flags) { return pin(address, size, flags, "Register"); }
hipError_t hipHostUnregister(void *address) { return unpin(address, "Unregister"); }
const char *hipGetErrorName(hipError_t error) { return error == hipErrorOutOfMemory ? "hipErrorOutOfMemory" : "hipError"; }
#if BATCH
hipError_t hipMemcpyBatchAsync(void **targets, void **sources, size_t *sizes, size_t count, hipMemcpyAttributes *attributes,
                               size_t *first, size_t number, size_t *failed, hipStream_t stream) {
    *failed = 0;
    if (attributes || first || number) return INVALID;
    return move_all(targets, sources, sizes, count, stream, "MemcpyBatchAsync");
}
#endif

#else

CUresult cuInit(unsigned flags) { return note("Init", "%u", flags); }
CUresult cuDeviceGet(CUdevice *device, int ordinal) { return *device = ordinal + 100, note("DeviceGet", "%d", ordinal); }
CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) {
    return *context = (CUcontext)(size_t)device, note("DevicePrimaryCtxRetain", "%d", device);
}
CUresult cuCtxPushCurrent_v2(CUcontext context) {
    if (entered == sizeof current / sizeof *current) return INVALID; /* pushed and never popped */
    CUresult result = note("CtxPushCurrent", "%zu", (size_t)context);
    if (!result) current[entered++] = (size_t)context;
    return result;
}
CUresult cuCtxPopCurrent_v2(CUcontext *context) {
    if (!entered) return NO_CONTEXT;
    return *context = (CUcontext)current[--entered], note("CtxPopCurrent", "%zu", (size_t)*context);
}
CUresult cuStreamCreate(CUstream *stream, unsigned flags) { return make((void **)stream, flags, "Stream"); }
CUresult cuEventCreate(CUevent *event, unsigned flags) { return make((void **)event, flags, "Event"); }
CUresult cuThreadExchangeStreamCaptureMode(CUstreamCaptureMode *mode) { return exchange((int *)mode); }
CUresult cuEventRecord(CUevent event, CUstream stream) {
    return inside(note("EventRecord", "%zu %zu", (size_t)event, (size_t)stream));
}
CUresult cuEventQuery(CUevent event) { return inside(note("EventQuery", "%zu", (size_t)event)); }
CUresult cuEventSynchronize(CUevent event) { return inside(note("EventSynchronize", "%zu", (size_t)event)); }
CUresult cuStreamWaitEvent(CUstream stream, CUevent event, unsigned flags) {
    return inside(note("StreamWaitEvent", "%zu %zu %u", (size_t)stream, (size_t)event, flags));
}
CUresult cuMemcpyAsync(CUdeviceptr target, CUdeviceptr source, size_t size, CUstream stream) {
    return move((void *)target, (void *)source, size, stream, "MemcpyAsync");
}
CUresult cuMemHostRegister_v2(void *address, size_t size, unsigned flags) { return pin(address, size, flags, "Register"); }
CUresult cuMemHostUnregister(void *address) { return unpin(address, "Unregister"); }
CUresult cuGetErrorName(CUresult error, const char **text) {
    *text = error == CUDA_ERROR_OUT_OF_MEMORY ? "CUDA_ERROR_OUT_OF_MEMORY" : "CUDA_ERROR";
    return CUDA_SUCCESS;
}
static int wrong(CUmemcpyAttributes *attributes, size_t *first, size_t number) {
    return number != 1 || *first || attributes->srcAccessOrder != CU_MEMCPY_SRC_ACCESS_ORDER_STREAM || attributes->flags;
}
#undef cuMemcpyBatchAsync
#if BATCH == 1
CUresult cuMemcpyBatchAsync(CUdeviceptr *targets, CUdeviceptr *sources, size_t *sizes, size_t count,
                            CUmemcpyAttributes *attributes, size_t *first, size_t number, size_t *failed, CUstream stream) {
    *failed = 0;
    if (wrong(attributes, first, number)) return INVALID;
    return move_all((void **)targets, (void **)sources, sizes, count, stream, "MemcpyBatchAsync");
}
#elif BATCH == 2
CUresult cuMemcpyBatchAsync_v2(CUdeviceptr *targets, CUdeviceptr *sources, size_t *sizes, size_t count,
                               CUmemcpyAttributes *attributes, size_t *first, size_t number, CUstream stream) {
    if (wrong(attributes, first, number)) return INVALID;
    return move_all((void **)targets, (void **)sources, sizes, count, stream, "MemcpyBatchAsync_v2");
}
#endif

#endif
