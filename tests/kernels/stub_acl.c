/* A stand-in for libascendcl. CANN's headers are in no package, so the types are written from its documentation (8.5).
 * Memory is the host's, copies happen at once, every call leaves a line. -DBATCH=0 leaves out what older CANN lacks.
 */
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

typedef int aclError;
typedef void *aclrtStream;
typedef enum { ACL_MEMCPY_HOST_TO_HOST, ACL_MEMCPY_HOST_TO_DEVICE, ACL_MEMCPY_DEVICE_TO_HOST } aclrtMemcpyKind;
typedef enum { ACL_MEM_LOCATION_TYPE_HOST, ACL_MEM_LOCATION_TYPE_DEVICE } aclrtMemLocationType;
typedef struct { uint32_t id; aclrtMemLocationType type; } aclrtMemLocation;
typedef struct { aclrtMemLocation dstLoc, srcLoc; uint8_t rsv[16]; } aclrtMemcpyBatchAttr;

enum { INVALID = 107000, REGISTERED = 107001, NO_CONTEXT = 107002 };

static char lines[1 << 20];
static size_t used;
static char failing[64];
static int failure;
static void *registered[64];
static __thread int entered; /* the device of this thread, from 1 */

const char *stub_lines(void) { return lines; }
size_t stub_current(void) { return entered; }
void stub_clear(void) { used = 0, lines[0] = 0; }
void stub_reset(void) { stub_clear(), memset(registered, 0, sizeof registered), failing[0] = 0, entered = 0; }
void stub_fail(const char *name, int code) { snprintf(failing, sizeof failing, "%s", name), failure = code; }

static aclError note(const char *name, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    if (used < sizeof lines - 256) {
        used += snprintf(lines + used, 64, "%s ", name);
        used += vsnprintf(lines + used, 128, format, arguments);
        used += snprintf(lines + used, 4, "\n");
    }
    va_end(arguments);
    return strcmp(name, failing) ? 0 : failure;
}

aclError aclrtSetDevice(int32_t device) { return entered = device + 1, note("SetDevice", "%d", device); }
aclError aclrtGetDevice(int32_t *device) { return *device = entered - 1, entered ? 0 : NO_CONTEXT; }

aclError aclrtMemcpyAsync(void *dst, size_t destMax, const void *src, size_t count, aclrtMemcpyKind kind, aclrtStream stream) {
    aclError result = note("MemcpyAsync", "%zu %d %zu", count, kind, (size_t)stream);
    if (!entered || destMax < count || (kind != ACL_MEMCPY_HOST_TO_DEVICE && kind != ACL_MEMCPY_DEVICE_TO_HOST)) return INVALID;
    if (!result) memcpy(dst, src, count);
    return result;
}

aclError aclrtHostUnregister(void *ptr) {
    aclError result = note("HostUnregister", "%p", ptr);
    for (int i = 0; !result && i < 64; i++)
        if (registered[i] == ptr) return registered[i] = 0, 0;
    return result ? result : INVALID;
}

#if BATCH
aclError aclrtHostRegisterV2(void *ptr, uint64_t size, uint32_t flag) {
    aclError result = note("HostRegisterV2", "%p %zu %#x", ptr, (size_t)size, flag);
    int at = 0;
    if (result) return result;
    if (!entered) return INVALID;
    for (int i = 0; i < 64; i++) {
        if (registered[i] == ptr) return REGISTERED;
        if (!registered[i]) at = i;
    }
    registered[at] = ptr;
    return 0;
}

aclError aclrtMemcpyBatchAsync(void **dsts, size_t *destMaxs, void **srcs, size_t *sizes, size_t numBatches,
                               aclrtMemcpyBatchAttr *attrs, size_t *attrsIndexes, size_t numAttrs, size_t *failIndex,
                               aclrtStream stream) {
    aclError result = note("MemcpyBatchAsync", "%zu %d->%d %zu", numBatches, attrs->srcLoc.type, attrs->dstLoc.type, (size_t)stream);
    *failIndex = SIZE_MAX;
    if (!entered || numBatches > 4096 || numAttrs != 1 || *attrsIndexes || attrs->srcLoc.type == attrs->dstLoc.type) return INVALID;
    for (int i = 0; i < 16; i++)
        if (attrs->rsv[i]) return INVALID;
    for (size_t i = 0; !result && i < numBatches; i++) {
        if (destMaxs[i] < sizes[i]) return *failIndex = i, INVALID;
        memcpy(dsts[i], srcs[i], sizes[i]);
    }
    return result;
}
#endif
