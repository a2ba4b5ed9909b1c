"""Every sentence that a ``DistcompError`` can say, and its remedy: read from the code, so that none is left
out.

A message is ``what is wrong; what to do``. Where it ends without what to do, ``REMEDIES`` says it. What
stands here and is no sentence of the code any more is told, too."""

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import settings

import distcomp

SOURCES = Path(distcomp.__file__).parent

GIVE = "‹the settings that the sentence names, and their defaults›"
AGAIN = "the file did not arrive as it was written: copy it again, and compare its checksum with the source's"
KEY = "send the update again; if it stays so, the receiver goes on with the next key frame (`ask_for_key()`)"

DAMAGED = r"damaged|cut short|stream|due$|longer|announces|do not lie|neither true|outside its shape"
BEYOND = r"\bnot (at |to )?(1/)?[\[‹].*$|, not ‹.*$| (is|are) .*(or more|positive|must be|must rise).*$"
SETTING = r"\b(takes|is|are|has|have|needs?|knows|lies|lasts|starts|falls) .*\b(not|must) .*$"
PATTERNS = (
    ("updates/", re.compile(r"alter|cut short|damaged|a part is missing|no text"), KEY),
    ("files/", re.compile(DAMAGED), AGAIN),
    ("", re.compile(f"{BEYOND}|{SETTING}"), GIVE),
)
"""(Where, what the sentence says, what to do)."""

REMEDIES = {
    "‹words›: ‹error›": "of a message: what follows its name says it, and what to do",
    "on_failure='continue' needs a plain module": "attach the module itself, on the CPU and over Gloo, or "
    "take `on_failure='stop'`",
    "the method was detached before": "call `detach()`, or leave the `with` block, after `optimizer.step()`",
    "optimizer_state='reset' or 'average' needs": "pass the optimizer as the second argument",
    "codistill exchanges predictions of examples": "pass `shared=examples`, the same on every rank",
    "the optimizer steps but no gradient went": "call the attached model; `no_sync()` is for the "
    "micro-batches before the last",
    "--ranks-here is 1 or more": "say how many of the ranks run on this machine, or leave it out",
    "--ranks and --steps are 1 or more": "two ranks and three steps tell it: `--ranks 2 --steps 3`",
    "--steps and --eval-every are 1 or more": "leave `--eval-every` out, or give whole numbers above 0",
    "--price-hour, --price-gb and --watts": "give the number without its unit: `--price-hour 2.5`",
    "--dct takes clusters": "give three numbers between commas: `--dct 16,0.5,32`",
    "AccNet filters images": "give images of one channel: `x.flatten(0, 1).unsqueeze(1)`",
    "MEC takes one group": "keep `Conv2d` for that layer: name only others to `swap`",
    "Winograd's convolution is": "keep `Conv2d` for that layer: name only others to `swap`",
    "a schedule's values must be finite": "correct the schedule's begin and end: neither is nan nor infinite",
    "a schedule's shape is": "take `step`, `linear` or another of the list",
    "say how many there are": "add the option that the sentence names",
    "probe runs on every rank": "start it as the sentence says",
    "--largest is above": "leave `--largest` out, or give megabytes: `--largest 8000000`",
    "‹heads› heads and the end of the network": "give one weight for each head and one for the end",
    "a bottleneck of": "give a rank in the range, or leave it out",
    "known logits have no features": "give the teacher itself in the place of its logits, or a loss of "
    "logits alone (`hinton`)",
    "‹name› has no module": "take a name of `dict(model.named_modules())`",
    "‹name› is of type ‹dtype›, which": "store it as float32, float16, bfloat16, bool or whole numbers",
    "the file is longer than its table": AGAIN,
    "a kernel of": "pad the input, or take a smaller kernel",
    "eps=": GIVE,
    "budget=": GIVE,
    "payloads are coded by": GIVE,
    "‹path›: ‹error›": "mend the line of the file that the sentence names",
    "the model has": "give the number of layers that the sentence names",
    "bands need a law": GIVE,
    "sparse_from=": "let the sparse phase begin first",
    "torch.fx cannot trace": "keep that part out (`keep=`), or write its `forward` without branches",
    "hashing has a domain": GIVE,
    "‹name›: ‹key› takes": GIVE,
    "the overlap is below the period": "give a smaller overlap or a longer period",
    "fragments and overlap go with": "leave `optimizer_state` at `'keep'`, or leave both out",
    "‹error›": "of a rank that was given up and that nobody takes in again: restart it from a checkpoint",
    "rank ‹rank› reaches no notice board": "let TCP through between the nodes of the job "
    "([which ports](nodes.md#which-ports))",
}
"""How a sentence begins (as the page shows it) -> what to do."""

