// A CUDA launch on one CPU core: blocks in sequence, and inside a block one fiber (a stack of its own, switched by hand) for each CUDA thread.
// A fiber runs until it meets a barrier, a warp operation, or its end; then the scheduler resumes the next. So a barrier really waits, and a
// missing one really shows. Threads are not preempted: a thread that spins on a flag set by another one never ends.
//
// Compiled three ways: for launching (nothing defined), with -fsanitize=address, and with -fsanitize=thread. The two sanitizers are told of each
// switch of stacks; in the third, the only order between two fibers that the detector knows is the one that barriers and warp operations make.
#pragma once
#include <signal.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#if defined(__has_feature)
#  if __has_feature(thread_sanitizer)
#    define CC_TSAN 1
#  elif __has_feature(address_sanitizer)
#    define CC_ASAN 1
#  endif
#endif
#if defined(__SANITIZE_THREAD__)
#  define CC_TSAN 1
#elif defined(__SANITIZE_ADDRESS__)
#  define CC_ASAN 1
#endif

#define CC_EXPORT extern "C" __attribute__((visibility("default")))
#define CC_HIDDEN   /* functions of the scheduler that a sanitizer must not look into */
#define CC_ACQUIRE(p) ((void)(p))
#define CC_RELEASE(p) ((void)(p))
#if CC_TSAN
extern "C" {
void* __tsan_create_fiber(unsigned);
void* __tsan_get_current_fiber();
void __tsan_switch_to_fiber(void*, unsigned);
void __tsan_acquire(void*);
void __tsan_release(void*);
}
#  undef CC_HIDDEN
#  undef CC_ACQUIRE
#  undef CC_RELEASE
#  define CC_HIDDEN __attribute__((no_sanitize("thread"), noinline))
#  define CC_ACQUIRE(p) __tsan_acquire(p)
#  define CC_RELEASE(p) __tsan_release(p)
#elif CC_ASAN
extern "C" {
void __sanitizer_start_switch_fiber(void**, const void*, size_t);
void __sanitizer_finish_switch_fiber(void*, const void**, size_t*);
}
#  undef CC_HIDDEN
#  define CC_HIDDEN __attribute__((no_sanitize("address"), noinline))
#endif

struct uint3 { unsigned x, y, z; };
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned a = 1, unsigned b = 1, unsigned c = 1) : x(a), y(b), z(c) {}
};

// ------------------------------------------------------------------------------------------------ switching stacks
// Push the registers that a callee must keep, swap the stack pointer, pop. A fresh stack holds zeros and the address of fiber_main.
extern "C" void cc_switch(void** save, void* load);
#if defined(__APPLE__)
#  define CC_FUNCTION(name) ".globl _" name "\n.p2align 2\n_" name ":\n"
#else
#  define CC_FUNCTION(name) ".local " name "\n.type " name ",%function\n" name ":\n"
#endif
#if defined(__x86_64__)
__asm__(".text\n" CC_FUNCTION("cc_switch")
        "pushq %rbp\n pushq %rbx\n pushq %r12\n pushq %r13\n pushq %r14\n pushq %r15\n"
        "movq %rsp, (%rdi)\n movq %rsi, %rsp\n"
        "popq %r15\n popq %r14\n popq %r13\n popq %r12\n popq %rbx\n popq %rbp\n popq %rcx\n jmpq *%rcx\n");
