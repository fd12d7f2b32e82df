"""What a server tells each of its HTTP processes, and their columns in the shared table."""

from __future__ import annotations

import argparse
import dataclasses
import json
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Self

from compiledllm.remote.shared_engine import COLUMNS_PER_ENGINE


class ProcessState(IntEnum):
    """Of an HTTP process: it takes no connections yet, no requests yet, or both."""

    STARTING = 0
    LOADING = 1
    READY = 2


@dataclass(frozen=True, slots=True)
class ProcessSettings:
    """arguments: of the command line, by name. host, port: where all processes listen.

    row, num_rows: of the shared table. name: no other process of this server has it, also no
    earlier one. is_late: the engines are ready, and others take connections meanwhile.
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
        """JSON as Python has it: with numbers of any size, and inf."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Self:
        return cls(**json.loads(text))

    @property
    def namespace(self) -> argparse.Namespace:
        return argparse.Namespace(**self.arguments)


def num_columns(num_engines: int) -> int:
    """The columns of the shared table."""
    return num_engines * COLUMNS_PER_ENGINE + 2


def state_column(num_engines: int) -> int:
    return num_engines * COLUMNS_PER_ENGINE


def connections_column(num_engines: int) -> int:
    return num_engines * COLUMNS_PER_ENGINE + 1
