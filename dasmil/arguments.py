"""Command lines: parsers that answer a mistake with one sentence, and options per scale."""

import inspect
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn, get_type_hints

import yaml
from jsonargparse import ArgumentParser, get_loader, set_loader

from dasmil.config_files import find_config
from dasmil.errors import InputError, input_error_in, near
from dasmil.files import must_be_file
from dasmil.help import D_NUMBER, PAPER_PAGE, HelpFormatter, arrange

CONFIG = "--config"
PER_SCALE = re.compile(  # options that hold one value or several settings per scale
    r"--(extractors|features|patches)(?:\.(x\d+(?:\.\d+)?|[^.=]+)(?:\.(\w+))?)?(?:=(.*))?",
    re.DOTALL,
)
TEXTS = re.compile(r"(?:[\w.]+\.)?(?:truth_)?classes")  # options that are lists of labels
LABELS = re.compile(rf"--{TEXTS.pattern}\+?")
TYPES = {  # jsonargparse's names of types
    "<class 'int'>": "a whole number",
    "<class 'float'>": "a number",
    "<class 'bool'>": "true or false",
    "<class 'str'>": "text",
    "<class 'tuple'>": "a list such as [a,b]",
    "<class 'list'>": "a list such as [a,b]",
    "<class 'dict'>": "a dictionary such as {a: 1}",
    "<class 'NoneType'>": "null",
}
UNSAID = re.compile(r"Does not validate|Subtypes: |Errors:|Given value type: |Expected a path but ")


class SentenceParser(ArgumentParser):
    """An ``ArgumentParser`` without abbreviations, whose errors are sentences.

    Attributes
    ----------
    needed: options that --help shows first although the parser can do without them.
    """

    needed: Sequence[str] = ()

    def __init__(self, *args: Any, **kwargs: Any):
        defaults = {
            "allow_abbrev": False,
            "formatter_class": HelpFormatter,
            "prog": "python -m dasmil",
        }
        super().__init__(*args, **{**defaults, **kwargs})

    def format_help(self, *args: Any) -> str:
        groups = self._action_groups
        required = (action.dest for action in self._actions if action.required)
        self._action_groups = arrange(groups, [*self.needed, *required])
        try:
            text = super().format_help(*args)
        finally:
            self._action_groups = groups
        return text + (f"\nD numbers: {PAPER_PAGE}\n" if D_NUMBER.search(text) else "")

    def parse_args(self, args: Any = None, namespace: Any = None, **options: Any) -> Any:  # type: ignore[override]
        """Parse arguments whose labels are text, also those that YAML takes for other values."""
        # jsonargparse forgets what is required while it parses, --help included
        self.needed = [*self.needed, *(a.dest for a in self._actions if a.required)]
        with _labels_as_text():
            given = None if args is None else with_labels(args)
            return super().parse_args(given, namespace, **options)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise :class:`InputError`; a parser inside another one leaves that to the outer one."""
        if not self.exit_on_error:
            super().error(message, ex)
        raise InputError(input_error_in(ex) or sentence(message, self)) from ex


@contextmanager
def said_of_trainer() -> Iterator[None]:
    """Say in one sentence what Lightning's Trainer refuses while it is made."""
    try:
        yield
    except InputError:
        raise
    except (ValueError, TypeError, RuntimeError) as error:
        if input_error_in(error):
            raise
        raise InputError(f"--trainer: {first_sentence(error)}") from error


def first_sentence(error: BaseException) -> str:
    """The first sentence of an error of another library."""
    return re.split(r"(?<=[.!?])\s", " ".join(str(error).split()))[0]


def sentence(message: str, parser: ArgumentParser) -> str:
    """Shorten jsonargparse's report of a mistake to what is wrong with which option.

    jsonargparse lists every type that an option may have and all values that it was given. Only
    the most specific of its complaints is kept.

    Parameters
    ----------
    message: of ``ArgumentParser.error``.
    parser: whose options it is about.
    """
    options = [name for action in parser._actions for name in action.option_strings]
    if found := re.match(r"unrecognized arguments: (.*)", message):
        words = found[1].split()
        word = next((word for word in words if word.startswith("-")), words[0])
        name = word.split("=")[0]
        return f"{name}: no such option{near(name, options)}"
    if found := re.match(
        r"argument (?:-\w/)?(\S+): expected (?:one|at least one) argument", message
    ):
        return f"{found[1]}: its value is missing"
    if found := re.match(r"the following arguments are required: (.*)", message):
        return f"give {_required(found[1].split(', '), parser)}"
    complaints = list(_complaints(message))
    if not complaints:
        return " ".join(message.split())
    best = min(complaints, key=lambda complaint: (complaint.rank, -len(complaint.path)))
    option = ".".join(key for key in best.path if key != "init_args")
    if best.rank == _Complaint.TYPE:
        alike = [c for c in complaints if c.rank == best.rank and c.path == best.path]
        types = [c.text for c in alike if not c.choices]
        if choices := dict.fromkeys(choice for c in alike for choice in c.choices):
            types.insert(0, f"one of {', '.join(choices)}")
        value = "it" if best.value is None else repr(best.value)
        return f"--{option}: {value} is not {' or '.join(dict.fromkeys(types))}"
    if found := re.match(r"unrecognized arguments: --([^\s=]+)", best.text):
        name = f"{option}.{found[1]}".strip(".")
        options = [f"--{option}.{key}" for key in _parameters(best.class_path)]
        return f"--{name}: no such option{near(f'--{name}', options)}"
    if found := re.match(r"Option '(.*)' is not accepted", best.text):
        name = ".".join([option, found[1]]).strip(".")
        if option:
            options = [f"--{option}.{key}" for key in _parameters(best.class_path)]
        moved = [
            known for known in options if known.count(".") > 1 and known.endswith(f".{found[1]}")
        ]
        if len(moved) == 1:
            return f"--{name}: its name is {moved[0]}"
        return f"--{name}: no such option{near(f'--{name}', options)}"
    if found := re.match(r"the following arguments are required: (.*)", best.text):
        names = (f"--{option}.{name}" for name in found[1].split(", "))
        return f"give {_in_words(names)}"
    if found := re.match(r"File does not exist: '(.*)'", best.text):
        return f"--{option}: {found[1]} does not exist"
    return f"--{option}: {best.text}" if option else best.text