#  define CC_FRAME 8       /* words: six registers, the return address, one more for alignment */
#  define CC_ENTRY 6
#elif defined(__aarch64__)
__asm__(".text\n" CC_FUNCTION("cc_switch")
        "sub sp, sp, #160\n"
        "stp x19, x20, [sp, #0]\n stp x21, x22, [sp, #16]\n stp x23, x24, [sp, #32]\n stp x25, x26, [sp, #48]\n stp x27, x28, [sp, #64]\n"
        "stp x29, x30, [sp, #80]\n stp d8, d9, [sp, #96]\n stp d10, d11, [sp, #112]\n stp d12, d13, [sp, #128]\n stp d14, d15, [sp, #144]\n"
        "mov x9, sp\n str x9, [x0]\n mov sp, x1\n"
        "ldp x19, x20, [sp, #0]\n ldp x21, x22, [sp, #16]\n ldp x23, x24, [sp, #32]\n ldp x25, x26, [sp, #48]\n ldp x27, x28, [sp, #64]\n"
        "ldp x29, x30, [sp, #80]\n ldp d8, d9, [sp, #96]\n ldp d10, d11, [sp, #112]\n ldp d12, d13, [sp, #128]\n ldp d14, d15, [sp, #144]\n"
        "add sp, sp, #160\n ret\n");
#  define CC_FRAME 20
#  define CC_ENTRY 11
#else
#  error "cudacpu_run.h has no context switch for this processor"
#endif

#if CC_TSAN || CC_ASAN
#  define CC_STACK (256u << 10)
#else
#  define CC_STACK (64u << 10)
#endif
#define CC_STRIDE (CC_STACK + 17 * 64) /* not a power of two: else the tops of all stacks share the same cache sets */
#define CC_MARGIN (1u << 20)          /* below the lowest stack, so that an overflow is found out and not a crash */
#define CC_CANARY 0x5afec0de5afec0deull

