"""One player's blocks: made when it is time, given up for newer controls, and gone back from.

Three sides, each on a thread of its own: what the player says and what is shown, see `seat`, and
the computing one here (`due`, `turn`), which makes blocks and does what was asked for, see `turns`.

**Late latching.** A block is begun as late as the measured p99 of making one allows, so that it
heeds the newest controls. If a control changes before the block is shown, it is given up, also
half-made, and made anew, unless it would then come too late: cells have no side effects, so
restoring the snapshot taken before it is all there is to do.

**Run-ahead.** A block is begun only if the player has seen the one before it.
"""

import warnings
from contextlib import suppress
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from worldsim.controls import ControlState
from worldsim.replay import Differs, Replay
from worldsim.schedule import Cell
from worldsim.streaming.seat import NEVER, Ready, Said, Seat


class Superseded(Exception):
    """A block was given up: there is a newer control, and time to heed it."""


class Player(Seat):
    """See the module docstring, and `Seat` for its arguments."""

    def due(self) -> float:
        """When it wants the next turn: now or before, later, or never (until it is woken)."""
        with self._lock:
            if self._leaving or not self.course.begun or self._commands:
                return 0.0
            if self._shown or self.course.behind:
                return 0.0
            if self._ready is not None:
                return 0.0 if self._to_be_redone() else NEVER
            return 0.0 if self._before is None else self._start()

    def turn(self) -> None:
        """Do the next thing that is to be done.

        Raises:
            Exception: whatever the model raises; the session cannot go on then.
        """
        if self._leaving:
            self.close()
        elif not self.course.begun:
            self._begin(self.seed)
        elif self.course.behind:
            self._catch_up()
        elif self._shown:
            self._settle()
        elif self._commands:
            with self._lock:
                command = self._commands.popleft()
                self._done += 1
            self._command(*command)
        else:
            self._latch()

    def close(self) -> None:
        """Give everything back."""
        with self._lock:
            self._ready, self._before, self._leaving = None, None, True
            self.ended = self.ended or "closed"
            self._sent.clear()
            self._shown.clear()
        try:
            try:
                if self.recording is not None:
                    with suppress(OSError):
                        self.recording.close()
            finally:
                self.course.close()
        finally:
            self.closed = True  # whatever it was: nobody may come back to it

    def _start(self) -> float:
        """When to begin the next block. With the lock held."""
        if self.paused or self.block > self._seen + 1:
            return NEVER
        if not self.late_latching or self.pacer.due is None or not self._took:
            return 0.0
        return self.pacer.due - self.expected(0.99)

    def _to_be_redone(self) -> bool:
        """Whether there is a newer control than the block at hand heeds, and time for it. With the
        lock held."""
        due = self.pacer.due
        if not (self.late_latching and self._urgent and self._took) or due is None:
            return False
        return not self.course.replaying and self.clock() + self.expected(0.9) <= due

    def _latch(self) -> None:
        """Make the next block, or the one that waits anew, if it is time."""
        with self._lock:
            redo = self._ready is not None and self._to_be_redone()
            start = NEVER if self._ready is not None else self._start()
        redo = redo and self._withdraw()  # it may have left just now
        self.counts.redone += redo
        if self._before is None:
            self._before = self.course.session.snapshot()
        if redo or start <= self.clock():
            self._make()

    def _make(self) -> None:
        with self._lock:
            heeded = tuple(self._heard)
            changed, self._heard, self._urgent = self._urgent, [], False
            wanted = max(self._allowed, self._start())
        if changed and self.course.replaying:
            self.course.take_over()
            self._before = self.course.session.snapshot()
            self._tell_state()
        heeded = tuple(said for said in heeded if self._heeds(said.state))
        try:
            block = self.course.step(self._look)
        except Superseded:
            assert self._before is not None
            self.course.session.restore(self._before)
            self.counts.aborted += 1
            with self._lock:
                self._heard = [*heeded, *self._heard]
                self._urgent = True
                self._allowed = self.clock()
            return
        except (Differs, ValueError) as error:
            if not self.course.replaying:
                raise
            differs = isinstance(error, Differs)
            why = "another world than was recorded" if differs else "a run that makes no sense"
            self.tell("notice", text=f"this is {why}: {error}")
            self._begin(self.course.seed)
            return
        encoding = self.clock()
        pictures = [self._encode(block.frames[0])]
        done = self.clock()
        work = {"denoise": block.timings["denoise"], "decode": block.timings["decode"]}
        work["encode"] = done - encoding
        pose = None
        if self.course.session.world.actions.posed:
            x, y, heading = self.course.session.pose[:3]
            pose = (x, y, heading)
        for said in heeded:
            self._event = said.state.event_id or self._event
        ready = Ready(
            self._run, block, self._number, pictures, len(block.frames), self._encode.kind, heeded,
            self._event, pose, work, done,
        )  # fmt: skip
        self._number += ready.count
        self._took.append(done - wanted)
        with self._lock:
            self._ready = ready
        self.changed()
        pictures += [self._encode(picture) for picture in block.frames[1:]]
        self._look_around()
        self.counts.made += 1

    def _heeds(self, state: ControlState) -> bool:
        """Whether the session took a control; if not, the player is told why."""
        if self.course.replaying:
            return False
        try:
            with warnings.catch_warnings(record=True) as passed_over:
                warnings.simplefilter("always")
                self.course.session.control(state=state)
        except ValueError as error:
            self.tell("notice", text=str(error))
            return False
        for warning in passed_over:
            self.tell("notice", text=str(warning.message))
        return True

    def _look(self, cell: Cell, x0: Tensor) -> None:
        """After each step: give the block up for a newer control, if there is time."""
        with self._lock:
            if self._to_be_redone() or self._leaving:
                raise Superseded

    def _withdraw(self) -> bool:
        """Take back the block that is ready and not shown, if there is one. One of a replay stays:
        it would be the same."""
        with self._lock:
            if self.course.replaying or self._ready is None:
                return False
            ready, self._ready = self._ready, None
            self._heard = [*ready.heeded, *self._heard]
            self._allowed = self.clock()
        assert self._before is not None
        self._number = ready.number
        self.course.session.restore(self._before)
        self._look_around()
        return True

    def _settle(self) -> None:
        """After a block is shown: record it, and get ready for the next while nobody waits."""
        while self._shown:
            ready = self._shown.popleft()
            self.course.walked(ready.block, ready.pose)
            self._film(ready)
        self._before = self.course.session.snapshot()

    def _film(self, ready: Ready) -> None:
        """Add a block that was shown to the recording."""
        if self.recording is None:
            return
        try:
            self.recording.write(ready.block.frames)
        except (OSError, ValueError) as error:
            self.tell("notice", text=f"the recording has ended: {error}")
            self._tell_state()

    def _begin(self, seed: int, *pictures: Any) -> None:
        try:
            self.course.begin(seed, *pictures)
        except OSError as error:
            self.tell("notice", text=f"no replay file is written: {error}")
        self._anew()

    def _catch_up(self) -> None:
        self.course.catch_up()
        if not self.course.behind:
            self._anew()

    def _anew(self) -> None:
        """It goes on from elsewhere: what was ready, sent or seen counts no more."""
        self._look_around()
        with self._lock:
            self._ready, self._before = None, None
            self._sent.clear()
            shown = list(self._shown)  # since the command came
            self._shown.clear()
            self._run += 1
            self._seen = self.block - 1
            self._allowed = self.clock()
            self.pacer.stop()
            # What was said before the command was meant for where it came from.
            self._heard = [said for said in self._heard if said.after >= self._done]
            self._urgent = self._urgent and bool(self._heard)
            if not self._heard and self._latest is not None:
                # Keys stay held, whatever the world had been told.
                self._heard = [Said(self._latest, NEVER, self._done)]
        for ready in shown:
            self._film(ready)
        self.tell("path", run=self._run, points=list(self.course.path))
        self._tell_state()

    def _look_around(self) -> None:
        """Note what others may want to know, who may not ask the session."""
        now, pool = self.course.session.now, self.course.session.context.pool
        self.block, self.oldest, self.asked = now.block, self.course.oldest, now.asked.prompt
        table = self.course.session.context.table
        self.cache_bytes = sum(pool.page_nbytes(pool.kind(entry.page)) for entry in table)

    # --- commands -------------------------------------------------------------------------------
    def _command(self, what: str, values: tuple[Any, ...]) -> None:
        try:
            getattr(self, f"_do_{what}")(*values)
        except (ValueError, OSError) as error:
            self.tell("notice", text=str(error))
        self._tell_state()

    def _do_pause(self) -> None:
        self._withdraw()
        with self._lock:
            self.paused = True
            self.pacer.stop()

    def _do_resume(self) -> None:
        with self._lock:
            self.paused = False
            self._allowed = self.clock()
        self.changed()

    def _do_reset(self, seed: int) -> None:
        self._begin(seed)

    def _do_begin(self, picture: NDArray[np.uint8]) -> None:
        """Anew, from a picture uint8 ``[H, W, 3]``."""
        self._begin(self.course.seed, picture)

    def _do_load(self, replay: Replay) -> None:
        try:
            self.course.follow(replay)
        except OSError as error:
            self.tell("notice", text=f"no replay file is written: {error}")
        self._anew()

    def _do_rewind(self, block: int) -> None:
        self._withdraw()
        self.course.rewind(block)
        if not self.course.behind:
            self._anew()

    def _do_fork(self) -> None:
        self._withdraw()
        self.course.fork()

    def _do_switch(self, number: int) -> None:
        self._withdraw()
        self.course.switch(number)
        self._anew()

    def _do_drop(self, number: int) -> None:
        self.course.drop(number)

    def _do_record(self, on: bool) -> None:
        if self.recording is None:
            raise ValueError("this player records nothing")
        if on:
            self.recording.start()
        elif self.recording.on:
            self.recording.stop()
            self.tell("recorded")

    def _tell_state(self) -> None:
        self.tell(
            "state",
            paused=self.paused,
            seed=self.course.seed,
            run=self._run,
            block=self.block,
            oldest=self.oldest,
            behind=len(self.course.behind),
            replaying=self.course.replaying,
            prompt=self.asked,
            recording=self.recording is not None and self.recording.on,
            branches=[
                {"number": branch.number, "block": branch.block, "prompt": branch.prompt}
                for branch in self.course.branches.values()
            ],
        )
