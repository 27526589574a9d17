"""Small worlds with tools and a goal: a calculator, a key-value store, a calendar, a tree of files.

A state is JSON and all that an episode remembers, so episodes share nothing. Time is a number in the state: no tool
reads a clock. The goal is checked on the state at the end, not on words, except where the task asks for an answer.
"""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from freehold.environments.procedures import NAMES, WORDS
from freehold.environments.protocol import Conversations, Environment, Message, Reply, Split, Task, said, text_of
from freehold.environments.single import TRIES, is_held_out
from freehold.environments.verifiers import same_number

State = dict[str, Any]
Tool = Callable[[State, Mapping[str, Any]], Any]
Call = tuple[str, dict[str, Any]]


class ToolError(Exception):
    """What a tool says of a call that it cannot do."""


class World:
    """Tools, tasks and the check of one simulator."""

    name: str
    version = "1"
    functions: Mapping[str, tuple[str, Mapping[str, str], Tool]]
    """Tool -> what it does, its parameters with their JSON types, and the function."""

    def make(self, r: random.Random) -> tuple[str, State, Any, list[Call]]:
        """Return a goal in words, the state at the start, what the end must have, and calls that reach it."""
        raise AssertionError("a world makes its tasks")

    def reached(self, state: State, wanted: Any, text: str) -> bool:
        """Return whether the goal is reached."""
        return bool(state["world"] == wanted)

    def closing(self, wanted: Any) -> str:
        """Return what a right transcript says at its end."""
        return "Done."


class Calculator(World):
    """Numbers are computed by a tool; the answer is said."""

    name = "calculator"

    def __init__(self) -> None:
        two = {"a": "integer", "b": "integer"}
        self.functions = {
            "add": ("Add two numbers.", two, lambda s, a: a["a"] + a["b"]),
            "subtract": ("Subtract b from a.", two, lambda s, a: a["a"] - a["b"]),
            "multiply": ("Multiply two numbers.", two, lambda s, a: a["a"] * a["b"]),
        }

    def make(self, r: random.Random) -> tuple[str, State, Any, list[Call]]:
        """Ask for a * b + c or (a - b) * c."""
        a, b, c = r.randint(12, 99), r.randint(12, 99), r.randint(2, 99)
        if r.random() < 0.5:
            calls = [("multiply", {"a": a, "b": b}), ("add", {"a": a * b, "b": c})]
            return f"What is {a} times {b}, plus {c}?", {}, str(a * b + c), calls
        calls = [("subtract", {"a": a, "b": b}), ("multiply", {"a": a - b, "b": c})]
        return f"Take {b} from {a} and multiply by {c}.", {}, str((a - b) * c), calls

    def reached(self, state: State, wanted: Any, text: str) -> bool:
        """Return whether the number is said."""
        return bool(same_number(text, wanted))

    def closing(self, wanted: Any) -> str:
        """Say the number."""
        return str(wanted)


class Store(World):
    """A key-value store."""

    name = "store"

    def __init__(self) -> None:
        self.functions = {
            "get": ("Read a key.", {"key": "string"}, lambda s, a: _known(s["world"], a["key"], "key")),
            "set": ("Write a key.", {"key": "string", "value": "string"}, _set),
            "delete": ("Remove a key.", {"key": "string"}, _delete),
        }

    def make(self, r: random.Random) -> tuple[str, State, Any, list[Call]]:
        """Ask to copy a value, or to rename a key."""
        first, second, *more = r.sample(WORDS, 5)
        world = {first: r.choice(NAMES), **{key: r.choice(NAMES) for key in more}}
        calls: list[Call] = [("get", {"key": first}), ("set", {"key": second, "value": world[first]})]
        if r.random() < 0.5:
            return f"Copy {first} to {second}.", {"world": world}, {**world, second: world[first]}, calls
        wanted = {**{k: v for k, v in world.items() if k != first}, second: world[first]}
        return f"Rename {first} to {second}.", {"world": world}, wanted, [*calls, ("delete", {"key": first})]


