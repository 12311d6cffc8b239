"""PTX as text: parameters, widths of registers, instructions and labels of one kernel."""

import functools
import re
from dataclasses import dataclass

LINE = re.compile(r"^(?:@(?P<negated>!)?(?P<guard>%p\d+)\s+)?(?P<op>[a-z][\w.:]*)\s*(?P<rest>.*)$")
WIDTHS = {"pred": 1, "b16": 16, "b32": 32, "b64": 64}


@dataclass(frozen=True)
class Instruction:
    """One instruction: `@!%p1 add.s32 %r1, %r2, 3` has the guard %p1, negated; lists in braces are tuples."""

    op: tuple[str, ...]
    args: tuple
    guard: str | None = None
    negated: bool = False

    def __str__(self):
        return f"{'.'.join(self.op)} {', '.join(map(str, self.args))}"


@dataclass(frozen=True)
class Code:
    """A kernel. params: names. registers: bits by prefix. labels: the index of the instruction after each."""

    params: tuple[str, ...]
    registers: dict[str, int]
    instructions: tuple[Instruction, ...]
    labels: dict[str, int]

    def count(self, op):
        """How many instructions begin with `op`."""
        return sum(".".join(one.op).startswith(op) for one in self.instructions)


@functools.cache
def parse(text):
    """The kernel of a PTX file that has one.

    >>> parse('.entry f( .param .u64 f_param_0 ) {\\n.reg .b32 %r<3>;\\n$L: @%p1 add.s32 %r1, {%r2, _}, 7;\\n}')
    ... # doctest: +NORMALIZE_WHITESPACE
    Code(params=('f_param_0',), registers={'%r': 32}, instructions=(Instruction(op=('add', 's32'),
    args=('%r1', ('%r2', '_'), '7'), guard='%p1', negated=False),), labels={'$L': 0})
    """
    text = re.sub(r"//[^\n]*", "", text)
    head, _, body = text[text.index(".entry") :].partition("{")
    body = re.split(r"\$L__func_end\d+:|\n}", body)[0]
    instructions, labels, registers = [], {}, {}
    for line in re.split(r"[;\n]", body):
        while label := re.match(r"\s*(\$\w+):", line):
            labels[label[1]], line = len(instructions), line[label.end() :]
        if declared := re.match(r"\s*\.reg \.(\w+)\s+(%[a-z]+)<", line):
            registers[declared[2]] = WIDTHS[declared[1]]
        elif found := LINE.match(line.strip()):
            op, args = tuple(found["op"].split(".")), _arguments(found["rest"])
            instructions.append(Instruction(op, args, found["guard"], bool(found["negated"])))
    return Code(tuple(re.findall(r"\w+_param_\d+", head)), registers, tuple(instructions), labels)


def _arguments(text):
    """Arguments, without brackets; those in braces as a tuple."""
    parts = re.findall(r"\{([^}]*)\}|\[([^\]]*)\]|([^,\s][^,]*)", text)
    return tuple(
        tuple(part.strip() for part in many.split(",")) if many else (address or one).strip()
        for many, address, one in parts
    )
