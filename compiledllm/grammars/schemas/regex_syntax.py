"""Parses ECMAScript's regular expressions (ECMA-262) into a tree."""

from __future__ import annotations

from compiledllm.grammars.schemas.regex_tree import (
    DIGIT,
    DOT,
    SPACE,
    WORD,
    Chars,
    Choice,
    Edge,
    Look,
    Node,
    Property,
    Ranges,
    Repeat,
    Sequence,
    UnreadablePattern,
    chars,
    inverted,
    merged,
)

MAX_REPEATS = 10_000
_CLASSES = {"d": DIGIT, "w": WORD, "s": SPACE}
_CLASSES |= {name.upper(): inverted(ranges) for name, ranges in _CLASSES.items()}
_CONTROLS = {"n": "\n", "r": "\r", "t": "\t", "f": "\f", "v": "\v", "0": "\0"}


def parse(pattern: str) -> Node:
    """The tree of a pattern. Raises UnreadablePattern, also for look-behind, \\1 and \\b."""
    parser = _Parser(pattern)
    node = parser.choice()
    if not parser.is_over:
        raise UnreadablePattern("a ) without its (")
    return node


class _Parser:
    def __init__(self, text: str) -> None:
        self._text = text
        self._position = 0
        self._depth = 0

    @property
    def is_over(self) -> bool:
        return self._position >= len(self._text)

    def _peek(self) -> str:
        return self._text[self._position : self._position + 1]

    def _next(self) -> str:
        if self.is_over:
            raise UnreadablePattern("it ends too early")
        self._position += 1
        return self._text[self._position - 1]

    def _take(self, text: str) -> bool:
        found = self._text.startswith(text, self._position)
        self._position += len(text) if found else 0
        return found

    def _until(self, end: str) -> str:
        stop = self._text.find(end, self._position)
        if stop < 0:
            raise UnreadablePattern(
                f"no {end} after {self._text[self._position : self._position + 9]}"
            )
        found, self._position = self._text[self._position : stop], stop + len(end)
        return found

    def choice(self) -> Node:
        self._depth += 1
        if self._depth > 100:
            raise UnreadablePattern("groups are nested more than 100 deep")
        options = [self._sequence()]
        while self._take("|"):
            options.append(self._sequence())
        self._depth -= 1
        return options[0] if len(options) == 1 else Choice(tuple(options))

    def _sequence(self) -> Node:
        nodes: list[Node] = []
        while not self.is_over and self._peek() not in "|)":
            nodes.append(self._repeated(self._atom()))
        return nodes[0] if len(nodes) == 1 else Sequence(tuple(nodes))

    def _repeated(self, node: Node) -> Node:
        while (bounds := self._bounds()) is not None:
            node = Repeat(node, *bounds)
            if not self._take("?"):  # laziness does not change which texts match
                break
        return node

    def _bounds(self) -> tuple[int, int | None] | None:
        for sign, bounds in (("*", (0, None)), ("+", (1, None)), ("?", (0, 1))):
            if self._take(sign):
                return bounds
        end = self._text.find("}", self._position)
        low, comma, high = self._text[self._position + 1 : max(end, self._position)].partition(",")
        if self._peek() != "{" or not low.isdecimal() or (high and not high.isdecimal()):
            return None  # the brace is a literal character
        self._position = end + 1
        min_count = int(low[:9])
        max_count = None if comma and not high else int(high[:9] or min_count)
        is_empty = max_count is not None and max_count < min_count
        if is_empty or max(min_count, max_count or 0) > MAX_REPEATS:
            raise UnreadablePattern(f"a repetition of {{{low}{comma}{high}}}")
        return min_count, max_count

    def _atom(self) -> Node:
        char = self._next()
        if char == "(":
            return self._group()
        if char == "[":
            return self._class()
        if char == "\\":
            return self._escape()
        if char == ".":
            return Chars(DOT)
        if char in "^$":
            return Edge(char == "^")
        if char in "*+?":
            raise UnreadablePattern(f"nothing to repeat in front of {char}")
        return Chars(chars(char))

    def _group(self) -> Node:
        look = self._take("?=") or (None if not self._take("?!") else False)
        if look is None:
            if self._take("?<") or self._take("?P<"):
                if self._peek() in "=!":
                    raise UnreadablePattern("look-behind")
                self._until(">")
            elif self._take("?") and not self._take(":"):
                raise UnreadablePattern(f"(?{self._peek()}")
        node = self.choice()
        if not self._take(")"):
            raise UnreadablePattern("a ( without its )")
        return node if look is None else Look(node, not look)

    def _escape(self) -> Node:
        char = self._next()
        if char in _CLASSES:
            return Chars(_CLASSES[char])
        if char in "pP":
            return Property(f"\\{char}{self._property()}")
        if char in "bB":
            raise UnreadablePattern(f"\\{char}, a word boundary")
        if char in "123456789k":
            raise UnreadablePattern(f"\\{char}, a back reference")
        return Chars(chars(self._escaped(char)))

    def _property(self) -> str:
        return "{" + self._until("}") + "}" if self._take("{") else self._next()

    def _escaped(self, char: str) -> str:
        """The character that an escape stands for."""
        if char in _CONTROLS:
            return _CONTROLS[char]
        if char == "c":
            return chr(ord(self._next()) % 32)
        if char in "xu":
            digits = self._until("}") if self._take("{") else None
            if digits is None:
                size = 2 if char == "x" else 4
                digits, self._position = self._text[self._position :][:size], self._position + size
            try:
                return chr(int(digits, 16))
            except (ValueError, OverflowError):
                raise UnreadablePattern(f"\\{char}{digits}") from None
        if char.isalnum() and char not in "aezAZG":
            return char
        if char.isalnum():
            raise UnreadablePattern(f"\\{char}")
        return char

    def _class(self) -> Node:
        is_inverted = self._take("^")
        ranges: list[tuple[int, int]] = []
        others: list[Node] = []
        while not self._take("]"):
            low = self._member()
            if isinstance(low, Property):
                others.append(low)
            elif len(low) != 1 or low[0][0] != low[0][1] or not self._is_range():
                ranges += low
            else:
                self._position += 1
                high = self._member()
                if isinstance(high, Property) or high[0][0] < low[0][0]:
                    raise UnreadablePattern("a range in a class that runs backwards")
                ranges.append((low[0][0], high[0][0]))
        found = merged(ranges)
        if not others:
            return Chars(inverted(found) if is_inverted else found)
        if is_inverted:
            raise UnreadablePattern("[^\\p{..}]")
        return Choice((Chars(found), *others))

    def _is_range(self) -> bool:
        return self._peek() == "-" and self._text[self._position + 1 : self._position + 2] not in (
            "]",
            "",
        )

    def _member(self) -> Ranges | Property:
        char = self._next()
        if char != "\\":
            return chars(char)
        char = self._next()
        if char == "b":
            return chars("\b")
        if char in _CLASSES:
            return _CLASSES[char]
        if char in "pP":
            return Property(f"\\{char}{self._property()}")
        return chars(self._escaped(char))
