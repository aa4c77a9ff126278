"""fxpress's own operators, one family a file; `table.OPERATORS` is the only list of them."""
