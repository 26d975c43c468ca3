"""softmax, log_softmax and logsumexp of arrays on a device, in every traversal, format and place in memory."""

import ml_dtypes
import numpy as np
import pytest

import fastsoftmax
from fastsoftmax import record_plans
from fastsoftmax.cuda._plan import IN_FLIGHT
from tests.reference import exact, max_ulp_error, summand_scale

DTYPES = {name: np.dtype(getattr(np, name, None) or getattr(ml_dtypes, name)) for name in
          ("float16", "bfloat16", "float32", "float64")}  # fmt: skip
# Of the result, or of the larger summand of logsumexp. 16-bit results are rounded once from float32.
MAX_ULPS = {"float16": 0.51, "bfloat16": 0.51, "float32": 2.0, "float64": 2.0}


@pytest.fixture(params=DTYPES)
def dtype(request):
    return DTYPES[request.param]


@pytest.fixture(params=["softmax", "log_softmax", "logsumexp"])
def function(request):
    return request.param


def normals(shape, dtype, seed=0):
    return (np.random.default_rng(seed).normal(size=shape) * 5).astype(dtype)


def check(gpu, function, x, axis, offset=0, out_offset=None):
    """Compute on the device, hold the result against long double, and return the plan that served.

    The arrays begin so many elements after a boundary; the output is a new one where its place is not given.
    """
    expected = exact(function, x, axis)
    out = None
    if out_offset is not None:
        shape = np.squeeze(expected, axis).shape if function == "logsumexp" else x.shape
        out = gpu.to_device(np.full(shape, 7, x.dtype), out_offset)
    with record_plans() as plans:
        result = getattr(fastsoftmax, function)(gpu.to_device(x, offset), axis, out=out)
    assert out is None or result is out
    host = gpu.to_host(result)
    assert host.dtype == x.dtype
    scale = summand_scale(x, axis).reshape(host.shape) if function == "logsumexp" else None
    assert max_ulp_error(host, expected.reshape(host.shape), scale) <= MAX_ULPS[x.dtype.name]
    (plan,) = plans
    assert (plan.function, plan.backend) == (function, "cuda")
    return plan.launch


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("shape", [(3, 1), (2, 3), (5, 10), (2, 129)])
def test_rows_within_a_warp(gpu, function, dtype, shape, offset):
    launch = check(gpu, function, normals(shape, dtype), 1, offset, offset)
    assert launch.traversal == "rows"
    assert launch.vector == 16 // dtype.itemsize
    assert launch.threads_per_row <= 32
    assert launch.threads_per_row * launch.elements_per_thread >= shape[1]


def test_vectors_need_the_same_alignment_everywhere(gpu, dtype):
    x = normals((3, 37), dtype)
    assert check(gpu, "softmax", x, 1, 1, 2).vector == 1
    assert check(gpu, "softmax", x, 1, 1).vector == 16 // dtype.itemsize  # a new result has the alignment of the input
    assert check(gpu, "logsumexp", x, 1, 1, 2).vector == 16 // dtype.itemsize  # which writes an element per row


@pytest.mark.parametrize("n_cols", [1024, 1027])
def test_rows_of_a_block(gpu, function, n_cols):
    launch = check(gpu, function, normals((2, n_cols), np.float32), 1)
    assert (launch.traversal, launch.vector, launch.rows_per_block) == ("rows", 4, 1)
    assert launch.threads_per_row > 32


def test_rows_that_do_not_fit_in_registers(gpu, function, small_plans):
    launch = check(gpu, function, normals((2, 6001), np.float32), 1, 3, 3)
    assert (launch.traversal, launch.stored, launch.has_rest) == ("rows", 5 * IN_FLIGHT, True)
    assert launch.shared_bytes == 5 * IN_FLIGHT * 64 * 16


