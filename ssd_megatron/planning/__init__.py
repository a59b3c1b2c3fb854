"""Predicts what a layout needs and how fast it is, from a model's settings and a cluster's data sheet."""
