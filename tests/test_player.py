"""Players without a browser: turns, late latching, run-ahead, going elsewhere. A clock of our own
makes every deadline exact; nothing sleeps."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from worldsim.controls import ControlState
from worldsim.history import STRIDE
from worldsim.replay import Differs, Replay, read_run
from worldsim.streaming.course import Course
from worldsim.streaming.latency import PARTS, Latency, quantile, trip
from worldsim.streaming.pacing import Pacer
from worldsim.streaming.pictures import JPEG, WEBP, Jpeg, Webp, encoder
from worldsim.streaming.player import Player
from worldsim.streaming.recording import Recording
from worldsim.streaming.seat import COMMANDS_KEPT, HEARD_KEPT, NEVER, Ready
from worldsim.streaming.turns import Turns
from worldsim.world import World

STEP = 0.02  # seconds that a block takes by our clock
FORWARD, LEFT = frozenset({"KeyW"}), frozenset({"KeyA"})


class Clock:
    """Stands still unless it is told to go on."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Slow(Course):
    """Its blocks take `STEP` by the clock; ``during`` is called after their first step."""

    clock: Clock
    during: Callable[[], None] = staticmethod(lambda: None)

    def step(self, on_step: Any = None) -> Any:
        def taking(cell: Any, x0: Any) -> None:
            self.clock.now += STEP / 2
            during, self.during = self.during, lambda: None
            during()
            if on_step is not None:
                on_step(cell, x0)

        return super().step(taking)


Seat = Callable[..., tuple[Player, Clock]]


@pytest.fixture(scope="module")
def world(make_world: Callable[..., World]) -> World:
    return make_world(cache="sink=1,recent=3", steps=2)


@pytest.fixture
def seat(world: World, tmp_path: Path) -> Iterator[Seat]:
    """Players that are closed at the end."""
    players = []

    def sit(clock: Clock | None = None, **options: Any) -> tuple[Player, Clock]:
        clock = clock or Clock()
        name = str(len(players))

        def opened(seed: int, picture: Any = None) -> Any:
            more = {} if picture is None else {"pictures": picture[None]}
            return world.session(seed=seed, history=2**20, **more)

        course = Slow(opened, run=tmp_path / f"{name}.wsrun")
        course.clock = clock
        film = Recording(tmp_path / f"{name}.mp4", world.config.fps)
        player = Player(course, Webp(), world.config.fps, recording=film, clock=clock, **options)
        players.append(player)
        return player, clock

    yield sit
    for player in players:
        player.close()
    assert world.pool.used_pages == 0, "a player left pages behind"


def work(player: Player, clock: Clock) -> None:
    """Let it compute until it wants no turn now."""
    while player.due() <= clock() and not player.closed:
        player.turn()


def show(player: Player, clock: Clock) -> Ready:
    """Compute, wait until the block is due, and take it."""
    while (due := player.waiting()) is None:
        work(player, clock)
        if player.waiting() is None:
            assert player.due() < NEVER, "it waits for nothing"
            clock.now = max(clock.now, player.due())
    clock.now = max(clock.now, due)
    taken = player.take(clock())
    assert taken is not None
    return taken[0]


def see(player: Player, ready: Ready, clock: Clock) -> None:
    player.acknowledge(ready.number, clock(), clock(), clock())


def play(player: Player, clock: Clock, blocks: int) -> list[Ready]:
    shown = []
    for _ in range(blocks):
        shown.append(show(player, clock))
        see(player, shown[-1], clock)
    work(player, clock)
    return shown


def pixels(shown: list[Ready]) -> list[bytes]:
    return [picture for ready in shown for picture in ready.pictures]


def walked(world: World, track: list[frozenset[str]], seed: int = 0) -> list[bytes]:
    """What a plain session shows under held keys of each block."""
    encode = Webp()
    with world.session(seed=seed) as session:
        shown = []
        for held in track:
            session.control(held)
            shown += [encode(picture) for picture in session.step().frames]
        return shown


