"""The simulation of ranks against what can be counted by hand, and against chance."""

from dataclasses import replace

import pytest

from worldsim.schedule import Schedule
from worldsim.simulate import Costs, Forecast, simulate
from worldsim.wavefront import spread

STAGE = 0.05
STEPS = (1000, 750, 500, 250)
SERIAL = Schedule(STEPS)
TPP = replace(SERIAL, context="lag", order="steps")


def told(schedule: Schedule, ranks: int, blocks: int = 60, **costs: float) -> Forecast:
    return simulate(spread(schedule, blocks, ranks), Costs(STAGE, pictures=4, **costs))  # type: ignore[arg-type]


def test_one_rank_does_one_pass_after_another() -> None:
    said = told(SERIAL, 1, commit=STAGE, decode=0.02, own_thread=False)
    assert 4 / said.fps == pytest.approx(5 * STAGE + 0.02)
    assert said.first == pytest.approx(4 * STAGE + 0.02) == pytest.approx(said.delay)
    assert said.busy == pytest.approx((1.0,)), "never more"


def test_each_step_on_a_rank_brings_a_block_in_every_stage() -> None:
    said = told(TPP, 4)
    assert 4 / said.fps == pytest.approx(STAGE)
    assert said.first == pytest.approx(4 * STAGE) == pytest.approx(said.delay)


def test_messages_and_links_are_on_the_way_of_every_block() -> None:
    said = told(TPP, 4, message=0.001, latency=0.004)
    assert said.first == pytest.approx(4 * STAGE + 3 * (2 * 0.001 + 0.004) + 0.001)
    period = STAGE + 2 * 0.001 + 0.004  # packed and unpacked by who computes; none waits on the way
    assert 4 / said.fps == pytest.approx(period)


def test_a_cold_start_is_over_unless_a_context_pass_hides_it() -> None:
    cold, hiar = STAGE / 5, replace(SERIAL, context="output", order="steps")
    for schedule, lag in ((TPP, 0.0), (hiar, 3 * cold)):
        passes = {"commit": STAGE} if schedule is hiar else {}
        said = told(schedule, 4, cold=cold, **passes)
        assert said.first == pytest.approx(4 * (STAGE + cold))
        assert said.delay == pytest.approx(4 * STAGE + lag)
        assert said.fps == pytest.approx(told(schedule, 4, **passes).fps)


def test_a_slow_decoder_sets_the_pace() -> None:
    said = told(TPP, 5, decode=2 * STAGE)
    assert 4 / said.fps == pytest.approx(2 * STAGE)
    assert said.busy[4] > 0.9 > said.busy[0]


def test_passes_that_vary_slow_the_ranks_and_keep_no_block_waiting_long() -> None:
    even, uneven = told(TPP, 4), told(TPP, 4, spread=0.1)
    assert uneven == told(TPP, 4, spread=0.1), "chance is the same at every call"
    assert even.delay < uneven.delay < 4.5 / (uneven.fps / 4), "a period for every rank, or so"
    assert 0.8 * even.fps < uneven.fps < 0.97 * even.fps
    assert told(TPP, 4, spread=0.2).fps < uneven.fps
