"""What this machine's tiers cost: latency and bandwidth over size, for the profile that decisions are made by.

`base.py` says what can be measured and times it, one file per kind of tier opens it (`memory.py`, `dax.py`,
`directory.py`, `tier.py`, `gpu.py`), `targets.py` finds them, `fit.py` makes a model of the points, `runner.py` puts a
profile together, `table.py` and `plot.py` show it. The profile's records and file are `penstock/profile.py`.
"""
