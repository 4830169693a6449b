"""`penstock bench tiers`: the tiers below the pool against their targets.

`base.py` lists what is measured; each group is a module with `run(group, scale)` and runs in a process of its own.
"""
