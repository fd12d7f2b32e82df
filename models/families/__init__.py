"""The declarative model families."""