@pytest.mark.parametrize("n_cols", [513, 1537, 5632])  # a little of one tile or two, and five to their last element
def test_rows_that_end_in_shared_memory(gpu, n_cols, small_plans):
    launch = check(gpu, "softmax", normals((2, n_cols), np.float32), 1)
    assert (launch.stored, launch.has_rest) == (IN_FLIGHT * -(-(n_cols - 512) // 1024), False)


def test_long_rows_in_other_formats_and_places(gpu, dtype, small_plans):
    assert check(gpu, "softmax", normals((2, 1031), dtype), 1, 1, 1).stored
    apart = check(gpu, "softmax", normals((2, 391), dtype), 1, 1, 2)
    assert (apart.vector, apart.stored, apart.has_rest) == (1, 2 * IN_FLIGHT, False)


def test_rows_split_over_blocks(gpu, function, small_plans):
    launch = check(gpu, function, normals((1, 2500), np.float32), 1, 3, 3)
    assert (launch.traversal, launch.n_chunks) == ("split", 3)


@pytest.mark.parametrize("shape", [(21, 24), (3, 9, 21)])
def test_strips(gpu, function, dtype, shape, small_plans):
    launch = check(gpu, function, normals(shape, dtype), -2)
    assert launch.traversal == "strips"
    assert launch.vector == (16 // dtype.itemsize if shape[-1] * dtype.itemsize % 16 == 0 else 1)


def test_strips_split_over_blocks(gpu, function, small_plans):
    x = normals((130, 9), np.float32)
    x[40:80, 3] = -np.inf  # the only elements of a row in some chunks
    launch = check(gpu, function, x, 0)
    assert (launch.traversal, launch.n_chunks) == ("strips", 5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_vectors_of_strips_split_over_blocks(gpu, dtype, small_plans):
    launch = check(gpu, "softmax", normals((2, 270, 8), DTYPES[dtype]), 1)
    assert launch.vector == 16 // DTYPES[dtype].itemsize
    assert launch.n_chunks > 1


@pytest.mark.parametrize("axis", [0, 1, 2, (0, 2), (0, 1), None])
def test_any_axes(gpu, function, axis):
    check(gpu, function, normals((3, 4, 5), np.float32), axis)


def test_fortran_order_is_kept(gpu):
    x = np.asfortranarray(normals((5, 12), np.float32))
    for axis in (0, 1):
        check(gpu, "softmax", x, axis)
    assert gpu.to_host(fastsoftmax.softmax(gpu.to_device(x, 0), 1)).shape == x.shape


SPECIAL_ROWS = {
    "nan": [1.0, np.nan, 2.0],
    "one +inf": [1.0, np.inf, 0.0],
    "two +inf": [1.0, np.inf, np.inf],
    "nan beside +inf": [np.inf, np.nan, 0.0],
    "all -inf": [-np.inf] * 3,
    "one -inf": [0.0, -np.inf, -1.0],
    "only one that is not -inf": [0.0, -np.inf, -np.inf],
    "far apart": [0.0, -40.0, -np.inf],
    "largest numbers": [1.0, -1.0, 1.0],
}


@pytest.mark.parametrize(("dtype", "axis"), [("bfloat16", 1), ("float32", 0), ("float32", 1), ("float64", 0)])
@pytest.mark.parametrize("row", SPECIAL_ROWS)
def test_special_values(gpu, function, dtype, row, axis):
    dtype = DTYPES[dtype]
    x = np.array([SPECIAL_ROWS[row]] * 2).astype(dtype)
    if row == "largest numbers":
        x = (x.astype(np.float64) * float(ml_dtypes.finfo(dtype).max)).astype(dtype)
    x = np.ascontiguousarray(x if axis else x.T)
    result = gpu.to_host(getattr(fastsoftmax, function)(gpu.to_device(x, 0), axis))
    expected = getattr(fastsoftmax, function)(x, axis, backend="numpy")
    np.testing.assert_allclose(result.astype(float), expected.astype(float), rtol=1e-2, atol=0)
    assert np.array_equal(result == 0, expected == 0)


@pytest.mark.parametrize("row", ["nan", "two +inf", "all -inf"])
def test_special_values_in_one_of_many_chunks(gpu, function, row, small_plans):
    x = np.full((1, 1100), -np.inf if row == "all -inf" else -3.0, np.float32)
    x[0, 1050:1053] = SPECIAL_ROWS[row]
    data = gpu.to_device(x, 0)
    with record_plans() as plans:
        result = gpu.to_host(getattr(fastsoftmax, function)(data, 1))
    assert plans[0].launch.n_chunks == 2
    np.testing.assert_allclose(result, getattr(fastsoftmax, function)(x, 1, backend="numpy"), rtol=1e-5)


@pytest.mark.parametrize("value", [-1e30, 3e8, 1e4, -700.0, 80.0])
def test_large_common_offsets(gpu, value):
    check(gpu, "softmax", (normals((2, 40), np.float32) + np.float32(value)).astype(np.float32), 1)


def test_wide_rows_are_exact_where_differences_are_not(gpu, function):
    x = np.random.default_rng(1).uniform(-80, 80, (4, 100)).astype(np.float32)
    check(gpu, function, x, 1)


def test_subnormal_results_are_rounded_once(gpu):
    x = np.array([[0.0, -88.5, -95.0, -103.0, -104.5]], np.float32)
    check(gpu, "softmax", x, 1)


def test_out_and_in_place(gpu):
    x = normals((4, 33), np.float32)
    expected = fastsoftmax.softmax(x, 1)
    data, out = gpu.to_device(x, 0), gpu.to_device(np.zeros_like(x), 0)
    assert fastsoftmax.softmax(data, 1, out=out) is out
    np.testing.assert_allclose(gpu.to_host(out), expected, rtol=1e-6)
    assert fastsoftmax.softmax(data, 1, out=data) is data
    np.testing.assert_allclose(gpu.to_host(data), expected, rtol=1e-6)


def test_keepdims_and_empty_arrays(gpu):
    x = normals((2, 3, 4), np.float32)
    kept = fastsoftmax.logsumexp(gpu.to_device(x, 0), (0, 2), keepdims=True)
    assert tuple(kept.shape) == (1, 3, 1)
    empty = gpu.to_device(np.empty((3, 0), np.float32), 0)
    assert tuple(fastsoftmax.softmax(empty, 1).shape) == (3, 0)
    assert np.all(gpu.to_host(fastsoftmax.logsumexp(empty, 1)) == -np.inf)


def test_results_are_the_same_each_time(gpu, small_plans):
    x = gpu.to_device(normals((1, 2500), np.float32), 0)
    first, second = (gpu.to_host(fastsoftmax.softmax(x, 1)).tobytes() for _ in range(2))
    assert first == second


def test_calls_are_remembered_by_all_that_distinguishes_them(gpu):
    x = normals((4, 6), np.float32)
    calls = [(axis, keepdims) for axis in (0, 1, None) for keepdims in (False, True)]
    for _ in range(2):
        for axis, keepdims in calls:
            data = gpu.to_device(x, 0)
            result = gpu.to_host(fastsoftmax.logsumexp(data, axis, keepdims=keepdims))
            expected = fastsoftmax.logsumexp(x, axis, keepdims=keepdims, backend="numpy")
            assert np.shape(result) == np.shape(expected)
            np.testing.assert_allclose(result, expected, rtol=1e-6)
    with pytest.raises(TypeError, match="axis must be"):
        fastsoftmax.logsumexp(gpu.to_device(x, 0), True)
    assert check(gpu, "softmax", x, 1, 1).vector == check(gpu, "softmax", x, 1, 0).vector == 4
    assert check(gpu, "softmax", x, 1, 1).vector == check(gpu, "softmax", x, 1, 0).vector == 4


def test_bad_input(gpu):
    data = gpu.to_device(normals((3, 4), np.float32), 0)
    with pytest.raises(TypeError, match="must be one of float16, bfloat16, float32, float64, not int32"):
        fastsoftmax.softmax(gpu.to_device(np.ones(3, np.int32), 0))
    with pytest.raises(np.exceptions.AxisError):
        fastsoftmax.softmax(data, 2)
    with pytest.raises(TypeError, match="out must be a"):
        fastsoftmax.softmax(data, 1, out=np.empty((3, 4), np.float32))
    with pytest.raises(TypeError, match="out must have dtype float32, not float64"):
        fastsoftmax.softmax(data, 1, out=gpu.to_device(np.empty((3, 4)), 0))
    with pytest.raises(ValueError, match="out must have shape"):
        fastsoftmax.softmax(data, 1, out=gpu.to_device(np.empty((4, 3), np.float32), 0))
    with pytest.raises(TypeError, match="backend 'numpy' does not compute on arrays on a CUDA device"):
        fastsoftmax.softmax(data, 1, backend="numpy")


@pytest.mark.usefixtures("gpu")
def test_arrays_in_main_memory(function, dtype):
    x = normals((2, 5, 7), dtype)[:, ::-2]
    with record_plans() as plans:
        result = getattr(fastsoftmax, function)(x, 1, backend="cuda")
    assert (plans[0].backend, plans[0].launch.traversal) == ("cuda", "rows")
    expected = exact(function, x, 1)
    scale = summand_scale(x, 1).reshape(result.shape) if function == "logsumexp" else None
    assert isinstance(result, np.ndarray)
    assert max_ulp_error(result, expected.reshape(result.shape), scale) <= MAX_ULPS[dtype.name]


@pytest.mark.usefixtures("gpu")
def test_b_is_left_to_other_backends():
    with pytest.raises(TypeError, match="does not compute logsumexp with b"):
        fastsoftmax.logsumexp([1.0, 2.0], b=[1.0, 2.0], backend="cuda")


# On a card.


@pytest.mark.usefixtures("card")
@pytest.mark.parametrize("shape", [(64, 1000), (64, 1025), (33, 16385), (300, 32768), (200, 65536), (2, 1_000_003)])
def test_large_rows(gpu, function, dtype, shape):
    check(gpu, function, normals(shape, dtype), 1)
    check(gpu, function, normals(shape, dtype), 1, 1)


@pytest.mark.usefixtures("card")
@pytest.mark.parametrize(("shape", "axis"), [((4096, 512), 0), ((16, 21, 64, 64), 1), ((64, 100, 1000), 1)])
def test_large_strips(gpu, function, dtype, shape, axis):
    check(gpu, function, normals(shape, dtype), axis)