RELAYED = {
    "attaching/agreement.py:_decide": (
        "rank ‹rank› cannot load the checkpoint, so no rank does: ‹sentence›",
        "mend what that rank says; its sentence is in this table",
    ),
    "network/control_socket.py:answer": (
        "‹what the holder of the network says›",
        "it is one of the sentences of this room, said by the process that holds the network",
    ),
    "transports/agreement.py:agree": (
        "‹what another rank says, or the first setting that differs, with the ranks›",
        "attach with the same settings on every rank; the sentence names the rank and the setting",
    ),
    "transports/heartbeat.py:diagnose": (
        "‹which rank is lost, and why›",
        "look at that rank's own log first, then restart from the last checkpoint "
        "([when something breaks](faults.md))",
    ),
}
"""Sentences that were made elsewhere, by the function that raises them."""

HEAD = """\
# Troubleshooting

Every sentence that a `DistcompError` can say, with what to do, room by room: {count} of them, read from the
code when this page is built. What stands between ‹ › is filled in when it is said; search for words
around it. Hangs, lost hosts and pulled cables are on [their own page](faults.md), networks on
[theirs](nodes.md).

`PeerLost`, `SettingsMismatch`, `CorruptPayload` and `Mismatch` are kinds of `DistcompError`: a script that
catches the one catches all. The shell prints the sentence and ends with status 2.

"""


@dataclass(frozen=True)
class Sentence:
    """What a call in the code says, where, and the class that says it."""

    file: str
    line: int
    error: str
    text: str

    @property
    def room(self) -> str:
        return self.file.split("/")[0].removesuffix(".py")


@lru_cache(maxsize=1)
def _trees() -> dict[str, ast.Module]:
    return {
        str(path.relative_to(SOURCES)): ast.parse(path.read_text(encoding="utf-8"))
        for path in sorted(SOURCES.rglob("*.py"))
    }


@lru_cache(maxsize=1)
def kinds() -> frozenset[str]:
    """``DistcompError`` and all classes made of it."""
    classes = [
        node for tree in _trees().values() for node in ast.walk(tree) if isinstance(node, ast.ClassDef)
    ]
    found = {"DistcompError"}
    while True:
        more = {one.name for one in classes if found & {_last(base) for base in one.bases}} | found
        if more == found:
            return frozenset(found)
        found = more


@lru_cache(maxsize=1)
def _constants() -> dict[str, str]:
    """Texts that a module gives a name in capitals."""
    found = {}
    for tree in _trees().values():
        for node in tree.body:
            value = getattr(getattr(node, "value", None), "value", None)
            if (
                isinstance(node, ast.Assign)
                and isinstance(node.targets[0], ast.Name)
                and isinstance(value, str)
            ):
                found[node.targets[0].id] = value
    return found


def sentences() -> Iterator[Sentence]:
    """One for each call of an error's class; several where a function raises what its callers say."""
    for file, tree in _trees().items():
        for function, call in _raised(tree):
            said = _said(call, function, file)
            for text in said:
                yield Sentence(file, call.lineno, _last(call.func), " ".join(text.split()))


def remedy(one: Sentence) -> str:
    """What to do; empty where nobody says it."""
    told, semicolon, what = one.text.partition("; ")
    if semicolon:
        return what
    for begin, what in REMEDIES.items():
        if told.startswith(begin):
            return _specific(one, what)
    return next(
        (
            _specific(one, what)
            for room, says, what in PATTERNS
            if one.file.startswith(room) and says.search(told)
        ),
        "",
    )


def _specific(one: Sentence, what: str) -> str:
    """In the place of :data:`GIVE`: which setting it is, and what it usually is."""
    return settings.remedy(one.file, one.line, one.text) if what is GIVE else what


def unused() -> list[str]:
    """Remedies and relays for what the code says no more."""
    said = list(sentences())
    texts = [one.text for one in said if "; " not in one.text]
    return [begin for begin in REMEDIES if not any(text.startswith(begin) for text in texts)]


def page() -> str:
    """The page, as Markdown."""
    rooms: dict[str, dict[str, Sentence]] = {}
    for one in sentences():
        rooms.setdefault(one.room, {}).setdefault(one.text, one)
    lines = [HEAD.format(count=sum(map(len, rooms.values())))]
    for room, said in sorted(rooms.items()):
        lines += [f"## {room}", "", "| it says | do this |", "|---|---|"]
        lines += [_row(one) for one in sorted(said.values(), key=lambda one: one.text.lower())]
        lines.append("")
    return "\n".join(lines)


