"""Runs: the plan, the encoding of one unit, and the dispatch of many units on a cluster."""
