"""`cnpp-trt report`: results as one HTML page, its Markdown twin, the README's tables, and two results compared."""
