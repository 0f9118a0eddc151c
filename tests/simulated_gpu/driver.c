/* A simulated CUDA driver (libcuda.so.1) on host memory: enough for real cuda-python code to run on a machine without a
 * GPU, and stricter than a GPU, so that errors that a real driver would let pass now and then show every time.
 *
 * Nothing here is a kernel: test code hands in callbacks (sim_launch) that stand for them. How to use it: simulator.py.
 *
 * Types follow cuda.h only as far as the ABI needs: enumerations are int, handles are opaque words. cuda.h itself is not
 * included, so that the CUDA toolkit is not needed to run the tests.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

typedef int CUresult;
typedef uint64_t CUdeviceptr;
typedef uintptr_t handle;
typedef void (*callback)(void *);
typedef struct { int type, id; } location;

#define ERRORS(X) \
    X(INVALID_VALUE, 1) X(OUT_OF_MEMORY, 2) X(NOT_INITIALIZED, 3) X(INVALID_DEVICE, 101) X(INVALID_CONTEXT, 201) \
    X(INVALID_HANDLE, 400) X(ILLEGAL_STATE, 401) X(NOT_FOUND, 500) X(NOT_READY, 600) X(ILLEGAL_ADDRESS, 700) \
    X(NOT_PERMITTED, 800) X(NOT_SUPPORTED, 801) X(STREAM_CAPTURE_UNSUPPORTED, 900) \
    X(STREAM_CAPTURE_INVALIDATED, 901) X(STREAM_CAPTURE_MERGE, 902) X(STREAM_CAPTURE_UNMATCHED, 903) \
    X(STREAM_CAPTURE_UNJOINED, 904) X(STREAM_CAPTURE_ISOLATION, 905) X(STREAM_CAPTURE_IMPLICIT, 906) \
    X(CAPTURED_EVENT, 907) X(STREAM_CAPTURE_WRONG_THREAD, 908)
#define X(name, code) name = code,
enum { ERRORS(X) };
#undef X
enum { MODE_GLOBAL, MODE_THREAD_LOCAL, MODE_RELAXED };
enum { STREAM_NON_BLOCKING = 1, EVENT_DISABLE_TIMING = 2, EXTERNAL = 1 };
enum { MAX_BRANCHES = 16, PAGE = 4096, PRIMARY_CONTEXT = 0xC0DE, POOL = 0xB001 };

/* ---------------------------------------------------------------- settings, lock, trace */

static pthread_mutex_t mutex = PTHREAD_RECURSIVE_MUTEX_INITIALIZER_NP;
static bool initialized, lazy, in_callback;
static size_t total_memory = 8ull << 30;
static int capability[2] = {12, 0};
static CUresult context_error; /* sticky: as on a GPU, nothing works in this process after an illegal access */
static __thread handle current[16];
static __thread int depth; /* current[depth - 1] is the thread's current context */
static __thread int thread_mode = MODE_GLOBAL;
static char **trace;
static int trace_count, trace_room;

static int lock(void) { return pthread_mutex_lock(&mutex); }
static void unlock(int *unused) { (void)unused; pthread_mutex_unlock(&mutex); }
#define LOCK() __attribute__((cleanup(unlock), unused)) int locked = lock()

__attribute__((constructor)) static void read_settings(void) {
    const char *text;
    lazy = (text = getenv("SIMULATED_GPU_LAZY")) && !strcmp(text, "1");
    if ((text = getenv("SIMULATED_GPU_MEMORY"))) total_memory = strtoull(text, NULL, 10);
    if ((text = getenv("SIMULATED_GPU_CC"))) sscanf(text, "%d.%d", &capability[0], &capability[1]);
}

static void *grow(void *array, int count, int *room, size_t size) {
    if (count < *room) return array;
    *room = *room ? 2 * *room : 16;
    return realloc(array, *room * size);
}

enum { ANYWHERE = 0, IN_CONTEXT = 1, ALWAYS = 2 };

/* What every traced call does first. ALWAYS: allowed after a sticky error too, as handles must be freed even then. */
static CUresult enter(int needs, const char *name, const char *format, ...) {
    char line[160];
    int at = snprintf(line, sizeof line, "%s", name);
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(line + at, sizeof line - at, format, arguments);
    va_end(arguments);
    trace = grow(trace, trace_count, &trace_room, sizeof *trace);
    trace[trace_count++] = strdup(line);
    if (!initialized) return NOT_INITIALIZED;
    if (in_callback) return NOT_PERMITTED; /* host functions and kernels may not call the driver */
    if ((needs & IN_CONTEXT) && !(depth && current[depth - 1])) return INVALID_CONTEXT;
    return needs & ALWAYS ? 0 : context_error;
}
#define ENTER(needs, ...) LOCK(); { CUresult no = enter(needs, __func__, __VA_ARGS__); if (no) return no; }

/* ---------------------------------------------------------------- handles */

typedef enum { DEVICE_MEMORY, PINNED_MEMORY, STREAM, EVENT, GRAPH, EXEC, USER, KINDS } kind;
static const char *kind_names[KINDS] = {"device", "pinned", "stream", "event", "graph", "exec", "user"};
static int live[KINDS];

typedef struct { kind kind; bool alive; handle self; } object;
static object **objects;
static int object_count, object_room;

/* Handles are numbers that are never given out twice and objects are never freed: a handle that was destroyed is told
 * from a live one, where a GPU's driver would crash or use whatever lies there. */
static void *create(kind k, size_t size) {
    object *o = calloc(1, size);
    objects = grow(objects, object_count, &object_room, sizeof *objects);
    *o = (object){k, true, 0x10000 + 16 * (handle)object_count};
    objects[object_count++] = o;
    live[k]++;
    return o;
}

static void *lookup(handle h, kind k) {
    uint64_t i = (h - 0x10000) / 16;
    if (h < 0x10000 || h % 16 || i >= (uint64_t)object_count) return NULL;
    return objects[i]->alive && objects[i]->kind == k ? objects[i] : NULL;
}

static void destroy(void *o) { ((object *)o)->alive = false; live[((object *)o)->kind]--; }

/* ---------------------------------------------------------------- memory */

typedef struct { uint64_t start; size_t size; bool device, alive, dying; } block;
static block *blocks; /* in the order of their addresses */
static int block_count, block_room;
static uint64_t arena, arena_next;
static const uint64_t arena_size = 1ull << 40; /* addresses only, no memory */
static size_t live_bytes, peak_bytes, pool_threshold;

