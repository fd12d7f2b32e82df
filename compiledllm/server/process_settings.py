"""The settings that the owner sends to each HTTP process, and the columns of the shared table."""

from __future__ import annotations

import argparse
import dataclasses
import json
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Self

from compiledllm.remote.shared_engine import COLUMNS_PER_ENGINE


class ProcessState(IntEnum):
    """The state of an HTTP process.

    STARTING: takes no connections yet. LOADING: takes connections, but no requests yet. READY:
    takes both.
    """

    STARTING = 0
    LOADING = 1
    READY = 2


@dataclass(frozen=True, slots=True)
class ProcessSettings:
    """The settings of one HTTP process.

    arguments: of the command line, by name. host, port: the address at which all processes listen.
    row: the process's row in the shared table, which has num_rows rows. name: unique among all
    present and earlier processes of this server. is_late: other processes are ready and take
    connections, so this process listens only once it is ready, too.
    """

    arguments: dict[str, Any]
    api_keys: list[str]
    serves_only_local: bool
    host: str
    port: int
    name: str
    row: int
    num_rows: int
    num_engines: int
    is_late: bool

    def as_json(self) -> str:
        """Python's JSON, which also has integers of any size and inf."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Self:
        return cls(**json.loads(text))

    @property
    def namespace(self) -> argparse.Namespace:
        return argparse.Namespace(**self.arguments)


def num_columns(num_engines: int) -> int:
    """Number of columns of the shared table: those of each engine, the state, the connections."""
    return num_engines * COLUMNS_PER_ENGINE + 2


def state_column(num_engines: int) -> int:
    return num_engines * COLUMNS_PER_ENGINE


def connections_column(num_engines: int) -> int:
    return num_engines * COLUMNS_PER_ENGINE + 1
