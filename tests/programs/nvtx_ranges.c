/* An NVTX tool: prints every range of a domain as it begins and ends. NVTX_INJECTION64_PATH has it loaded.
 * Tables and numbers are those of NVTX 3 (nvtxDetail/nvtxTypes.h, nvToolsExt.h: nvtxEventAttributes_v2). */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef void (*function)(void);
typedef struct {
    size_t struct_size;
    int (*table_of)(int module, function ***table, unsigned *size);
} callbacks;
typedef struct {
    uint16_t version, size;
    uint32_t category;
    int32_t color_type;
    uint32_t color;
    int32_t payload_type, reserved;
    uint64_t payload;
    int32_t message_type;
    const char *message; /* where it is registered: what register_string gave, which here is the text */
} attributes;

enum { CALLBACKS = 1, CORE2 = 5, PUSH = 4, POP = 5, REGISTER = 10, CREATE = 12 };

static int push(void *domain, const attributes *a) {
    fprintf(stderr, "NVTX %s begin %s\n", (char *)domain, a->message);
    return 0;
}
static int pop(void *domain) {
    fprintf(stderr, "NVTX %s end\n", (char *)domain);
    return 0;
}
static void *register_string(void *domain, const char *text) {
    (void)domain;
    return strdup(text);
}
static void *create(const char *name) { return strdup(name); }

int InitializeInjectionNvtx2(const void *(*export_table)(uint32_t)) {
    const callbacks *c = export_table(CALLBACKS);
    function **table;
    unsigned size;
    if (!c || !c->table_of(CORE2, &table, &size) || size <= CREATE) return 0;
    *table[PUSH] = (function)push;
    *table[POP] = (function)pop;
    *table[REGISTER] = (function)register_string;
    *table[CREATE] = (function)create;
    return 1;
}