/* Every allocation gets an address that was never used before, with an unreadable page behind it: malloc would soon
 * hand out a freed address again, and a graph that still holds it would look right. */
static CUresult allocate(uint64_t *out, size_t size, bool device) {
    if (!out || !size) return INVALID_VALUE;
    if (device && (size > total_memory || live_bytes > total_memory - size)) return OUT_OF_MEMORY;
    if (!arena) {
        void *reserved = mmap(NULL, arena_size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (reserved == MAP_FAILED) return OUT_OF_MEMORY;
        arena = arena_next = (uint64_t)reserved;
    }
    size_t room = (size + PAGE - 1) / PAGE * PAGE;
    if (room + PAGE > arena + arena_size - arena_next) return OUT_OF_MEMORY;
    if (mprotect((void *)arena_next, room, PROT_READ | PROT_WRITE)) return OUT_OF_MEMORY;
    memset((void *)arena_next, 0xA5, room);
    blocks = grow(blocks, block_count, &block_room, sizeof *blocks);
    blocks[block_count++] = (block){arena_next, size, device, true, false};
    *out = arena_next;
    arena_next += room + PAGE;
    live[device ? DEVICE_MEMORY : PINNED_MEMORY]++;
    if (device && (live_bytes += size) > peak_bytes) peak_bytes = live_bytes;
    return 0;
}

static bool in_arena(uint64_t address) { return arena && address >= arena && address < arena + arena_size; }

static block *find(uint64_t address) {
    int low = 0, high = block_count;
    while (low < high) {
        int middle = (low + high) / 2;
        if (blocks[middle].start <= address) low = middle + 1; else high = middle;
    }
    block *b = low ? &blocks[low - 1] : NULL;
    return b && b->alive && address - b->start < b->size ? b : NULL;
}

/* Memory of the program itself is not ours to judge: only addresses of our own are. */
static bool usable(uint64_t address, size_t bytes) {
    if (!bytes) return true;
    if (!in_arena(address)) return address != 0;
    block *b = find(address);
    return b && bytes <= b->size - (address - b->start);
}

static bool usable_by_device(uint64_t address, size_t bytes) {
    return !bytes || (in_arena(address) && usable(address, bytes));
}

static bool is_pageable(uint64_t address) { return !in_arena(address); }
static bool is_device_only(uint64_t address) { block *b = find(address); return b && b->device; }

static void release(block *b) {
    memset((void *)b->start, 0xDD, b->size);
    if (b->size >= 1 << 20) { /* small ones stay readable, so that a stale read sees 0xDD; large ones would add up */
        size_t room = (b->size + PAGE - 1) / PAGE * PAGE;
        madvise((void *)b->start, room, MADV_DONTNEED);
        mprotect((void *)b->start, room, PROT_NONE);
    }
    b->alive = false;
    live[b->device ? DEVICE_MEMORY : PINNED_MEMORY]--;
    if (b->device) live_bytes -= b->size;
}

/* ---------------------------------------------------------------- streams and what runs on them */

typedef struct { uint64_t start, bytes; } range;
typedef struct event event;
typedef struct stream stream;
typedef struct {
    enum { COPY, FILL, CALL, RECORD, WAIT, FREE } kind;
    uint64_t to, from;
    size_t bytes;
    uint32_t value, width; /* of FILL; its bytes are value repeated */
    callback function;
    void *data;
    const range *ranges; /* never freed: graphs and their copies share it, and tests are short */
    int range_count;
    event *event;
    stream *after; /* of WAIT: this stream up to that serial number */
    uint64_t after_serial, serial;
    bool staged; /* from is a copy of the program's memory that the operation owns */
} operation;
typedef struct { operation *at; int count, room; } list;

typedef struct user { object head; int references; callback destroy; void *data; } user;
typedef struct { object head; list nodes; handle source; user **users; int user_count, user_room; } graph;
typedef struct capture {
    graph *graph;
    bool active, invalid;
    int mode, branch_count;
    pthread_t thread;
    stream *branches[MAX_BRANCHES]; /* the first is the origin */
    uint64_t id;
    struct capture *next;
} capture;

/* seen[i]: how many operations of branch i precede this point (a vector clock). A capture may end where the origin has
 * seen everything: forgotten joins are found although the order of the graph's nodes is just the order of recording. */
struct stream {
    object head;
    unsigned flags;
    int priority, done;
    list queue; /* from `done` on: not yet executed */
    capture *capture;
    int branch;
    uint32_t seen[MAX_BRANCHES];
    handle last_node;
};
struct event {
    object head;
    unsigned flags;
    bool recorded, done;
    double time;
    stream *stream;
    uint64_t serial;
    capture *capture; /* what it was last recorded in, also after that ended */
    uint32_t seen[MAX_BRANCHES];
};

static stream *legacy, *per_thread;
static capture *captures; /* the active ones */
static uint64_t serial, capture_id;

static void push(list *l, const operation *o) {
    l->at = grow(l->at, l->count, &l->room, sizeof *l->at);
    l->at[l->count++] = *o;
}

static stream *stream_of(handle h) {
    if (!legacy) {
        legacy = create(STREAM, sizeof *legacy);
        per_thread = create(STREAM, sizeof *per_thread);
        live[STREAM] -= 2; /* the program did not make them */
    }
    return h <= 1 ? legacy : h == 2 ? per_thread : lookup(h, STREAM);
}

static void flush(stream *s, uint64_t up_to);

static CUresult execute(operation *o) {
    switch (o->kind) {
    case COPY:
        if (!usable(o->to, o->bytes) || !usable(o->from, o->bytes)) return ILLEGAL_ADDRESS;
        memmove((void *)o->to, (void *)o->from, o->bytes);
        if (o->staged) free((void *)o->from);
        return 0;
    case FILL:
        if (!usable_by_device(o->to, o->bytes)) return ILLEGAL_ADDRESS;
        for (size_t i = 0; i < o->bytes; i += o->width) memcpy((char *)o->to + i, &o->value, o->width);
        return 0;
    case CALL:
        for (int i = 0; i < o->range_count; i++)
            if (!usable_by_device(o->ranges[i].start, o->ranges[i].bytes)) return ILLEGAL_ADDRESS;
        in_callback = true;
        o->function(o->data);
        in_callback = false;
        return 0;
    case RECORD: {
        struct timespec now;
        clock_gettime(CLOCK_MONOTONIC, &now);
        if (o->event->serial == o->serial) { /* else it was recorded again since */
            o->event->time = now.tv_sec * 1e3 + now.tv_nsec / 1e6;
            o->event->done = true;
        }
        return 0;
    }
    case WAIT:
        if (o->after) flush(o->after, o->after_serial);
        return 0;
    case FREE: {
        block *b = find(o->to);
        if (!b) return ILLEGAL_ADDRESS;
        release(b);
        return 0;
    }
    }
    return INVALID_VALUE;
}

static void flush_blocking(uint64_t up_to) {
    for (int i = 0; i < object_count; i++) {
        stream *s = (stream *)objects[i];
        if (objects[i]->kind == STREAM && s != legacy && !(s->flags & STREAM_NON_BLOCKING)) flush(s, up_to);
    }
}

/* Executes what is queued, with the legacy stream's rule: it and every blocking stream wait for each other. */
static void flush(stream *s, uint64_t up_to) {
    while (s->done < s->queue.count && s->queue.at[s->done].serial <= up_to) {
        operation o = s->queue.at[s->done];
        if (s == legacy) flush_blocking(o.serial - 1);
        else if (!(s->flags & STREAM_NON_BLOCKING)) flush(legacy, o.serial - 1);
        s->done++;
        if (!context_error) context_error = execute(&o);
    }
    if (s->done == s->queue.count) s->done = s->queue.count = 0;
}

static CUresult flush_all(void) {
    for (int i = 0; i < object_count; i++)
        if (objects[i]->kind == STREAM) flush((stream *)objects[i], UINT64_MAX);
    return context_error;
}

/* What a query does on unfinished work: one operation more, or a program that polls would poll forever. */
static CUresult step(stream *s) {
    if (s->done < s->queue.count) flush(s, s->queue.at[s->done].serial);
    return context_error ? context_error : NOT_READY;
}

/* Runs or queues an operation on a stream that is not capturing. */
static CUresult dispatch(stream *s, operation o) {
    if (context_error) return context_error;
    o.serial = ++serial;
    if (o.kind == RECORD) {
        o.event->recorded = true;
        o.event->done = false;
        o.event->stream = s;
        o.event->serial = o.serial;
        o.event->capture = NULL;
    } else if (o.kind == WAIT) {
        o.after = o.event->stream;
        o.after_serial = o.event->serial;
    }
    push(&s->queue, &o);
    if (!lazy) flush(s, UINT64_MAX);
    return context_error;
}

/* ---------------------------------------------------------------- capture */

static CUresult invalidate(capture *c, CUresult reason) { c->invalid = true; return reason; }

/* Calls that a capture in mode `global` forbids to all threads and `thread_local` to its own. */
static CUresult forbid_unsafe(void) {
    CUresult no = 0;
    for (capture *c = captures; c; c = c->next) {
        bool own = pthread_equal(c->thread, pthread_self());
        if (own ? c->mode != MODE_RELAXED && thread_mode != MODE_RELAXED
                : c->mode == MODE_GLOBAL && thread_mode == MODE_GLOBAL)
            no = invalidate(c, STREAM_CAPTURE_UNSUPPORTED);
    }
    return no;
}

/* The legacy stream would wait for every blocking stream, and a capturing one cannot be waited for. */
static CUresult forbid_legacy(void) {
    CUresult no = 0;
    for (capture *c = captures; c; c = c->next)
        for (int i = 0; i < c->branch_count; i++)
            if (!(c->branches[i]->flags & STREAM_NON_BLOCKING)) no = invalidate(c, STREAM_CAPTURE_IMPLICIT);
    return no;
}

static CUresult record(stream *s, const operation *o) {
    if (s->capture->invalid) return STREAM_CAPTURE_INVALIDATED;
    push(&s->capture->graph->nodes, o);
    s->seen[s->branch]++;
    s->last_node = (s->capture->graph->head.self << 24) + s->capture->graph->nodes.count;
    return 0;
}

/* Whatever is asked of a stream: recorded in its capture, or done. */
static CUresult submit(handle h, operation o) {
    stream *s = stream_of(h);
    if (!s) return INVALID_HANDLE;
    if (s->capture) return record(s, &o);
    if (s == legacy && forbid_legacy()) return STREAM_CAPTURE_IMPLICIT;
    return dispatch(s, o);
}

CUresult cuStreamBeginCapture_v2(handle h, int mode) {
    ENTER(ANYWHERE, " %d", mode);
    stream *s = stream_of(h);
    if (!s) return INVALID_HANDLE;
    if (s == legacy) return STREAM_CAPTURE_UNSUPPORTED;
    if (s->capture) return ILLEGAL_STATE;
    if (mode < MODE_GLOBAL || mode > MODE_RELAXED) return INVALID_VALUE;
    capture *c = calloc(1, sizeof *c); /* never freed: events point to it */
    *c = (capture){create(GRAPH, sizeof(graph)), true, false, mode, 1, pthread_self(), {s}, ++capture_id, captures};
    live[GRAPH]--; /* the program does not own it yet */
    captures = c;
    s->capture = c;
    s->branch = 0;
    memset(s->seen, 0, sizeof s->seen);
    s->last_node = 0;
    return 0;
}

CUresult cuStreamEndCapture(handle h, handle *out) {
    ENTER(ALWAYS, "");
    stream *s = stream_of(h);
    if (!s) return INVALID_HANDLE;
    capture *c = s->capture;
    if (!c) return ILLEGAL_STATE;
    if (c->branches[0] != s) return invalidate(c, STREAM_CAPTURE_UNMATCHED);
    if (c->mode != MODE_RELAXED && !pthread_equal(c->thread, pthread_self())) return STREAM_CAPTURE_WRONG_THREAD;
    CUresult result = c->invalid ? STREAM_CAPTURE_INVALIDATED : 0;
    for (int i = 0; i < c->branch_count; i++) {
        if (!result && s->seen[i] < c->branches[i]->seen[i]) result = STREAM_CAPTURE_UNJOINED;
        c->branches[i]->capture = NULL;
    }
    c->active = false;
    for (capture **link = &captures; *link; link = &(*link)->next)
        if (*link == c) { *link = c->next; break; }
    live[GRAPH]++;
    if (result) destroy(c->graph);
    *out = result ? 0 : c->graph->head.self;
    return result;
}

static int capture_status(const stream *s) { return !s->capture ? 0 : s->capture->invalid ? 2 : 1; }

CUresult cuStreamGetCaptureInfo_v3(handle h, int *status, uint64_t *id, handle *into, const handle **dependencies,
                                   const void **edges, size_t *count) {
    LOCK();
    stream *s = stream_of(h);
    if (!s) return INVALID_HANDLE;
    *status = capture_status(s);
    if (id) *id = s->capture ? s->capture->id : 0;
    if (into) *into = s->capture ? s->capture->graph->head.self : 0;
    if (dependencies) *dependencies = &s->last_node;
    if (edges) *edges = NULL;
    if (count) *count = s->capture && s->last_node;
    return 0;
}

CUresult cuStreamGetCaptureInfo_v2(handle h, int *status, uint64_t *id, handle *into, const handle **dependencies,
                                   size_t *count) {
    return cuStreamGetCaptureInfo_v3(h, status, id, into, dependencies, NULL, count);
}
CUresult cuStreamIsCapturing(handle h, int *status) { return cuStreamGetCaptureInfo_v3(h, status, 0, 0, 0, 0, 0); }

CUresult cuThreadExchangeStreamCaptureMode(int *mode) {
    int old = thread_mode;
    thread_mode = *mode;
    *mode = old;
    return 0;
}

/* ---------------------------------------------------------------- graphs */

static void release_user(user *u, int count) {
    if ((u->references -= count) > 0 || !u->head.alive) return;
    destroy(u);
    u->destroy(u->data);
}

static void hold_user(graph *g, user *u) {
    g->users = grow(g->users, g->user_count, &g->user_room, sizeof *g->users);
    g->users[g->user_count++] = u;
}

static CUresult destroy_graph(handle h, kind k) {
    graph *g = lookup(h, k);
    if (!g) return INVALID_HANDLE;
    destroy(g);
    for (int i = 0; i < g->user_count; i++) release_user(g->users[i], 1);
    return 0;
}

static CUresult copy_graph(handle *out, handle from, kind k) {
    graph *source = lookup(from, GRAPH);
    if (!source) return INVALID_HANDLE;
    graph *g = create(k, sizeof *g);
    g->source = from;
    for (int i = 0; i < source->nodes.count; i++) push(&g->nodes, &source->nodes.at[i]);
    for (int i = 0; i < source->user_count; i++) {
        source->users[i]->references++;
        hold_user(g, source->users[i]);
    }
    *out = g->head.self;
    return 0;
}

CUresult cuGraphDestroy(handle h) { ENTER(ALWAYS, ""); return destroy_graph(h, GRAPH); }
CUresult cuGraphExecDestroy(handle h) {
    ENTER(ALWAYS, "");
    flush_all(); /* launches in flight still need what it holds */
    return destroy_graph(h, EXEC);
}
CUresult cuGraphClone(handle *out, handle h) { ENTER(ANYWHERE, ""); return copy_graph(out, h, GRAPH); }
CUresult cuGraphInstantiateWithFlags(handle *out, handle h, unsigned long long flags) {
    (void)flags;
    ENTER(IN_CONTEXT, "");
    return copy_graph(out, h, EXEC);
}
CUresult cuGraphInstantiateWithParams(handle *out, handle h, void *parameters) {
    struct { uint64_t flags; handle upload_stream, failed_node; int result; } *p = parameters;
    ENTER(IN_CONTEXT, "");
    p->result = 0;
    return copy_graph(out, h, EXEC);
}

CUresult cuGraphUpload(handle exec, handle h) {
    ENTER(ANYWHERE, "");
    return lookup(exec, EXEC) && stream_of(h) ? 0 : INVALID_HANDLE;
}

CUresult cuGraphLaunch(handle exec, handle h) {
    ENTER(ANYWHERE, "");
    graph *g = lookup(exec, EXEC);
    if (!g) return INVALID_HANDLE;
    CUresult result = stream_of(h) ? 0 : INVALID_HANDLE;
    for (int i = 0; i < g->nodes.count && !result; i++) result = submit(h, g->nodes.at[i]);
    return result;
}

CUresult cuGraphGetNodes(handle h, handle *nodes, size_t *count) {
    LOCK();
    graph *g = lookup(h, GRAPH);
    if (!g) return INVALID_HANDLE;
    for (size_t i = 0; nodes && i < *count; i++)
        nodes[i] = i < (size_t)g->nodes.count ? (g->head.self << 24) + i + 1 : 0;
    if (!nodes || *count > (size_t)g->nodes.count) *count = g->nodes.count;
    return 0;
}

CUresult cuGraphNodeFindInClone(handle *out, handle node, handle clone) {
    LOCK();
    graph *g = lookup(clone, GRAPH);
    if (!g || node >> 24 != g->source) return INVALID_VALUE;
    *out = (clone << 24) + (node & 0xFFFFFF);
    return 0;
}
CUresult cuGraphChildGraphNodeGetGraph(handle node, handle *out) { (void)node; *out = 0; return NOT_SUPPORTED; }

CUresult cuUserObjectCreate(handle *out, void *data, callback function, unsigned references, unsigned flags) {
    (void)flags;
    LOCK();
    user *u = create(USER, sizeof *u);
    u->references = references, u->destroy = function, u->data = data;
    *out = u->head.self;
    return 0;
}
CUresult cuUserObjectRetain(handle h, unsigned count) {
    LOCK();
    user *u = lookup(h, USER);
    if (u) u->references += count;
    return u ? 0 : INVALID_HANDLE;
}
CUresult cuUserObjectRelease(handle h, unsigned count) {
    LOCK();
    user *u = lookup(h, USER);
    if (u) release_user(u, count);
    return u ? 0 : INVALID_HANDLE;
}
CUresult cuGraphRetainUserObject(handle h, handle object, unsigned count, unsigned flags) {
    LOCK();
    graph *g = lookup(h, GRAPH);
    user *u = lookup(object, USER);
    if (!g || !u) return INVALID_HANDLE;
    for (unsigned i = 0; i < count; i++) hold_user(g, u);
    if (!(flags & 1)) u->references += count; /* 1: the caller's references move into the graph */
    return 0;
}
CUresult cuGraphReleaseUserObject(handle h, handle object, unsigned count) {
    LOCK();
    graph *g = lookup(h, GRAPH);
    user *u = lookup(object, USER);
    if (!g || !u) return INVALID_HANDLE;
    for (int i = 0; i < g->user_count && count; i++) {
        if (g->users[i] != u) continue;
        g->users[i--] = g->users[--g->user_count];
        release_user(u, 1);
        count--;
    }
    return count ? INVALID_VALUE : 0;
}

/* ---------------------------------------------------------------- device and context */

CUresult cuInit(unsigned flags) { LOCK(); initialized = true; return flags ? INVALID_VALUE : 0; }
CUresult cuDriverGetVersion(int *version) {
    const char *chosen = getenv("SIMULATED_GPU_CUDA");
    *version = chosen ? atoi(chosen) : 13000;
    return 0;
}
CUresult cuDeviceGetCount(int *count) { *count = 1; return initialized ? 0 : NOT_INITIALIZED; }
CUresult cuDeviceGet(int *device, int ordinal) {
    *device = ordinal;
    return !initialized ? NOT_INITIALIZED : ordinal ? INVALID_DEVICE : 0;
}
CUresult cuDeviceGetName(char *name, int size, int device) {
    snprintf(name, size, "Simulated GPU");
    return device ? INVALID_DEVICE : 0;
}
CUresult cuDeviceGetUuid_v2(char *uuid, int device) { memset(uuid, 0x51, 16); return device ? INVALID_DEVICE : 0; }
CUresult cuDeviceTotalMem_v2(size_t *bytes, int device) { *bytes = total_memory; return device ? INVALID_DEVICE : 0; }
CUresult cuDeviceGetAttribute(int *value, int attribute, int device) {
    switch (attribute) {
    case 1: *value = 1024; break; /* threads per block */
    case 10: *value = 32; break; /* warp size */
    case 16: *value = 1; break; /* multiprocessors */
    case 19: case 41: case 78: case 115: *value = 1; break; /* mapped host memory, UVA, stream priorities, pools */
    case 75: case 76: *value = capability[attribute - 75]; break;
    default: *value = 0;
    }
    return device ? INVALID_DEVICE : 0;
}
CUresult cuDevicePrimaryCtxRetain(handle *out, int device) {
    *out = PRIMARY_CONTEXT;
    return !initialized ? NOT_INITIALIZED : device ? INVALID_DEVICE : 0;
}
CUresult cuDevicePrimaryCtxRelease_v2(int device) { return device ? INVALID_DEVICE : 0; }
CUresult cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active) {
    *flags = 0, *active = 1;
    return device ? INVALID_DEVICE : 0;
}
CUresult cuCtxPushCurrent_v2(handle context) {
    if (depth == 16) return OUT_OF_MEMORY;
    current[depth++] = context;
    return 0;
}
CUresult cuCtxPopCurrent_v2(handle *out) {
    if (!depth) return INVALID_CONTEXT;
    handle top = current[--depth];
    if (out) *out = top;
    return 0;
}
CUresult cuCtxSetCurrent(handle context) {
    if (context && context != PRIMARY_CONTEXT) return INVALID_CONTEXT;
    if (!depth) depth = 1;
    current[depth - 1] = context;
    return 0;
}
CUresult cuCtxGetCurrent(handle *out) { *out = depth ? current[depth - 1] : 0; return initialized ? 0 : NOT_INITIALIZED; }
CUresult cuCtxGetDevice(int *device) { *device = 0; return depth && current[depth - 1] ? 0 : INVALID_CONTEXT; }
CUresult cuCtxGetDevice_v2(int *device, handle context) { (void)context; *device = 0; return 0; }
CUresult cuCtxGetId(handle context, unsigned long long *id) { (void)context; *id = 1; return 0; }
CUresult cuCtxGetFlags(unsigned *flags) { *flags = 0; return 0; }
CUresult cuCtxGetStreamPriorityRange(int *least, int *greatest) {
    if (least) *least = 0;
    if (greatest) *greatest = -5;
    return 0;
}

