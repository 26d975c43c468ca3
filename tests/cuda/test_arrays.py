"""Arrays of other libraries, by stand-ins that offer what the interfaces prescribe and nothing else.

Only the simulator can have them: a stand-in needs memory that is none of a library's.
"""

import numpy as np
import pytest

import fastsoftmax
from fastsoftmax.cuda import _arrays, _launch
from tests.reference import exact, max_ulp_error

pytestmark = pytest.mark.usefixtures("simulated")


class Named:
    """``__cuda_array_interface__`` version 3, and nothing else."""

    def __init__(self, elements, read_only=False, **entries):
        self.elements = elements
        address = elements.ctypes.data if elements.size else 0
        strides = None if elements.flags.c_contiguous else elements.strides
        self.interface = {"shape": elements.shape, "typestr": elements.dtype.str, "version": 3, "strides": strides}
        self.interface |= {"data": (address, read_only), **entries}

    @property
    def __cuda_array_interface__(self):
        return self.interface


class Lent:
    """DLPack, and nothing else. What is asked of it is kept in ``asked``."""

    device = (2, 0)

    def __init__(self, elements):
        self.elements, self.asked = elements, []

    def __dlpack_device__(self):
        return self.device

    def __dlpack__(self, *, stream=None):
        self.asked.append(stream)
        return self.elements


class Namespaced(Lent):
    """An array of a library with the array API, which gets results back through DLPack."""

    def __array_namespace__(self):
        return self

    def from_dlpack(self, array):
        self.asked.append("handed back")
        return Namespaced(array.elements)


@pytest.fixture
def simulated(gpu, monkeypatch):
    """Have new arrays of Numba's made in simulated memory, and its devices asked by none."""
    if not hasattr(gpu, "allocate"):
        pytest.skip("stand-ins have no memory on a card")

    def new_array(shape, dtype, offset, stream):
        size = int(np.prod(shape))
        memory = gpu.allocate((size + offset) * dtype.itemsize).view(dtype)[offset:]
        return Named(memory.reshape(shape), stream=stream or None)

    def assign(x, value, stream):
        x.elements[...] = value.elements

    monkeypatch.setattr(_arrays, "new_array", new_array)
    monkeypatch.setattr(_arrays, "assign", assign)
    monkeypatch.setattr(_launch, "queue_behind", lambda stream, other: gpu.streams.append((stream, "behind", other)))
    monkeypatch.setattr(_arrays, "device_of", lambda address: 0)
    gpu.streams.clear()


def on_device(gpu, array, offset=0):
    return gpu.to_device(array, offset).elements


def normals(shape, dtype=np.float32):
    return np.random.default_rng(0).normal(size=shape).astype(dtype)


@pytest.mark.parametrize("stream", [None, 1, 2, 0x5EED])
def test_the_interface_names_the_stream(gpu, stream):
    """None asks for no order, 1 and 2 are the default streams; the result names the stream that computes it."""
    x = normals((3, 10))
    for _ in range(2):  # looked up the second time
        result = fastsoftmax.softmax(Named(on_device(gpu, x), stream=stream), 1)
        assert type(result) is Named
        assert result.interface["stream"] == stream
        assert max_ulp_error(result.elements, exact("softmax", x, 1)) <= 2
    assert gpu.streams == [stream or 0] * 2


def test_the_interface_may_leave_out_what_it_may(gpu):
    x = normals((3, 4))
    given = Named(on_device(gpu, x))
    del given.interface["strides"]
    result = fastsoftmax.logsumexp(given, 1)
    assert max_ulp_error(result.elements, exact("logsumexp", x, 1)[:, 0]) <= 2


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_the_interface_has_strides(gpu, axis):
    x = normals((6, 8))[::-2, ::3]
    memory = on_device(gpu, normals((6, 8)))[::-2, ::3]
    result = fastsoftmax.softmax(Named(memory), axis)
    assert max_ulp_error(result.elements, exact("softmax", x, axis)) <= 2


