"""Connectors: what makes an inference engine read from and write to a pool.

One module or package for each engine, which imports the engine inside: importing `penstock.connectors` loads
none. `equality.py` compares what an engine generates with and without the pool.
"""