static CUresult synchronize_context(void) {
    CUresult no = 0;
    for (capture *c = captures; c; c = c->next) no = invalidate(c, STREAM_CAPTURE_UNSUPPORTED);
    return no ? no : flush_all();
}
CUresult cuCtxSynchronize(void) { ENTER(IN_CONTEXT, ""); return synchronize_context(); }
CUresult cuCtxSynchronize_v2(handle context) { (void)context; ENTER(ANYWHERE, ""); return synchronize_context(); }

/* ---------------------------------------------------------------- streams */

CUresult cuStreamCreateWithPriority(handle *out, unsigned flags, int priority) {
    ENTER(IN_CONTEXT, "");
    stream_of(0); /* the default streams come first */
    stream *s = create(STREAM, sizeof *s);
    s->flags = flags;
    s->priority = priority > 0 ? 0 : priority < -5 ? -5 : priority;
    *out = s->head.self;
    return 0;
}
CUresult cuStreamCreate(handle *out, unsigned flags) { return cuStreamCreateWithPriority(out, flags, 0); }

CUresult cuStreamDestroy_v2(handle h) {
    ENTER(ALWAYS, "");
    stream *s = lookup(h, STREAM);
    if (!s || s == legacy || s == per_thread) return INVALID_HANDLE;
    if (s->capture && s->capture->branches[0] == s) return invalidate(s->capture, STREAM_CAPTURE_UNSUPPORTED);
    flush(s, UINT64_MAX); /* its work is still done; a branch's is in the capture, where its join is still asked for */
    destroy(s);
    return 0;
}

