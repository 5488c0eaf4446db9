"""Triton's interpreter with all programs of a launch at work at once, for kernels whose programs wait for each other.

The stock interpreter runs one program after the other, so one that waits for a later one never ends. Here each has a
thread, only one of which runs; at every atomic operation another, drawn at random, takes over. That checks a protocol
(who waits for whom, which data is read when), not the memory model: what is written is seen at once.
"""

from __future__ import annotations

import contextlib
import itertools
import random
import threading

from triton.runtime import interpreter

MOST_SWITCHES = 100_000  # hundreds of times what the tests need: more means that a program waits for ever


class _Abandoned(Exception):
    """Ends the other programs when one has failed."""


class _Team:
    """The programs of one launch. `running` holds the baton; nobody else moves."""

    def __init__(self, grid, random_order: random.Random):
        self.programs = list(itertools.product(*map(range, grid)))
        self.random_order = random_order
        self.changed = threading.Condition()
        self.running: threading.Thread | None = None
        self.alive: list[threading.Thread] = []
        self.error: BaseException | None = None
        self.switches = 0

    def run(self, function, arguments) -> None:
        self.alive = [threading.Thread(target=self._program, args=(p, function, arguments)) for p in self.programs]
        threads = list(self.alive)
        for thread in threads:
            thread.start()
        with self.changed:
            self._hand_over()
        for thread in threads:
            thread.join()
        if self.error is not None:
            raise self.error

    def switch(self) -> None:
        """Called by the running program: another one may go on, and this one when it is drawn again."""
        with self.changed:
            place = interpreter.interpreter_builder.grid_idx
            self._hand_over()
            self._wait()
            interpreter.interpreter_builder.grid_idx = place

    def _program(self, place, function, arguments) -> None:
        try:
            with self.changed:
                self._wait()
                interpreter.interpreter_builder.set_grid_idx(*place)
            function(**arguments)
        except _Abandoned:
            pass
        except BaseException as error:
            self.error = self.error or error
        with self.changed:
            self.alive.remove(threading.current_thread())
            self._hand_over()

    def _hand_over(self) -> None:
        self.switches += 1
        if self.switches > MOST_SWITCHES:
            self.error = self.error or TimeoutError("the programs wait for each other for ever")
        self.running = self.random_order.choice(self.alive) if self.alive else None
        self.changed.notify_all()

    def _wait(self) -> None:
        while self.running is not threading.current_thread():
            self.changed.wait()
        if self.error is not None:
            raise _Abandoned


@contextlib.contextmanager
def concurrent(seed: int):
    """Within the block every launch is one team; yields the list of the numbers of switches of each launch."""
    random_order, switches = random.Random(seed), []
    builder = interpreter.interpreter_builder
    stock_call, stock_atomic = interpreter.GridExecutor.__call__, type(builder).create_atomic_rmw
    teams: list[_Team] = []

    def call(executor, *args, **kwargs):
        function, done = executor.fn, False

        def everybody(**arguments):
            # The stock executor calls this once per program: the first call runs them all.
            nonlocal done
            if not done:
                done = True
                teams.append(_Team(executor.grid, random_order))
                try:
                    teams[-1].run(function, arguments)
                finally:
                    switches.append(teams.pop().switches)

        def set_grid_dim(*dims):
            type(builder).set_grid_dim(builder, *dims)
            executor.fn = everybody  # only now: before, the executor reads its signature

        builder.set_grid_dim = set_grid_dim
        try:
            return stock_call(executor, *args, **kwargs)
        finally:
            del builder.set_grid_dim

    def atomic(self, *args):
        result = stock_atomic(self, *args)
        if teams:
            teams[-1].switch()
        return result

    interpreter.GridExecutor.__call__, type(builder).create_atomic_rmw = call, atomic
    try:
        yield switches
    finally:
        interpreter.GridExecutor.__call__, type(builder).create_atomic_rmw = stock_call, stock_atomic
