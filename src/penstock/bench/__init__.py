"""Measurements with targets: how fast Penstock is on this machine, in a form that can be compared.

`stats.py` makes intervals, `report.py` results and their table, `machine.py` says where it was measured. What is
measured is one folder per part of Penstock (`pool/`). Nothing outside imports this but the command line.
"""
