"""Command lines: parsers that report a mistake in one sentence, and options per scale."""

import inspect
import json
import re
from collections.abc import Callable, Iterator, Sequence
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
VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
SEE_HELP = ", see --help"
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
IGNORED = re.compile(
    r"Does not validate|Subtypes: |Errors:|Given value type: |Expected a path but "
)


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
        """Parse arguments; class labels such as ``no`` stay text."""
        # jsonargparse forgets what is required while it parses, --help included
        self.needed = [*self.needed, *(a.dest for a in self._actions if a.required)]
        with _labels_as_text():
            quoted = None if args is None else quote_labels(args)
            return super().parse_args(quoted, namespace, **options)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise :class:`InputError`; an inner parser leaves that to the outer one."""
        if not self.exit_on_error:
            super().error(message, ex)
        raise InputError(input_error_in(ex) or shorten_error(message, self)) from ex


@contextmanager
def trainer_errors() -> Iterator[None]:
    """Turn what Lightning's Trainer raises when it is created into :class:`InputError`."""
    try:
        yield
    except InputError:
        raise
    except (ValueError, TypeError, RuntimeError) as error:
        if input_error_in(error):
            raise
        first_sentence = re.split(r"(?<=[.!?])\s", " ".join(str(error).split()))[0]
        raise InputError(f"--trainer: {first_sentence}") from error


def shorten_error(message: str, parser: ArgumentParser) -> str:
    """Shorten jsonargparse's report of a mistake to one sentence about one option.

    jsonargparse lists every type that an option may have and every value that was given. Only the
    most specific complaint is kept.

    Parameters
    ----------
    message: of ``ArgumentParser.error``.
    parser: the parser that reports the mistake.
    """
    options = [name for action in parser._actions for name in action.option_strings]
    if match := re.match(r"unrecognized arguments: (.*)", message):
        words = match[1].split()
        word = next((word for word in words if word.startswith("-")), words[0])
        name = word.split("=")[0]
        return f"{name}: no such option{near(name, options) or SEE_HELP}"
    if match := re.match(
        r"argument (?:-\w/)?(\S+): expected (?:one|at least one) argument", message
    ):
        return f"{match[1]}: its value is missing"
    if match := re.match(r"the following arguments are required: (.*)", message):
        return f"give {_required(match[1].split(', '), parser)}"
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
    if option:
        options = [f"--{option}.{key}" for key in _parameters(best.class_path)]
    unknown = r"unrecognized arguments: --([^\s=]+)|Option '(.*)' is not accepted"
    if match := re.match(unknown, best.text):
        key = match[1] or match[2]
        name = f"{option}.{key}".strip(".")
        ends = (f".{key}", f".{key.replace('_', '.', 1)}")  # split_seed is split.seed now
        moved = [known for known in options if known.count(".") > 1 and known.endswith(ends)]
        if len(moved) == 1:
            return f"--{name}: its name is {moved[0]}"
        return f"--{name}: no such option{near(f'--{name}', options) or SEE_HELP}"
    if match := re.match(r"the following arguments are required: (.*)", best.text):
        names = (f"--{option}.{name}" for name in match[1].split(", "))
        return f"give {' and '.join(names)}"
    if match := re.match(r"File does not exist: '(.*)'", best.text):
        return f"--{option}: {match[1]} does not exist"
    return f"--{option}: {best.text}" if option else best.text


class _Complaint:
    """One line of jsonargparse's report.

    Parameters
    ----------
    text: the line.
    path: keys of the option, outermost first.
    class_path: of the class that has the option; "" if none.
    """

    SPECIFIC, OTHER, TYPE = range(3)  # ranks; the lowest is kept

    def __init__(self, text: str, path: tuple[str, ...], class_path: str):
        self.path = path
        self.class_path = class_path
        self.value: str | None = None
        self.rank, self.text = self.OTHER, text
        self.choices: list[str] = []
        if re.match(r"Option '|the following arguments|File does not exist", text):
            self.rank = self.SPECIFIC
        elif match := re.match(r"Expected a (.*?)(?:\. Got value: (.*))?$", text):
            self.rank, self.value = self.TYPE, match[2]
            if choices := re.match(r"typing\.Literal\[(.*)\]", match[1]):
                self.choices = [word.strip(" '") for word in choices[1].split(",")]
            else:
                self.text = TYPES.get(match[1], match[1].split("'")[-2:][0])


def _complaints(message: str) -> Iterator[_Complaint]:
    """The complaints of a report, each with its option."""
    keys: list[tuple[int, str]] = []  # indentation and key, outermost first
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
        if match := re.match(r'Parser key "(.*?)":\s*', text):
            keys.append((indent, match[1].removeprefix("fit.")))
            text = text[match.end() :]
        if match := re.match(r"Problem with given class_path '(.*)':\s*", text):
            classes.append((indent, match[1]))
            text = text[match.end() :]
        if not text or IGNORED.match(text):
            continue
        class_path = classes[-1][1] if classes else ""
        path = tuple(part for _, key in keys for part in key.split("."))
        open_complaints.append(_Complaint(text, path, class_path))
    yield from open_complaints


def _required(names: Sequence[str], parser: ArgumentParser) -> str:
    """Join missing arguments as a user writes them."""
    positional = {
        a.dest: a.metavar or a.dest.upper() for a in parser._actions if not a.option_strings
    }
    return " and ".join(str(positional.get(name, f"--{name}")) for name in names)


