"""Models with random weights in the published layouts: loaded where the real ones cannot be had."""
