"""How the keyword-only arguments of a method become flags, and flags a method."""
import inspect
import re
from typing import Literal, get_args, get_origin

from utils.args import SWITCH

from .base import Distiller


def hyper_parameters(method: type[Distiller]) -> dict[str, tuple[inspect.Parameter, str]]:
    """name: (parameter, text of its docstring line)."""
    texts, parameters = notes(method), inspect.signature(method).parameters.values()
    own = [p for p in parameters if p.kind is p.KEYWORD_ONLY]
    for p in own:
        if p.name not in texts:
            raise ValueError(f'{method.__name__}: its docstring has no line "{p.name}: ...", which --help would show')
        if get_origin(p.annotation) not in (Literal, tuple) and type(p.default) not in (bool, int, float, str):
            raise ValueError(f'{method.__name__}: {p.name} is no number, text or bool by its default, and no Literal '
                             'or tuple by its annotation')
    return {p.name: (p, texts[p.name]) for p in own}


def notes(method: type[Distiller]) -> dict[str, str]:
    """The lines `word: text` of the docstring."""
    return dict(re.findall(r'^ *(\w+): (.+)$', inspect.getdoc(method), re.MULTILINE))


def first_line(documented) -> str:
    """Of a method's class, what it wants; of its module, the paper."""
    return inspect.getdoc(documented).partition('\n')[0]


def options(parameter: inspect.Parameter) -> dict:
    """add_argument's words: Literal is a choice, a tuple takes several values, else the default tells the type."""
    kind, inner = get_origin(parameter.annotation), get_args(parameter.annotation)
    if kind is Literal:
        return {'choices': inner}
    if kind is tuple:
        return {'nargs': '+', 'type': inner[0], 'metavar': 'X'}
    if isinstance(parameter.default, bool):
        return SWITCH
    return {'type': type(parameter.default), 'metavar': 'N' if isinstance(parameter.default, int) else 'X'}


def flag(name: str, key: str) -> str:
    return f'--{name}-{key}'.replace('_', '-')


def add_flags(parser, table: dict[str, type[Distiller]]):
    """--NAME-HYPER-PARAMETER for each of each method in the table."""
    for name, method in table.items():
        group = parser.add_argument_group(f'--distiller {name}', first_line(method))
        for key, (parameter, text) in hyper_parameters(method).items():
            group.add_argument(flag(name, key), default=parameter.default, help=text.replace('%', '%%'),
                               **options(parameter))


def values_of(table: dict[str, type[Distiller]], name: str, args) -> dict:
    """A method's hyper-parameters by its flags; an older run's arguments know less of them."""
    return {key: getattr(args, f'{name}_{key}', parameter.default)
            for key, (parameter, _) in hyper_parameters(table[name]).items()}


def from_flags(table: dict[str, type[Distiller]], names: list[str], args, student, teacher) -> dict[str, Distiller]:
    """The named methods, built with the values of their flags."""
    made = {}
    for name in names:
        try:
            made[name] = table[name](student, teacher, **values_of(table, name, args))
        except ValueError as error:  # of a hyper-parameter, whose flag is its name for the user; or of the pair
            word, _, rest = str(error).partition(' ')
            own = word in hyper_parameters(table[name])
            raise ValueError(f'{flag(name, word)} {rest}' if own else f'{name}: {error}') from None
    return made


def describe(table: dict[str, type[Distiller]]) -> str:
    """Each method's paper, first sentence, and flags with their defaults and where these are from."""
    lines = []
    for name, method in table.items():
        lines += [f'{name}: {first_line(inspect.getmodule(method))}', f'    {first_line(method)}']
        lines.append(f'    Defaults: {notes(method)["Defaults"]}')
        for key, (parameter, text) in hyper_parameters(method).items():
            default = '' if parameter.default == () else f' {parameter.default}'
            lines.append(f'    {flag(name, key)}{default}   {text}')
    return '\n'.join(lines)


def drop_foreign(table: dict[str, type[Distiller]], names: list[str], args) -> list[str]:
    """Take the flags of methods that were not named out of args; returns those that were given all the same."""
    given = []
    for name in table.keys() - set(names):
        for key, (parameter, _) in hyper_parameters(table[name]).items():
            if vars(args).pop(f'{name}_{key}') != parameter.default:
                given.append(flag(name, key))
    return sorted(given)