CUresult cuStreamSynchronize(handle h) {
    ENTER(ANYWHERE, "");
    stream *s = stream_of(h);
    if (!s) return INVALID_HANDLE;
    if (s->capture) return invalidate(s->capture, STREAM_CAPTURE_UNSUPPORTED);
    if (forbid_unsafe()) return STREAM_CAPTURE_UNSUPPORTED;
    if (s == legacy && forbid_legacy()) return STREAM_CAPTURE_IMPLICIT;
    if (s == legacy) flush_blocking(UINT64_MAX);
    flush(s, UINT64_MAX);
    return context_error;
}

CUresult cuStreamQuery(handle h) {
    ENTER(ANYWHERE, "");
    stream *s = stream_of(h);
    if (!s) return INVALID_HANDLE;
    if (s->capture) return invalidate(s->capture, STREAM_CAPTURE_UNSUPPORTED);
    if (forbid_unsafe()) return STREAM_CAPTURE_UNSUPPORTED;
    return s->done == s->queue.count ? 0 : step(s);
}

#define STREAM_GETTER(name, type, value) \
    CUresult name(handle h, type *out) { \
        LOCK(); \
        stream *s = stream_of(h); \
        if (s) *out = value; \
        return s ? 0 : INVALID_HANDLE; \
    }
