"""Removing weights: which ones, masks in the graph, and cutting what the masks leave unused."""
