"""Weightings of other papers, under the same rule of imports: torch, jaxtyping and the standard library."""
