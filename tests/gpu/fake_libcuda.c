/* A driver that draws graphs instead of running them: enough of libcuda.so.1 for what backends/cuda.py calls.
 *
 * A graph is a list of nodes; a node is a kernel, a copy of a graph, or a condition with bodies. fake_describe() spells
 * a graph, nodes behind one another joined by ">". The function named by FAKE_CUDA_REFUSES returns an error. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { SUCCESS = 0, INVALID_VALUE = 1, NOT_SUPPORTED = 801, NOT_FOUND = 500, MOST = 64 };

typedef struct Graph Graph;
typedef struct Node { const char *kernel; Graph *child, **bodies; unsigned kind, size; int after; } Node;
struct Graph { Node nodes[MOST]; int count; unsigned long long conditions[MOST]; };
typedef struct { int type, reserved[3]; unsigned long long handle; int kind; unsigned size; Graph **out; void *context; } NodeParams;

static Graph *capturing;
static char launched[4096];
static int graphs_alive, launchable_alive;
static unsigned long long next_condition = 7;

static int refused(const char *name) { const char *asked = getenv("FAKE_CUDA_REFUSES"); return asked && !strcmp(asked, name); }

int cuInit(unsigned flags) { return flags; }
int cuGetExportTable(const void **table, const void *id) { (void)id; *table = NULL; return NOT_FOUND; } /* NVRTC asks */
int cuDriverGetVersion(int *version) { *version = 13000; return SUCCESS; }

/* The calling thread's contexts, and how often the only one there is, the GPU's primary context, is retained. */
static void *contexts[MOST];
static int depth, retained;
int cuCtxGetCurrent(void **context) { *context = depth ? contexts[depth - 1] : NULL; return SUCCESS; }
int cuCtxPushCurrent_v2(void *context) { contexts[depth++] = context; return SUCCESS; }
int cuCtxPopCurrent_v2(void **context) { return depth ? (*context = contexts[--depth], SUCCESS) : 201; }
int cuCtxSetCurrent(void *context) {
    depth -= depth > 0;
    if (context) contexts[depth++] = context;
    return SUCCESS;
}
int cuDevicePrimaryCtxRetain(void **context, int device) { *context = (void *)0xC0; ++retained; return device; }
int cuDevicePrimaryCtxRelease_v2(int device) { --retained; return device; } /* by the manual, it pops nothing */
int fake_contexts(void) { return depth; }
int fake_retained(void) { return retained; }

int cuGetErrorName(int error, const char **name) {
    *name = error == NOT_SUPPORTED ? "CUDA_ERROR_NOT_SUPPORTED" : "CUDA_ERROR_INVALID_VALUE";
    return SUCCESS;
}
int cuGetProcAddress_v2(const char *name, void **found, int version, unsigned long long flags, void *status) {
    (void)version; (void)flags; (void)status;
    *found = dlsym(RTLD_DEFAULT, name);
    return *found ? SUCCESS : NOT_FOUND;
}

int cuGraphCreate(Graph **graph, unsigned flags) {
    if (flags || refused("cuGraphCreate")) return INVALID_VALUE;
    *graph = calloc(1, sizeof(Graph));
    ++graphs_alive;
    return SUCCESS;
}
int cuGraphDestroy(Graph *graph) { if (!graph) return INVALID_VALUE; --graphs_alive; return SUCCESS; }
int cuGraphGetNodes(Graph *graph, void **nodes, size_t *count) { (void)nodes; *count = (size_t)graph->count; return SUCCESS; }

int cuStreamBeginCapture_v2(void *stream, int mode) {
    if (stream != (void *)0x51 || mode != 1 || capturing || refused("cuStreamBeginCapture")) return INVALID_VALUE;
    return cuGraphCreate(&capturing, 0);
}
int cuStreamBeginCapture(void *stream, int mode) { return cuStreamBeginCapture_v2(stream, mode); }
int cuStreamEndCapture(void *stream, Graph **graph) {
    (void)stream;
    *graph = capturing;
    capturing = NULL;
    return refused("cuStreamEndCapture") ? INVALID_VALUE : SUCCESS;
}