STREAM_GETTER(cuStreamGetPriority, int, s->priority)
STREAM_GETTER(cuStreamGetFlags, unsigned, s->flags)
STREAM_GETTER(cuStreamGetId, unsigned long long, s->head.self)
STREAM_GETTER(cuStreamGetDevice, int, 0)
STREAM_GETTER(cuStreamGetCtx, handle, PRIMARY_CONTEXT)
CUresult cuStreamGetCtx_v2(handle h, handle *context, handle *green) {
    *green = 0;
    return cuStreamGetCtx(h, context);
}

/* ---------------------------------------------------------------- events */

CUresult cuEventCreate(handle *out, unsigned flags) {
    ENTER(IN_CONTEXT, "");
    event *e = create(EVENT, sizeof *e);
    e->flags = flags;
    *out = e->head.self;
    return 0;
}

CUresult cuEventDestroy_v2(handle h) {
    ENTER(ALWAYS, "");
    event *e = lookup(h, EVENT);
    if (e) destroy(e);
    return e ? 0 : INVALID_HANDLE;
}

static CUresult record_event(handle he, handle hs, bool external) {
    event *e = lookup(he, EVENT);
    stream *s = stream_of(hs);
    if (!e || !s) return INVALID_HANDLE;
    if (!s->capture || external) return submit(hs, (operation){.kind = RECORD, .event = e});
    if (s->capture->invalid) return STREAM_CAPTURE_INVALIDATED;
    e->capture = s->capture; /* no node: it only marks a point of the capture */
    memcpy(e->seen, s->seen, sizeof e->seen);
    return 0;
}
CUresult cuEventRecord(handle e, handle s) { ENTER(ANYWHERE, ""); return record_event(e, s, false); }
CUresult cuEventRecordWithFlags(handle e, handle s, unsigned flags) {
    ENTER(ANYWHERE, " %u", flags);
    return record_event(e, s, flags & EXTERNAL);
}

