"""The commands of `cnpp-trt`: each parses, calls one function, prints."""