static Node *add(Graph *graph, Node **before, size_t count) {
    Node *node = &graph->nodes[graph->count++];
    node->after = count ? (int)(before[0] - graph->nodes) : -1;
    return node;
}
int cuGraphAddChildGraphNode(Node **node, Graph *graph, Node **before, size_t count, Graph *child) {
    if (refused("cuGraphAddChildGraphNode")) return NOT_SUPPORTED;
    *node = add(graph, before, count);
    (*node)->child = child;
    return SUCCESS;
}
int cuGraphConditionalHandleCreate(unsigned long long *handle, Graph *graph, void *context, unsigned value, unsigned flags) {
    if (context != (void *)0xC0 || value != 1 || flags != 1) return INVALID_VALUE;
    *handle = next_condition++;
    for (int i = 0; i < MOST; ++i) if (!graph->conditions[i]) { graph->conditions[i] = *handle; break; }
    return SUCCESS;
}
int cuGraphAddNode(Node **node, Graph *graph, Node **before, const void *edges, size_t count, NodeParams *params) {
    if (edges || params->type != 13 || params->context != (void *)0xC0 || refused("cuGraphAddNode")) return NOT_SUPPORTED;
    int is_ours = 0;
    for (int i = 0; i < MOST; ++i) is_ours |= graph->conditions[i] == params->handle;
    if (!is_ours) return INVALID_VALUE; /* a condition of another graph */
    *node = add(graph, before, count);
    (*node)->kind = (unsigned)params->kind;
    (*node)->size = params->size;
    (*node)->bodies = params->out = calloc(params->size, sizeof(Graph *));
    for (unsigned i = 0; i < params->size; ++i) params->out[i] = calloc(1, sizeof(Graph));
    return SUCCESS;
}

static void spell(const Graph *graph, char *text) {
    for (int i = 0; i < graph->count; ++i) {
        const Node *node = &graph->nodes[i];
        strcat(text, i == 0 ? "" : node->after == i - 1 ? ">" : "|");
        if (node->kernel) strcat(text, node->kernel);
        else if (node->child) { strcat(text, "("); spell(node->child, text); strcat(text, ")"); }
        else {
            strcat(text, node->kind == 1 ? "while{" : node->kind == 2 ? "switch{" : "if{");
            for (unsigned body = 0; body < node->size; ++body) {
                strcat(text, body ? ";" : "");
                spell(node->bodies[body], text);
            }
            strcat(text, "}");
        }
    }
}
void fake_describe(Graph *graph, char *text) { text[0] = 0; spell(graph, text); }

int cuGraphInstantiateWithFlags(Graph **launchable, Graph *graph, unsigned long long flags) {
    if (flags || refused("cuGraphInstantiate")) return NOT_SUPPORTED;
    *launchable = graph;
    ++launchable_alive;
    return SUCCESS;
}
int cuGraphInstantiate(Graph **launchable, Graph *graph, unsigned long long flags) {
    return cuGraphInstantiateWithFlags(launchable, graph, flags);
}
int cuGraphLaunch(Graph *launchable, void *stream) {
    if (stream != (void *)0x51 || refused("cuGraphLaunch")) return INVALID_VALUE;
    strcat(launched, "[");
    spell(launchable, launched);
    strcat(launched, "]");
    return SUCCESS;
}
int cuGraphExecDestroy(Graph *launchable) { (void)launchable; --launchable_alive; return SUCCESS; }

/* What pycuda's stand-in calls. */
void fake_kernel(const char *name) {
    if (capturing) capturing->nodes[capturing->count] = (Node){.kernel = strdup(name), .after = capturing->count - 1}, ++capturing->count;
    else strcat(launched, name);
}
const char *fake_launched(void) { return launched; }
int fake_graphs_alive(void) { return graphs_alive; }
int fake_launchable_alive(void) { return launchable_alive; }
