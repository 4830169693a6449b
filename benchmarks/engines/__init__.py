"""The real vLLM with Penstock, alone, and with its peers, side by side: `python -m benchmarks.engines`.

`systems.py` says what is compared and how each is started, `processes.py` starts and ends it, `client.py` asks. What is
measured: `documents.py` (a repeated document in another process), `turns.py` (traffic with sharing), `fresh.py`
(traffic without), `lookup.py` (the scheduler's lookup alone), `loaded.py` (a hit while others decode). `report.py`
makes the JSON and the table. How to install the peers is in README.md.
"""
