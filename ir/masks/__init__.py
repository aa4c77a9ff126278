"""Mask algebra: what an attention mask means, read from the graph that computes it.

`expression` holds the expressions over the indices (b, h, i, j) and their normal form; `reader` interprets a graph with
the rules of `views` and `elementwise`; `meaning` answers what a lowering asks: which keys are padding, which band is
visible, what is left as a bias; `emit` writes nodes again for what a kernel takes as a tensor; `evaluate` is the judge.
"""
