"""Schedules as data: what each cell reads, when it runs and where; orders that cannot be."""

from dataclasses import replace
from itertools import pairwise, product
from pathlib import Path

import pytest

from worldsim.apps.schedule_show import ShowOptions, run
from worldsim.cache.config import CacheConfig
from worldsim.lines import NAMES, called, read
from worldsim.schedule import CLEAN, LAST, Schedule
from worldsim.wavefront import Grid, Name, Placed, kept, ranges, spread

ONE_RANK = ("serial", "fused", "reuse", "diagonal", "disa", "tpp", "batch", "ring", "hiar")
SIZES = tuple(product((1, 2, 3, 7), (1, 2, 3, 4)))  # blocks, steps


def of(name: str, steps: int = 4) -> Schedule:
    return called(name, Schedule.uniform(steps, 5.0))


def d(block: int, level: int, part: int = 0) -> Name:
    return Name("denoise", block, level, part)


# --- ticks ------------------------------------------------------------------------------------
@pytest.mark.parametrize(("blocks", "steps"), SIZES)
def test_ticks_are_the_published_formulas(blocks: int, steps: int) -> None:
    ticks = {
        "serial": blocks * (steps + 1),
        "reuse": blocks * steps,
        "fused": blocks * steps + 1,
        "batch": blocks + steps - 1,
        "rolling": 2 * (blocks + steps - 1),
    }
    for name, expected in ticks.items():
        assert spread(of(name, steps), blocks).ticks == expected, name
    assert spread(of("tpp", steps), blocks, steps).ticks == blocks + steps - 1
    assert spread(of("hiar", steps), blocks, steps).ticks == 2 * blocks + steps - 1
    for ranks in (1, 2, 3):
        assert spread(of("ring", steps), blocks, ranks).ticks == blocks + steps * ranks - 1


def test_lag_counts_for_as_many_ticks_as_it_says() -> None:
    assert [spread(of(f"lag{k}"), 7).ticks for k in range(4)] == [10, 16, 22, 28]
    for lag in range(4):
        for cell in spread(of(f"lag{lag}"), 7).cells:
            assert cell.tick == (lag + 1) * cell.name.block + cell.name.level


@pytest.mark.parametrize(("blocks", "steps"), SIZES)
def test_longest_chains_are_those_of_the_table(blocks: int, steps: int) -> None:
    chains = {"serial": blocks * (steps + 1), "reuse": blocks * steps}
    chains |= {"tpp": blocks + steps - 1, "hiar": 2 * blocks + steps - 1}
    for name, expected in chains.items():
        grid = spread(of(name, steps), blocks, steps if name in ("tpp", "hiar") else 1)
        assert len(grid.critical) == expected, name
        for before, after in pairwise(grid.critical):
            assert before in grid.needs(grid.at[after])


def test_control_to_photon_is_told_in_blocks() -> None:
    assert spread(of("tpp"), 8, 4).delay == 4  # no sooner for its four ranks
    assert spread(of("hiar"), 8, 4).delay == 2
    assert spread(of("serial"), 8).delay == 4 / 5
    assert spread(of("ring"), 9, 2).delay == 8


def test_a_rank_of_its_own_decodes() -> None:
    grid = spread(of("tpp", 2), 3, 3)
    decoded = [cell for cell in grid.cells if cell.name.kind == "decode"]
    assert [(cell.rank, cell.tick) for cell in decoded] == [(2, 2), (2, 3), (2, 4)]
    assert [grid.done(block) for block in range(3)] == [2, 3, 4]
    assert (grid.period, grid.delay) == (1, 3), "it is there when it is decoded"


# --- what is read -----------------------------------------------------------------------------
def test_every_cell_reads_the_level_that_its_rule_says() -> None:
    reads = {  # the level at which step 0, 1, 2 and 3 read
        "serial": [CLEAN] * 4,
        "fused": [CLEAN] * 4,
        "reuse": [3] * 4,
        "tpp": [0, 1, 2, 3],
        "batch": [0, 1, 2, 3],
        "ring": [0, 1, 2, 3],
        "lag1": [1, 2, 3, 3],
        "lag3": [3] * 4,
        "hiar": [1, 2, 3, CLEAN],
    }
    for name, level in reads.items():
        for cell in spread(of(name), 5).cells:
            block, s = cell.name.block, cell.name.level
            # A context pass reads its own level.
            expected = level[s] if cell.name.kind == "denoise" else s
            assert cell.reads == tuple((j, expected) for j in range(block)), (name, cell)


def test_the_history_is_what_the_policy_keeps() -> None:
    config = CacheConfig.parse("sink=1,recent=3", 1)
    history = kept(config, 1, 8)
    assert [list(history(b)) for b in range(6)] == [
        [], [0], [0, 1], [0, 1, 2], [0, 1, 2, 3], [0, 2, 3, 4],
    ]  # fmt: skip
    grid = spread(of("tpp"), 8, 4, history)
    assert grid.at[d(7, 2)].reads == ((0, 2), (4, 2), (5, 2), (6, 2))
    halves = kept(CacheConfig.parse("recent=3", 2), 2, 4)  # a window that splits a block
    assert [list(halves(b)) for b in range(4)] == [[], [0], [0, 1], [1, 2]]


