"""The engine beside plain bytes: what property/test_engine.py lets happen, and what must hold.

steps.py        the steps, and how hypothesis makes them up
world.py        the engine, the model, and what is under way; stalls and faults
changes.py      changes of `active`
operations.py   what is asked of snapshots and bitmaps, and reads
checks.py       what holds after each step, and when all is quiet
"""
