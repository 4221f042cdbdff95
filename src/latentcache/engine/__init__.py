"""Runs: what is left to do, one unit at a time, many units on a cluster."""