# --- pictures and deadlines -----------------------------------------------------------------------
def test_small_pictures_keep_every_pixel(rng_picture: np.ndarray[Any, Any]) -> None:
    import io

    from PIL import Image

    back = np.asarray(Image.open(io.BytesIO(Webp()(rng_picture))).convert("RGB"))
    np.testing.assert_array_equal(back, rng_picture)
    assert encoder(64, 64).kind == WEBP
    assert encoder(480, 832).kind == JPEG
    near = np.asarray(Image.open(io.BytesIO(Jpeg(95)(rng_picture // 8 + 100))))
    assert np.abs(near.astype(int) - (rng_picture // 8 + 100)).mean() < 4


@pytest.fixture
def rng_picture() -> np.ndarray[Any, Any]:
    return np.random.default_rng(0).integers(0, 256, (24, 36, 3), dtype=np.uint8)


def test_deadlines_do_not_drift_and_do_not_hurry() -> None:
    pacer = Pacer(10)
    assert pacer.begin(5.0, 4) == 5.0
    assert pacer.due == pytest.approx(5.4)
    assert pacer.begin(5.43, 4) == pytest.approx(5.4)  # a little late: the next is not
    assert pacer.due == pytest.approx(5.8)
    assert pacer.begin(6.5, 4) == 6.5  # far too late: all that follows moves
    assert pacer.due == pytest.approx(6.9)
    assert pacer.late == 1


def test_a_picture_is_dropped_once_the_next_is_due() -> None:
    pacer = Pacer(10)
    due = pacer.begin(0.0, 3)
    assert pacer.shows(0.0, due, 0, 3)
    assert not pacer.shows(0.21, due, 1, 3)
    assert pacer.shows(0.29, due, 2, 3)  # the last is always shown
    assert (pacer.pictures, pacer.dropped, pacer.late) == (3, 1, 0)
    for delay in (-0.02, 0.04, 0.06):
        pacer.painted(delay)
    assert pacer.late == 1, "of what is painted, what is more than half a period behind"


def test_deadlines_follow_the_screen() -> None:
    pacer = Pacer(10)
    pacer.begin(1.0, 4)
    frame, first = 1 / 60, 1.003  # a screen's frames, and when one of them begins

    def painted(due: float) -> float:
        """The nearest frame, and the time that painting takes."""
        return first + frame * round((due - first) / frame) + 0.002

    for offset in (0.0, 0.006, 0.0083, 0.012):
        first += offset
        for _ in range(40):
            pacer.begin(pacer.due or 0.0, 4)
            pacer.follow(painted(pacer.due or 0.0) - (pacer.due or 0.0))
        off = painted(pacer.due or 0.0) - (pacer.due or 0.0)
        assert abs(off) <= 0.0041, "frames begin where pictures are due"
    before = pacer.due or 0.0
    pacer.follow(0.05)
    assert pacer.due == pytest.approx(before, abs=1e-9), "one that was held up moves nothing"


# --- latency --------------------------------------------------------------------------------------
def test_parts_of_a_trip_sum_to_what_the_player_felt() -> None:
    work = {"denoise": 0.020, "decode": 0.005, "encode": 0.001}
    times = {"arrived": 50.0, "sent": 50.1, "key": 1.0, "received": 1.115, "painted": 1.125}
    for due, early in (
        (1.0, 0.0),
        (1.119, 0.004),
        (1.13, 0.01),
    ):  # there late, early, painted early
        made = trip(7, 3, work, due=due, **times)
        assert sum(getattr(made, part) for part in PARTS) == pytest.approx(0.125)
        assert made.network == pytest.approx(0.015)
        assert made.wait == pytest.approx(0.1 - 0.026 + early)
        assert made.paint == pytest.approx(0.01 - early)
    made = trip(7, 3, work, due=1.0, **times)
    latency = Latency()
    latency.add(made)
    assert latency.figures()["own"][0] == pytest.approx(26)
    assert quantile([3.0, 1.0, 2.0], 0.5) == 2.0 and quantile([], 0.5) == 0.0
    assert quantile([float(x) for x in range(300)], 0.99) == 296.0, "three are above"


# --- blocks ---------------------------------------------------------------------------------------
def test_a_player_sees_what_a_session_makes(seat: Seat, world: World) -> None:
    player, clock = seat()
    player.control(ControlState(FORWARD, event_id=1))
    shown = play(player, clock, 3)
    player.control(ControlState(LEFT, event_id=2))
    shown += play(player, clock, 3)
    assert pixels(shown) == walked(world, [FORWARD] * 3 + [LEFT] * 3)
    assert [ready.event for ready in shown] == [1, 1, 1, 2, 2, 2]
    assert [ready.block.index for ready in shown] == list(range(6))


def test_no_block_is_made_beyond_the_one_after_what_was_seen(seat: Seat) -> None:
    player, clock = seat(late_latching=False)
    first = show(player, clock)
    work(player, clock)
    assert player.due() == NEVER, "the next block was begun before the first was seen"
    see(player, first, clock)
    work(player, clock)
    assert player.waiting() is not None
    assert player.figures()["ahead"] == 1


def test_a_block_is_begun_as_late_as_its_p99_allows(seat: Seat) -> None:
    player, clock = seat()
    play(player, clock, 4)
    due = player.pacer.due
    assert due is not None
    assert player.expected(0.99) == pytest.approx(STEP, rel=0.01)
    assert player.due() == pytest.approx(due - STEP, abs=1e-3)
    early, clock = seat(late_latching=False)
    play(early, clock, 4)
    assert early.waiting() is not None, "without late latching it is made at once"


def hasty(player: Player, clock: Clock) -> None:
    """Let the next block begin long before it is due: one in twenty took eight times as long."""
    player._took.extend([STEP] * 20 + [8 * STEP])
    work(player, clock)
    clock.now = player.due()


def test_a_newer_control_makes_a_waiting_block_anew(seat: Seat, world: World) -> None:
    player, clock = seat()
    player.control(ControlState(FORWARD, event_id=1))
    shown = play(player, clock, 2)
    hasty(player, clock)
    player.turn()
    assert player.waiting() is not None
    player.control(ControlState(LEFT, event_id=2))
    work(player, clock)
    shown += play(player, clock, 2)
    assert player.counts.redone == 1
    assert pixels(shown) == walked(world, [FORWARD] * 2 + [LEFT] * 2)
    assert shown[2].event == 2
    numbers = [ready.number for ready in shown]
    assert numbers == sorted(set(numbers)), "a picture that was never sent has no number"


def test_a_block_that_leaves_just_then_is_not_made_anew(seat: Seat, world: World) -> None:
    player, clock = seat()
    shown = play(player, clock, 2)
    hasty(player, clock)
    player.turn()
    player.control(ControlState(LEFT, event_id=2))
    withdraw = player._withdraw

    def leaving() -> bool:
        taken = player.take(clock())
        assert taken is not None
        shown.append(taken[0])
        return withdraw()

    player._withdraw = leaving  # type: ignore[method-assign]
    player.turn()
    player._withdraw = withdraw  # type: ignore[method-assign]
    work(player, clock)
    assert player.counts.redone == 0 and player.waiting() is None, "made before it was seen"
    see(player, shown[-1], clock)
    shown += play(player, clock, 1)
    assert pixels(shown) == walked(world, [frozenset()] * 3 + [LEFT])


def test_a_newer_control_stops_a_block_half_made(seat: Seat, world: World) -> None:
    player, clock = seat()
    shown = play(player, clock, 2)
    hasty(player, clock)

    def press() -> None:
        player.control(ControlState(FORWARD, event_id=5))

    player.course.during = press  # type: ignore[attr-defined]
    shown += play(player, clock, 1)
    assert player.counts.aborted == 1
    assert shown[-1].event == 5
    assert pixels(shown) == walked(world, [frozenset()] * 2 + [FORWARD])


def test_a_control_that_comes_too_late_waits_for_the_next_block(seat: Seat, world: World) -> None:
    player, clock = seat()
    shown = play(player, clock, 2)
    clock.now = player.due()
    player.turn()  # it is ready just in time
    player.control(ControlState(FORWARD, event_id=3))
    shown += play(player, clock, 2)
    assert player.counts.redone == player.counts.aborted == 0
    assert player.pacer.late == 0
    assert pixels(shown) == walked(world, [frozenset()] * 3 + [FORWARD])


def test_a_tap_shorter_than_a_block_counts_once(seat: Seat, world: World) -> None:
    player, clock = seat()
    shown = play(player, clock, 2)
    for event, held in enumerate((FORWARD, frozenset[str]()), 1):
        player.control(ControlState(held, event_id=event))
    shown += play(player, clock, 2)
    assert pixels(shown) == walked(world, [frozenset()] * 2 + [FORWARD, frozenset()])
    assert player.counts.applied == 2


def test_an_unknown_prompt_is_told_and_nothing_ends(seat: Seat) -> None:
    player, clock = seat()
    play(player, clock, 1)
    player.prompt("zzzz qqqq")
    play(player, clock, 2)
    assert any("zzzz" in told.data.get("text", "") for told in player.told())
    player.prompt("night zzzz")
    play(player, clock, 2)
    assert player.asked == "night zzzz"
    assert any("passed over zzzz" in told.data.get("text", "") for told in player.told())


def test_what_is_said_right_after_a_command_is_heeded(seat: Seat, world: World) -> None:
    player, clock = seat()
    play(player, clock, 2)
    player.prompt("red brick")
    player.ask("reset", 9)
    player.control(ControlState(FORWARD, event_id=1))
    player.control(ControlState(event_id=2))
    player.prompt("night", event_id=3)
    work(player, clock)
    shown = play(player, clock, 2)
    assert player.asked == "night"
    with world.session("night", seed=9) as session:
        wanted = []
        for held in (FORWARD, frozenset[str]()):
            session.control(held)
            session.control(())
            wanted += [Webp()(picture) for picture in session.step().frames]
    assert pixels(shown) == wanted, "the tap or the prompt was lost"


def test_of_very_many_controls_nothing_is_lost(seat: Seat) -> None:
    player, clock = seat()
    play(player, clock, 1)
    player.ask("pause")
    work(player, clock)
    player.prompt("night")
    player.control(ControlState(FORWARD))
    for event in range(3 * HEARD_KEPT):
        player.control(ControlState(event_id=event))
    assert len(player._heard) == HEARD_KEPT
    player.ask("resume")
    work(player, clock)
    shown = play(player, clock, 2)
    assert player.asked == "night"
    assert FORWARD in [ready.block.applied.controls[0].buttons for ready in shown]


def test_movements_of_very_many_controls_are_summed(seat: Seat) -> None:
    player, _ = seat()
    for event in range(3 * HEARD_KEPT):
        player.control(ControlState(look=(1.0, -0.5), scroll=2.0, event_id=event))
    assert len(player._heard) == HEARD_KEPT
    assert sum(said.state.look[0] for said in player._heard) == 3 * HEARD_KEPT
    assert sum(said.state.scroll for said in player._heard) == 6 * HEARD_KEPT
    assert player._heard[-1].state.event_id == 3 * HEARD_KEPT - 1


def test_too_many_commands_are_refused(seat: Seat) -> None:
    player, _ = seat()
    asked = [player.ask("resume") for _ in range(COMMANDS_KEPT + 1)]
    assert asked == [True] * COMMANDS_KEPT + [False]
    assert not player.ask("pause") and not player.paused
    other, _ = seat()
    assert other.ask("begin", None) and not other.ask("load", None) and other.ask("fork")
    other._commands.clear()
    assert all("too much waits" in told.data["text"] for told in player.told())


def test_pause_makes_nothing_and_resume_goes_on(seat: Seat, world: World) -> None:
    player, clock = seat()
    shown = play(player, clock, 2)
    player.ask("pause")
    assert player.waiting() is None
    work(player, clock)
    assert player.due() == NEVER
    clock.now += 60
    player.ask("resume")
    shown += play(player, clock, 2)
    assert pixels(shown) == walked(world, [frozenset()] * 4)
    assert player.pacer.late == 0, "time that was paused is not late"


# --- elsewhere ------------------------------------------------------------------------------------
def test_rewound_and_played_again_is_the_same(seat: Seat) -> None:
    player, clock = seat()
    player.control(ControlState(FORWARD, event_id=1))
    shown = play(player, clock, 12)
    player.ask("rewind", 5)
    work(player, clock)
    again = play(player, clock, 7)
    assert pixels(again) == pixels(shown[5:])
    assert len({ready.run for ready in shown}) == 1
    assert again[0].run > shown[0].run
    player.ask("rewind", 99)
    work(player, clock)
    assert any("99" in told.data.get("text", "") for told in player.told())


def test_a_tap_before_a_kept_moment_is_not_heard_again(seat: Seat, world: World) -> None:
    player, clock = seat()
    shown = play(player, clock, STRIDE)
    player.control(ControlState(FORWARD, event_id=1))
    player.control(ControlState(event_id=2))
    play(player, clock, 2)
    assert player.course.session.history.before(STRIDE, player.course.session.now).block == STRIDE
    player.ask("rewind", STRIDE)
    work(player, clock)
    shown += play(player, clock, 2)
    assert pixels(shown) == walked(world, [frozenset()] * (STRIDE + 2))


def test_a_fork_is_come_back_to(seat: Seat) -> None:
    player, clock = seat()
    play(player, clock, 3)
    player.ask("fork")
    work(player, clock)
    player.control(ControlState(FORWARD, event_id=1))
    there = play(player, clock, 3)
    player.control(ControlState(event_id=2))
    play(player, clock, 2)
    player.control(ControlState(FORWARD, event_id=3))
    player.ask("switch", 1)
    work(player, clock)
    assert pixels(play(player, clock, 3)) == pixels(there)
    for _ in range(9):
        player.ask("fork")
    work(player, clock)
    assert len(player.course.branches) == 8
    player.ask("drop", 1)
    work(player, clock)
    assert 1 not in player.course.branches


def test_reset_begins_another_seed(seat: Seat, world: World) -> None:
    player, clock = seat()
    play(player, clock, 2)
    player.ask("reset", 9)
    work(player, clock)
    assert pixels(play(player, clock, 2)) == walked(world, [frozenset()] * 2, seed=9)


def test_a_picture_begins_a_session(seat: Seat, world: World) -> None:
    player, clock = seat()
    play(player, clock, 1)
    picture = np.full((world.config.height, world.config.width, 3), 200, np.uint8)
    player.ask("begin", picture)
    work(player, clock)
    shown = play(player, clock, 2)
    with world.session(pictures=picture[None]) as session:
        wanted = [Webp()(frame) for _ in range(2) for frame in session.step().frames]
    assert pixels(shown) == wanted
    # What was given stays given: one goes back to what was made of it.
    assert player.oldest == 1
    player.ask("rewind", 0)
    work(player, clock)
    assert pixels(play(player, clock, 2)) == wanted


def test_what_is_recorded_is_what_was_shown(seat: Seat) -> None:
    player, clock = seat()
    play(player, clock, 1)
    player.ask("record", True)
    work(player, clock)
    shown = play(player, clock, 4)
    player.ask("record", False)
    work(player, clock)
    assert any(told.kind == "recorded" for told in player.told())
    assert player.recording is not None
    with av.open(str(player.recording.path)) as film:
        frames = sum(1 for _ in film.decode(video=0))
    assert frames == len(pixels(shown))


@pytest.mark.parametrize("what", ["rewind", "reset"])
def test_what_is_shown_while_a_command_comes_is_recorded(seat: Seat, what: str) -> None:
    player, clock = seat()
    play(player, clock, 1)
    player.ask("record", True)
    work(player, clock)
    shown = play(player, clock, 3)
    while player.waiting() is None:
        clock.now = max(clock.now, player.due())
        work(player, clock)
    real = player._command

    def shown_meanwhile(name: str, values: tuple[Any, ...]) -> None:
        taken = player.take(clock.now + 10)  # by the thread that shows, right after it was looked
        if taken is not None:
            shown.append(taken[0])
        real(name, values)

    player._command = shown_meanwhile  # type: ignore[method-assign]
    player.ask(what, 0)
    work(player, clock)
    player._command = real  # type: ignore[method-assign]
    player.ask("record", False)
    work(player, clock)
    assert len(shown) == 4 and player.recording is not None
    with av.open(str(player.recording.path)) as film:
        assert sum(1 for _ in film.decode(video=0)) == len(pixels(shown))


def test_a_full_disk_ends_the_film_and_not_the_player(seat: Seat) -> None:
    player, clock = seat()
    play(player, clock, 1)
    assert player.recording is not None

    def full(_: Any) -> None:
        raise OSError("cannot write film: no space left on device: make room")

    player.recording.write = full  # type: ignore[method-assign]
    play(player, clock, 2)
    assert any("no space" in told.data.get("text", "") for told in player.told())
    assert player.ended is None


@pytest.mark.parametrize("load", (False, True))
def test_a_full_disk_costs_the_replay_file_and_not_the_next_session(
    seat: Seat, world: World, load: bool
) -> None:
    player, clock = seat()
    play(player, clock, 2)
    recorder, run = player.course.session.recorder, player.course.run
    assert recorder is not None and run is not None
    replay = Replay(world, read_run(run).straight())

    def full() -> None:
        raise OSError("no space left on device")

    recorder.close = full  # type: ignore[method-assign]
    player.ask(*(("load", replay) if load else ("reset", 0)))
    work(player, clock)
    assert pixels(play(player, clock, 2)) == walked(world, [frozenset()] * 2)
    assert any("no space" in told.data.get("text", "") for told in player.told())
    assert player.ended is None
    player.close()
    assert world.pool.used_pages == 0, "the session before was not closed"


def test_a_saved_run_is_played_again_and_taken_over(seat: Seat, world: World) -> None:
    player, clock = seat()
    player.control(ControlState(FORWARD, event_id=1))
    play(player, clock, 3)
    player.ask("rewind", 1)
    player.control(ControlState(LEFT, event_id=2))
    work(player, clock)
    shown = play(player, clock, 4)
    assert player.course.run is not None
    run = read_run(player.course.run).straight()
    assert run.blocks == 5

    other, clock = seat()
    play(other, clock, 1)
    other.ask("load", Replay(world, run))
    work(other, clock)
    assert other.course.replaying
    again = play(other, clock, 4)
    assert pixels(again[1:]) == pixels(shown[:3])
    other.control(ControlState(FORWARD, event_id=1))
    own = play(other, clock, 2)
    assert not other.course.replaying
    assert (
        pixels(own) == walked(world, [FORWARD, *[LEFT] * 3, FORWARD, FORWARD])[-len(pixels(own)) :]
    )
    # What it saves is the whole way, which verifies.
    assert other.course.run is not None
    made = list(Replay(world, read_run(other.course.run)))
    assert made[-1][1].index == 5


def test_a_run_of_another_world_is_told(seat: Seat, world: World) -> None:
    player, clock = seat()
    play(player, clock, 3)
    assert player.course.run is not None
    run = read_run(player.course.run).straight()
    run.lines[1]["hash"] = "0" * len(run.lines[1]["hash"])  # type: ignore[index]
    with pytest.raises(Differs):
        list(Replay(world, run))
    player.ask("load", Replay(world, run))
    work(player, clock)
    play(player, clock, 3)
    assert any("another world" in told.data.get("text", "") for told in player.told())
    assert player.ended is None and not player.course.replaying


def test_a_line_that_makes_no_sense_ends_the_run_and_not_the_player(
    seat: Seat, world: World
) -> None:
    player, clock = seat()
    play(player, clock, 3)
    assert player.course.run is not None
    run = read_run(player.course.run).straight()
    run.lines[1]["controls"] = [{"buttens": []}]  # type: ignore[index]
    player.ask("load", Replay(world, run))
    work(player, clock)
    play(player, clock, 3)
    assert any("buttens" in told.data.get("text", "") for told in player.told())
    assert player.ended is None and not player.course.replaying


def test_a_run_that_cannot_be_opened_changes_nothing(seat: Seat, world: World) -> None:
    player, clock = seat(late_latching=False)
    shown = play(player, clock, 2)
    assert player.waiting() is not None
    assert player.course.run is not None
    replay = Replay(world, read_run(player.course.run).straight())

    def closed(_: int) -> Any:
        raise ValueError("no such run")

    replay.open = closed  # type: ignore[method-assign]
    player.ask("load", replay)
    work(player, clock)
    shown += play(player, clock, 2)
    assert any("no such run" in told.data.get("text", "") for told in player.told())
    assert pixels(shown) == walked(world, [frozenset()] * 4)


def test_a_run_keeps_no_more_to_rewind_to_than_its_player_may(world: World, tmp_path: Path) -> None:
    with world.session() as session:
        session.record(tmp_path / "run.wsrun")
        session.step()
    course = Course(lambda seed: world.session(seed=seed), history=0)
    course.follow(Replay(world, read_run(tmp_path / "run.wsrun")))
    assert course.session.history.most == 0
    pool = world.pool_of(world.config.size)
    for _ in range(3):  # no block of it was made yet
        course.follow(Replay(world, read_run(tmp_path / "run.wsrun")))
        course.take_over()
    promised = dict(pool._promised)
    course.follow(Replay(world, read_run(tmp_path / "run.wsrun")))
    course.take_over()
    assert promised == dict(pool._promised), "its own session is gone"
    course.close()


# --- turns ----------------------------------------------------------------------------------------
def test_players_take_turns_and_shares_are_counted(seat: Seat) -> None:
    clock = Clock()
    turns = Turns(clock=clock, start=False)
    players = [seat(clock, late_latching=False)[0] for _ in range(3)]
    for player in players:
        turns.add(player)
    for _ in range(200):
        turns.once()
        for player in players:
            if player.waiting() is not None:
                taken = player.take(clock())
                assert taken is not None
                see(player, taken[0], clock)
    counts = [player.counts.shown for player in players]
    assert max(counts) - min(counts) <= 1 and min(counts) > 10
    assert sum(player.share for player in players) == pytest.approx(1)
    assert all(player.share == pytest.approx(1 / 3, abs=0.05) for player in players)


def test_one_players_error_ends_nobody_else(seat: Seat) -> None:
    clock = Clock()
    turns = Turns(clock=clock, start=False)
    good, bad = (seat(clock, late_latching=False)[0] for _ in range(2))
    turns.add(good)
    turns.add(bad)

    def broken(*_: Any) -> Any:
        raise RuntimeError("out of memory")

    bad.course.step = broken  # type: ignore[method-assign]
    close = bad.course.close

    def unclosable() -> None:
        close()
        raise OSError("its folder is gone")

    bad.course.close = unclosable  # type: ignore[method-assign]
    for _ in range(30):
        turns.once()
        if good.waiting() is not None:
            taken = good.take(clock())
            assert taken is not None
            see(good, taken[0], clock)
    assert bad.closed and bad.ended == "the world stopped: RuntimeError: out of memory"
    assert good.ended is None and good.counts.shown > 5
    assert turns.players == [good]
    bad.course.close = close  # type: ignore[method-assign]


def test_idle_and_gone_players_are_freed(seat: Seat) -> None:
    clock = Clock()
    turns = Turns(idle=300, clock=clock, start=False)
    idle, gone, busy = (seat(clock)[0] for _ in range(3))
    for player in (idle, gone, busy):
        turns.add(player)
    for _ in range(12):
        turns.once()
    gone.leave("the browser left")
    clock.now += 301
    busy.control(ControlState(FORWARD, event_id=1))
    for _ in range(12):
        turns.once()
    assert idle.closed and "5 minutes" in (idle.ended or "")
    assert gone.closed and gone.ended == "the browser left"
    assert turns.players == [busy]


def test_turns_run_on_a_thread_until_closed(seat: Seat) -> None:
    import threading
    import time

    ready = threading.Event()
    player, _ = seat(Clock(), changed=ready.set)
    turns = Turns()
    turns.add(player)
    assert ready.wait(30)
    until = time.perf_counter() + 30
    while player.waiting() is None and time.perf_counter() < until:
        ready.wait(0.01)
    assert player.waiting() is not None
    turns.close()
    assert player.closed
    with pytest.raises(ValueError, match="closing"):
        turns.add(player)
