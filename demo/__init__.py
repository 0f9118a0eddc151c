"""The demo: one page in a browser that draws, and paints segmentations, through the service's scheduler."""