class _Complaint:
    """One line of jsonargparse's report.

    Parameters
    ----------
    path: the option's keys from the outside in.
    class_path: of the class whose option it is; "" if none.
    """

    SPECIFIC, OTHER, TYPE = range(3)  # ranks: the lowest is kept

    def __init__(self, text: str, path: tuple[str, ...], class_path: str):
        self.path = path
        self.class_path = class_path
        self.value: str | None = None
        self.rank, self.text = self.OTHER, text
        self.choices: list[str] = []
        if re.match(r"Option '|the following arguments|File does not exist", text):
            self.rank = self.SPECIFIC
        elif found := re.match(r"Expected a (.*?)(?:\. Got value: (.*))?$", text):
            self.rank, self.value = self.TYPE, found[2]
            if choices := re.match(r"typing\.Literal\[(.*)\]", found[1]):
                self.choices = [word.strip(" '") for word in choices[1].split(",")]
            else:
                self.text = TYPES.get(found[1], found[1].split("'")[-2:][0])


def _complaints(message: str) -> Iterator[_Complaint]:
    """The lines of a report that complain, each with the option that it is about."""
    keys: list[tuple[int, str]] = []  # indentation and key, from the outside in
    classes: list[tuple[int, str]] = []
    open_complaints: list[_Complaint] = []
    for line in message.splitlines():
        text = line.lstrip(" -")
        indent = len(line) - len(text)
        if value := re.match(r"Given value: (.*)", text):
            for complaint in open_complaints:
                complaint.value = complaint.value or value[1]
            yield from open_complaints
            open_complaints = []
            continue
        keys = [(place, key) for place, key in keys if place < indent]
        classes = [(place, name) for place, name in classes if place < indent]
        if found := re.match(r'Parser key "(.*?)":\s*', text):
            keys.append((indent, found[1].removeprefix("fit.")))
            text = text[found.end() :]
        if found := re.match(r"Problem with given class_path '(.*)':\s*", text):
            classes.append((indent, found[1]))
            text = text[found.end() :]
        if not text or UNSAID.match(text):
            continue
        class_path = classes[-1][1] if classes else ""
        path = tuple(part for _, key in keys for part in key.split("."))
        open_complaints.append(_Complaint(text, path, class_path))
    yield from open_complaints


def _required(names: Sequence[str], parser: ArgumentParser) -> str:
    """Missing arguments as a user writes them."""
    positional = {
        a.dest: a.metavar or a.dest.upper() for a in parser._actions if not a.option_strings
    }
    return _in_words(str(positional.get(name, f"--{name}")) for name in names)


def _in_words(names: Iterable[str]) -> str:
    return " and ".join(names)


def _parameters(class_path: str) -> list[str]:
    """The options of a class and its bases, and the fields of those that are dataclasses."""
    module, _, name = class_path.rpartition(".")
    found: list[str] = []
    try:
        for cls in getattr(import_module(module), name).__mro__[:-1]:
            types = get_type_hints(cls.__init__)
            for option in inspect.signature(cls.__init__).parameters:
                kind = types.get(option)
                inner = fields(kind) if is_dataclass(kind) else ()
                found += [option, *(f"{option}.{field.name}" for field in inner)]
    except (ImportError, AttributeError, TypeError, ValueError, NameError):
        return found
    return found


def with_configs(args: Sequence[str]) -> list[str]:
    """Arguments in which every ``--config`` names a file that is there.

    A config that is not found from the current folder is looked for in dasmil's own ``configs/``.
    """
    found: list[str] = []
    for word in args:
        option, equals, value = word.partition("=")
        if found and found[-1] in (CONFIG, "-c"):
            word = _config(word)
        elif option in (CONFIG, "-c") and equals:
            word = f"{option}={_config(value)}"
        found.append(word)
    return found


