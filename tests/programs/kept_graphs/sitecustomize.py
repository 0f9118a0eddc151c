"""Imported by Python itself when it starts, where this folder is on the path: exports take graphs that are kept."""

import sys

if "export" in sys.orig_argv:
    import graph_cache

    graph_cache.install()