class Calendar(World):
    """Meetings of one day by their hour; the clock stands still at `now`."""

    name = "calendar"

    def __init__(self) -> None:
        hour = {"hour": "integer"}
        self.functions = {
            "now": ("Return the hour that it is.", {}, lambda s, a: s["now"]),
            "list": ("List the meetings.", {}, lambda s, a: dict(sorted(s["world"].items()))),
            "book": ("Book a meeting at a free hour.", {**hour, "who": "string"}, _book),
            "cancel": ("Cancel the meeting of an hour.", hour, _cancel),
        }

    def make(self, r: random.Random) -> tuple[str, State, Any, list[Call]]:
        """Ask to move a meeting, or to book one in some hours from now."""
        hours = r.sample(range(8, 18), 3)
        people = r.sample(NAMES, 3)
        world = {str(h): p for h, p in zip(hours[:2], people, strict=False)}
        if r.random() < 0.5:
            goal = f"Move the meeting with {people[0]} to {hours[2]} o'clock."
            wanted = {**{h: p for h, p in world.items() if p != people[0]}, str(hours[2]): people[0]}
            calls: list[Call] = [
                ("list", {}), ("cancel", {"hour": hours[0]}), ("book", {"hour": hours[2], "who": people[0]}),
            ]  # fmt: skip
            return goal, {"world": world, "now": 7}, wanted, calls
        ahead = r.randint(1, 5)
        goal = f"Book a meeting with {people[2]} in {ahead} hours from now."
        wanted = {**world, str(hours[2]): people[2]}
        calls = [("now", {}), ("book", {"hour": hours[2], "who": people[2]})]
        return goal, {"world": world, "now": hours[2] - ahead}, wanted, calls


class Files(World):
    """A tree of text files by path."""

    name = "files"

    def __init__(self) -> None:
        path = {"path": "string"}
        self.functions = {
            "list": ("List the files of a folder.", path, _list),
            "read": ("Read a file.", path, lambda s, a: _known(s["world"], a["path"], "file")),
            "write": ("Write a file.", {**path, "text": "string"}, _write),
            "remove": ("Remove a file.", path, lambda s, a: _removed(s["world"], a["path"], "file")),
        }

    def make(self, r: random.Random) -> tuple[str, State, Any, list[Call]]:
        """Ask to move a file to another folder, or to remove the one that holds a word."""
        folder, other, *names = r.sample(WORDS, 5)
        texts = [r.choice(NAMES) + "\n  " + r.choice(WORDS) for _ in names]
        world = {f"{folder}/{name}.txt": text for name, text in zip(names, texts, strict=True)}
        at = r.randrange(3)
        path = f"{folder}/{names[at]}.txt"
        rest = {key: text for key, text in world.items() if key != path}
        calls: list[Call] = [("list", {"path": folder}), ("read", {"path": path})]
        if r.random() < 0.5:
            new = f"{other}/{names[at]}.txt"
            calls += [("write", {"path": new, "text": texts[at]}), ("remove", {"path": path})]
            return f"Move {path} to the folder {other}.", {"world": world}, {**rest, new: texts[at]}, calls
        return f"Remove {path} from {folder}.", {"world": world}, rest, [*calls, ("remove", {"path": path})]


class Simulator:
    """An environment over a world: tools are run as called, in order, and the goal is checked when none is called."""

    def __init__(self, world: World, seed: int) -> None:
        self.world, self.seed, self.name, self.version = world, seed, world.name, world.version
        self.tools = tuple(_described(name, *one) for name, one in world.functions.items())

    def task(self, split: Split, number: int) -> Task:
        """Return a goal with the tools."""
        goal, state, wanted, _ = self._made(split, number)
        prompt = ({"role": "user", "content": goal},)
        return Task(f"{self.name}/{split}/{number}", prompt, {"start": state, "wanted": wanted}, self.tools)

    def start(self, task: Task) -> State:
        """Return the world as it is at first."""
        return {**copy.deepcopy(task.answer["start"]), "calls": 0, "invalid": 0}

    def step(self, task: Task, state: State, turn: Message) -> Reply:
        """Run the calls of a turn; a turn without calls ends the episode."""
        calls = turn.get("tool_calls") or []
        if not calls:
            return Reply(state)
        state, results = copy.deepcopy(state), []
        for call in calls:
            result = self._run(state, call["function"])
            results.append({"role": "tool", "content": json.dumps(result, ensure_ascii=False, sort_keys=True)})
        return Reply(state, tuple(results), done=False)

    def reward(self, task: Task, state: State, turns: Sequence[Message]) -> Mapping[str, float]:
        """Return whether the goal is reached; an episode that ends with a call has not said that it is done."""
        ended = bool(turns) and not turns[-1].get("tool_calls")
        return {"correct": float(ended and self.world.reached(state, task.answer["wanted"], text_of(turns)))}

    def gold(self, task: Task) -> list[list[Message]]:
        """Return the calls that reach the goal, and a last word."""
        _, _, wanted, calls = self._of(task)
        turns = [_calling(name, arguments) for name, arguments in calls]
        return [[*turns, *said(self.world.closing(wanted))]]

    def wrong(self, task: Task) -> list[list[Message]]:
        """Return transcripts that claim, call nothing of use, stop one call early, or call with other arguments."""
        _, _, _, calls = self._of(task)
        turns = [_calling(name, arguments) for name, arguments in calls]
        name, arguments = calls[-1]
        broken = _calling(name, dict.fromkeys(arguments, "x"))
        written = json.dumps({"name": name, "arguments": arguments})
        return [
            [], said(""), said("Done."), said(task.messages[0]["content"]), said(written),
            [*turns[:-1], *said("Done.")], [*turns[:-1], broken, *said("Done.")], turns,
            [_calling("reward", {}), *said("Done.")],
        ]  # fmt: skip

    def _run(self, state: State, function: Mapping[str, Any]) -> dict[str, Any]:
        """Return the result of one call, or `error`; a call that cannot be done changes nothing but the counts."""
        state["calls"] += 1
        try:
            _, parameters, tool = self.world.functions[function["name"]]
            arguments = json.loads(function["arguments"] or "{}")
            _check_arguments(arguments, parameters)
            return {"result": tool(state, arguments)}
        except KeyError:
            found = "there is no such tool"
        except ToolError as error:
            return {"error": str(error)}
        except (ValueError, RecursionError) as error:
            found = str(error)[:200]
        state["invalid"] += 1
        return {"error": found}

    def _of(self, task: Task) -> tuple[str, State, Any, list[Call]]:
        _, split, number = task.id.rsplit("/", 2)
        return self._made(split, int(number))  # type: ignore[arg-type]

    def _made(self, split: Split, number: int) -> tuple[str, State, Any, list[Call]]:
        draw = random.Random(f"{self.seed} {self.name} {split} {number}")
        for _ in range(TRIES):
            made = self.world.make(draw)
            if is_held_out(made[0]) == (split == "held_out"):
                return made
        raise AssertionError(f"{self.name} has no task for {split}")


