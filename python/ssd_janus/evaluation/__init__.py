"""How good pictures under a plan are: `quality` (does a picture show its prompt?) and `fidelity` (how close is the
model to itself with the full cache?). `folder` keeps a run's results, `statistics` and `report` sum them up.
"""
