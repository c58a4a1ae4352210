"""What comes over the wire is believed only as far as it is checked."""

import json
import math
import random

import pytest

from worldsim.apps.wire import (
    FIELDS,
    FIRST,
    HEADER,
    MESSAGE_BYTES,
    OPTIONAL,
    VERSION,
    Malformed,
    Rate,
    picture,
    read,
)

GOOD = {
    "control": {"id": 1, "t": 12.5, "buttons": ["KeyW"]},
    "prompt": {"id": 2, "t": 3, "text": "night"},
    "ack": {"number": 5, "received": 1.0, "due": 1.5, "painted": 2.0},
    "pause": {},
    "resume": {},
    "reset": {"seed": 2**53},
    "rewind": {"block": 0},
    "fork": {},
    "switch": {"branch": 1},
    "drop": {"branch": 1},
    "record": {"on": True},
}


def test_every_kind_of_message_is_read() -> None:
    assert GOOD.keys() == FIELDS.keys()
    for kind, fields in GOOD.items():
        assert read(json.dumps({"type": kind, **fields})) == {"type": kind, **fields}


@pytest.mark.parametrize("kind", GOOD)
def test_a_missing_or_a_strange_field_is_refused(kind: str) -> None:
    good = {"type": kind, **GOOD[kind]}
    with pytest.raises(Malformed, match="unknown field 'x'"):
        read(json.dumps({**good, "x": 1}))
    for name in GOOD[kind]:
        if name not in OPTIONAL:
            with pytest.raises(Malformed, match=f"{name} is missing"):
                read(json.dumps({key: value for key, value in good.items() if key != name}))
        for wrong in (None, {}, [[]], "", -1.5, 1e308, "x" * 600, [1] * 40, ["A" * 30]):
            if FIELDS[kind][name](wrong):
                continue
            with pytest.raises(Malformed, match=name):
                read(json.dumps({**good, name: wrong}))


@pytest.mark.parametrize(
    "text",
    [
        b"\x00\x01", "", "{", "[]", "null", "1", '"pause"', "{}", '{"type": null}',
        '{"type": ["pause"]}', '{"type": "pause", "type": "nothing"}', "[" * 3000,
        '{"type":"ack","number":1,"received":NaN,"due":1,"painted":1}',
        '{"type":"ack","number":1,"received":Infinity,"due":1,"painted":1}',
        '{"type":"ack","number":1e3,"received":1,"due":1,"painted":1}',
        '{"type":"ack","number":true,"received":1,"due":1,"painted":1}',
        '{"type":"ack","number":1,"received":1e999,"due":1,"painted":1}',
        '{"type":"reset","seed":' + "9" * 400 + "}",
        '{"type":"prompt","id":1,"t":1,"text":"' + "a" * MESSAGE_BYTES + '"}',
        '{"type":"prompt","id":1,"t":1,"text":"   "}',
        '{"type":"control","id":1,"t":1,"buttons":[""]}',
        '{"type":"control","id":1,"t":1,"buttons":[],"look":[0,1000001]}',
        '{"type":"control","id":1,"t":1,"buttons":[],"move":[0,-1e7,0]}',
        '{"type":"control","id":1,"t":1,"buttons":[],"scroll":1e15}',
        "\ud800",
    ],
)  # fmt: skip
def test_malformed_messages_are_refused_in_one_line(text: str | bytes) -> None:
    with pytest.raises(Malformed) as told:
        read(text)
    assert "\n" not in str(told.value) and len(str(told.value)) < 200


def test_mutated_messages_are_read_or_refused_and_nothing_else() -> None:
    draw = random.Random(7)
    texts = [json.dumps({"type": kind, **fields}) for kind, fields in GOOD.items()]
    for _ in range(20_000):
        text = list(draw.choice(texts))
        for _ in range(draw.randrange(1, 5)):
            at = draw.randrange(len(text))
            text[at : at + draw.randrange(3)] = draw.choice(
                ['"', "9", "{", "[", "-", "e", "\\", "é"]
            )
        try:
            told = read("".join(text))
        except Malformed:
            continue
        assert told["type"] in FIELDS


def test_the_header_of_a_picture() -> None:
    message = picture(1, 2, 3, 4, 5, (0.5, -1.0, 2.0), 1.25, 2.5, b"data", first=True)
    assert HEADER.size == 48  # what page.js counts on
    head = HEADER.unpack(message[: HEADER.size])
    assert head == (VERSION, 1, FIRST, 2, 3, 4, 5, 0.5, -1.0, 2.0, 1250.0, 2500.0)
    assert message[HEADER.size :] == b"data"
    still = HEADER.unpack(picture(2, 2, 3, 4, 5, None, 0, 0, b"", first=False)[: HEADER.size])
    assert still[2] == 0 and all(map(math.isnan, still[7:10]))


def test_rate() -> None:
    rate = Rate(10, 3, now=0.0)
    assert [rate.allows(0.0) for _ in range(4)] == [True, True, True, False]
    assert rate.allows(0.1) and not rate.allows(0.1)
    assert [rate.allows(60.0) for _ in range(4)] == [True, True, True, False], "no more is saved"
