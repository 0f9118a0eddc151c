"""Many requests from a file, drawn to the end: `cnpp-trt batch`."""