def test_arrays_that_the_interface_names_wrongly_or_not_wholly(gpu):
    memory = on_device(gpu, normals((3, 4)))
    with pytest.raises(TypeError, match="has a mask"):
        fastsoftmax.softmax(Named(memory, mask=Named(memory)), 1)
    with pytest.raises(TypeError, match=r"x on a CUDA device must be one of .*, not >f4"):
        fastsoftmax.softmax(Named(memory, typestr=">f4"), 1)
    with pytest.raises(ValueError, match="out is read-only"):
        fastsoftmax.softmax(Named(memory), 1, out=Named(memory, read_only=True))
    with pytest.raises(TypeError, match="out must be a Named on the same device"):
        fastsoftmax.softmax(Named(memory), 1, out=[0.0])
    assert gpu.streams == []


def test_a_result_goes_where_it_is_told_to(gpu):
    x = normals((3, 4))
    out = Named(on_device(gpu, np.zeros_like(x)), stream=3)
    assert fastsoftmax.softmax(Named(on_device(gpu, x), stream=9), 1, out=out) is out
    assert gpu.streams == [(9, "behind", 3), 9, (3, "behind", 9)]
    assert max_ulp_error(out.elements, exact("softmax", x, 1)) <= 2


def test_streams_wait_for_each_other_where_arrays_name_several(gpu):
    p, g = (Named(on_device(gpu, normals((3, 4))), stream=stream) for stream in (None, 5))
    fastsoftmax.softmax_vjp(p, g, 1)
    assert gpu.streams == [(0, "behind", 5), 0]
    gpu.streams.clear()
    fastsoftmax.softmax_vjp(g, p, 1)
    fastsoftmax.softmax_vjp(g, g, 1, out=g)
    assert gpu.streams == [5, 5]


def test_empty_arrays_have_no_address(gpu):
    result = fastsoftmax.softmax(Named(on_device(gpu, np.empty((0, 3), np.float32))), 1)
    assert result.elements.shape == (0, 3)
    assert gpu.streams == []


def test_dlpack_puts_streams_in_order(gpu):
    x = normals((3, 10))
    lender = Lent(on_device(gpu, x))
    result = fastsoftmax.softmax(lender, 1)
    assert lender.asked == [7]  # the stream that the borrower is using
    assert max_ulp_error(gpu.to_host(result), exact("softmax", x, 1)) <= 2


def test_results_are_handed_back_by_dlpack(gpu):
    p, g = (Namespaced(on_device(gpu, array)) for array in (normals((3, 4)), normals((3, 4))))
    result = fastsoftmax.softmax_vjp(p, g, 1)
    assert type(result) is Namespaced
    assert (p.asked, g.asked) == ([7, "handed back"], [7])
    p, g = p.elements, g.elements
    assert np.allclose(result.elements, p * (g - (p * g).sum(1, keepdims=True)), rtol=1e-5, atol=1e-6)


def test_factors_and_signs_belong_to_the_library(gpu):
    a, b = normals((3, 4)), normals((4,))
    for b_stream, waits in ((5, [(0, "behind", 5)]), (None, [])):
        factors = Named(on_device(gpu, b), stream=b_stream)
        found, sign = fastsoftmax.logsumexp(Named(on_device(gpu, a)), 1, factors, return_sign=True)
        assert gpu.streams == [*waits, 0]
        gpu.streams.clear()
        assert type(found) is type(sign) is Named
    total = (b * np.exp(a.astype(float))).sum(1)
    assert sign.elements.tolist() == np.sign(total).tolist()
    np.testing.assert_allclose(found.elements, np.log(np.abs(total)), rtol=1e-6)
    lender, factors = (Namespaced(on_device(gpu, one)) for one in (a, b))
    results = fastsoftmax.logsumexp(lender, 1, factors, return_sign=True)
    assert (lender.asked, factors.asked) == ([7, "handed back", "handed back"], [7])
    for result, expected in zip(results, (found, sign), strict=True):
        assert type(result) is Namespaced
        np.testing.assert_array_equal(result.elements, expected.elements)
    with pytest.raises(TypeError, match="b must be a number or a Namespaced on the same device, as a is"):
        fastsoftmax.logsumexp(lender, 1, b)


def test_nothing_is_copied(gpu):
    memory = on_device(gpu, normals((3, 10)))
    lender = Namespaced(memory)
    assert fastsoftmax.softmax(lender, 1, out=lender) is lender
    assert np.allclose(memory.sum(1), 1)


def test_arrays_that_never_change_are_not_written_to(gpu, monkeypatch):
    monkeypatch.setattr(Namespaced, "__module__", "jaxlib._jax")
    x = Namespaced(on_device(gpu, normals((3, 4))))
    with pytest.raises(TypeError, match="out is an array of Namespaced, which must not be written to"):
        fastsoftmax.softmax(x, 1, out=x)
    assert gpu.streams == []


