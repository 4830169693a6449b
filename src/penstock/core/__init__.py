"""The brain: decides what stays and what leaves, and does no I/O.

`brain.py` takes batches of events and returns batches of victims; `actions.py` is the same, decoded, for
tests and people. The facts and the policies it drives are in `penstock.policies`; what performs its
decisions is the runtime.
"""