def calculator(settings: Mapping[str, Any], seed: int, conversations: Conversations) -> Environment:
    """Compute with tools."""
    return Simulator(Calculator(), seed)


def store(settings: Mapping[str, Any], seed: int, conversations: Conversations) -> Environment:
    """Copy and rename in a key-value store."""
    return Simulator(Store(), seed)


def calendar(settings: Mapping[str, Any], seed: int, conversations: Conversations) -> Environment:
    """Move and book meetings."""
    return Simulator(Calendar(), seed)


def files(settings: Mapping[str, Any], seed: int, conversations: Conversations) -> Environment:
    """Move and remove files."""
    return Simulator(Files(), seed)


def _described(name: str, text: str, parameters: Mapping[str, str], tool: Tool) -> dict[str, Any]:
    properties = {key: {"type": kind} for key, kind in parameters.items()}
    schema = {"type": "object", "properties": properties, "required": list(parameters)}
    return {"type": "function", "function": {"name": name, "description": text, "parameters": schema}}


def _calling(name: str, arguments: Mapping[str, Any]) -> Message:
    call = {"type": "function", "function": {"name": name, "arguments": json.dumps(arguments)}}
    return {"role": "assistant", "content": "", "tool_calls": [call]}


def _check_arguments(arguments: Any, parameters: Mapping[str, str]) -> None:
    kinds = {"integer": int, "string": str}
    if not isinstance(arguments, dict) or set(arguments) != set(parameters):
        raise ValueError(f"the arguments must be {', '.join(parameters) or 'none'}")
    for key, kind in parameters.items():
        if not isinstance(arguments[key], kinds[kind]) or isinstance(arguments[key], bool):
            raise ValueError(f"{key} is no {kind}")
        if kind == "integer" and abs(arguments[key]) > 10**12:
            raise ValueError(f"{key} is too large")


def _known(world: Mapping[str, Any], key: str, what: str) -> Any:
    if key not in world:
        raise ToolError(f"no such {what}")
    return world[key]


def _set(state: State, arguments: Mapping[str, Any]) -> str:
    state["world"][arguments["key"]] = arguments["value"]
    return "ok"


def _delete(state: State, arguments: Mapping[str, Any]) -> str:
    return _removed(state["world"], arguments["key"], "key")


def _removed(world: State, key: str, what: str) -> str:
    _known(world, key, what)
    del world[key]
    return "ok"


def _book(state: State, arguments: Mapping[str, Any]) -> str:
    hour = arguments["hour"]
    if not 0 <= hour < 24 or str(hour) in state["world"]:
        raise ToolError("that hour is not free")
    state["world"][str(hour)] = arguments["who"]
    return "ok"


def _cancel(state: State, arguments: Mapping[str, Any]) -> str:
    return _removed(state["world"], str(arguments["hour"]), "meeting")


def _list(state: State, arguments: Mapping[str, Any]) -> list[str]:
    root = arguments["path"].strip("/")
    return sorted(path for path in state["world"] if not root or path.startswith(root + "/"))


def _write(state: State, arguments: Mapping[str, Any]) -> str:
    path = arguments["path"].strip("/")
    if not path or ".." in path.split("/"):
        raise ToolError("no such path")
    state["world"][path] = arguments["text"]
    return "ok"