def write(docs: Path) -> None:
    """Write the page if it changed."""
    path, text = docs / "troubleshooting.md", page()
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")


def _row(one: Sentence) -> str:
    wrong = one.text.partition("; ")[0]
    kind = "" if one.error == "DistcompError" else f"{one.error}: "
    return f"| {_cell(kind + wrong)} | {_cell(remedy(one))} |"


def _cell(text: str) -> str:
    """As it reads: a sign is only a sign, but for code between backticks and links to pages."""
    parts = re.split(r"(`[^`]*`|\[[^]]*\]\([\w/#-]+\.md[^)]*\))", text)
    parts[::2] = [re.sub(r"([\\*_<$\[\]`~])", r"\\\1", part) for part in parts[::2]]
    return "".join(parts).replace("|", "\\|")


def _last(node: ast.AST) -> str:
    return getattr(node, "attr", getattr(node, "id", ""))


def _raised(tree: ast.Module) -> Iterator[tuple[ast.FunctionDef | None, ast.Call]]:
    """(the innermost function around, the call) of every error that a file makes."""
    inside: dict[ast.AST, ast.FunctionDef] = {}
    for function in ast.walk(tree):  # outer ones first
        if isinstance(function, ast.FunctionDef):
            inside |= dict.fromkeys(ast.walk(function), function)
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and _last(node.func) in kinds():
            yield inside.get(node), node


def _said(call: ast.Call, function: ast.FunctionDef | None, file: str) -> list[str]:
    """The sentences of one call. Never none: what cannot be read is shown as a name."""
    name = f"{file}:{function.name if function else ''}"
    given = call.args[0] if call.args else ast.Constant("")
    text = _text(given, _assigned(function))
    if text is None and isinstance(given, ast.Name) and function is not None:
        passed = list(_passed(function, given.id, file))
        if passed:
            return passed
    if name in RELAYED and (text is None or text.startswith("‹said›")):
        return ["; ".join(RELAYED[name])]
    return [f"‹{ast.unparse(given)[:60]}›" if text is None else text]


def _assigned(function: ast.FunctionDef | None) -> dict[str, str]:
    """Texts that a function gives a name."""
    found: dict[str, str] = {}
    for node in ast.walk(function) if function else ():
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            text = _text(node.value, {})
            if text is not None and " " in text:
                found[node.targets[0].id] = text
    return found


def _passed(function: ast.FunctionDef, parameter: str, file: str) -> Iterator[str]:
    """What callers say for a parameter: those of the same file, or, if there are none, all."""
    names = [one.arg for one in function.args.args if one.arg not in ("self", "cls")]
    if parameter not in names:
        return
    place = names.index(parameter)
    for trees in ([_trees()[file]], _trees().values()):
        calls = [
            node
            for tree in trees
            for node in ast.walk(tree)
            if isinstance(node, ast.Call) and _last(node.func) == function.name and len(node.args) > place
        ]
        texts = [text for node in calls if (text := _text(node.args[place], {})) is not None and " " in text]
        if texts:
            yield from texts
            return


def _text(node: ast.AST, local: dict[str, str]) -> str | None:
    """A text with its gaps named, or None for what is no text that is written here."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else None
    if isinstance(node, ast.Name):
        return local.get(node.id) or (_constants().get(node.id) if node.id.isupper() else None)
    if isinstance(node, ast.JoinedStr):
        return "".join(_piece(one, local) for one in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        sides = [_text(side, local) for side in (node.left, node.right)]
        if sides == [None, None]:
            return None
        return "".join(
            side if side is not None else _gap(each)
            for side, each in zip(sides, (node.left, node.right), strict=True)
        )
    return None


def _piece(node: ast.AST, local: dict[str, str]) -> str:
    if isinstance(node, ast.Constant):
        return str(node.value)
    inner = getattr(node, "value", node)
    known = _text(inner, local) if isinstance(inner, ast.Name) else None
    return known if known is not None else _gap(inner)


def _gap(node: ast.AST) -> str:
    """A short name for what is filled in."""
    while isinstance(node, ast.Call) and node.args:
        node = node.args[0]
    if isinstance(node, ast.Subscript):
        node = node.value
    return f"‹{_last(node).strip('_') or '…'}›"