CUresult cuStreamWaitEvent(handle hs, handle he, unsigned flags) {
    ENTER(ANYWHERE, "");
    event *e = lookup(he, EVENT);
    stream *s = stream_of(hs);
    if (!e || !s) return INVALID_HANDLE;
    capture *c = e->capture;
    if (s->capture && (flags & EXTERNAL)) return record(s, &(operation){.kind = WAIT, .event = e});
    if (s->capture && s->capture->invalid) return STREAM_CAPTURE_INVALIDATED;
    if (s->capture && c && c != s->capture) return invalidate(s->capture, STREAM_CAPTURE_MERGE);
    if (s->capture && !c && e->recorded) return invalidate(s->capture, STREAM_CAPTURE_ISOLATION);
    if (!c) return e->recorded ? submit(hs, (operation){.kind = WAIT, .event = e}) : 0;
    if (!c->active) return CAPTURED_EVENT;
    if (c->invalid) return STREAM_CAPTURE_INVALIDATED;
    if (!s->capture) { /* a fork: the stream's work is now recorded in the event's capture */
        if (s == legacy) return invalidate(c, STREAM_CAPTURE_IMPLICIT);
        if (c->branch_count == MAX_BRANCHES) return NOT_SUPPORTED;
        s->branch = c->branch_count++;
        c->branches[s->branch] = s;
        s->capture = c;
        memset(s->seen, 0, sizeof s->seen);
        s->last_node = 0;
    }
    for (int i = 0; i < MAX_BRANCHES; i++)
        if (s->seen[i] < e->seen[i]) s->seen[i] = e->seen[i];
    return 0;
}

static CUresult check_event(const event *e) {
    if (!e) return INVALID_HANDLE;
    if (e->capture) return e->capture->active ? invalidate(e->capture, CAPTURED_EVENT) : CAPTURED_EVENT;
    return forbid_unsafe();
}

CUresult cuEventSynchronize(handle h) {
    ENTER(ANYWHERE, "");
    event *e = lookup(h, EVENT);
    CUresult no = check_event(e);
    if (no) return no;
    if (e->recorded && !e->done) flush(e->stream, e->serial);
    return context_error;
}

CUresult cuEventQuery(handle h) {
    ENTER(ANYWHERE, "");
    event *e = lookup(h, EVENT);
    CUresult no = check_event(e);
    if (no || !e->recorded || e->done) return no;
    return step(e->stream);
}

CUresult cuEventElapsedTime_v2(float *milliseconds, handle from, handle to) {
    ENTER(ANYWHERE, "");
    event *a = lookup(from, EVENT), *b = lookup(to, EVENT);
    if (!a || !b || ((a->flags | b->flags) & EVENT_DISABLE_TIMING)) return INVALID_HANDLE;
    if (a->capture || b->capture) return CAPTURED_EVENT;
    if (!a->recorded || !b->recorded) return INVALID_HANDLE;
    if (!a->done || !b->done) return NOT_READY;
    *milliseconds = (float)(b->time - a->time);
    return 0;
}

/* ---------------------------------------------------------------- memory calls */

static CUresult allocate_now(uint64_t *out, size_t size, bool device) {
    return forbid_unsafe() ? STREAM_CAPTURE_UNSUPPORTED : allocate(out, size, device);
}
CUresult cuMemAlloc_v2(CUdeviceptr *out, size_t size) {
    ENTER(IN_CONTEXT, " %zu", size);
    return allocate_now(out, size, true);
}
CUresult cuMemAllocHost_v2(void **out, size_t size) {
    ENTER(IN_CONTEXT, " %zu", size);
    return allocate_now((uint64_t *)out, size, false);
}
CUresult cuMemHostAlloc(void **out, size_t size, unsigned flags) {
    (void)flags;
    ENTER(IN_CONTEXT, " %zu", size);
    return allocate_now((uint64_t *)out, size, false);
}

static CUresult free_now(uint64_t address, bool device) {
    if (!address && device) return 0;
    if (forbid_unsafe()) return STREAM_CAPTURE_UNSUPPORTED;
    block *b = find(address);
    if (!b || b->start != address || b->device != device || b->dying) return INVALID_VALUE;
    CUresult result = flush_all(); /* it waits for the device's work */
    release(b);
    return result;
}
CUresult cuMemFree_v2(CUdeviceptr address) { ENTER(IN_CONTEXT, ""); return free_now(address, true); }
CUresult cuMemFreeHost(void *address) { ENTER(IN_CONTEXT, ""); return free_now((uint64_t)address, false); }

