/* Work shared among the threads of the OpenMP runtime that torch has loaded.
 *
 * The library is linked with no OpenMP runtime of its own, since two of them would fight for the processors: Python looks
 * up these three functions in torch's and hands them over. Without them everything runs in the caller's thread.
 */
#include <stdint.h>

typedef void (*parallel_function)(void (*body)(void *), void *data, unsigned num_threads, unsigned flags);

static parallel_function run_parallel = 0;

void use_threads(parallel_function parallel) { run_parallel = parallel; }

typedef void (*task_function)(const void *data, int64_t begin, int64_t end);

struct work {
    task_function task;
    const void *data;
    int64_t count, grain, next;
};

/* A thread takes the next `grain` items until none is left. Who computes an item has no influence on its bits. */
static void take_items(void *shared) {
    struct work *work = shared;
    for (;;) {
        const int64_t begin = __atomic_fetch_add(&work->next, work->grain, __ATOMIC_RELAXED);
        if (begin >= work->count)
            return;
        const int64_t end = begin + work->grain;
        work->task(work->data, begin, end < work->count ? end : work->count);
    }
}

static void share(task_function task, const void *data, int64_t count, int64_t grain, int64_t threads) {
    if (threads > 1 && count > grain && run_parallel) {
        struct work work = {task, data, count, grain, 0};
        run_parallel(take_items, &work, (unsigned)threads, 0);
    } else if (count > 0) {
        task(data, 0, count);
    }
}

/* `count` equal items, as many to each thread. */
static void share_evenly(task_function task, const void *data, int64_t count, int64_t threads) {
    share(task, data, count, threads > 1 ? (count + threads - 1) / threads : count, threads);
}
