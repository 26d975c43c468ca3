"""How the benchmark asks its peers, by stand-ins that compute with NumPy: the peers themselves are large."""

import ctypes
import os
import sys
from types import ModuleType, SimpleNamespace

import ml_dtypes
import numpy as np
import pytest

import fastsoftmax
from fastsoftmax import _bench

X = np.arange(12, dtype=np.float32).reshape(3, 4)


def stand_in(monkeypatch, name, **members):
    module = ModuleType(name)
    module.__dict__.update(members)
    monkeypatch.setitem(sys.modules, name, module)
    return module


class Tensor:
    def __init__(self, array):
        self.array = array

    def view(self, dtype):
        return Tensor(self.array.view(dtype))

    def copy_(self, other):
        self.array[...] = other.array


@pytest.fixture
def torch(monkeypatch):
    def softmax(x, axis, out):
        fastsoftmax.softmax(x.array, axis, out=out.array)

    module = stand_in(monkeypatch, "torch", from_numpy=Tensor, softmax=softmax, bfloat16=np.dtype(np.int16), threads=[])
    module.set_num_threads = module.threads.append
    return module


def test_torch_writes_into_memory_of_numpy(torch):
    result = _bench._prepare_torch("softmax", X, 1, 3)()
    np.testing.assert_array_equal(result, fastsoftmax.softmax(X, 1))
    assert torch.threads == [3]


def test_torch_copies_on_several_threads_only(torch):
    assert _bench._prepare_torch_copy("softmax", X, 1, 1) is None
    _bench._prepare_torch_copy("softmax", X, 1, 2)()
    assert torch.threads == [2]


def test_bfloat16_goes_to_torch_as_16_bits(torch):
    x = X.astype(ml_dtypes.bfloat16)
    tensor = _bench.as_tensor(x)
    assert tensor.array.dtype == np.int16
    assert np.shares_memory(tensor.array, x)


def test_jax_computes_on_the_processor(monkeypatch):
    monkeypatch.setenv("NPROC", "")
    asked = []

    def nn_softmax(x, axis):
        return SimpleNamespace(block_until_ready=lambda: fastsoftmax.softmax(x, axis))

    stand_in(
        monkeypatch,
        "jax",
        config=SimpleNamespace(update=lambda *option: asked.append(option)),
        nn=SimpleNamespace(softmax=nn_softmax),
        jit=lambda function: function,
        devices=lambda kind: [kind],
        device_put=lambda x, device: asked.append(device) or x,
    )
    np.testing.assert_array_equal(_bench.prepare_jax("softmax", X, 1, 2)(), fastsoftmax.softmax(X, 1))
    assert asked == [("jax_enable_x64", True), "cpu"]
    assert os.environ["NPROC"] == "2"


def fields(message):
    """Decode a protobuf message: the numbers of its fields, with integers or bytes."""
    found, at = {}, 0

    def varint():
        nonlocal at
        value = shift = 0
        while True:
            byte = message[at]
            at, value, shift = at + 1, value | (byte & 127) << shift, shift + 7
            if byte < 128:
                return value

    while at < len(message):
        number, kind = divmod(varint(), 8)
        value = varint()
        if kind == 2:
            at, value = at + value, message[at : at + value]
        found.setdefault(number, []).append(value)
    return found


@pytest.mark.parametrize(
    ("function", "operator", "attributes"),
    [
        ("softmax", b"Softmax", {b"axis": 1}),
        ("log_softmax", b"LogSoftmax", {b"axis": 1}),
        ("logsumexp", b"ReduceLogSumExp", {b"axes": 1, b"keepdims": 0}),
    ],
)
def test_the_onnx_model_is_one_node(function, operator, attributes):
    model = fields(_bench._onnx_model(function, np.dtype(np.float64), 1))
    assert (model[1], fields(model[8][0])) == ([7], {2: [13]})
    graph = fields(model[7][0])
    node = fields(graph[1][0])
    assert (node[1], node[2], node[4]) == ([b"x"], [b"y"], [operator])
    decoded = [fields(attribute) for attribute in node[5]]
    assert {one[1][0]: one.get(3, one.get(8))[0] for one in decoded} == attributes
    assert [fields(graph[number][0])[1] for number in (11, 12)] == [[b"x"], [b"y"]]
    element_type = fields(fields(fields(graph[11][0])[2][0])[1][0])[1]
    assert element_type == [11]


def test_numbers_of_several_bytes():
    assert _bench._varint(300) == b"\xac\x02"


def test_onnxruntime_reads_and_writes_memory_of_numpy(monkeypatch):
    class Session:
        def __init__(self, model, options, providers):
            assert providers == ["CPUExecutionProvider"]
            assert options.intra_op_num_threads == 2
            self.places = {}

        def io_binding(self):
            return SimpleNamespace(bind_input=self.bind, bind_output=self.bind)

        def bind(self, name, device, device_id, element_type, shape, address):
            assert (device, device_id, element_type) == ("cpu", 0, 1)
            memory = (ctypes.c_float * int(np.prod(shape))).from_address(address)
            self.places[name] = np.frombuffer(memory, np.float32).reshape(shape)

        def run_with_iobinding(self, binding):
            self.places["y"][...] = fastsoftmax.softmax(self.places["x"], 1)

    stand_in(monkeypatch, "onnxruntime", SessionOptions=SimpleNamespace, InferenceSession=Session)
    result = _bench._prepare_onnxruntime("softmax", X, 1, 2)()
    np.testing.assert_array_equal(result, fastsoftmax.softmax(X, 1))
