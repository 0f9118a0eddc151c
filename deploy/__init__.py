"""A bundle where other servers and clusters run it: `cnpp-trt package`."""
