"""A bounded run of the fuzzer on every backend, and that its law is one that can be broken."""

import numpy as np
import pytest
from hypothesis import given, settings

import fastsoftmax

from . import fuzz


@settings(max_examples=250)
@given(fuzz.calls())
def test_calls_of_any_kind(backend, call):
    with np.errstate(all="ignore"):
        fuzz.check(call)


def softmax_call(**arguments):
    room = np.zeros(64, np.uint8)
    x = np.ndarray(4, np.float32, room, 16)
    x[:] = [1, 2, 3, 4]
    return fuzz.Call("softmax", {"x": x, "axis": 0, **arguments}, {"x": room})


def test_right_calls_pass():
    fuzz.check(softmax_call())
    fuzz.check(softmax_call(axis=3))


@pytest.mark.parametrize("byte", [0, 15, 16, 40])
def test_a_byte_written_outside_of_out_is_seen(monkeypatch, byte):
    call = softmax_call()
    softmax = fastsoftmax.softmax

    def careless(x, **keywords):
        call.rooms["x"][byte] += 1
        return softmax(x, **keywords)

    monkeypatch.setattr(fastsoftmax, "softmax", careless)
    with pytest.raises(AssertionError, match="Arrays are not equal"):
        fuzz.check(call)


def test_writing_before_an_error_is_seen(monkeypatch):
    call = softmax_call(axis=3)

    def careless(x, **keywords):
        x[0] = 9
        raise ValueError("too late")

    monkeypatch.setattr(fastsoftmax, "softmax", careless)
    with pytest.raises(AssertionError, match="too late"):
        fuzz.check(call)


def test_other_bits_of_a_strided_array_are_seen(monkeypatch):
    softmax = fastsoftmax.softmax

    def careless(x, **keywords):
        return softmax(x, **keywords) + (0 if x.strides == (4,) else np.float32(1e-7))

    call = softmax_call(out=None)
    call.arguments["x"] = call.arguments["x"][::-1]
    monkeypatch.setattr(fastsoftmax, "softmax", careless)
    with pytest.raises(AssertionError, match="Arrays are not equal"):
        fuzz.check(call)


def test_undocumented_exceptions_are_seen(monkeypatch):
    def careless(x, **keywords):
        raise ZeroDivisionError

    monkeypatch.setattr(fastsoftmax, "softmax", careless)
    with pytest.raises(ZeroDivisionError):
        fuzz.check(softmax_call())


def test_results_that_are_far_from_the_numpy_backend_are_seen(monkeypatch):
    softmax = fastsoftmax.softmax

    def careless(x, backend=None, **keywords):
        return softmax(x, backend=backend, **keywords) * np.float32(1 if backend == "numpy" else 1.001)

    monkeypatch.setattr(fastsoftmax, "softmax", careless)
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        fuzz.check(softmax_call())
