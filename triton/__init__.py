"""A bundle as a model repository of NVIDIA Triton Inference Server: `cnpp-trt package`."""
