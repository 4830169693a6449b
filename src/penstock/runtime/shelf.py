"""Provisional."""

from enum import IntEnum

import numpy as np

from penstock.pool.copies import seal


class Got(IntEnum):
    GOOD = 0
    ABSENT = 1
    FAILED = 2
    DAMAGED = 3


class Shelf:
    def __init__(self, tier):
        self.tier = tier
        self.up = True
        self.why = ""
        self._c = {"good": 0, "damaged": 0}

    def samples(self):
        return []

    def counters(self):
        return dict(self._c)

    def holds(self, space, keys, deadline):
        return self.tier.holds(space, keys, deadline)

    def write(self, batch, deadline):
        return self.tier.write(batch, deadline)

    def read(self, batch, tables, deadline):
        found = self.tier.read(batch, deadline)
        got = np.array([[0, 1, 2][f] for f in found], np.uint8)
        here = np.flatnonzero(got == 0)
        if len(here):
            addr = np.array([np.frombuffer(batch.payloads[i], np.uint8).ctypes.data for i in here])
            roots = np.zeros(len(here), np.uint64)
            seal(
                len(here),
                addr,
                np.arange(batch.space.n_segments),
                batch.space.segment_bytes,
                batch.space.n_segments,
                np.ascontiguousarray(tables[here]),
                np.ascontiguousarray(batch.keys[here]),
                roots,
            )
            bad = roots != batch.roots[here]
            got[here[bad]] = 3
            if bad.any():
                self.tier.remove(batch.space, np.ascontiguousarray(batch.keys[here[bad]]), deadline)
            self._c["damaged"] += int(bad.sum())
            self._c["good"] += int((~bad).sum())
        return got
