"""The kinds of attention, one a file; `table` lists them."""
