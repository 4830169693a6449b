"""Which block leaves next: pure policies over state arrays.

`facts.py` holds what is true of every block whatever the policy, `base.py` the interface, `registry.py` the
names; every other file is one policy. Nothing here sees bytes, threads, clocks or logs.
"""
