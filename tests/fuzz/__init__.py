"""Fuzzers of everything that comes from a file, a picture, a prompt or the command line.

A kind (`kinds.KINDS`) makes inputs and tries each on the product's public entry points. The property is the same for
all: success, or one printable line of a `CnppError`; never another exception, a hang, or a file outside its folder.
`run.fuzz` runs a kind in a process of its own; the tests, `make fuzz` and the reliability program call that.
"""
