"""Streams, graphs and devices of libraries on a card: what a stand-in cannot tell."""

import numpy as np
import pytest

import fastsoftmax
from tests.reference import exact, max_ulp_error

pytestmark = pytest.mark.usefixtures("card")

# Of each traversal one: rows in registers, in shared memory, split, strips.
SHAPES = [((64, 1000), 1), ((300, 40000), 1), ((1, 3_000_000), 1), ((1000, 64), 0)]
DELAY = 200_000_000  # clock cycles, a tenth of a second


@pytest.fixture
def torch():
    return pytest.importorskip("torch", reason="needs torch")


def delayed(torch, shape, stream):
    """Return an array that gets its numbers on a stream after a while, and these numbers."""
    numbers = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    ready, x = torch.from_numpy(numbers).cuda(), torch.zeros(shape, device="cuda")
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(DELAY)
        x.copy_(ready)
    return x, numbers


@pytest.mark.parametrize(("shape", "axis"), SHAPES)
def test_work_is_queued_on_the_current_stream_of_torch(torch, shape, axis):
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        fastsoftmax.softmax(torch.zeros(shape, device="cuda"), axis)  # compiles
    x, numbers = delayed(torch, shape, stream)
    with torch.cuda.stream(stream):
        result = fastsoftmax.softmax(x, axis)
        assert not stream.query()  # nobody waited
    stream.synchronize()
    assert max_ulp_error(result.cpu().numpy(), exact("softmax", numbers, axis)) <= 2


def test_work_is_queued_on_the_stream_that_the_interface_names(torch):
    class Named:
        def __init__(self, tensor, stream):
            self.tensor, self.stream = tensor, stream

        @property
        def __cuda_array_interface__(self):
            return dict(self.tensor.__cuda_array_interface__, version=3, stream=self.stream.cuda_stream)

    stream, other = torch.cuda.Stream(), torch.cuda.Stream()
    fastsoftmax.softmax(Named(torch.zeros((64, 1000), device="cuda"), stream), 1)
    x, numbers = delayed(torch, (64, 1000), stream)
    result = fastsoftmax.softmax(Named(x, stream), 1)
    assert not stream.query()
    assert result.__cuda_array_interface__["stream"] == stream.cuda_stream
    out = torch.zeros_like(x)
    fastsoftmax.softmax(Named(x, stream), 1, out=Named(out, other))
    other.synchronize()  # which waits for the stream that computes
    expected = exact("softmax", numbers, 1)
    assert max_ulp_error(out.cpu().numpy(), expected) <= 2
    assert max_ulp_error(result.copy_to_host(), expected) <= 2


@pytest.mark.parametrize(("shape", "axis"), SHAPES)
def test_calls_can_be_captured_in_a_graph(torch, shape, axis):
    x = torch.zeros(shape, device="cuda")
    out = torch.empty_like(x)
    fastsoftmax.softmax(x, axis, out=out)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        fastsoftmax.softmax(x, axis, out=out)
    numbers = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    x.copy_(torch.from_numpy(numbers))
    for _ in range(2):
        out.zero_()
        graph.replay()
        torch.cuda.synchronize()
        assert max_ulp_error(out.cpu().numpy(), exact("softmax", numbers, axis)) <= 2


def test_results_of_jax_are_arrays_of_jax(torch):
    jax = pytest.importorskip("jax", reason="needs jax")
    if jax.default_backend() != "gpu":
        pytest.skip("jax has no device")
    numbers = np.random.default_rng(0).normal(size=(64, 1000)).astype(np.float32)
    x = jax.numpy.asarray(numbers)
    result = fastsoftmax.softmax(x, 1)
    assert isinstance(result, jax.Array)
    assert max_ulp_error(np.asarray(result), exact("softmax", numbers, 1)) <= 2
    with pytest.raises(TypeError, match="must not be written to"):
        fastsoftmax.softmax(x, 1, out=x)


def test_the_device_is_that_of_the_array(torch):
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one device")
    numbers = np.random.default_rng(0).normal(size=(64, 1000)).astype(np.float32)
    result = fastsoftmax.softmax(torch.from_numpy(numbers).to("cuda:1"), 1)
    assert result.device.index == 1
    assert torch.cuda.current_device() == 0
    assert max_ulp_error(result.cpu().numpy(), exact("softmax", numbers, 1)) <= 2
