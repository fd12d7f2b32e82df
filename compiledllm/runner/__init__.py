"""Step execution: device-resident request rows, input gathering, forward pass and sampling."""