def test_lanes_are_what_cells_read_and_each_is_written() -> None:
    assert of("serial").lanes == of("fused").lanes == (CLEAN,)
    assert of("reuse").lanes == (LAST,)
    assert of("tpp").lanes == (0, 1, 2, 3)
    assert of("lag1").lanes == (1, 2, 3) and of("lag9").lanes == (3,)
    assert of("hiar").lanes == (1, 2, 3, CLEAN) and of("hiar", 1).lanes == (CLEAN,)
    for name in (*ONE_RANK, "lag1", "lag3"):
        schedule = of(name)
        cells = [*schedule.cells(5), *schedule.commit_cells(5)]
        assert {cell.reads for cell in cells} == set(schedule.lanes)
        written = [cell.publishes for cell in cells if cell.publishes is not None]
        assert sorted(written) == sorted(schedule.lanes), name


def test_lists_of_steps_differ_by_block() -> None:
    diagonal = of("diagonal")
    assert [len(diagonal.step_list(block)) for block in range(4)] == [4, 3, 2, 2]
    grid = spread(diagonal, 3)
    assert grid.at[d(2, 0)].reads == ((0, 3), (1, 2))  # the last step, whichever that was
    assert [len(of("disa", 5).step_list(block)) for block in range(5)] == [5, 4, 3, 2, 2]
    assert of("disa", 1).step_list(0) == (1000,)
    with pytest.raises(ValueError, match="equally many steps"):
        replace(diagonal, context="lag")


def test_a_joint_window_is_plain_data_too() -> None:
    grid = spread(of("rolling", 3), 5)
    assert grid.together == "joint"
    assert grid.at[d(3, 1)].reads == ((0, CLEAN), (1, CLEAN), (2, 2), (4, 0))
    assert grid.at[d(3, 1)].tick == grid.at[d(2, 2)].tick == grid.at[d(4, 0)].tick
    with pytest.raises(ValueError, match=r"D\(0,1\) at tick 2 reads \(1, 0\) of tick 2"):
        replace(grid, together="independent")  # the same order, if nobody may see a peer


# --- orders that cannot be ----------------------------------------------------------------------
@pytest.mark.parametrize("name", (*ONE_RANK, "rolling", "lag1", "lag2"))
@pytest.mark.parametrize(("blocks", "steps"), [(1, 1), (3, 2), (4, 4)])
def test_whatever_is_moved_before_what_it_needs_is_refused(
    name: str, blocks: int, steps: int
) -> None:
    grid = spread(of(name, steps), blocks)
    for index, cell in enumerate(grid.cells):
        for needed in grid.needs(cell):
            early = replace(cell, tick=grid.at[needed].tick)
            moved = (*grid.cells[:index], early, *grid.cells[index + 1 :])
            peers = grid.together == "joint" and needed not in cell.after
            if peers:  # in a joint tick one may read who is in it, but what comes later goes wrong
                continue
            with pytest.raises(ValueError, match=r"^grid: .*"):
                replace(grid, cells=moved)


def test_grids_that_cannot_be_are_refused_in_a_line() -> None:
    first = Placed(d(0, 0), 0, 0, leaves=(0, 0))
    reading = Placed(d(1, 0), 1, 0, reads=((0, 0),))
    assert Grid((first, reading)).ticks == 2
    for wrong, message in (
        (replace(reading, reads=((0, 1),)), r"reads \(0, 1\), which nobody leaves behind"),
        (replace(reading, tick=0), "has D.0,0. and D.1,0. at tick 0"),
        (replace(reading, rank=1), "rank 0; keys and values do not travel"),
        (replace(reading, rank=7), "is at rank 7"),
        (replace(reading, name=d(1, 1)), r"no step before it: D\(1,0\) is missing"),
        (replace(reading, after=(d(5, 0),)), r"waits for D\(5,0\), which is not there"),
        (replace(reading, name=d(0, 0)), "twice"),
        (replace(reading, leaves=(0, 0)), r"D.0,0. and D.1,0. both leave \(0, 0\)"),
        (Placed(d(0, 1), 0, 1), r"D\(0,1\) at tick 0 needs D\(0,0\) of tick 0"),
        (Placed(Name("commit", 0, CLEAN), 0, 1), r"C\(0,clean\) at tick 0 needs D\(0,0\)"),
        (Placed(Name("commit", 0, 2), 1, 0), r"no step before it: D\(0,1\) is missing"),
        (Placed(Name("decode", 0, CLEAN), 0, 1), r"V\(0,clean\) at tick 0 needs D\(0,0\)"),
        (Placed(Name("decode", 1, CLEAN), 0, 1), "no step before it"),
        (replace(reading, reads=((1, 0),), leaves=(1, 0)), r"reads \(1, 0\) of tick 1"),
    ):
        with pytest.raises(ValueError, match=f"^grid: .*{message}") as told:
            Grid((first, wrong), ranks=2)
        assert "\n" not in str(told.value)


