"""What a GPU does with this package, found out stage by stage: `cnpp-trt first-contact`."""
