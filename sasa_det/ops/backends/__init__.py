"""The implementations of the operator, of which none imports another, and the choice between them."""
