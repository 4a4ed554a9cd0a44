#!/usr/bin/env python3
"""Writes a model in which every field of ONNX's schema is set, by reflection over the `onnx` package's own messages.

    python scripts/oracles/onnx_schema.py quant/tests/data/onnx_every_field.onnx

The file isn't a valid model, it is a complete one: a reader that writes it back byte for byte knows the whole schema.
"""
import sys

import onnx
from google.protobuf.descriptor import FieldDescriptor as F

MAX_DEPTH = 9
counter = 0


def number():
    global counter
    counter += 1
    return counter


def scalar(field):
    n = number()
    match field.type:
        case F.TYPE_STRING:
            return f"{field.name}-{n}"
        case F.TYPE_BYTES:
            return f"{field.name}\xff{n}".encode("latin-1")
        case F.TYPE_FLOAT | F.TYPE_DOUBLE:
            return n * 0.25
        case F.TYPE_ENUM:
            values = [v.number for v in field.enum_type.values]
            return values[n % len(values)]
        case F.TYPE_INT32 | F.TYPE_INT64:
            return -n if n % 3 == 0 else n << (7 * (n % 2))
        case _:
            return n << (7 * (n % 5))


def fill(message, depth, branch, stack):
    """Sets every field; of a oneof the field numbered `branch`."""
    for field in message.DESCRIPTOR.fields:
        oneof = field.containing_oneof
        if oneof is not None and oneof.fields.index(field) != branch % len(oneof.fields):
            continue
        # A reader may write a oneof's fields where its first one belongs; then bytes can only be compared if none of
        # the other fields' numbers lies between.
        chosen = [message.WhichOneof(o.name) for o in message.DESCRIPTOR.oneofs]
        chosen = [message.DESCRIPTOR.fields_by_name[name].number for name in chosen if name]
        if field.name == "denotation" and any(number > field.number for number in chosen):
            continue
        if field.message_type is None:
            value = scalar(field)
            if field.is_repeated:
                getattr(message, field.name).extend([value, scalar(field)])
            else:
                setattr(message, field.name, value)
            continue
        # Each kind of message is nested in itself once at most, or the file would be large.
        kind = field.message_type.full_name
        if depth == 0 or stack.count(kind) > 0:
            continue
        child = field.message_type
        branches = max([len(o.fields) for o in child.oneofs], default=1)
        if field.is_repeated:
            for b in range(branches):
                fill(getattr(message, field.name).add(), depth - 1, b, stack + [kind])
        else:
            getattr(message, field.name).SetInParent()
            fill(getattr(message, field.name), depth - 1, branch, stack + [kind])


model = onnx.ModelProto()
fill(model, MAX_DEPTH, 0, [])
# All kinds of types, which single fields above show only one of.
for branch in range(6):
    for inner in range(6):
        info = model.graph.value_info.add()
        info.name = f"type-{branch}-{inner}"
        fill(info.type, 3, branch, [])
        for holder in ("sequence_type", "optional_type"):
            if info.type.HasField(holder):
                getattr(info.type, holder).ClearField("elem_type")
                fill(getattr(info.type, holder).elem_type, 2, inner, [])
        if info.type.HasField("map_type"):
            info.type.map_type.ClearField("value_type")
            fill(info.type.map_type.value_type, 2, inner, [])
with open(sys.argv[1], "wb") as out:
    out.write(model.SerializeToString(deterministic=True))
print(len(model.SerializeToString()), "bytes")