def _parameters(class_path: str) -> list[str]:
    """The options of a class and its bases, and the fields of those that are dataclasses."""
    module, _, name = class_path.rpartition(".")
    names: list[str] = []
    try:
        for cls in getattr(import_module(module), name).__mro__[:-1]:
            types = get_type_hints(cls.__init__)
            for option, parameter in inspect.signature(cls.__init__).parameters.items():
                if parameter.kind in VARIADIC:
                    continue
                kind = types.get(option)
                inner = fields(kind) if is_dataclass(kind) else ()
                names += [option, *(f"{option}.{field.name}" for field in inner)]
    except (ImportError, AttributeError, TypeError, ValueError, NameError):
        return names
    return names


def find_configs(args: Sequence[str]) -> list[str]:
    """Replace the value of every ``--config`` by the path of an existing file.

    A config that is not found from the current folder is looked for in dasmil's own ``configs/``.

    Raises
    ------
    InputError
        if there is no such file, or it is not YAML.
    """
    return _map_values(args, re.compile(f"{CONFIG}|-c"), _find_config)


def _map_values(
    args: Sequence[str], options: re.Pattern[str], change: Callable[[str], str]
) -> list[str]:
    """Change the values of some options, as ``--option value`` or ``--option=value``."""
    changed: list[str] = []
    for word in args:
        option, equals, value = word.partition("=")
        if changed and options.fullmatch(changed[-1]):
            word = change(word)
        elif equals and options.fullmatch(option):
            word = f"{option}={change(value)}"
        changed.append(word)
    return changed


def _find_config(value: str) -> str:
    """The path of a config, or the config itself if it is given inline."""
    if value.startswith("{"):
        return value
    path = find_config(value)
    read_config(path)
    return str(path)


def read_config(path: Path) -> dict[str, Any]:
    """Read a YAML file as plain values by name; YAML tags create no objects.

    Raises
    ------
    InputError
        if there is no such file, or it is not YAML with keys in UTF-8.
    """
    must_be_file(path, "give a file of options in YAML")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not YAML in UTF-8 ({error.reason}); save it as UTF-8") from error
    return _mapping(text, str(path))


def quote_labels(args: Sequence[str]) -> list[str]:
    """Quote the labels in lists such as ``[no,yes]`` or ``[0,1]``."""
    key = "classes: "
    return _map_values(args, LABELS, lambda value: _quote_labels(key + value).removeprefix(key))


@contextmanager
def _labels_as_text() -> Iterator[None]:
    """Keep labels in YAML files as text; YAML would read ``no`` as false and ``01`` as 1."""
    load = get_loader("yaml")
    set_loader("yaml", lambda text: load(_quote_labels(text)), (yaml.YAMLError,))
    try:
        yield
    finally:
        set_loader("yaml", load, (yaml.YAMLError,))


def _quote_labels(text: str) -> str:
    """Quote the items of lists of labels in YAML."""
    if not TEXTS.search(text):
        return text
    try:
        nodes = [yaml.compose(text, yaml.SafeLoader)]
    except (yaml.YAMLError, RecursionError):
        return text  # the loader reports the error
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


def join_scales(args: Sequence[str]) -> list[str]:
    """Join the options of all scales into one config in JSON.

    jsonargparse cannot parse ``--extractors.x2.5.model NAME``, because every dot is a level to it,
    and it keeps only some of several settings per scale. Other scales and settings in the config
    files are kept.

    Raises
    ------
    InputError
        if a value is missing or is not YAML with keys.
    """
    rest: list[str] = []
    given: dict[str, dict[str, Any]] = {}
    words = iter(args)
    for word in words:
        match = PER_SCALE.fullmatch(word)
        if match is None:
            rest.append(word)
            continue
        name, scale, setting, value = match.groups()
        value = next(words, None) if value is None else value
        values = given.setdefault(name, _values_in_configs(args, name))
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
    # A config, because an option's unknown setting would be taken for text. It follows the files,
    # which it completes, and precedes --print_config, which ends the parsing.
    last = max((n for n, word in enumerate(rest) if word.startswith(CONFIG)), default=-1)
    place = last + 1 + ("=" not in rest[last]) if last >= 0 else 0
    return [*rest[:place], CONFIG, json.dumps(given), *rest[place:]]


def _values_in_configs(args: Sequence[str], name: str) -> dict[str, Any]:
    """Values per scale of an option in the config files of a command; later files win."""
    values: dict[str, Any] = {}
    for _, value in given_options(args, CONFIG):
        config = _mapping(value, value) if value.startswith("{") else read_config(Path(value))
        values |= config.get(name) or {}
    return values


def given_options(args: Sequence[str], *options: str) -> Iterator[tuple[str, str]]:
    """These options and their values, as ``--option value`` or ``--option=value``."""
    for word, following in zip(args, [*args[1:], ""]):
        option, equals, value = word.partition("=")
        if option in options:
            yield option, value if equals else following


def _mapping(text: str, where: str) -> dict[str, Any]:
    """Load YAML with keys as a dictionary."""
    try:
        return dict(get_loader("yaml")(text) or {})
    except Exception as error:  # jsonargparse chooses the YAML library
        raise InputError(f"{where}: not YAML with keys ({' '.join(str(error).split())})") from error
