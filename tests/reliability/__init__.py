"""The reliability program: `make reliability`, or `PYTHONPATH=tests python -m reliability --only fuzz`.

Each part tries to break the program in one way and counts what came of it. Parts are measured one by one, and kept in
a result (`benchmarks/results/reliability.json`): what was measured before is not measured again unless asked for.
docs/reliability.md is written from that result and from nothing else.
"""
