"""What runs next: requests, blocks and the token budget. Imports no torch."""
