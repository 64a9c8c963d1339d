"""Addresses as arrays, inside compiled loops: for calls so short that passing arrays would show.

Making a numpy array of a tensor and taking it apart again costs about three microseconds, an
address a tenth of that, and a decoded token passes six hundred of them.
"""

from numba import carray, types
from numba.extending import intrinsic, register_jitable


def _pointer(kind):
    @intrinsic
    def pointer(typing, address):
        def build(context, builder, signature, arguments):
            return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

        return types.CPointer(kind)(address), build

    return pointer


_float_pointer, _int_pointer = _pointer(types.float32), _pointer(types.int64)


@register_jitable
def floats(address, shape):
    """The float32 array of this shape (a tuple) at an address."""
    return carray(_float_pointer(address), shape)


@register_jitable
def integers(address, shape):
    """The int64 array of this shape (a tuple) at an address."""
    return carray(_int_pointer(address), shape)