static CUresult allocate_ordered(CUdeviceptr *out, size_t size, handle h) {
    stream *s = stream_of(h);
    if (!s) return INVALID_HANDLE;
    if (s->capture) return invalidate(s->capture, NOT_SUPPORTED); /* memory nodes are not simulated */
    return allocate(out, size, true);
}
CUresult cuMemAllocAsync(CUdeviceptr *out, size_t size, handle s) {
    ENTER(IN_CONTEXT, " %zu", size);
    return allocate_ordered(out, size, s);
}
CUresult cuMemAllocFromPoolAsync(CUdeviceptr *out, size_t size, handle pool, handle s) {
    ENTER(IN_CONTEXT, " %zu", size);
    return pool == POOL ? allocate_ordered(out, size, s) : INVALID_HANDLE;
}
CUresult cuMemFreeAsync(CUdeviceptr address, handle h) {
    ENTER(ANYWHERE, "");
    stream *s = stream_of(h);
    block *b = find(address);
    if (!s) return INVALID_HANDLE;
    if (!b || b->start != address || b->dying) return INVALID_VALUE;
    if (s->capture) return invalidate(s->capture, NOT_SUPPORTED);
    b->dying = true;
    return submit(h, (operation){.kind = FREE, .to = address});
}

CUresult cuMemGetInfo_v2(size_t *unused, size_t *total) {
    ENTER(IN_CONTEXT, "");
    *total = total_memory;
    *unused = total_memory - live_bytes;
    return 0;
}
CUresult cuMemGetAddressRange_v2(CUdeviceptr *start, size_t *size, CUdeviceptr address) {
    LOCK();
    block *b = find(address);
    if (b && start) *start = b->start;
    if (b && size) *size = b->size;
    return b ? 0 : INVALID_VALUE;
}

CUresult cuPointerGetAttribute(void *out, int attribute, CUdeviceptr address) {
    LOCK();
    block *b = find(address);
    if (!b) return INVALID_VALUE;
    switch (attribute) {
    case 1: *(handle *)out = PRIMARY_CONTEXT; return 0;
    case 2: *(unsigned *)out = b->device ? 2 : 1; return 0;
    case 3: *(uint64_t *)out = address; return 0;
    case 4: *(uint64_t *)out = b->device ? 0 : address; return b->device ? INVALID_VALUE : 0;
    case 7: *(uint64_t *)out = b - blocks + 1; return 0;
    case 8: *(unsigned *)out = 0; return 0;
    case 9: *(int *)out = 0; return 0;
    case 11: *(uint64_t *)out = b->start; return 0;
    case 12: *(size_t *)out = b->size; return 0;
    default: return NOT_SUPPORTED;
    }
}
CUresult cuPointerGetAttributes(unsigned count, const int *attributes, void **out, CUdeviceptr address) {
    static const char sizes[] = {[1] = 8, [2] = 4, [3] = 8, [4] = 8, [7] = 8, [8] = 4, [9] = 4, [11] = 8, [12] = 8};
    for (unsigned i = 0; i < count; i++) /* unknown memory is no error here: its attributes are zeros */
        if (cuPointerGetAttribute(out[i], attributes[i], address) && attributes[i] < (int)sizeof sizes)
            memset(out[i], attributes[i] == 9 ? 0xFE : 0, sizes[attributes[i]]);
    return 0;
}

/* One pool, which only hands out and counts. */
CUresult cuDeviceGetMemPool(handle *out, int device) { *out = POOL; return device ? INVALID_DEVICE : 0; }
CUresult cuDeviceGetDefaultMemPool(handle *out, int device) { return cuDeviceGetMemPool(out, device); }
CUresult cuMemGetMemPool(handle *out, const location *where, int type) {
    (void)type;
    return where->type == 1 ? cuDeviceGetMemPool(out, where->id) : NOT_SUPPORTED;
}
CUresult cuMemPoolSetAttribute(handle pool, int attribute, const void *value) {
    LOCK();
    if (attribute == 4) pool_threshold = *(const uint64_t *)value;
    return pool == POOL ? 0 : INVALID_HANDLE;
}
CUresult cuMemPoolGetAttribute(handle pool, int attribute, void *value) {
    LOCK();
    if (attribute <= 3) *(int *)value = 1;
    else *(uint64_t *)value = attribute == 4 ? pool_threshold : attribute % 2 ? live_bytes : peak_bytes;
    return pool == POOL ? 0 : INVALID_HANDLE;
}

/* ---------------------------------------------------------------- copies, fills, launches */

enum { HOST, DEVICE, EITHER };

static bool valid(uint64_t address, size_t bytes, int where) {
    if (where == DEVICE) return usable_by_device(address, bytes);
    return usable(address, bytes) && (where == EITHER || !is_device_only(address));
}

static CUresult copy(uint64_t to, int to_where, uint64_t from, int from_where, size_t bytes, handle h) {
    stream *s = stream_of(h);
    if (!s) return INVALID_HANDLE;
    if (!valid(to, bytes, to_where) || !valid(from, bytes, from_where))
        return s->capture ? invalidate(s->capture, INVALID_VALUE) : INVALID_VALUE;
    operation o = {.kind = COPY, .to = to, .from = from, .bytes = bytes};
    /* The program's own memory is staged at once, as the driver promises: it may change or go after the call. */
    if (lazy && !s->capture && is_pageable(from) && bytes) {
        o.staged = true;
        o.from = (uint64_t)memcpy(malloc(bytes), (void *)from, bytes);
    }
    CUresult result = submit(h, o);
    if (!result && !s->capture && is_pageable(to)) flush(s, UINT64_MAX); /* promised likewise */
    return result ? result : s->capture ? 0 : context_error;
}

/* Synchronous copies run on the legacy stream and wait for it: for blocking streams, not for the others. */
static CUresult copy_now(uint64_t to, int to_where, uint64_t from, int from_where, size_t bytes) {
    if (forbid_unsafe()) return STREAM_CAPTURE_UNSUPPORTED;
    CUresult result = copy(to, to_where, from, from_where, bytes, 0);
    if (!result) flush(legacy, UINT64_MAX);
    return result ? result : context_error;
}

