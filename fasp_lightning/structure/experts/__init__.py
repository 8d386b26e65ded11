"""Pairs of experts: the weights of one layer of all experts are one three-dimensional parameter."""
