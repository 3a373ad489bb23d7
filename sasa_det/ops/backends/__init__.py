"""The implementations of the operator, which do not import each other, and the choice between them."""
