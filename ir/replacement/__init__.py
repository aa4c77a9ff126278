"""Attention and what may stand in its place: the sites in a program, the kinds, how they are fitted and chosen."""