def _config(value: str) -> str:
    """The path of a config, or a config itself."""
    if value.startswith("{"):
        return value
    path = find_config(value)
    read_config(path)
    return str(path)


def read_config(path: Path) -> dict[str, Any]:
    """The values of a YAML file by name, as plain values: tags make nothing.

    Raises
    ------
    InputError
        if it is no file of that kind.
    """
    must_be_file(path, "give a file of options in YAML")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not YAML in UTF-8 ({error.reason}); save it as UTF-8") from error
    return _mapping(text, str(path))


def with_labels(args: Sequence[str]) -> list[str]:
    """Arguments in which the labels of lists such as ``[no,yes]`` or ``[0,1]`` are quoted."""
    found: list[str] = []
    for word in args:
        option, equals, value = word.partition("=")
        if found and LABELS.fullmatch(found[-1]):
            word = _quoted(word)
        elif equals and LABELS.fullmatch(option):
            word = f"{option}={_quoted(value)}"
        found.append(word)
    return found


def _quoted(value: str) -> str:
    key = "classes: "
    return _labels_quoted(key + value).removeprefix(key)


@contextmanager
def _labels_as_text() -> Iterator[None]:
    """Read labels in YAML files as they stand; YAML takes ``no`` for false and ``01`` for 1."""
    load = get_loader("yaml")
    set_loader("yaml", lambda text: load(_labels_quoted(text)), (yaml.YAMLError,))
    try:
        yield
    finally:
        set_loader("yaml", load, (yaml.YAMLError,))


def _labels_quoted(text: str) -> str:
    """YAML in which the items of lists of labels are quoted."""
    if not TEXTS.search(text):
        return text
    try:
        nodes = [yaml.compose(text, yaml.SafeLoader)]
    except (yaml.YAMLError, RecursionError):
        return text  # whoever loads it says what is wrong
    labels: list[yaml.ScalarNode] = []
    while nodes:
        node = nodes.pop()
        if isinstance(node, yaml.SequenceNode):
            nodes += node.value
        elif isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                nodes.append(value)
                if isinstance(value, yaml.SequenceNode) and TEXTS.fullmatch(str(key.value)):
                    labels += [n for n in value.value if isinstance(n, yaml.ScalarNode)]
    for node in sorted(labels, key=lambda node: -node.start_mark.index):
        if node.style is None:
            start, end = node.start_mark.index, node.end_mark.index
            text = f"{text[:start]}{json.dumps(node.value)}{text[end:]}"
    return text


def with_scales_together(args: Sequence[str]) -> list[str]:
    """Arguments in which the options of all scales are one option of JSON.

    ``--extractors.x2.5.model NAME`` cannot be parsed as it is, because for jsonargparse every dot
    is a level; and of several settings of a scale it keeps only some. What the config files say of
    other scales and settings is kept.
    """
    rest: list[str] = []
    given: dict[str, dict[str, Any]] = {}
    words = iter(args)
    for word in words:
        found = PER_SCALE.fullmatch(word)
        if found is None:
            rest.append(word)
            continue
        name, scale, setting, value = found.groups()
        value = next(words, None) if value is None else value
        values = given.setdefault(name, _of_configs(args, name))
        if value is None:
            raise InputError(f"{word}: its value is missing")
        if scale is None:
            values |= _mapping(value, word)
        elif setting is None:
            values[scale] = _mapping(value, word) if value.startswith("{") else value
        else:
            before = values.get(scale, {})
            before = {"model": before} if isinstance(before, str) else before
            values[scale] = {**before, setting: value}
    if not given:
        return rest
    # As a config, which refuses an unknown setting; as an option it would be taken for text. It
    # follows the files, which it completes, and precedes --print_config, which ends the parsing.
    last = max((n for n, word in enumerate(rest) if word.startswith(CONFIG)), default=-1)
    place = last + 1 + ("=" not in rest[last]) if last >= 0 else 0
    return [*rest[:place], CONFIG, json.dumps(given), *rest[place:]]


def _of_configs(args: Sequence[str], name: str) -> dict[str, Any]:
    """What the config files of a command say of an option per scale; later ones win."""
    values: dict[str, Any] = {}
    for option, value in zip(args, [*args[1:], ""]):
        if option.startswith(f"{CONFIG}="):
            value = option.removeprefix(f"{CONFIG}=")
        elif option != CONFIG:
            continue
        found = _mapping(value, value) if value.startswith("{") else read_config(Path(value))
        values |= found.get(name) or {}
    return values


def _mapping(text: str, where: str) -> dict[str, Any]:
    """YAML with keys, as a dictionary."""
    try:
        return dict(get_loader("yaml")(text) or {})
    except Exception as error:  # of whatever YAML library jsonargparse uses
        raise InputError(f"{where}: not YAML with keys ({' '.join(str(error).split())})") from error
