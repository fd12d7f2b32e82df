// Fibers: the threads of a kernel that runs on a CPU. A fiber runs until it waits for something or ends.
//
// Fibers switch by __builtin_setjmp: swapcontext would make a system call each time.

typedef void* Registers[5];
static Registers scheduler;

// __builtin_longjmp must not be in the function that has called __builtin_setjmp.
[[gnu::noinline]] static void jump(Registers& to) { __builtin_longjmp(to, 1); }

class Fiber {
public:
    void prepare(void* stack, size_t size, void (*body)()) {
        has_started = has_ended = false, is_ready = nullptr;
        getcontext(&start);
        start.uc_stack.ss_sp = stack, start.uc_stack.ss_size = size;
        makecontext(&start, body, 0);
    }
    // Called by the scheduler. Returns when the fiber gives way or ends.
    [[gnu::noinline]] void run() {
        is_ready = nullptr;
        if (__builtin_setjmp(scheduler)) return;
        if (std::exchange(has_started, true)) jump(registers);
        setcontext(&start);
    }
    bool can_run() const { return !has_ended && (!is_ready || is_ready(awaited)); }
    bool is_alive() const { return !has_ended; }

    // Called by the fiber itself.
    [[gnu::noinline]] void give_way() {
        if (!__builtin_setjmp(registers)) jump(scheduler);
    }
    // Gives way until ready() is true, which the scheduler asks: it must not depend on who runs.
    template <class F> void wait_until(F& ready) {
        awaited = &ready, is_ready = [](void* f) { return bool((*(F*)f)()); };
        give_way();
    }
    void end() {  // the last thing that the body does
        has_ended = true;
        jump(scheduler);
    }

private:
    ucontext_t start;
    Registers registers;
    bool (*is_ready)(void*);  // null: yes
    void* awaited;
    bool has_started, has_ended;
};
