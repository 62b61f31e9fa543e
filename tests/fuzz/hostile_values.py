"""Strategies: values that no schema allows, objects with one field damaged, files with some bytes changed."""

import json

from hypothesis import strategies as st

# What people write for a number, a text or a list, and what none of them is.
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(min_value=2**60, max_value=2**70),
    st.floats(),
    st.sampled_from(
        ["", " ", "5", "true", "null", "nan", "\u200b", "../..", "/nowhere", "a\0b", "\ud800", "<script>"]
    ),
    st.text(max_size=20),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=5,
)


@st.composite
def damaged(draw, whole, keys=None):
    """The object `whole` with one to three of its fields left out, renamed, or given another value."""
    values = dict(whole)
    for _ in range(draw(st.integers(1, 3))):
        key = draw(st.sampled_from(sorted(keys or whole)))
        how = draw(st.sampled_from(["value", "value", "value", "missing", "renamed"]))
        if how == "value":
            values[key] = draw(VALUES)
        elif key in values:
            value = values.pop(key)
            if how == "renamed":
                values[draw(st.text(max_size=8))] = value
    return values


@st.composite
def rewritten(draw, whole):
    """The bytes `whole` cut short, with some of them changed, or with others put in."""
    data = bytearray(whole)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(0, len(data) - 1)))
        how = draw(st.sampled_from(["change", "change", "cut", "insert", "count"]))
        if how == "cut":
            del data[at:]
        elif how == "insert":
            data[at:at] = draw(st.binary(max_size=9))
        elif how == "count":  # a length that lies
            data[at : at + 8] = draw(st.integers(0, 2**64 - 1)).to_bytes(8, "little")
        elif data:
            data[at] = draw(st.integers(0, 255))
    return bytes(data)


def as_json(value):
    """JSON as Python writes it, NaN and lone surrogates included."""
    return json.dumps(value)


def read(reader, path):
    """What is read, or None; the refusal must be one line that names the file."""
    try:
        return reader(path)
    except (ValueError, OSError) as error:
        assert path.name in str(error) and "\n" not in str(error)
        return None
