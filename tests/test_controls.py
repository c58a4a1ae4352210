"""What a player does: snapshots, the latest of which wins, and taps that are not lost."""

import json
import random
from dataclasses import replace

import numpy as np
import pytest

from worldsim.controls import IDLE, ControlState, Held, Keys, merged

W, A, S, D = "KeyW", "KeyA", "KeyS", "KeyD"
OPPOSED = ((W, S), (A, D))


def state(*buttons: str, **others: object) -> ControlState:
    return ControlState(frozenset(buttons), **others)  # type: ignore[arg-type]


# --- states -------------------------------------------------------------------------------------
def test_a_state_is_a_plain_value() -> None:
    some = ControlState({W, A}, [1, 2], [0, 0, 1], 3, "night", 12, 7)  # type: ignore[arg-type]
    assert some == ControlState(frozenset({A, W}), (1.0, 2.0), (0.0, 0.0, 1.0), 3.0, "night", 12, 7)
    assert len({some, replace(some), ControlState()}) == 2
    assert some.amounts == (1, 2, 3, 0, 0, 1)
    text = json.dumps(some.as_dict())
    assert ControlState.from_dict(json.loads(text)) == some
    assert ControlState().as_dict() == {}
    assert ControlState.from_dict({}) == ControlState()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "must be an object of fields, got list"),
        ({"keys": ["KeyW"]}, "unknown field 'keys'"),
        ({"buttons": "KeyW"}, "buttons must be a list"),
        ({"buttons": [1]}, "buttons must be a set of names"),
        ({"buttons": None}, "buttons must be a list"),
        ({"look": [1]}, "look must be 2 finite numbers"),
        ({"look": [1, "2"]}, "look must be 2 finite numbers"),
        ({"look": {"x": 1, "y": 2}}, "look must be a list"),
        ({"look": [1, float("nan")]}, "look must be 2 finite numbers"),
        ({"move": [1, 2]}, "move must be 3 finite numbers"),
        ({"move": [0, 0, True]}, "move must be 3 finite numbers"),
        ({"move": [0, 0, [1]]}, "move must be 3 finite numbers"),
        ({"look": [0, 1e7]}, "look must be within ±1e\\+06"),
        ({"scroll": 10**400}, "scroll must be a finite number"),
        ({"scroll": "1"}, "scroll must be a finite number"),
        ({"scroll": None}, "scroll must be a finite number"),
        ({"t_client": float("inf")}, "t_client must be a finite number"),
        ({"prompt": 3}, "prompt must be words or None"),
        ({"event_id": -1}, "event_id must be 0 or more"),
        ({"event_id": 1.5}, "event_id must be 0 or more"),
        ({"event_id": True}, "event_id must be 0 or more"),
    ],
)
def test_what_is_no_control_is_refused_in_one_line(data: object, message: str) -> None:
    with pytest.raises(ValueError, match=f"^control: {message}") as told:
        ControlState.from_dict(data)  # type: ignore[arg-type]
    assert "\n" not in str(told.value)


def test_shares_of_a_state_sum_to_it() -> None:
    whole = state(W, look=(3.0, -1.0), scroll=2.0, move=(0.0, 0.0, 0.5))
    third = whole.shared(3)
    assert third.buttons == whole.buttons and third.move == whole.move
    assert np.allclose(3 * np.array([*third.look, third.scroll]), [3, -1, 2], atol=1e-12)
    assert whole.shared(1) == whole


# --- latest wins, short taps are kept -----------------------------------------------------------
def test_a_tap_is_held_for_one_block() -> None:
    held = Held().heard(state(W)).heard(state())
    assert held.buttons == IDLE and held.now().buttons == {W}
    assert held.spent().now().buttons == IDLE
    long = Held().heard(state(W)).spent()  # held for a block already
    assert long.now().buttons == {W}
    assert long.heard(state()).now().buttons == IDLE
    again = long.heard(state()).heard(state(W)).heard(state())  # let go of, and tapped
    assert again.now().buttons == {W} and again.spent().now().buttons == IDLE


