#include "block.h"

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>

#include "order.h"
#include "runtime.h"
#include "shared.h"
#include "symbols.h"

namespace ppnet::emulator {

Block block;
Thread* current = nullptr;

namespace {

constexpr size_t kMaxShared = 227 * 1024;  // of a block, from compute capability 9.0 on

Stacks stacks;
Context host;
Launch launched;
uint64_t chosen_seed = [] {
  const char* text = std::getenv("PPNET_EMULATOR_SEED");
  return text ? std::strtoull(text, nullptr, 10) : 0;
}();
char text[2048];
int error;

Order order;

Thread* thread_of(int warp, int lane) { return &block.thread[warp * 32 + lane]; }

// The thread that goes on next; null where none can.
Thread* next() {
  if (chosen_seed != 0) {
    for (int i = 0; i < block.warps; ++i) {
      const int w = order.warps[i];
      if (block.warp[w].ready) return thread_of(w, order.first(block.warp[w].ready));
    }
    return nullptr;
  }
  // Taking turns: the rest of this warp, the following warps, the first lanes of this one.
  const uint32_t rest = block.warp[current->warp].ready & ~((uint32_t{2} << current->lane) - 1);
  if (rest) return thread_of(current->warp, lowest(rest));
  for (int i = 1; i <= block.warps; ++i) {
    const int w = (current->warp + i) % block.warps;
    if (block.warp[w].ready) return thread_of(w, lowest(block.warp[w].ready));
  }
  return nullptr;
}

// Without its folder.
const char* short_name(Where where) {
  const char* slash = where.file ? std::strrchr(where.file, '/') : nullptr;
  return slash ? slash + 1 : where.file ? where.file : "?";
}

// Ends the launch: the contexts of its threads are left as they are.
[[noreturn]] void give_up() {
  Thread* last = current;
  current = nullptr;
  switch_context(last->context, host);
  std::abort();
}

[[noreturn]] void deadlock() {
  const Thread* waiting[2] = {nullptr, nullptr};  // two that wait for different things, if there are
  for (int i = 0; i < block.threads; ++i) {
    const Thread& t = block.thread[i];
    if (t.state == State::returned) continue;
    if (!waiting[0]) waiting[0] = &t;
    else if (!waiting[1] && (t.where.line != waiting[0]->where.line || t.what != waiting[0]->what)) waiting[1] = &t;
  }
  const Thread& t = *waiting[0];
  if (!waiting[1]) fail(t, t.where, "deadlock: all threads wait, this one in %s", t.what);
  const Thread& u = *waiting[1];
  fail(t, t.where, "deadlock: this thread waits in %s, while thread (%u, %u, %u) waits in %s at %s:%d", t.what,
       u.index.x, u.index.y, u.index.z, u.what, short_name(u.where), u.where.line);
}

void go_on() {
  Thread* to = next();
  if (!to) deadlock();
  if (to == current) return;
  Thread* from = current;
  current = to;
  switch_context(from->context, to->context);
}

void wait(State state, const char* what, Where where) {
  current->state = state;
  current->what = what;
  current->where = where;
  block.warp[current->warp].ready &= ~(uint32_t{1} << current->lane);
  go_on();
}

void wake(Thread& t) {
  t.state = State::ready;
  block.warp[t.warp].ready |= uint32_t{1} << t.lane;
}

// After threads have met: the one that came last is not always the one to go on.
void after_meeting() {
  if (chosen_seed == 0) return;
  if (order.bits() % 2) order.draw(block.warps);
  go_on();
}

// A thread that waits for `t`, or null.
const Thread* waiting_for(const Thread& t) {
  for (int i = 0; block.arrived > 0 && i < block.threads; ++i)
    if (block.thread[i].state == State::at_barrier) return &block.thread[i];
  const Warp& w = block.warp[t.warp];
  for (uint32_t rest = w.waiting; rest; rest &= rest - 1)
    if (w.mask[lowest(rest)] >> t.lane & 1) return thread_of(t.warp, lowest(rest));
  return nullptr;
}

// Every context begins here.
void thread_main() {
  entered();
  launched.call(launched.arguments);
  Thread& t = *current;
  Warp& w = block.warp[t.warp];
  t.state = State::returned;
  w.ready &= ~(uint32_t{1} << t.lane);
  w.returned |= uint32_t{1} << t.lane;
  if (const Thread* u = waiting_for(t))
    fail(t, u->where, "this thread returned, while thread (%u, %u, %u) waits for it in %s", u->index.x, u->index.y,
         u->index.z, u->what);
  if (++block.returned < block.threads) go_on();
  give_up();
}

void run_block(uint64_t number) {
  const uint64_t x = block.grid.x, y = block.grid.y;
  block.index = {static_cast<unsigned>(number % x), static_cast<unsigned>(number / x % y),
                 static_cast<unsigned>(number / x / y)};
  block.returned = block.arrived = block.sum = 0;
  order.state = chosen_seed * 0x2545f4914f6cdd1du + number;
  order.draw(block.warps);
  std::memset(block.warp, 0, sizeof block.warp);
  const dim3 s = block.shape;
  for (int i = 0; i < block.threads; ++i) {
    Thread& t = block.thread[i];
    const auto n = static_cast<unsigned>(i);
    t.index = {n % s.x, n / s.x % s.y, n / s.x / s.y};
    t.warp = i / 32;
    t.lane = i % 32;
    t.calls = 0;
    t.copies.clear();
    t.groups.clear();
    block.warp[t.warp].exists |= uint32_t{1} << t.lane;
    prepare(t.context, stacks.bottom(i), thread_main);
    wake(t);
  }
  current = &block.thread[0];
  current = chosen_seed != 0 ? next() : current;
  switch_context(host, current->context);
  current = nullptr;
}

int refuse(const char* why) {
  std::snprintf(text, sizeof text, "emulated kernel %s cannot be launched: %s", name_of(launched.kernel), why);
  return cudaErrorInvalidConfiguration;
}

int check_launch(const Launch& l) {
  const uint64_t threads = uint64_t{l.shape.x} * l.shape.y * l.shape.z;
  if (threads == 0 || threads > kMaxThreads || l.shape.z > 64)
    return refuse("a block has 1 .. 1024 threads, 64 along z");
  if (l.grid.x == 0 || l.grid.y == 0 || l.grid.z == 0 || l.grid.x > INT32_MAX || l.grid.y > 65535 || l.grid.z > 65535)
    return refuse("a grid has 1 .. 2^31 - 1 blocks along x and 1 .. 65535 along y and z");
  if (l.shared_bytes > kMaxShared) return refuse("a block has at most 227 KB of shared memory");
  return 0;
}

// Lanes that wait for each other must have called the same with the same mask.
void check_agreement(const Thread& t, Where where, const char* what) {
  const Warp& w = block.warp[t.warp];
  const uint32_t mask = w.mask[t.lane];
  const auto agrees = [&](int l) { return w.mask[l] == mask && w.operation[l] == w.operation[t.lane]; };
  // Most often all that wait are of one mask, and agree with each other.
  if (w.waiting == 0 || (agrees(lowest(w.waiting)) && (w.waiting & ~mask) == 0)) return;
  for (uint32_t rest = w.waiting; rest; rest &= rest - 1) {
    const int l = lowest(rest);
    if (agrees(l) || !((mask >> l & 1) || (w.mask[l] >> t.lane & 1))) continue;
    const Thread& u = *thread_of(t.warp, l);
    fail(t, where, "%s with mask 0x%08x, while lane %d waits in %s with mask 0x%08x at %s:%d", what, mask, l, u.what,
         w.mask[l], short_name(u.where), u.where.line);
  }
}

}  // namespace

void fail(const Thread& thread, Where where, const char* format, ...) {
  int n = std::snprintf(text, sizeof text, "emulated kernel %s, block (%u, %u, %u), thread (%u, %u, %u), %s:%d (%s)",
                        name_of(launched.kernel), block.index.x, block.index.y, block.index.z, thread.index.x,
                        thread.index.y, thread.index.z, short_name(where), where.line,
                        where.function ? where.function : "?");
  if (chosen_seed != 0)
    n += std::snprintf(text + n, sizeof text - static_cast<size_t>(n), ", seed %llu",
                       static_cast<unsigned long long>(chosen_seed));
  n += std::snprintf(text + n, sizeof text - static_cast<size_t>(n), ": ");
  va_list values;
  va_start(values, format);
  std::vsnprintf(text + n, sizeof text - static_cast<size_t>(n), format, values);
  va_end(values);
  error = cudaErrorLaunchFailure;
  if (!current) {
    std::fprintf(stderr, "%s\n", text);
    std::abort();
  }
  give_up();
}

int barrier(int value, const char* what, Where where) {
  if (block.returned > 0)
    fail(*current, where, "%s, but %d of %d threads of the block have returned", what, block.returned, block.threads);
  if (block.arrived > 0) {
    for (int i = 0; i < block.threads; ++i) {
      const Thread& t = block.thread[i];
      if (t.state != State::at_barrier) continue;
      if (t.where.line != where.line || std::strcmp(t.where.file, where.file) != 0)
        fail(*current, where, "%s, while thread (%u, %u, %u) waits in the %s of another line, %s:%d", what, t.index.x,
             t.index.y, t.index.z, t.what, short_name(t.where), t.where.line);
      break;
    }
  }
  block.sum += value;
  if (++block.arrived < block.threads) {
    wait(State::at_barrier, what, where);
    return block.met_sum;
  }
  block.met_sum = block.sum;  // stays until all meet again, so until every thread has read it
  block.sum = block.arrived = 0;
  for (int i = 0; i < block.threads; ++i) wake(block.thread[i]);
  const int sum = block.met_sum;
  after_meeting();
  return sum;
}

void together(Operation operation, uint32_t mask, const void* in, void* out, const char* what, Where where) {
  Thread& t = *current;
  Warp& w = block.warp[t.warp];
  const uint32_t lane = uint32_t{1} << t.lane;
  if (!(mask & lane))
    fail(t, where, "%s with mask 0x%08x, which does not name the calling lane %d", what, mask, t.lane);
  if (mask & ~w.exists)
    fail(t, where, "%s with mask 0x%08x, but the warp has the lanes 0x%08x alone", what, mask, w.exists);
  if (mask & w.returned)
    fail(t, where, "%s with mask 0x%08x, but lane %d has returned", what, mask, lowest(mask & w.returned));
  w.posted.in[t.lane] = in;
  w.posted.out[t.lane] = out;
  w.mask[t.lane] = mask;
  w.operation[t.lane] = operation;
  check_agreement(t, where, what);
  if ((w.waiting | lane) != (w.waiting | mask)) {
    w.waiting |= lane;
    wait(State::in_warp, what, where);
    return;
  }
  t.where = where;
  t.what = what;
  operation(w.posted, mask);
  for (uint32_t rest = mask & ~lane; rest; rest &= rest - 1) wake(*thread_of(t.warp, lowest(rest)));
  w.waiting &= ~mask;
  after_meeting();
}

void may_switch() {
  if (chosen_seed == 0) {
    if (++current->calls % 256 == 0) go_on();
  } else if (order.bits() % 8 == 0) {
    order.draw(block.warps);
    go_on();
  }
}

uint32_t random_bits() { return chosen_seed == 0 ? 0 : order.bits(); }

int run(const Launch& launch) {
  static std::mutex one_at_a_time;  // `__shared__` variables are the library's
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  launched = launch;
  error = check_launch(launch);
  if (error != 0) return error;
  block.grid = launch.grid;
  block.shape = launch.shape;
  block.threads = static_cast<int>(launch.shape.x * launch.shape.y * launch.shape.z);
  block.warps = (block.threads + 31) / 32;
  stacks.reserve(block.threads);
  Shared shared(launch.shared_bytes);
  block.shared = shared.begin();
  block.shared_bytes = launch.shared_bytes;
  const uint64_t blocks = uint64_t{launch.grid.x} * launch.grid.y * launch.grid.z;
  const uint64_t first = chosen_seed % blocks;
  for (uint64_t i = 0; i < blocks; ++i) {
    if (i > 0) shared.poison();
    poison_variables();
    const uint64_t turned = (first + i) % blocks;
    run_block(chosen_seed % 2 ? blocks - 1 - turned : turned);
    if (error != 0) {
      stacks.clean();
      return error;
    }
    if (!shared.guards_untouched()) {
      std::snprintf(text, sizeof text,
                    "emulated kernel %s, block (%u, %u, %u): wrote outside of its %zu bytes of dynamic shared memory",
                    name_of(launched.kernel), block.index.x, block.index.y, block.index.z, launch.shared_bytes);
      return cudaErrorLaunchFailure;
    }
  }
  return 0;
}

const char* message() { return text; }
void set_seed(uint64_t seed) { chosen_seed = seed; }
uint64_t seed() { return chosen_seed; }

}  // namespace ppnet::emulator
