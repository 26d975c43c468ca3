"""Calls like one before are served without a decision, and give what the general way gives."""

import numpy as np
import pytest

import fastsoftmax
from fastsoftmax import _remembered, record_plans

from .inputs import values

numba_cpu = pytest.importorskip("fastsoftmax.backends.numba_cpu")

X = np.arange(12.0).reshape(3, 4)


class Subclass(np.ndarray):
    """Arrays that are of no other kind, but by name."""


@pytest.fixture(autouse=True)
def remembered(monkeypatch):
    """An empty memory of calls."""
    memory = {}
    monkeypatch.setattr(_remembered, "_remembered", memory)
    return memory


@pytest.fixture
def call(function):
    def call(x, axis=-1, **keywords):
        return getattr(fastsoftmax, function)(x, axis, **{"backend": "numba"} | keywords)

    return call


@pytest.fixture
def general(call):
    """The function by the general way, which records plans."""

    def general(*arguments, **keywords):
        with record_plans():
            return call(*arguments, **keywords)

    return general


@pytest.fixture
def no_decisions(monkeypatch):
    """Have every further decision fail."""

    def start():
        monkeypatch.setattr(numba_cpu, "plan", None)

    return start


def in_order(x, order):
    orders = {"C": x, "F": np.asfortranarray(x), "reversed": x[::-1, ::-1], "steps": np.repeat(x, 2, axis=1)[:, ::2]}
    return orders[order]


@pytest.mark.parametrize("axis", [0, 1, -1, None])
@pytest.mark.parametrize("order", ["C", "F", "reversed", "steps"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16])
def test_the_second_call_has_the_bits_of_the_general_way(
    function, call, general, no_decisions, remembered, dtype, order, axis
):
    first, second = (in_order(values("normal", (40, 7), dtype, seed), order) for seed in (1, 2))
    call(first, axis)
    expected = general(second, axis)
    if remembered or dtype != np.float16:  # of which rows that are gathered are not remembered
        no_decisions()
    result = call(second, axis)
    assert type(result) is type(expected)
    assert result.strides == expected.strides
    np.testing.assert_array_equal(result, expected)


def test_outputs(function, call, general, no_decisions):
    first, second = values("normal", (3, 1000), np.float32, 1), values("normal", (3, 1000), np.float32, 2)
    out = call(first)
    assert call(first, out=out) is out
    expected = general(second)
    no_decisions()
    assert call(second, out=out) is out
    np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize("function", ["softmax", "log_softmax"])
def test_in_place(call, general, no_decisions):
    first, second = X.copy(), X + 0.25
    call(first, out=first)
    expected = general(second)
    no_decisions()
    assert call(second, out=second) is second
    np.testing.assert_array_equal(second, expected)


@pytest.mark.parametrize("function", ["softmax", "log_softmax"])
def test_an_output_in_the_memory_of_the_input_is_left_to_the_general_way(call, general):
    memory, other = np.arange(32.0), np.empty((3, 8))
    call(memory[:24].reshape(3, 8), out=other)
    expected = general(memory[:24].reshape(3, 8).copy())
    np.testing.assert_array_equal(call(memory[:24].reshape(3, 8), out=memory[8:].reshape(3, 8)), expected)


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"axis": True}, TypeError),
        ({"axis": 1.0}, TypeError),
        ({"axis": 2}, np.exceptions.AxisError),
        ({"axis": [1]}, None),
        ({"temperature": True}, TypeError),
        ({"temperature": 0.0}, ValueError),
        ({"temperature": 2.0}, None),
        ({"dtype": np.float32}, None),
        ({"dtype": "int"}, TypeError),
        ({"where": X > 3}, None),
        ({"where": 1}, TypeError),
        ({"backend": "nubma"}, ValueError),
        ({"backend": ["numba"]}, ValueError),
        ({"backend": "numpy"}, None),
        ({"x": X.tolist()}, None),
        ({"x": np.asfortranarray(X)}, None),
        ({"x": X.astype(np.float32)}, None),
        ({"x": X.astype(">f8")}, None),
        ({"x": np.ma.masked_less(X, 3)}, None),
        ({"x": X.view(Subclass)}, None),
        ({"x": np.frombuffer(b"\0" + X.tobytes(), np.uint8)[1:].view(np.float64).reshape(3, 4)}, None),
    ],
    ids=lambda value: "".join(value) if isinstance(value, dict) else "",
)
def test_calls_that_differ_in_one_thing(call, general, changes, error):
    arguments = {"x": X, "axis": 1} | changes
    call(X, 1)
    call(X, 1)
    if error:
        with pytest.raises(error):
            call(**arguments)
    else:
        expected = general(**arguments)
        result = call(**arguments)
        assert result.dtype == expected.dtype
        np.testing.assert_array_equal(result, expected)


def test_outputs_that_are_refused(call, function):
    out = call(X)
    call(X, out=out)
    read_only = out.copy()
    read_only.flags.writeable = False
    for refused in (read_only, out[:2], out.astype(np.float32), np.ma.array(out), out.tolist()):
        with pytest.raises((TypeError, ValueError), match="out"):
            call(X, out=refused)


def test_an_unaligned_output(call, general):
    out = call(X)
    call(X, out=out)
    unaligned = np.zeros(out.nbytes + 1, np.uint8)[1:].view(np.float64).reshape(out.shape)
    assert not unaligned.flags.aligned
    assert call(X, out=unaligned) is unaligned
    np.testing.assert_array_equal(unaligned, general(X))


def test_plans_are_recorded(call):
    call(X)
    with record_plans() as plans:
        call(X)
    assert [plan.backend for plan in plans] == ["numba"]


def test_calls_that_threads_share_are_decided_anew(call, remembered):
    call(np.zeros((2, numba_cpu.MIN_ELEMENTS_PER_THREAD)))
    assert not remembered


def test_keepdims_signs_and_factors_are_not_remembered(remembered):
    for keywords in ({"keepdims": True}, {"return_sign": True}, {"b": X}):
        fastsoftmax.logsumexp(X, 1, **keywords, backend="numba")
    assert not remembered


def test_the_memory_is_bounded(call, remembered, monkeypatch):
    monkeypatch.setattr(_remembered, "_MOST_REMEMBERED", 2)
    for n in (1, 2, 3):
        call(X[:n])
    assert len(remembered) == 1
