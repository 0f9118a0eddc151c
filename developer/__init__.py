"""Programs for developers of this package; the wheel leaves the folder out.

They train the embedded model, make models with random weights, measure full-size models and write the README's tables.
"""