def test_steps_go_in_order_whatever_they_say_of_themselves() -> None:
    early = (Placed(d(0, 1), 0, 0), Placed(d(0, 0), 1, 0))
    with pytest.raises(ValueError, match=r"^grid: D\(0,1\) at tick 0 needs D\(0,0\) of tick 1"):
        Grid(early)
    parts = (Placed(d(0, 0), 0, 0), Placed(d(0, 0, 1), 1, 1), Placed(d(0, 1), 1, 0))
    with pytest.raises(ValueError, match=r"D\(0,1\) at tick 1 needs D\(0,0\)/1 of tick 1"):
        Grid((*parts, Placed(d(0, 1, 1), 2, 1)), 2)
    later = (Placed(d(1, 0), 0, 0, leaves=(1, 0)), Placed(d(0, 0), 1, 0, reads=((1, 0),)))
    with pytest.raises(ValueError, match=r"^grid: D\(0,0\) reads \(1, 0\), which is no earlier"):
        Grid(later)


@pytest.mark.parametrize(
    ("context", "order", "lag"),
    [
        ("clean", "steps", 0),
        ("last", "layers", 0),
        ("output", "batch", 0),
        ("lag", "joint", 0),
        ("lag", "steps", 1),
        ("joint", "serial", 0),
    ],
)
def test_orders_that_a_context_forbids_are_refused(context: str, order: str, lag: int) -> None:
    with pytest.raises(ValueError, match=f"^schedule: .* cannot be spread as {order}; it goes as"):
        Schedule((1000, 500), context=context, order=order, lag=lag)
    assert of("tpp").under("clean").order == "serial" and of("tpp").under("joint").rule == "joint"


@pytest.mark.parametrize(
    ("name", "ranks", "message"),
    [
        ("tpp", 6, "4 steps use at most 5 ranks, one for each and one that decodes; got 6"),
        ("tpp", 0, "ranks must be 1 or more"),
        ("serial", 2, "has a single rank; over ranks go tpp, hiar"),
        ("lag1", 2, "has a single rank"),
        ("nonsense", 1, "unknown 'nonsense': there is serial, fused"),
    ],
)
def test_ranks_that_cannot_be_used_are_refused(name: str, ranks: int, message: str) -> None:
    with pytest.raises(ValueError, match=f"^schedule: .*{message}"):
        spread(of(name), 3, ranks)


def test_things_are_shared_out_evenly() -> None:
    assert ranges(5, 2) == [range(0, 3), range(3, 5)]
    assert ranges(4, 4) == [range(i, i + 1) for i in range(4)]
    with pytest.raises(ValueError, match="3 cannot be shared out over 4 ranks"):
        ranges(3, 4)


# --- words for it -----------------------------------------------------------------------------
def test_a_line_names_sampler_schedule_and_steps() -> None:
    plain = Schedule.uniform(4, 5.0)
    tpp = replace(plain, context="lag", order="steps")
    assert read("tpp", plain, "euler", False) == (tpp, "euler")
    assert read("renoise+tpp", plain, "euler", False) == (tpp, "renoise")
    assert read("tpp+renoise", plain, "euler", False) == (tpp, "renoise")
    short = replace(tpp, steps=(1000, 500))
    assert read("renoise+tpp:1000,500", plain, "euler", False) == (short, "renoise")
    assert read("serial", plain, "euler", False) == (plain, "euler")
    assert read("lag2", plain, "euler", False)[0] == replace(
        plain, context="lag", lag=2, order="batch"
    )
    for line, message in (
        ("tpp+hiar", "tpp and hiar exclude each other"),
        ("euler+renoise", "euler and renoise exclude each other"),
        ("unipc+tpp", "unipc remembers the steps before, which tpp spreads"),
        ("diagonal:1000", "step lists of its own"),
        ("quick", "'quick' is none of renoise, euler, unipc, serial"),
    ):
        with pytest.raises(ValueError, match=f"^schedule: .*{message}"):
            read(line, plain, "euler", False)
    with pytest.raises(ValueError, match="leave out the number of steps"):
        read("tpp:1000,500", plain, "euler", True)


def test_every_name_is_shown_on_the_terminal_and_as_a_picture(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in (*NAMES, "lag1"):
        run(ShowOptions(name, 4, 3, None, None))
        told = capsys.readouterr().out
        assert f"{name}: " in told and "3·0" in told and "control to photon: " in told
    run(ShowOptions("hiar", 3, 2, 2, tmp_path / "grid.png"))
    assert (tmp_path / "grid.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match=r"--out is a \.png file"):
        run(ShowOptions("hiar", 3, 2, 2, tmp_path / "grid.svg"))
