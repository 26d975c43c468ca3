"""The kernels of the active instruction-set tier as C functions, for ``cimport`` (see cython_softmax.pxd)."""

from libc.stdint cimport uintptr_t

from fastsoftmax.backends import compiled

ctypedef void (*map_f32)(const float*, float*, Py_ssize_t) noexcept nogil
ctypedef void (*map_f64)(const double*, double*, Py_ssize_t) noexcept nogil
ctypedef float (*reduce_f32)(const float*, Py_ssize_t) noexcept nogil
ctypedef double (*reduce_f64)(const double*, Py_ssize_t) noexcept nogil

cdef dict addresses = compiled.kernel_addresses()
cdef map_f32 softmax_f32_kernel = <map_f32><uintptr_t>addresses["softmax", "float32"]
cdef map_f64 softmax_f64_kernel = <map_f64><uintptr_t>addresses["softmax", "float64"]
cdef map_f32 log_softmax_f32_kernel = <map_f32><uintptr_t>addresses["log_softmax", "float32"]
cdef map_f64 log_softmax_f64_kernel = <map_f64><uintptr_t>addresses["log_softmax", "float64"]
cdef reduce_f32 logsumexp_f32_kernel = <reduce_f32><uintptr_t>addresses["logsumexp", "float32"]
cdef reduce_f64 logsumexp_f64_kernel = <reduce_f64><uintptr_t>addresses["logsumexp", "float64"]


cdef void softmax_f32(const float* x, float* y, Py_ssize_t n) noexcept nogil:
    softmax_f32_kernel(x, y, n)


cdef void softmax_f64(const double* x, double* y, Py_ssize_t n) noexcept nogil:
    softmax_f64_kernel(x, y, n)


cdef void log_softmax_f32(const float* x, float* y, Py_ssize_t n) noexcept nogil:
    log_softmax_f32_kernel(x, y, n)


cdef void log_softmax_f64(const double* x, double* y, Py_ssize_t n) noexcept nogil:
    log_softmax_f64_kernel(x, y, n)


cdef float logsumexp_f32(const float* x, Py_ssize_t n) noexcept nogil:
    return logsumexp_f32_kernel(x, n)


cdef double logsumexp_f64(const double* x, Py_ssize_t n) noexcept nogil:
    return logsumexp_f64_kernel(x, n)
