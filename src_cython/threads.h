/* A pool of threads for calls that last microseconds.
 *
 * The caller works too; helpers take the blocks of its job one at a time. After a job a helper looks for the next one for
 * SPIN_SECONDS, in which a program that calls in a loop comes back, and then sleeps: one that looks has taken a job up
 * after 0.2 us, one that sleeps after 50, in which the caller goes on alone. OpenMP's threads spin for milliseconds
 * instead, at the cost of whatever else the program does, and hang in a child that was forked after they were used. Here
 * the child forgets them and starts its own.
 *
 * There is one pool and one job at a time: a caller that finds it taken does its blocks alone.
 */
#ifndef FASTSOFTMAX_THREADS_H
#define FASTSOFTMAX_THREADS_H

#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdlib.h>
#include <time.h>

#define SPIN_SECONDS 50e-6
#define MAX_HELPERS 255

typedef void (*block_function)(void *context, ptrdiff_t block);

static struct {
    /* The job. Written by its caller before seats are offered. */
    block_function run;
    void *context;
    ptrdiff_t n_blocks;
    atomic_ptrdiff_t next;    /* block nobody has taken */
    atomic_int seats;         /* for helpers that may still join */
    atomic_int finished;      /* helpers that joined and are done */
    /* The pool. */
    atomic_flag taken;
    atomic_uint generation;   /* of jobs */
    atomic_int sleepers;
    int n_helpers;            /* only touched by the caller that has taken the pool */
    pthread_mutex_t mutex;    /* of the sleep only */
    pthread_cond_t wake;
} pool = {.taken = ATOMIC_FLAG_INIT, .mutex = PTHREAD_MUTEX_INITIALIZER, .wake = PTHREAD_COND_INITIALIZER};

static inline void spin_briefly(void)
{
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ __volatile__("yield");
#endif
}

static inline double seconds(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

static inline void run_blocks_of_job(void)
{
    ptrdiff_t block;
    while ((block = atomic_fetch_add_explicit(&pool.next, 1, memory_order_relaxed)) < pool.n_blocks)
        pool.run(pool.context, block);
}

static inline int take_seat(void)
{
    int seats = atomic_load_explicit(&pool.seats, memory_order_relaxed);
    while (seats > 0)
        if (atomic_compare_exchange_weak_explicit(
                &pool.seats, &seats, seats - 1, memory_order_acquire, memory_order_relaxed))
            return 1;
    return 0;
}

static void wait_for_job_after(unsigned generation)
{
    double deadline = seconds() + SPIN_SECONDS;
    do {
        for (int i = 0; i < 64; i++) {
            if (atomic_load_explicit(&pool.generation, memory_order_acquire) != generation)
                return;
            spin_briefly();
        }
    } while (seconds() < deadline);
    pthread_mutex_lock(&pool.mutex);
    atomic_fetch_add(&pool.sleepers, 1); /* before the last look: the caller looks for sleepers after its change */
    while (atomic_load(&pool.generation) == generation)
        pthread_cond_wait(&pool.wake, &pool.mutex);
    atomic_fetch_sub(&pool.sleepers, 1);
    pthread_mutex_unlock(&pool.mutex);
}

static void *help(void *unused)
{
    unsigned generation = 0;
    for (;;) {
        wait_for_job_after(generation);
        generation = atomic_load_explicit(&pool.generation, memory_order_acquire);
        if (take_seat()) {
            run_blocks_of_job();
            atomic_fetch_add_explicit(&pool.finished, 1, memory_order_release);
        }
    }
    return unused;
}

/* Start helpers up to a number; fewer where the system gives no more. Signals are left to Python's own threads. */
static void start_helpers(int wanted)
{
    sigset_t all, before;
    pthread_attr_t attributes;
    pthread_t thread;
    if (pool.n_helpers >= wanted)
        return;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    pthread_attr_init(&attributes);
    pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
    while (pool.n_helpers < wanted && pthread_create(&thread, &attributes, help, NULL) == 0)
        pool.n_helpers++;
    pthread_attr_destroy(&attributes);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
}

/* Call run(context, block) for each block below n_blocks, on up to n_threads threads, and return when all are done. The
 * name is for other libraries to know this one by: it is the only symbol that is exported. */
__attribute__((visibility("default")))
void fastsoftmax_run_on_threads(block_function run, void *context, ptrdiff_t n_blocks, int n_threads)
{
    int helpers = (int)(n_blocks < n_threads ? n_blocks : n_threads) - 1, missed;
    if (helpers > MAX_HELPERS)
        helpers = MAX_HELPERS;
    if (helpers < 1 || atomic_flag_test_and_set_explicit(&pool.taken, memory_order_acquire)) {
        for (ptrdiff_t block = 0; block < n_blocks; block++)
            run(context, block);
        return;
    }
    start_helpers(helpers);
    pool.run = run;
    pool.context = context;
    pool.n_blocks = n_blocks;
    atomic_store_explicit(&pool.next, 0, memory_order_relaxed);
    atomic_store_explicit(&pool.finished, 0, memory_order_relaxed);
    atomic_store_explicit(&pool.seats, helpers, memory_order_release);
    atomic_fetch_add(&pool.generation, 1);
    if (atomic_load(&pool.sleepers) > 0) {
        pthread_mutex_lock(&pool.mutex);
        pthread_cond_broadcast(&pool.wake);
        pthread_mutex_unlock(&pool.mutex);
    }
    run_blocks_of_job();
    missed = atomic_exchange_explicit(&pool.seats, 0, memory_order_relaxed);
    for (int i = 0; atomic_load_explicit(&pool.finished, memory_order_acquire) < helpers - missed; i++) {
        if (i < 1000)
            spin_briefly();
        else
            sched_yield(); /* the helper may be waiting for this very core */
    }
    atomic_flag_clear_explicit(&pool.taken, memory_order_release);
}

/* The helpers of the parent do not exist in a forked child, and whoever held a lock there does not either. */
static void forget_pool(void)
{
    pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
    pthread_cond_t wake = PTHREAD_COND_INITIALIZER;
    pool.mutex = mutex;
    pool.wake = wake;
    pool.n_helpers = 0;
    atomic_store(&pool.seats, 0);
    atomic_store(&pool.sleepers, 0);
    atomic_store(&pool.generation, 0);
    atomic_flag_clear(&pool.taken);
}

static int forget_pool_after_fork(void) { return pthread_atfork(NULL, NULL, forget_pool); }

#endif
