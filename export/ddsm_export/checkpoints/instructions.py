"""What would the pickle in a checkpoint do? Its instructions are read, and never followed, before torch follows them.

torch's restricted unpickler runs no code, and still a hundred bytes can make it fill the memory (``bytearray(2**40)``,
an encoding of an encoding of …) or hash for ever (a tuple of two tuples of two tuples of …). A checkpoint needs none of
that: tensors, plain containers, numbers and words.
"""

from io import BytesIO
from pickletools import genops, opcodes  # it names instructions, and has nothing that follows them

from ddsm_engine.errors import CheckpointError

MAX_PICKLE_BYTES = 4 << 20  # CIFAR-10's, with the optimiser's state, has 0.4e6
MAX_INSTRUCTIONS = 1 << 20
MAX_TUPLE = 1 << 8
"""Items of one tuple, with the items of the tuples in it and so on, each as often as it is named."""
MAX_WHOLE_NUMBER = (1 << 63) - 1
"""Of larger ones, any number can be found with the same hash, which makes a dict of them take quadratic time."""
OLD_FORMAT = 0x1950A86A20F9469CFC6C
"""What a checkpoint in torch's old format begins with."""

_STORAGES = (
    "Float", "Half", "BFloat16", "Double", "Long", "Int", "Short", "Char", "Byte", "Bool", "ComplexFloat",
    "ComplexDouble",
)  # fmt: skip
ALLOWED = frozenset(
    {
        "collections OrderedDict",
        "torch Size",
        "torch._utils _rebuild_parameter",
        "torch._utils _rebuild_sparse_tensor",
        "torch._utils _rebuild_tensor_v2",
        "torch.serialization _get_layout",
        *(f"torch {kind}Storage" for kind in _STORAGES),
    }
)
"""Everything that a checkpoint may name, as pickle writes it."""

_TAKES = {code.name: [str(item) for item in code.stack_before] for code in opcodes}
_PUSHES = {code.name: len(code.stack_after) for code in opcodes}


def check_instructions(data: bytes, pickles: int) -> None:
    """Refuse pickles, one behind the other, that name anything but tensors and containers, or that explode.

    Args:
        data: At most ``MAX_PICKLE_BYTES``; what follows the pickles is not looked at.
        pickles: How many.

    Raises:
        CheckpointError: saying what was named, or which bound is passed.
        ValueError: the bytes are no such pickles.
    """
    stream, left = BytesIO(data), MAX_INSTRUCTIONS
    for _ in range(pickles):
        tuples = _TupleSizes()
        for instruction, argument, _ in genops(stream):
            left -= 1
            if not left:
                raise CheckpointError(f"refused: its pickle has more than {MAX_INSTRUCTIONS} instructions")
            _check_name(instruction.name, argument)
            tuples.follow(instruction.name, argument)


def _check_name(instruction: str, argument: object) -> None:
    if instruction in ("GLOBAL", "INST", "STACK_GLOBAL") and argument not in ALLOWED:
        name = str(argument).replace(" ", ".")[:80]
        raise CheckpointError(
            f"refused: it holds code or objects other than tensors ({name}), which are never run; save the state "
            "dict alone"
        )
    if isinstance(argument, int) and abs(argument) > MAX_WHOLE_NUMBER and argument != OLD_FORMAT:
        raise CheckpointError(f"refused: it holds a whole number of {argument.bit_length()} bits")


class _TupleSizes:
    """How large each value on the unpickler's stack is if a tuple is written out; anything else counts one."""

    def __init__(self) -> None:
        self.stack: list[int] = []
        self.marks: list[int] = []
        self.memo: dict[object, int] = {}

    def follow(self, name: str, argument: object) -> None:
        """Do to the sizes what an instruction does to the values.

        Raises:
            CheckpointError: a tuple of more than ``MAX_TUPLE``.
            ValueError: the instruction takes more than there is.
        """
        if name == "MARK":
            self.marks.append(len(self.stack))
            return
        taken = self._take(_TAKES[name])
        size = 1 + sum(taken) if "TUPLE" in name else self.memo.get(argument, 1) if "GET" in name else 1
        if size > MAX_TUPLE:
            raise CheckpointError(f"refused: it holds a tuple of more than {MAX_TUPLE} items, written out")
        self.stack += [size] * _PUSHES[name]
        if "PUT" in name and self.stack:
            self.memo[argument] = self.stack[-1]

    def _take(self, items: list[str]) -> list[int]:
        taken = []
        if "mark" in items:
            if not self.marks:
                raise ValueError("the pickle has no mark where it needs one")
            taken = self._pop_from(self.marks.pop())
            items = items[: items.index("mark")]
        return self._pop_from(len(self.stack) - len(items)) + taken

    def _pop_from(self, first: int) -> list[int]:
        if first < (self.marks[-1] if self.marks else 0):
            raise ValueError("the pickle takes more than it has")
        taken = self.stack[first:]
        del self.stack[first:]
        return taken