namespace cc {
enum State : uint8_t { NEW, READY, AT_BARRIER, IN_WARP, DONE };
struct Warp;
struct Fiber {
  void *sp, *sanitizer; char* stack; Warp* warp; uint3 tid;
  unsigned index, lane, mask; int line;
};
struct Slot { alignas(16) unsigned char in[16]; alignas(16) unsigned char out[16]; int from; };
struct Warp {
  Slot slot[32]; Fiber* fibers; uint8_t* state;
  unsigned lanes, votes, ballot, epoch; bool released; char order[2];
  unsigned everyone() const { return lanes == 32 ? ~0u : (1u << lanes) - 1; }
};
struct Vote { int count, all, any; };
static struct {
  uint3 tid, bid; dim3 bdim, gdim; char* dynamic;             // what a kernel can see
  Fiber *fiber, *fibers, *first, *odd; Warp* warps; uint8_t* state; char **stacks;
  unsigned n_threads, n_warps, n_stacks, n_done, n_waiting, epoch;
  void (*entry)(void**); void** args; void *sp, *sanitizer; const void* stack_lo; size_t stack_size;
  Vote collecting, voted; bool strict, failed; char order[2], begin, end; char error[512];
} now;

// error is "kind <tab> number <tab> text"; the number is a line, or for kind "bounds" the index of the array (-1: none)
CC_HIDDEN static void fail(const char* kind, int number, const char* format, ...) {
  if (now.failed) return;
  now.failed = true;
  int n = snprintf(now.error, sizeof now.error, "%s\t%d\tblock (%u,%u,%u) thread (%u,%u,%u) ", kind, number, now.bid.x, now.bid.y, now.bid.z,
                   now.tid.x, now.tid.y, now.tid.z);
  va_list list; va_start(list, format);
  vsnprintf(now.error + n, sizeof now.error - n, format, list);
  va_end(list);
}
CC_HIDDEN static void yield() {                                // a fiber gives way to the scheduler
#if CC_TSAN
  __tsan_switch_to_fiber(now.sanitizer, 1);
#elif CC_ASAN
  Fiber* self = now.fiber;
  __sanitizer_start_switch_fiber(&self->sanitizer, now.stack_lo, now.stack_size);
#endif
  cc_switch(&now.fiber->sp, now.sp);
#if CC_ASAN
  __sanitizer_finish_switch_fiber(self->sanitizer, nullptr, nullptr);
#endif
}
CC_HIDDEN static void fiber_main() {
#if CC_ASAN
  __sanitizer_finish_switch_fiber(nullptr, &now.stack_lo, &now.stack_size);
#endif
  CC_ACQUIRE(&now.begin);
  now.entry(now.args);
  CC_RELEASE(&now.end);
  now.state[now.fiber->index] = DONE; now.n_done++;
  yield();
}
CC_HIDDEN static void resume(Fiber* f) {                       // the scheduler lets a fiber go on
  now.fiber = f; now.tid = f->tid;
  if (now.state[f->index] == NEW) {
#if CC_TSAN
    f->stack = now.stacks[f->index];                           // a stack stays with its fiber, or its reuse would look like a race
    if (!f->sanitizer) f->sanitizer = __tsan_create_fiber(0);
#else
    f->stack = now.stacks[--now.n_stacks];                     // the stack used last is the one still in cache
#endif
    void** top = (void**)((uintptr_t)(f->stack + CC_STACK - 64) & ~(uintptr_t)63) - CC_FRAME;
    memset(top, 0, CC_FRAME * sizeof *top);
    top[CC_ENTRY] = (void*)fiber_main;
    f->sp = top;
    *(uint64_t*)f->stack = CC_CANARY;
  }
  now.state[f->index] = READY;
#if CC_TSAN
  __tsan_switch_to_fiber(f->sanitizer, 1);
#elif CC_ASAN
  void* own;
  __sanitizer_start_switch_fiber(&own, f->stack, CC_STACK);
#endif
  cc_switch(&now.sp, f->sp);
#if CC_ASAN
  __sanitizer_finish_switch_fiber(own, nullptr, nullptr);
#endif
  if (*(uint64_t*)f->stack != CC_CANARY) fail("stack", 0, "needs more than %u KiB of stack", CC_STACK >> 10);
#if !CC_TSAN
  if (now.state[f->index] == DONE) now.stacks[now.n_stacks++] = f->stack;
#endif
}

// ------------------------------------------------------------------------------------------------ barriers and warp operations
CC_HIDDEN static void block_sync(int line) {
  Fiber* f = now.fiber;
  now.state[f->index] = AT_BARRIER; f->line = line;
  if (!now.n_waiting++) now.first = f; else if (line != now.first->line) now.odd = f;
  char* order = &now.order[now.epoch & 1];                     // two in turn: an early arrival at the next barrier orders nothing here
  CC_RELEASE(order); yield(); CC_ACQUIRE(order);
}
CC_HIDDEN static Vote block_vote(int p, int line) {
  now.collecting.count += p != 0; now.collecting.all &= p != 0; now.collecting.any |= p != 0;
  block_sync(line);
  return now.voted;
}
CC_HIDDEN static void warp_sync(unsigned mask, int line) {
  Fiber* f = now.fiber; Warp* w = f->warp;
  mask &= w->everyone();
  if (!(mask >> f->lane & 1)) { fail("mask", line, "calls a warp operation at line %d with mask 0x%08x, which leaves out its own lane %u", line, mask, f->lane); yield(); }
  w->state[f->lane] = IN_WARP; f->mask = mask; f->line = line;
  char* order = &w->order[w->epoch & 1];
  CC_RELEASE(order);
  bool complete = true;
  for (unsigned l = 0; l < w->lanes && complete; l++) if (mask >> l & 1) complete = w->state[l] == IN_WARP && w->fibers[l].mask == mask;
  if (!complete) yield();
  else {                                                       // the last lane to arrive does the exchange for all
    for (unsigned l = 0; l < w->lanes; l++) if (mask >> l & 1) {
      Slot& s = w->slot[l];
      if (s.from < (int)w->lanes && mask >> s.from & 1) memcpy(s.out, w->slot[s.from].in, 16);
      else memset(s.out, 0xff, 16);                            // CUDA leaves this value undefined; here it is NaN or -1
      w->state[l] = READY;
    }
    w->ballot = w->votes & mask; w->released = true; w->epoch++;
    for (unsigned l = 0; l < w->lanes; l++) if (mask >> l & 1) memcpy(w->slot[l].in, &w->ballot, 4);
  }
  CC_ACQUIRE(order);
}
CC_HIDDEN static void exchange(unsigned mask, void* value, size_t size, int from, int line) {
  Slot& s = now.fiber->warp->slot[now.fiber->lane];
  memcpy(s.in, value, size); s.from = from;
  warp_sync(mask, line);
  memcpy(value, s.out, size);
}
CC_HIDDEN static unsigned ballot(unsigned mask, bool p, int line) {
  Fiber* f = now.fiber; Warp* w = f->warp; unsigned all;
  w->votes = (w->votes & ~(1u << f->lane)) | (unsigned)p << f->lane; w->slot[f->lane].from = f->lane;
  warp_sync(mask, line);
  memcpy(&all, w->slot[f->lane].in, 4);
  return all;
}
CC_HIDDEN static void warp_barrier(int line, unsigned mask = ~0u) { ballot(mask, false, line); }

// ------------------------------------------------------------------------------------------------ the scheduler
enum Order { UP, DOWN, SHUFFLED };                             // in which order threads get their turns; a correct kernel can't tell
CC_HIDDEN static unsigned draw(uint64_t& s) { s ^= s << 13; s ^= s >> 7; s ^= s << 17; return (unsigned)(s >> 32); }
CC_HIDDEN static bool run_block(int order, uint64_t seed) {
  auto& T = now;
  const Vote empty = {0, 1, 0};
  memset(T.state, NEW, T.n_threads); T.n_done = 0; T.collecting = empty;
  uint64_t random = seed * 0x9E3779B97F4A7C15ull + 0x1234567;
  for (;;) {
    T.n_waiting = 0; T.first = T.odd = nullptr;
    unsigned turn = order == SHUFFLED ? draw(random) % T.n_warps : 0;
    for (unsigned i = 0; i < T.n_warps; i++) {
      Warp* w = &T.warps[order == DOWN ? T.n_warps - 1 - i : (i + turn) % T.n_warps];
      unsigned flip = order == DOWN ? 31 : order == SHUFFLED ? draw(random) & 31 : 0;
      do {
        w->released = false;
        for (unsigned k = 0; k < 32; k++) {
          unsigned l = k ^ flip;
          if (l < w->lanes && w->state[l] <= READY) { resume(&w->fibers[l]); if (T.failed) return false; }
        }
      } while (w->released);
    }
    if (T.n_done == T.n_threads) return true;
    if (T.n_done + T.n_waiting != T.n_threads) {
      Fiber* f = T.fibers;
      while (T.state[f->index] != IN_WARP) f++;
      T.tid = f->tid; fail("deadlock", f->line, "waits at line %d for the lanes 0x%08x of its warp, and not all of them arrive", f->line, f->mask); return false;
    }
    if (T.odd) {
      Fiber *f = T.odd, *g = T.first;
      T.tid = f->tid; fail("barrier", f->line, "waits at the barrier of line %d while thread (%u,%u,%u) waits at the one of line %d: a barrier in divergent code",
                           f->line, g->tid.x, g->tid.y, g->tid.z, g->line); return false;
    }
    if (T.strict && T.n_done) {
      Fiber *f = T.first, *g = T.fibers;
      while (T.state[g->index] != DONE) g++;
      T.tid = f->tid; fail("barrier", f->line, "waits at the barrier of line %d, which %u threads never reach: thread (%u,%u,%u) has returned",
                           f->line, T.n_done, g->tid.x, g->tid.y, g->tid.z); return false;
    }
    T.epoch++; T.voted = T.collecting; T.collecting = empty;
    for (unsigned i = 0; i < T.n_threads; i++) if (T.state[i] == AT_BARRIER) T.state[i] = READY;
  }
}
CC_HIDDEN static char* stacks_for(unsigned n) {                // kept from one launch to the next
  static char* kept; static unsigned kept_n;
  if (n > kept_n) {
    size_t huge = 2u << 20, size = ((size_t)n * CC_STRIDE + CC_MARGIN + huge - 1) / huge * huge;
    char* p = (char*)mmap(nullptr, size + huge, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANON, -1, 0);
    if (p == MAP_FAILED) return nullptr;
    kept = (char*)(((uintptr_t)p + huge - 1) & ~(uintptr_t)(huge - 1)); kept_n = n;
#if defined(MADV_HUGEPAGE)
    madvise(kept, size, MADV_HUGEPAGE);                        // hundreds of stacks on 4 KiB pages overrun the address cache
#endif
  }
  return kept + CC_MARGIN;
}
// Returns 0, or 1 with the reason in `error` (512 bytes). Python holds a lock: one launch at a time.
CC_EXPORT int cc_launch(void (*entry)(void**), void** args, const unsigned* grid, const unsigned* block, size_t dynamic_bytes,
                        int order, uint64_t seed, int strict, char* error) {
  auto& T = now;
  T.entry = entry; T.args = args; T.strict = strict; T.failed = false; T.error[0] = 0;
  T.gdim = dim3(grid[0], grid[1], grid[2]); T.bdim = dim3(block[0], block[1], block[2]);
  unsigned n = T.n_threads = block[0] * block[1] * block[2];
  T.n_warps = (n + 31) / 32;
  T.fibers = (Fiber*)calloc(n, sizeof(Fiber)); T.warps = (Warp*)calloc(T.n_warps, sizeof(Warp));
  T.state = (uint8_t*)calloc(n, 1); T.stacks = (char**)calloc(n, sizeof(char*));
#if CC_ASAN
  char* dynamic = T.dynamic = (char*)malloc(dynamic_bytes ? dynamic_bytes : 1);
#  if defined(CC_PROGRAM)
  fprintf(stderr, "cudacpu-array -1 %llx %llu\n", (unsigned long long)(uintptr_t)dynamic, (unsigned long long)dynamic_bytes);
#  endif
#else
  char* dynamic = (char*)malloc(dynamic_bytes + 128);
  T.dynamic = (char*)(((uintptr_t)dynamic + 127) & ~(uintptr_t)127);
#endif
  for (unsigned i = 0; i < n; i++) {
    Fiber* f = &T.fibers[i];
    f->index = i; f->lane = i & 31; f->warp = &T.warps[i / 32];
    f->tid = {i % block[0], i / block[0] % block[1], i / (block[0] * block[1])};
    if (!f->lane) { f->warp->fibers = f; f->warp->state = T.state + i; }
    f->warp->lanes++;
  }
#if CC_TSAN
  T.sanitizer = __tsan_get_current_fiber();
#endif
  char* stacks = stacks_for(n);
  bool good = stacks != nullptr;
  if (!good) fail("memory", 0, "cannot start: no memory for %u stacks", n);
  uint64_t n_blocks = (uint64_t)grid[0] * grid[1] * grid[2];
  for (uint64_t b = 0; b < n_blocks && good; b++) {
    T.bid = {(unsigned)(b % grid[0]), (unsigned)(b / grid[0] % grid[1]), (unsigned)(b / ((uint64_t)grid[0] * grid[1]))};
    memset(T.dynamic, 0xff, dynamic_bytes);                    // shared memory that nobody has written reads as NaN or -1
    for (unsigned i = 0; i < n; i++) T.stacks[i] = stacks + (size_t)(n - 1 - i) * CC_STRIDE;
    T.n_stacks = n;
    CC_RELEASE(&T.begin); good = run_block(order, seed + b); CC_ACQUIRE(&T.end);
  }
  memcpy(error, T.error, sizeof T.error);
  free(T.fibers); free(T.warps); free(T.state); free(T.stacks); free(dynamic);
  T.fiber = nullptr;
  return !good;
}

// ------------------------------------------------------------------------------------------------ fences around arrays
// A fenced copy of an array ends where an unreadable page begins, so that element n faults; the handler says which array it was. The bytes before
// its start, up to the page before, hold a pattern that is looked at when the kernel is done.
#define CC_FILL 0xa5
struct Fence { char *lo, *data, *hi; size_t bytes; };
static Fence fences[64];
static int n_fences;
CC_EXPORT void* cc_fence(const void* from, size_t bytes, size_t align) {
  size_t page = (size_t)sysconf(_SC_PAGESIZE), used = (bytes + align - 1) / align * align, body = (used + page - 1) / page * page;
  if (n_fences == 64) return nullptr;
  char* p = (char*)mmap(nullptr, body + 2 * page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANON, -1, 0);
  if (p == MAP_FAILED) return nullptr;
  mprotect(p, page, PROT_NONE); mprotect(p + page + body, page, PROT_NONE);
  char* data = p + page + body - used;
  memset(p + page, CC_FILL, (size_t)(data - p) - page);
  fences[n_fences++] = {p, data, p + body + 2 * page, bytes};
  return memcpy(data, from, bytes);
}
CC_EXPORT int cc_written_before() {                            // the index of an array, or -1
  size_t page = (size_t)sysconf(_SC_PAGESIZE);
  for (int i = 0; i < n_fences; i++)
    for (char* p = fences[i].lo + page; p < fences[i].data; p++) if (*p != (char)CC_FILL) return i;
  return -1;
}
CC_EXPORT void cc_unfence() {
  while (n_fences) { Fence f = fences[--n_fences]; munmap(f.lo, f.hi - f.lo); }
}
static struct sigaction old_segv, old_bus;
CC_HIDDEN static void on_fault(int signal, siginfo_t* info, void*) {
  if (!now.fiber) { sigaction(signal, signal == SIGSEGV ? &old_segv : &old_bus, nullptr); return; }  // not ours
  char* at = (char*)info->si_addr;
  int hit = -1;
  for (int i = 0; i < n_fences; i++) if (at >= fences[i].lo && at < fences[i].hi) hit = i;
  if (hit < 0) fail("bounds", -1, "touches address %p, which is in no array", (void*)at);
  else fail("bounds", hit, "touches byte %ld of the %zu bytes of", (long)(at - fences[hit].data), fences[hit].bytes);
  yield();                                                     // never resumed
}
CC_EXPORT void cc_trap(int on) {
  struct sigaction ours;
  memset(&ours, 0, sizeof ours);
  ours.sa_sigaction = on_fault; ours.sa_flags = SA_SIGINFO | SA_NODEFER;
  sigaction(SIGSEGV, on ? &ours : &old_segv, on ? &old_segv : nullptr);
  sigaction(SIGBUS, on ? &ours : &old_bus, on ? &old_bus : nullptr);
}

#if defined(CC_PROGRAM)
// A kernel as a program of its own, for the sanitizers: the launch comes from a file. It says on stderr where each array lies.
static int program(void (**entries)(void**), char** argv) {
  void (*entry)(void**) = entries[atoi(argv[1])];
  FILE* file = fopen(argv[2], "rb");
  uint64_t head[8];
  if (!file || fread(head, 8, 8, file) != 8) return 99;
  unsigned grid[3] = {(unsigned)head[0], (unsigned)head[1], (unsigned)head[2]}, block[3] = {(unsigned)head[3], (unsigned)head[4], (unsigned)head[5]};
  void *args[64], *data[64];
  for (uint64_t i = 0; i < head[7]; i++) {
    uint64_t about[2];                                         // is it an array; bytes
    if (fread(about, 8, 2, file) != 2) return 99;
    data[i] = malloc(about[1] ? about[1] : 1);
    if (fread(data[i], 1, about[1], file) != about[1]) return 99;
    args[i] = about[0] ? (void*)&data[i] : data[i];
    if (about[0]) fprintf(stderr, "cudacpu-array %d %llx %llu\n", (int)i, (unsigned long long)(uintptr_t)data[i], (unsigned long long)about[1]);
  }
  fclose(file);
  char error[512];
  if (cc_launch(entry, args, grid, block, head[6], UP, 1, 1, error)) fprintf(stderr, "cudacpu-error %s\n", error);
  return 0;
}
#endif
}  // namespace cc
