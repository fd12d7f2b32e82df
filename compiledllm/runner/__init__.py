"""Executes a step: device-resident request rows, inputs, forward, sampling."""
