"""Checks for `launching.py` that the keys of `runtime/launch.py` match Triton's specialisation."""

import itertools

import torch
import triton
import triton.language as tl
from triton.runtime import driver
from triton.tools.tensor_descriptor import TensorDescriptor

from gqa_kernels.runtime import launch


@triton.jit(do_not_specialize=["any_value"])
def probe_kernel(x_ptr, value, any_value, strides, CONSTANT: tl.constexpr):
    pass


@triton.jit(do_not_specialize=["x_ptr"])
def any_address_kernel(x_ptr, CONSTANT: tl.constexpr):
    pass


VALUES = (0, 1, 2, 15, 16, 17, 32, -1, -16, 2**31 - 1, 2**31, 2**31 - 16, 2**31 + 16, -(2**31))
VALUES += (-(2**31) - 1, -(2**31) - 16, 2**40, 2**40 + 1, 2**63 - 1, 2**63 - 16, -(2**63))
VALUES += (2**63, 2**63 + 1, 2**64 - 1, True, False, 1.0, 0.5, None)


def arguments_of_probe():
    """Calls that try every class of each argument, with the first class of all others."""
    memory = torch.zeros(64, dtype=torch.float32)
    tensors = [*(memory[first:] for first in range(5)), torch.nn.Parameter(memory)]
    kinds = (torch.bfloat16, torch.int64, torch.bool, torch.float8_e4m3fn)
    tensors += [torch.zeros(64, dtype=dtype) for dtype in kinds]
    sources = (memory.view(4, 16), memory.view(4, 16), torch.zeros(4, 16, dtype=torch.bfloat16))
    blocks = ([16, 16], [32, 16], [16, 16])
    tensors += [
        TensorDescriptor(source, [4, 16], [16, 1], block)
        for source, block in zip(sources, blocks, strict=True)
    ]
    wholes = [value for value in VALUES if type(value) is int]
    strides = [(), *((value,) for value in wholes), (1, 16, 17), (16, 1, 17), (1, 16, 17, 2**31)]
    constants = (0, 1, 2, True, False, None)
    axes = ((*tensors, None, 7, 0.5), VALUES, VALUES, strides, constants)
    first = [axis[0] for axis in axes]
    for position, axis in enumerate(axes):
        for value in axis:
            yield (*first[:position], value, *first[position + 1 :])


def wrong_keys(kernel, calls):
    """Pairs of calls with the same key but different binaries in Triton, and pairs with different
    keys but the same binary."""
    binder = kernel.device_caches[driver.active.get_current_device()][4]
    keys = []
    for call in calls:
        types = tuple(map(type, call))
        describe = launch._describer(kernel, types)
        assert describe is not None, types
        # Triton treats equal constants, such as 1 and True, as the same; our key has the type too.
        theirs = tuple(
            (kind, type(value), value)
            if kind == "constexpr" and parameter.is_constexpr
            else (kind, value)
            for parameter, (kind, value) in zip(kernel.params, binder(*call)[1], strict=True)
        )
        keys.append(((types, describe(*call)), theirs, call))
    confused = [
        (a[2], b[2]) for a, b in itertools.combinations(keys, 2) if a[0] == b[0] and a[1] != b[1]
    ]
    split = [
        (a[2], b[2])
        for a, b in itertools.combinations(keys, 2)
        if a[0] != b[0] and a[1] == b[1] and a[0][0] == b[0][0]
    ]
    return confused, split


def check_keys(everything):
    """Calls have different keys if and only if Triton specialises on their difference."""
    confused, split = wrong_keys(probe_kernel, list(arguments_of_probe()))
    assert not confused, confused
    assert not split, split
    memory = torch.zeros(64)
    calls = [(x, 1) for x in (memory, memory[1:], torch.zeros(64, dtype=torch.int32), None)]
    assert wrong_keys(any_address_kernel, calls) == ([], [])


IN_RANGE = "-0x80000000 <= {0} <= 0x7FFFFFFF"
# Expressions from each of which one part is missing.
LEFT_OUT = {
    "_TENSOR": ("{0}.dtype", "{0}.data_ptr() & 15 == 0", "{0}.dtype, {0}.data_ptr() & 7 == 0"),
    "_INT": (
        f"(2 if {{0}} & 15 else 16) if {IN_RANGE} else (_wide({{0}}), {{0}} & 15 == 0)",
        f"(1 if {{0}} == 1 else 2) if {IN_RANGE} else (_wide({{0}}), {{0}} & 15 == 0)",
        f"(1 if {{0}} == 1 else 2 if {{0}} & 15 else 16) if {IN_RANGE} else _wide({{0}})",
        "1 if {0} == 1 else 2 if {0} & 15 else 16",
    ),
    "_INT_OF_ANY_VALUE": ("0", "0 if {0} <= 0x7FFFFFFF else _wide({0})"),
    "_TUPLE": ("len({0})",),
    "_DESCRIPTOR": ("{0}.base.dtype", "*{0}.block_shape"),
}


def check_that_a_poorer_key_is_noticed(everything):
    calls = list(arguments_of_probe())
    for name, mutants in LEFT_OUT.items():
        right = getattr(launch, name)
        for mutant in mutants:
            setattr(launch, name, mutant)
            try:
                confused, _ = wrong_keys(probe_kernel, calls)
            finally:
                setattr(launch, name, right)
            assert confused, f"{name} = {mutant!r} was not noticed"
