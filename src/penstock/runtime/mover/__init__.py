"""The mover: the process that moves blocks between a pool and the tiers below it.

It is a client of the pool like an engine, with a lane, leases and reservations, so that its death costs what an
engine's does. The keeper starts it, tells it what happens in the pool (`feed.py`), and starts it again when it dies.

`process.py` is its main program, `service.py` answers clients, `fetches.py` brings blocks up, `writes.py` takes them
down, `workers.py` runs transfers as `core/queue.py` orders them, `spaces.py` knows the pool's spaces as tiers see them.
Which blocks are written where is decided by `core/tiering.py`.
"""
