"""What the Triton backend makes of each operator, a family a file; importing this reads them all."""

from . import elements, extern, pointwise, products, reductions, views

__all__ = ["elements", "extern", "pointwise", "products", "reductions", "views"]
