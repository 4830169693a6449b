"""`penstock bench pool`: the pool against its targets.

`base.py` says what a group of measurements is and how large, `runner.py` runs each group in a process of its own,
`rig.py` builds keepers, chains and engine tensors; the other files measure.
"""
