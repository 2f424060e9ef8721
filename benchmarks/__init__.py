"""The benchmark harness: `python -m ingot.benchmarks` measures Ingot and its peers in one run, alternating.

subjects.py says what is measured and what the goals are, run.py measures one model, results.py is the JSON schema,
table.py draws it. Everything that is timed runs in child processes; this package's own process stays small.
"""
