"""Places below the pool's segment where blocks may live: disks, second memories, stores that machines share.

`base.py` is the interface, `registry.py` finds a tier by the scheme of its address, every other file is one tier. A
tier moves bytes and says what became of them; it decides nothing. Whether the bytes are right is checked by who asked
for them (`runtime/shelf.py`).
"""
