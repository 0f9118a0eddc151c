/* Stands for TensorRT's libraries (libnvinfer, libnvinfer_plugin, libnvonnxparser), so that its real Python bindings can
 * be imported, and called, without them. How it is built, and with which symbols: library.py.
 *
 * What there is depends on TENSORRT_STUB:
 *   nothing    factories write to the logger and give NULL, as on a machine without a driver
 *   empty      a builder and a runtime, of which every method gives zero
 *   no parser  a builder and a runtime, of which every method gives such an object again; no parser
 *   all        the parser too
 *
 * One object stands for all of TensorRT's. Its first word leads to a table of functions, as that of every C++ class with
 * virtual functions does, with the class's type before it; its second to the implementation behind TensorRT's interface,
 * here the same object. What a caller takes for something else than an object is its address, PLACE + 1: true, a size of
 * 65537 bytes, a count, or the text that is there, which is empty.
 */
#define _GNU_SOURCE
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#define TOLD "CUDA initialization failure with error: 35"
enum { FUNCTIONS = 512, ERROR = 1, ROOM = 0x2000, TABLE = 0x100 };

typedef void (*log_function)(void *logger, int severity, const char *message);
struct object { void *functions, *implementation; } __attribute__((packed));
struct table { void *offset, *type, *functions[FUNCTIONS]; };

extern char _ZTIi[]; /* typeid(int): pybind11 looks the type up, and takes what the function declares if it is unknown */

static struct object *object;
static void *result;

static void *called(void) { return result; }

static int is(const char *value) {
    const char *chosen = getenv("TENSORRT_STUB");
    return chosen && !strcmp(chosen, value);
}

/* At a fixed place, which the three libraries share: the first of them makes it. */
__attribute__((constructor)) static void make(void) {
    char *place = mmap((void *)(intptr_t)PLACE, ROOM, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0);
    object = (struct object *)(intptr_t)(PLACE + 1);
    result = is("no parser") || is("all") ? object : NULL;
    if (place == MAP_FAILED) return;
    struct table *table = (struct table *)(place + TABLE - offsetof(struct table, functions));
    for (int i = 0; i < FUNCTIONS; i++) table->functions[i] = (void *)called;
    table->type = _ZTIi;
    object->functions = table->functions; /* its lowest byte is 0: an empty text */
    object->implementation = object;
}

static void *refuse(void *logger) {
    log_function *functions = *(log_function **)logger;
    functions[LOG](logger, ERROR, TOLD);
    return NULL;
}

#define NOTHING(name) void *name(void) { return NULL; }
#define FACTORY(name) void *name(void *logger) { return is("empty") || result ? object : refuse(logger); }
#define PARSER(name) void *name(void *network, void *logger) { return (void)network, is("all") ? object : refuse(logger); }
SYMBOLS
