"""Decides what each step computes, from requests, blocks and token budget. Imports no torch."""
