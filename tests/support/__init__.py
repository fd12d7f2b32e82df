"""Code that several test files share: fakes, references, a server, grids of cases.

pytest puts the repository's root on the import path, so that a test file says
`from tests.support.server import wait_for`.
"""