def test_managed_memory_is_on_the_device_and_main_memory_is_not(gpu):
    class Managed(Lent):
        device = (13, 0)

    x = normals((2, 3))
    assert max_ulp_error(gpu.to_host(fastsoftmax.softmax(Managed(on_device(gpu, x)), 1)), exact("softmax", x, 1)) <= 2

    class Host(Lent):
        device = (1, 0)

    assert not fastsoftmax._dispatch.is_on_gpu(Host(x))


@pytest.mark.parametrize("kernel", ["softmax", "logsumexp", "softmax_vjp", "logsumexp_vjp"])
def test_outputs_that_overlap_inputs(gpu, kernel):
    """In place is right; what overlaps in part is written when all is read."""
    memory = on_device(gpu, normals(64))
    g = on_device(gpu, normals((3, 8)))[:, 0] if kernel == "logsumexp_vjp" else on_device(gpu, normals((3, 8)))
    x = memory[:24].reshape(3, 8)
    arguments = (x, g) if kernel.endswith("_vjp") else (x,)
    expected = getattr(fastsoftmax, kernel)(*arguments, 1, backend="numpy")
    for begin in (32, 0, 3, 4):  # the last one is aligned as the first, whose call is remembered
        before = memory.copy()
        out = memory[begin : begin + expected.size].reshape(expected.shape)
        getattr(fastsoftmax, kernel)(*map(Named, arguments), 1, out=Named(out))
        assert np.allclose(out, expected, rtol=1e-5, atol=1e-6)
        memory[...] = before
    if kernel == "softmax_vjp":  # the same of the second input
        before, expected = g.copy(), fastsoftmax.softmax_vjp(x[:2, :], g[:2], 1, backend="numpy")
        for begin in (0, 5, 4):
            out = g.reshape(-1)[begin : begin + 16].reshape(2, 8)
            fastsoftmax.softmax_vjp(Named(x[:2, :]), Named(g[:2]), 1, out=Named(out))
            assert np.allclose(out, expected, rtol=1e-5, atol=1e-6)
            g[...] = before


def test_what_was_written_elsewhere_first_is_not_remembered(gpu):
    memory = on_device(gpu, normals(64))
    x = memory[:16].reshape(4, 4)
    expected = fastsoftmax.softmax(x, 1, backend="numpy")
    for begin in (4, 32):  # the first shares memory with x
        out, before = memory[begin : begin + 16].reshape(4, 4).T, memory.copy()
        fastsoftmax.softmax(Named(x), 1, out=Named(out))
        assert np.allclose(out, expected, rtol=1e-5)
        memory[...] = before


def test_gradients_may_keep_the_reduced_axes(gpu):
    a, g = normals((2, 3, 4)), normals((1, 3, 1))
    result = fastsoftmax.logsumexp_vjp(Named(on_device(gpu, a)), Named(on_device(gpu, g)), (0, 2), keepdims=True)
    assert np.allclose(result.elements, g * fastsoftmax.softmax(a, (0, 2)), rtol=1e-5)


def test_scalars_and_no_axes(gpu):
    x = np.array(3.0, np.float32)
    assert fastsoftmax.softmax(Named(on_device(gpu, x))).elements == 1
    assert fastsoftmax.logsumexp(Named(on_device(gpu, x))).elements == 3
    assert np.all(fastsoftmax.softmax(Named(on_device(gpu, normals((2, 3)))), ()).elements == 1)


def test_calls_with_outputs_and_gradients_are_remembered(gpu, monkeypatch):
    from fastsoftmax.backends import numba_cuda  # which needs the simulator

    p, g = normals((3, 4)), normals((3, 4))
    arrays = [Named(on_device(gpu, array)) for array in (p, g, np.zeros_like(p))]
    for _ in range(2):
        fastsoftmax.softmax_vjp(*arrays[:2], 1, out=arrays[2])
        assert np.allclose(arrays[2].elements, p * (g - (p * g).sum(1, keepdims=True)), rtol=1e-5, atol=1e-6)
        arrays[2].elements[...] = 0
        monkeypatch.setattr(numba_cuda, "_compute", None)  # the second time nothing is laid out
    assert gpu.streams == [0, 0]
