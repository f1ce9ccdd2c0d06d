"""Ways to damage a file, as hypothesis strategies: by its bytes, by the values in its JSON."""

from __future__ import annotations

import json
import math
from typing import Any

from hypothesis import strategies as st

DEEP = 10**5
RAW = {  # what JSON text can hold and json.dumps does not write
    "deep lists": "[" * DEEP + "]" * DEEP,
    "deep tables": '{"a":' * DEEP + "1" + "}" * DEEP,
    "many digits": "1" * 5000,
    "a large float": "1e999",
    "a key twice": '{"a": 1, "a": [2]}',
    "half a character": r'"\ud800"',
}
VALUES = [
    *(None, True, False, 0, -1, 1, 2, 3, 1.5, 10**9, 10**30, -(10**30), 2**63, math.nan, math.inf),
    *("", "x", "../../x", "/etc/passwd", "~/x", "x\0y", "\u2028</script><!--", "x" * 10_000, "é̀"),
    *("input->m0", "m1->logits", "counterfactual", "scores", "circuit"),
    *([], {}, [[]], {"a": 1}, [None], [10**9] * 3, ["../x"], ["input->m0"] * 3, {"../x": "/x"}),
]
scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
anything = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=8,
)
values = st.sampled_from(VALUES) | scalars | anything


@st.composite
def harmed_bytes(draw: Any, content: bytes) -> bytes:
    """Cut short, some bytes changed, some put in, or repeated."""
    way = draw(st.sampled_from(["cut", "change", "put in", "repeat"]))
    at = draw(st.integers(0, len(content)))
    if way == "cut":
        return content[:at]
    if way == "put in":
        return content[:at] + draw(st.binary(min_size=1, max_size=20)) + content[at:]
    if way == "repeat":
        return content[:at] + content[at // 2 :]
    changed = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, len(content) - 1))
        changed[place] ^= draw(st.integers(1, 255))
    return bytes(changed)


@st.composite
def harmed_json(draw: Any, document: Any) -> str:
    """One value of the document replaced, removed or put in, as text."""
    document = json.loads(json.dumps(document))
    parent, key = draw(st.sampled_from(_places(document)))
    way = draw(st.sampled_from(["value", "value", "raw", "remove", "more"]))
    if parent is None:
        return json.dumps(draw(values))
    if way == "remove":
        del parent[key]
    elif way == "more" and isinstance(parent, dict):
        parent[draw(st.sampled_from(["../x", "", "more", "n_layers"]))] = draw(values)
    elif way == "raw":
        parent[key] = "@@"
        raw = draw(st.sampled_from(list(RAW.values())))
        return json.dumps(document).replace('"@@"', raw)
    else:
        parent[key] = draw(values)
    return json.dumps(document)


def _places(document: Any, limit: int = 60) -> list[tuple[Any, Any]]:
    """(container, key) of values, those near the root first; (None, None) for the whole."""
    found: list[tuple[Any, Any]] = [(None, None)]
    level = [document]
    while level and len(found) < limit:
        inner = []
        for value in level:
            keys = value if isinstance(value, dict) else range(len(value))
            places = [(value, key) for key in keys][:limit]
            found += places
            inner += [value[key] for _, key in places if isinstance(value[key], dict | list)]
        level = inner
    return found


@st.composite
def harmed_safetensors(draw: Any, content: bytes) -> bytes:
    """The note in the header, the header itself, or the length that it says, harmed."""
    size = int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8 : 8 + size]), content[8 + size :]
    way = draw(st.sampled_from(["note", "note", "header", "size", "data"]))
    if way == "size":
        lie = draw(st.sampled_from([0, 1, size - 1, size + 1, 10**8, 2**40, 2**63, 2**64 - 1]))
        return lie.to_bytes(8, "little") + content[8:]
    if way == "data":
        bad = draw(st.sampled_from([b"\x00\x00\xc0\x7f", b"\xff" * 4, b"\x00\x00\x80\xff"]))
        at = 4 * draw(st.integers(0, max(0, len(data) // 4 - 1)))
        data = data[:at] + bad + data[at + 4 :]
        text = json.dumps(header)
    elif way == "note":
        key = next(iter(header["__metadata__"]))
        note = draw(harmed_json(json.loads(header["__metadata__"][key])))
        header["__metadata__"] = {key: note}
        text = json.dumps(header)
    else:
        text = draw(harmed_json(header))
    written = text.encode()
    return len(written).to_bytes(8, "little") + written + data
