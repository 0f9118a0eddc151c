"""Requests of many clients: one scheduler, and the HTTP interfaces that stand on it."""
