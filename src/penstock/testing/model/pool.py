"""The cells of a modelled pool: a few slots, lanes and keys, with the names they have in `pool/layout.py`.

What is several words in the segment is one cell here only where the protocol orders it as one: a ring entry
(written before the head that publishes it) and a record's (epoch, stamp) (written before the state).
Generation, state, key and each half of a payload are cells of their own, because their order matters.
"""

from __future__ import annotations

from dataclasses import dataclass

from penstock.testing.model.machine import Memory, Model, Value

FREE, READY, LEAVING = 0, 1, 2
GRANTED = 3
"""GRANTED + lane."""
LANE_FREE, LANE_USED = 0, 1
COMMIT, ABORT = 1, 2


@dataclass(frozen=True)
class Shape:
    """How big a modelled pool is and what may happen in it."""

    slots: int = 1
    lanes: int = 2
    keys: int = 3
    """Keys are 1 .. keys - 1; 0 is none."""
    ring: int = 2
    grants: int = 2
    """Grants that the keeper makes at most."""
    evictions: int = 1
    ready: tuple[int, ...] = ()
    """Keys that are in slots 0, 1, ... at the start."""
    reader_lanes: tuple[int, ...] = ()
    """Lanes whose leases the keeper scans; the others never lease, and scanning them would cost states."""


class Pool:
    """Cell numbers of one model, by name. Compares by identity, so that programs may hold it in a local."""

    def __init__(self, shape: Shape, mutations: frozenset[str]) -> None:
        self.shape = shape
        self.mutations = mutations
        self.model = model = Model()
        slots, lanes, keys = range(shape.slots), range(shape.lanes), range(shape.keys)

        def row(name: str, where: range, value: Value = 0) -> tuple[int, ...]:
            return tuple(model.cell(f"{name}[{i}]", value) for i in where)

        self.generation = row("GENERATION", slots, 1)
        self.state = row("STATE", slots, FREE)
        self.key = row("KEY", slots)
        self.owner = row("EPOCH_STAMP", slots, (0, 0))
        self.data = tuple(row(f"DATA[{u}]", range(2)) for u in slots)
        self.directory = row("DIRECTORY", keys)
        self.epoch = row("LANE_EPOCH", lanes, 1)
        self.lane_state = row("LANE_STATE", lanes, LANE_USED)
        self.commit_head = row("COMMIT_HEAD", lanes)
        self.commit_tail = row("COMMIT_TAIL", lanes)
        self.commits = tuple(row(f"COMMITS[{i}]", range(shape.ring), (0, 0, 0, 0, 0)) for i in lanes)
        self.grant_head = row("GRANT_HEAD", lanes)
        self.grant_tail = row("GRANT_TAIL", lanes)
        self.grants = tuple(row(f"GRANTS[{i}]", range(shape.ring), (0, 0)) for i in lanes)
        self.want = row("WANT", lanes)
        self.lease = row("LEASE", lanes)
        self.hwm = row("LEASE_HWM", lanes)
        self.hello = row("HELLO", lanes)
        self.welcome = row("WELCOME", lanes)
        # Not in the segment: the kernel's locks, and ghosts that only the checks look at.
        self.lock = row("lock", lanes, 1)
        self.holder = row("holder", slots, -1)
        self.committed = row("committed", keys)
        self.settled = row("settled", keys)
        self.grants_left = model.cell("grants left", shape.grants)
        self.evictions_left = model.cell("evictions left", shape.evictions)
        self._fill_initial_slots()
        model.invariant = self.payloads_match
        model.at_rest = self.nothing_lost

    def has(self, mutation: str) -> bool:
        return mutation in self.mutations

    def _fill_initial_slots(self) -> None:
        first = self.model.initial
        for unit, key in enumerate(self.shape.ready):
            first[self.state[unit]], first[self.key[unit]] = READY, key
            first[self.data[unit][0]] = first[self.data[unit][1]] = key
            first[self.directory[key]] = unit + 1

    def payloads_match(self, memory: Memory) -> str | None:
        """In every state: what a READY slot holds is what its key says, and nobody is writing to it."""
        for unit in range(self.shape.slots):
            if memory[self.state[unit]] == READY:
                key = memory[self.key[unit]]
                halves = [memory[cell] for cell in self.data[unit]]
                if halves != [key, key]:
                    return f"slot {unit} is READY for key {key} and holds {halves}"
                if memory[self.holder[unit]] >= 0:
                    return f"slot {unit} is READY while client {memory[self.holder[unit]]} may write to it"
        return None

    def nothing_lost(self, memory: Memory, status: tuple[str, ...]) -> str | None:
        """At rest: no commit is lost or applied twice, no slot leaks, the directory is true."""
        if status[0] == "dead":
            return None
        return self._commits_complaint(memory) or self._slots_complaint(memory) or self._directory_complaint(memory)

    def _commits_complaint(self, memory: Memory) -> str | None:
        for key in range(1, self.shape.keys):
            if memory[self.committed[key]] != memory[self.settled[key]]:
                return (
                    f"key {key} was committed {memory[self.committed[key]]} times "
                    f"and applied or refused as a duplicate {memory[self.settled[key]]} times"
                )
        for lane in range(self.shape.lanes):
            if memory[self.commit_head[lane]] != memory[self.commit_tail[lane]]:
                return f"lane {lane}'s commit ring is not drained"
        return None

    def _slots_complaint(self, memory: Memory) -> str | None:
        for unit in range(self.shape.slots):
            state = memory[self.state[unit]]
            if state == LEAVING:
                return f"slot {unit} is LEAVING for ever"
            if state >= GRANTED and not self._is_known(memory, unit, state - GRANTED):
                return f"slot {unit} leaked: GRANTED to lane {state - GRANTED}, whose client does not have it"
        return None

    def _is_known(self, memory: Memory, unit: int, lane: int) -> bool:
        """Whether the lane's live client has the slot, in its hands or in its grant ring."""
        if memory[self.lock[lane]] != 1:
            return False
        waiting = range(memory[self.grant_tail[lane]], memory[self.grant_head[lane]])
        in_ring = [memory[self.grants[lane][i % self.shape.ring]] for i in waiting]
        return memory[self.holder[unit]] == lane or (unit, memory[self.generation[unit]]) in in_ring

    def _directory_complaint(self, memory: Memory) -> str | None:
        listed: dict[int, int] = {}
        for key in range(1, self.shape.keys):
            entry = memory[self.directory[key]]
            if entry:
                listed[entry - 1] = key
        for unit in range(self.shape.slots):
            held = memory[self.key[unit]] if memory[self.state[unit]] == READY else None
            if listed.get(unit) != held:
                return f"slot {unit} has key {held} and the directory says {listed.get(unit)}"
        return None