def test_the_latest_snapshot_wins_but_movements_are_summed() -> None:
    held = Held()
    for event, right in enumerate((1.0, 2.0, -5.0), start=1):
        told = state(W, look=(right, 1.0), scroll=0.5, move=(right, 0.0, 0.0), event_id=event)
        held = held.heard(replace(told, prompt="night"))
    now = held.now()
    assert (now.look, now.scroll, now.move) == ((-2.0, 3.0), 1.5, (-5.0, 0.0, 0.0))
    assert now.event_id == 3 and now.prompt is None  # a prompt is asked for once, by the session
    after = held.spent().now()
    assert (after.look, after.scroll, after.move) == ((0.0, 0.0), 0.0, (-5.0, 0.0, 0.0))
    assert after.event_id == 3 and after.buttons == {W}


def test_no_sum_grows_beyond_what_a_model_can_be_told() -> None:
    held = Held()
    for _ in range(3):
        held = held.heard(state(look=(-9e5, 1.0)))
    assert held.now().look == (-1e6, 3.0)


def test_of_opposed_keys_the_older_loses_for_as_long_as_both_are_held() -> None:
    held = Held().heard(state(W)).spent().heard(state(W, S))
    assert held.now(OPPOSED).buttons == {S}
    assert held.buttons == {W, S}  # it is held all the same
    assert held.spent().now(OPPOSED).buttons == {S}
    assert held.spent().heard(state(W)).now(OPPOSED).buttons == {W}
    # A tap of the other one is newer, for one block.
    tapped = Held().heard(state(W)).spent().heard(state(W, S)).heard(state(W))
    assert tapped.now(OPPOSED).buttons == {S}
    assert tapped.spent().now(OPPOSED).buttons == {W}
    # Let go of and pressed again, W is the newer one.
    again = Held().heard(state(W)).heard(state(S)).heard(state(S, W))
    assert again.now(OPPOSED).buttons == {W}
    both = Held().heard(state(W, A)).heard(state(W, A, S, D))
    assert both.now(OPPOSED).buttons == {S, D}
    three = Held().heard(state(A)).heard(state(A, D)).heard(state(A, D, W))
    assert three.now([(A, D, W)]).buttons == {D, W}


@pytest.mark.parametrize("seed", range(20))
def test_any_run_of_snapshots_is_heard_as_the_definition_says(seed: int) -> None:
    """Held at the end, or pressed in between; all that was moved is moved, once."""
    rng = random.Random(seed)
    held, before = Held(), IDLE
    for _ in range(30):  # blocks
        pressed: set[str] = set()
        moved = 0.0
        for _ in range(rng.randrange(5)):
            buttons: Keys = frozenset(key for key in (W, A, S, D) if rng.random() < 0.4)
            moved += (right := float(rng.randrange(-9, 9)))
            held = held.heard(ControlState(buttons, look=(right, 0.0)))
            pressed |= buttons - before
            before = buttons
        assert held.now().buttons == before | pressed and held.buttons == before
        assert held.now().look[0] == moved
        live = held.now(OPPOSED).buttons
        assert live <= before | pressed
        assert all(bool(live & set(pair)) == bool((before | pressed) & set(pair))
                   and not live.issuperset(pair) for pair in OPPOSED)  # fmt: skip
        held = held.spent()


def test_states_in_a_row_merge_into_one() -> None:
    track = [state(W, look=(1.0, 0.0)), state(A), state(A, D, look=(2.0, 1.0), event_id=4)]
    whole = merged(track)
    assert whole.buttons == {W, A, D} and whole.look == (3.0, 1.0) and whole.event_id == 4
    assert merged(track, OPPOSED).buttons == {W, D}
    assert merged([whole]) == whole and merged([]) == ControlState()
