# SPDX-License-Identifier: MIT
"""What a case is: one value for each of a door's choices, drawn, written as text, made smaller."""

from __future__ import annotations

import ast
import dataclasses
import random
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

# How often a choice takes one of its rare values. With some thirty choices a case has two or three
# of them: enough for those that meet badly, few enough to leave most cases to the fused plans.
RARITY = 0.07


@dataclass(frozen=True)
class Choice:
    """A question that a case answers; the first usual value is the simplest."""

    name: str
    usual: tuple[Any, ...]
    rare: tuple[Any, ...] = ()

    @property
    def simplest(self) -> Any:
        return self.usual[0]

    def draw(self, source: random.Random) -> Any:
        values = self.rare if self.rare and source.random() < RARITY else self.usual
        return values[int(source.random() * len(values))]


class Case(dict[str, Any]):
    """The door's name under "door", and the value of each choice by its name."""

    def text(self, choices: tuple[Choice, ...]) -> str:
        """What differs from the simplest case."""
        words = [self["door"]]
        words += [f"{c.name}={self[c.name]!r}" for c in choices if self[c.name] != c.simplest]
        return "; ".join(words)


@dataclass(frozen=True)
class Door:
    """One way into fused_step, with the choices that its cases make.

    `run` runs a case and returns what kind of outcome it was, for the summary; anything that is not
    allowed is an AssertionError.
    """

    name: str
    choices: tuple[Choice, ...]
    run: Callable[[Case], str]

    def draw(self, source: random.Random) -> Case:
        case = Case({c.name: c.draw(source) for c in self.choices})
        case["door"] = self.name
        return case

    def parse(self, text: str) -> Case:
        """The case of a text."""
        case = Case({c.name: c.simplest for c in self.choices})
        case["door"] = self.name
        for word in text.split(";")[1:]:
            name, value = word.split("=", 1)
            if name.strip() not in case:
                raise ValueError(f"{self.name} has no choice {name.strip()}")
            case[name.strip()] = ast.literal_eval(value.strip())
        return case

    def failure(self, case: Case) -> str | None:
        """What is wrong about a case; None: nothing."""
        try:
            self.run(case)
        except AssertionError as error:
            return str(error) or traceback.format_exc()
        except Exception:
            return traceback.format_exc()
        return None

    def shrink(self, case: Case) -> Case:
        """A case that fails too and has fewer answers other than the simplest."""
        smaller = True
        while smaller:
            smaller = False
            for choice in self.choices:
                if case[choice.name] == choice.simplest:
                    continue
                simpler = Case({**case, choice.name: choice.simplest})
                if self.failure(simpler) is not None:
                    case, smaller = simpler, True
        return case


def with_seed(*choices: Choice) -> tuple[Choice, ...]:
    """The choices, and that of the random numbers in the tensors."""
    return (*choices, Choice("seed", tuple(range(1000))))


def renamed(choice: Choice, name: str) -> Choice:
    return dataclasses.replace(choice, name=name)