#define COPIES(name, suffix, to_type, to_where, from_type, from_where) \
    CUresult name##suffix(to_type to, from_type from, size_t bytes) { \
        ENTER(IN_CONTEXT, " %zu", bytes); \
        return copy_now((uint64_t)to, to_where, (uint64_t)from, from_where, bytes); \
    } \
    CUresult name##Async##suffix(to_type to, from_type from, size_t bytes, handle s) { \
        ENTER(IN_CONTEXT, " %zu", bytes); \
        return copy((uint64_t)to, to_where, (uint64_t)from, from_where, bytes, s); \
    }
COPIES(cuMemcpyHtoD, _v2, CUdeviceptr, DEVICE, const void *, HOST)
COPIES(cuMemcpyDtoH, _v2, void *, HOST, CUdeviceptr, DEVICE)
COPIES(cuMemcpyDtoD, _v2, CUdeviceptr, DEVICE, CUdeviceptr, DEVICE)
COPIES(cuMemcpy, , CUdeviceptr, EITHER, CUdeviceptr, EITHER)

static CUresult fill(uint64_t to, uint32_t value, unsigned width, size_t count, handle h) {
    stream *s = stream_of(h);
    if (!s) return INVALID_HANDLE;
    if (to % width || count > SIZE_MAX / width || !usable_by_device(to, count * width))
        return s->capture ? invalidate(s->capture, INVALID_VALUE) : INVALID_VALUE;
    return submit(h, (operation){.kind = FILL, .to = to, .value = value, .width = width, .bytes = count * width});
}
#define FILLS(bits, type) \
    CUresult cuMemsetD##bits##_v2(CUdeviceptr to, type value, size_t count) { \
        ENTER(IN_CONTEXT, " %zu", count * sizeof(type)); \
        return forbid_unsafe() ? STREAM_CAPTURE_UNSUPPORTED : fill(to, value, sizeof(type), count, 0); \
    } \
    CUresult cuMemsetD##bits##Async(CUdeviceptr to, type value, size_t count, handle s) { \
        ENTER(IN_CONTEXT, " %zu", count * sizeof(type)); \
        return fill(to, value, sizeof(type), count, s); \
    }
FILLS(8, unsigned char)
FILLS(16, unsigned short)
FILLS(32, unsigned)

CUresult cuLaunchHostFunc(handle s, callback function, void *data) {
    ENTER(ANYWHERE, "");
    return function ? submit(s, (operation){.kind = CALL, .function = function, .data = data}) : INVALID_VALUE;
}

/* Stands for a kernel launch. The ranges are what the kernel may touch; they are judged when it runs, not here. */
CUresult sim_launch(handle s, callback function, void *data, int count, const uint64_t *starts, const uint64_t *sizes) {
    ENTER(IN_CONTEXT, "");
    range *ranges = malloc(count * sizeof *ranges + 1);
    for (int i = 0; i < count; i++) ranges[i] = (range){starts[i], sizes[i]};
    operation o = {.kind = CALL, .function = function, .data = data, .ranges = ranges, .range_count = count};
    return submit(s, o);
}

/* ---------------------------------------------------------------- for the tests */

void sim_trace_clear(void) { LOCK(); while (trace_count) free(trace[--trace_count]); }
int sim_trace_count(void) { LOCK(); return trace_count; }
void sim_trace_get(int i, char *buffer, int size) {
    LOCK();
    snprintf(buffer, size, "%s", i >= 0 && i < trace_count ? trace[i] : "");
}
size_t sim_live_bytes(void) { LOCK(); return live_bytes; }
size_t sim_peak_bytes(void) { LOCK(); return peak_bytes; }
int sim_live(const char *name) {
    LOCK();
    for (int k = 0; k < KINDS; k++) if (!strcmp(kind_names[k], name)) return live[k];
    return -1;
}
int sim_live_objects(void) {
    LOCK();
    int sum = 0;
    for (int k = 0; k < KINDS; k++) sum += live[k];
    return sum;
}
void sim_clear_error(void) { LOCK(); context_error = 0; }

/* ---------------------------------------------------------------- names */

CUresult cuGetErrorName(CUresult code, const char **out) {
    switch (code) {
    case 0: *out = "CUDA_SUCCESS"; return 0;
#define X(name, code) case code: *out = "CUDA_ERROR_" #name; return 0;
    ERRORS(X)
#undef X
    default: *out = NULL; return INVALID_VALUE;
    }
}
CUresult cuGetErrorString(CUresult code, const char **out) { return cuGetErrorName(code, out); }

/* A name is asked for without its suffix and means the newest function of that name. These are the exceptions, where
 * it meant another one up to some CUDA version. */
static const struct { const char *name; int before; const char *symbol; } older[] = {
    {"cuCtxGetDevice", 13000, "cuCtxGetDevice"},
    {"cuCtxSynchronize", 13000, "cuCtxSynchronize"},
    {"cuStreamGetCtx", 12050, "cuStreamGetCtx"},
    {"cuStreamGetCaptureInfo", 12030, "cuStreamGetCaptureInfo_v2"},
    {"cuGetProcAddress", 12000, "cuGetProcAddress"},
};

CUresult cuGetProcAddress_v2(const char *name, void **out, int version, uint64_t flags, int *status) {
    static void *self;
    char symbol[100];
    Dl_info here;
    (void)flags;
    if (!self && dladdr((void *)cuGetProcAddress_v2, &here)) self = dlopen(here.dli_fname, RTLD_NOW | RTLD_NOLOAD);
    *out = NULL;
    for (size_t i = 0; i < sizeof older / sizeof *older; i++)
        if (!strcmp(older[i].name, name) && version < older[i].before) *out = dlsym(self, older[i].symbol);
    for (int i = 3; i > 0 && !*out; i--) {
        snprintf(symbol, sizeof symbol, i > 1 ? "%s_v%d" : "%s", name, i);
        *out = dlsym(self, symbol);
    }
    if (status) *status = *out ? 0 : 1;
    if (!*out && getenv("SIMULATED_GPU_LOG")) fprintf(stderr, "simulated GPU: %s (%d) is not there\n", name, version);
    return *out ? 0 : NOT_FOUND;
}
CUresult cuGetProcAddress(const char *name, void **out, int version, uint64_t flags) {
    return cuGetProcAddress_v2(name, out, version, flags, NULL);
}
