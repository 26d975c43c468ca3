"""The instructions of a GPU that Numba has no name for, as functions for kernels.

Where a row lies on 16-byte boundaries (`load_vector`, `store_vector`) a thread reads 16 bytes at once, as raw *words*
of 32 bits (64 for float64); a 16-bit word holds two elements, the first in the lower half. `float16_at` and the like
turn half a word into float32, `pack_float16` and `pack_bfloat16` round two float32 to one word, to nearest, ties to
even. `copy_vector` takes 16 bytes past the registers to a block's shared memory, where `load_stored` finds them once
`await_copies` has waited: a lane needs nobody else for what it copied itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import cuda, types
from numba.cuda.extending import intrinsic

# Compiles a function for kernels to call.
device: Callable[[Any], Any] = cuda.jit(device=True)

_FULL_WARP = 0xFFFFFFFF
_i16, _i32, _i64, _float = ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType()


def _instruction(text: str, constraints: str, result: Any, *arguments: Any) -> Any:
    """Return a function that is one line of PTX; it has no effect but its result."""
    llvm = {types.float32: _float, types.uint32: _i32, types.uint16: _i16}
    function_type = ir.FunctionType(llvm[result], [llvm[argument] for argument in arguments])

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        return builder.asm(function_type, text, constraints, values, side_effect=False)

    def one(typing_context: Any, a: Any) -> Any:
        return result(*arguments), generate

    def two(typing_context: Any, a: Any, b: Any) -> Any:
        return result(*arguments), generate

    return intrinsic(one if len(arguments) == 1 else two)


ex2 = _instruction("ex2.approx.ftz.f32 $0, $1;", "=f,f", types.float32, types.float32)
larger32 = _instruction("max.NaN.f32 $0, $1, $2;", "=f,f,f", types.float32, types.float32, types.float32)
float16_value = _instruction("cvt.f32.f16 $0, $1;", "=f,h", types.float32, types.uint16)
# The first operand of the instruction becomes the upper half.
pack_float16 = _instruction("cvt.rn.f16x2.f32 $0, $2, $1;", "=r,f,f", types.uint32, types.float32, types.float32)
pack_bfloat16 = _instruction("cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,f,f", types.uint32, types.float32, types.float32)


@device
def larger64(a: Any, b: Any) -> Any:
    """The larger of two numbers; NaN if either is: there is no such instruction for float64."""
    return a if a >= b or a != a else b


@device
def fused(a: Any, b: Any, c: Any) -> Any:
    return cuda.fma(a, b, c)


@device
def log1p(x: Any) -> Any:
    return math.log1p(x)


@device
def exchange(value: Any, mask: Any) -> Any:
    """Return the value of the lane whose number differs in the bits of the mask. All lanes of the warp take part."""
    return cuda.shfl_xor_sync(_FULL_WARP, value, mask)


def _vector_access(generate: Callable[..., Any], is_shared: bool = False) -> Any:
    """Return a function of an array in memory, an index, an array of words and where in it those of the vector begin.

    Global memory is given by a pointer to elements, a block's shared memory as an array of words.
    """

    def access(typing_context: Any, memory: Any, index: Any, words: Any, position: Any) -> Any:
        def generate_access(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            memory_value, index_value, array_value, position_value = values
            word = context.get_value_type(words.dtype)
            vector = ir.VectorType(word, 128 // word.width)
            if is_shared:
                address = _in_shared_memory(context, builder, memory, memory_value, index_value, vector)
            else:
                address = _in_global_memory(builder, memory_value, index_value, vector)
            array = context.make_array(words)(context, builder, array_value)
            places = [
                builder.gep(array.data, [builder.add(position_value, ir.Constant(position_value.type, number))])
                for number in range(vector.count)
            ]
            generate(builder, vector, address, places)
            return context.get_dummy_value()

        return types.void(memory, types.int64, words, types.int64), generate_access

    return intrinsic(access)


def _in_global_memory(builder: Any, pointer: Any, index: Any, pointee: Any) -> Any:
    address = builder.bitcast(builder.gep(pointer, [index]), pointee.as_pointer())
    return builder.addrspacecast(address, pointee.as_pointer(1))


def _in_shared_memory(context: Any, builder: Any, array_type: Any, array: Any, index: Any, pointee: Any) -> Any:
    data = context.make_array(array_type)(context, builder, array).data
    return builder.addrspacecast(
        builder.bitcast(builder.gep(data, [index]), pointee.as_pointer()), pointee.as_pointer(3)
    )


def _generate_load(builder: Any, vector: Any, address: Any, places: list[Any]) -> None:
    value = builder.load(address, align=16)
    for number, place in enumerate(places):
        builder.store(builder.extract_element(value, ir.Constant(_i32, number)), place)


def _generate_store(builder: Any, vector: Any, address: Any, places: list[Any]) -> None:
    value = ir.Constant(vector, ir.Undefined)
    for number, place in enumerate(places):
        value = builder.insert_element(value, builder.load(place), ir.Constant(_i32, number))
    builder.store(value, address, align=16)


load_vector, store_vector = _vector_access(_generate_load), _vector_access(_generate_store)
load_stored, store_stored = _vector_access(_generate_load, True), _vector_access(_generate_store, True)


def _copy_vector(typing_context: Any, pointer: Any, index: Any, stored: Any, position: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        pointer_value, index_value, array_value, position_value = values
        source = _in_global_memory(builder, pointer_value, index_value, _i32)
        target = _in_shared_memory(context, builder, stored, array_value, position_value, _i32)
        addresses = [builder.ptrtoint(target, _i32), builder.ptrtoint(source, _i64)]
        function_type = ir.FunctionType(ir.VoidType(), [_i32, _i64])
        text = "cp.async.cg.shared.global [$0], [$1], 16;"
        builder.asm(function_type, text, "r,l,~{memory}", addresses, side_effect=True)
        return context.get_dummy_value()

    return types.void(pointer, types.int64, stored, types.int64), generate


# Begins to copy 16 bytes from a pointer and an index to shared memory; no register is needed for them.
copy_vector = intrinsic(_copy_vector)


def _effect(text: str) -> Any:
    """Return a function that is one line of PTX without arguments or a result, and stays where it is."""

    def effect(typing_context: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            builder.asm(ir.FunctionType(ir.VoidType(), []), text, "~{memory}", [], side_effect=True)
            return context.get_dummy_value()

        return types.void(), generate

    return intrinsic(effect)


# Copies begun since the last call are a group from here on.
commit_copies = _effect("cp.async.commit_group;")


def await_copies(n_groups: int) -> Any:
    """Return a function that waits until no more than so many of a lane's youngest groups are under way."""
    return _effect(f"cp.async.wait_group {n_groups};")
