# The kernels for other Cython code: `from fastsoftmax.cython_softmax cimport softmax_f32`.
#
# Each works on one row of n adjacent elements, on the fastest instruction-set tier of the processor, and gives the bits
# that the Python function gives. Input and output may be the same memory, but may not overlap otherwise. An empty row
# has no output; its logsumexp is -inf.

cdef void softmax_f32(const float* x, float* y, Py_ssize_t n) noexcept nogil
cdef void softmax_f64(const double* x, double* y, Py_ssize_t n) noexcept nogil
cdef void log_softmax_f32(const float* x, float* y, Py_ssize_t n) noexcept nogil
cdef void log_softmax_f64(const double* x, double* y, Py_ssize_t n) noexcept nogil
cdef float logsumexp_f32(const float* x, Py_ssize_t n) noexcept nogil
cdef double logsumexp_f64(const double* x, Py_ssize_t n) noexcept nogil
