"""The standard library of the running Python as text: every documented public function, class and method.

`HELD_OUT_MODULES` and `TRAINING_MODULES` split it. The shipped model is trained on the second only; the demo's
corpus asks about the first only. Both lists are fixed and name modules whose import has no side effect; a module that
another Python or platform lacks is passed over.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import textwrap
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any, TypeAlias


def _modules(names: str) -> tuple[str, ...]:
    """Read `a b(c d)` as a, b, b.c, b.d: packages with their submodules in brackets."""
    modules = []
    for package, submodules in re.findall(r"([\w.]+)(?:\(([^)]*)\))?", names):
        modules.append(package)
        modules.extend(f"{package}.{submodule}" for submodule in submodules.split())
    return tuple(modules)


HELD_OUT_MODULES = _modules("""
    argparse base64 bisect calendar collections configparser contextlib copy csv dataclasses difflib doctest
    email(base64mime charset contentmanager encoders errors feedparser generator header headerregistry iterators
    message parser policy quoprimime utils mime.application mime.audio mime.base mime.image mime.message
    mime.multipart mime.text) enum fractions functools getopt glob gzip heapq html(parser) imaplib inspect ipaddress
    json(decoder encoder) logging(config handlers) mimetypes optparse pathlib pdb pickletools pprint queue random
    sched shutil smtplib statistics string tarfile tempfile textwrap threading timeit tokenize traceback
    unittest(async_case case loader mock result runner signals suite util)
    urllib(error parse request response robotparser) uuid wave weakref zipfile
""")

TRAINING_MODULES = _modules("""
    _collections_abc abc array ast asyncio(base_events base_futures base_subprocess base_tasks events exceptions
    format_helpers futures locks protocols queues runners selector_events sslproto staggered streams subprocess
    taskgroups tasks threads timeouts transports trsock) atexit bdb binascii builtins bz2 cProfile cmath cmd code codecs
    codeop colorsys compileall concurrent.futures(process thread) contextvars copyreg ctypes(util) datetime dbm(dumb)
    decimal dis encodings(idna punycode) errno faulthandler filecmp fileinput fnmatch ftplib gc genericpath getpass
    gettext graphlib hashlib hmac http(client cookiejar cookies server) importlib(abc machinery metadata resources util)
    io itertools keyword linecache locale lzma mailbox marshal math mmap modulefinder multiprocessing(connection context
    dummy forkserver heap managers pool popen_fork process queues reduction resource_sharer resource_tracker
    shared_memory sharedctypes spawn synchronize util) netrc ntpath nturl2path numbers opcode operator os pickle pkgutil
    platform plistlib poplib posixpath profile pstats py_compile pyclbr pydoc pyexpat quopri re reprlib resource runpy
    secrets select selectors shelve shlex signal site socket socketserver sqlite3(dbapi2 dump) ssl stat stringprep
    struct subprocess symtable sys sysconfig tabnanny termios time token tomllib trace tracemalloc types typing
    unicodedata warnings webbrowser wsgiref(handlers headers simple_server types util validate) xml(dom.domreg
    dom.expatbuilder dom.minidom dom.minicompat dom.pulldom dom.xmlbuilder etree.ElementInclude etree.ElementPath
    etree.ElementTree sax.expatreader sax.handler sax.saxutils sax.xmlreader) xmlrpc(client server) zipapp zipimport
    zlib zoneinfo
""")

# `os` is written in C under the platform's name.
_PLATFORM_HOMES = (("os", "posix"), ("os", "nt"))
Definition: TypeAlias = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
_ADDRESS = re.compile(r" at 0x[0-9A-Fa-f]+")


@dataclass(frozen=True, slots=True, kw_only=True)
class Documented:
    """A public function, class or method: how it is called, its docstring, and its source if there is any.

    `name` is qualified by the module, `signature` reads `textwrap.dedent(text)`, `documentation` is the docstring
    without its indentation, `source` is without docstring and indentation, "" where none is available.
    """

    name: str
    module: str
    signature: str
    documentation: str
    source: str

    @property
    def text(self) -> str:
        """Signature and documentation, as `help()` would show them."""
        return f"{self.signature}\n\n{self.documentation}"


def documented(modules: Iterable[str], *, minimum_characters: int = 40) -> list[Documented]:
    """Everything public in `modules` with a docstring of at least `minimum_characters`, in the order of the names.

    Of several things with one docstring (a method and its override) only the first stays.
    """
    found: dict[str, Documented] = {}
    for module_name in modules:
        module = load(module_name)
        if module is None:
            continue
        sources = _sources(module)
        for name, thing in _public(module):
            documentation = _documentation(thing)
            if len(documentation) >= minimum_characters and documentation not in found:
                found[documentation] = Documented(
                    name=name,
                    module=module_name,
                    signature=name + _parameters(thing),
                    documentation=documentation,
                    source=sources.get((getattr(thing, "__qualname__", ""), documentation), ""),
                )
    return list(found.values())


def load(name: str) -> ModuleType | None:
    """Import a module of the standard library; None where this Python or platform has none of that name."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return importlib.import_module(name)
        except Exception:  # a broken optional module must not break the demo
            return None


def _public(module: ModuleType) -> Iterator[tuple[str, Any]]:
    """Public functions and classes that are at home in the module, and the methods that these classes define."""
    for name, thing in sorted(vars(module).items()):
        if name.startswith("_") or not (inspect.isclass(thing) or inspect.isroutine(thing)):
            continue
        home = getattr(thing, "__module__", None) or module.__name__
        if home not in (module.__name__, f"_{module.__name__}") and (module.__name__, home) not in _PLATFORM_HOMES:
            continue
        yield f"{module.__name__}.{name}", thing
        if inspect.isclass(thing):
            for method_name, raw in sorted(vars(thing).items()):
                method = raw.__func__ if isinstance(raw, staticmethod | classmethod) else raw
                if not method_name.startswith("_") and inspect.isroutine(method):
                    yield f"{module.__name__}.{name}.{method_name}", method


def _documentation(thing: Any) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some deprecated classes warn when their docstring is read
        return documentation_text(getattr(thing, "__doc__", None))


def documentation_text(docstring: object) -> str:
    """The docstring as written, without indentation; memory addresses in generated ones are left out."""
    if not isinstance(docstring, str) or not _is_encodable(docstring):
        return ""
    return _ADDRESS.sub("", inspect.cleandoc(docstring)).strip()


def _parameters(thing: Any) -> str:
    """`(text, width=70)`: literal defaults as they are, others as `...`, because a repr can be a matter of chance."""
    try:
        signature = inspect.signature(thing)
    except (ValueError, TypeError):
        return "(...)"
    parameters = [
        parameter.replace(
            annotation=parameter.empty,
            default=parameter.default if _is_literal(parameter.default) else ...,
        )
        for parameter in signature.parameters.values()
    ]
    text = str(signature.replace(parameters=parameters, return_annotation=signature.empty))
    return text.replace("=Ellipsis", "=...") if _is_encodable(text) else "(...)"


def _is_literal(value: object) -> bool:
    # Strings with a separator may be paths of this machine.
    if isinstance(value, str):
        return type(value) is str and "/" not in value and "\\" not in value
    return value is inspect.Parameter.empty or value is None or type(value) in (bool, int, float)


def _sources(module: ModuleType) -> dict[tuple[str, str], str]:
    """(qualified name in the module, documentation) -> source without docstring, of all functions and classes.

    One parse of the module: `inspect.getsource` parses it anew for each class. The documentation is part of the key
    because a name can be defined twice, in the branches of a condition.
    """
    try:
        text = inspect.getsource(module)
        tree = ast.parse(text)
    except Exception:  # no source file, or one that this Python does not read
        return {}
    lines = text.splitlines(keepends=True)
    return {
        (name, documentation): _without_docstring(lines, definition)
        for name, definition in definitions(tree)
        if (documentation := documentation_text(ast.get_docstring(definition, clean=False)))
        and len(definition.body) > 1
    }


def definitions(tree: ast.Module) -> Iterator[tuple[str, Definition]]:
    """(qualified name in the module, definition) of functions, classes and methods, also in branches of conditions."""
    below: list[tuple[str, ast.AST]] = [("", tree)]
    while below:
        prefix, node = below.pop(0)
        for child in ast.iter_child_nodes(node):
            if isinstance(child, Definition):
                yield prefix + child.name, child
                if isinstance(child, ast.ClassDef):
                    below.append((f"{prefix}{child.name}.", child))
            elif isinstance(child, ast.stmt):
                below.append((prefix, child))


def _without_docstring(lines: list[str], definition: Definition) -> str:
    """The lines of a definition, decorators included, without those of its docstring and without indentation."""
    first = min([definition.lineno, *(decorator.lineno for decorator in definition.decorator_list)])
    docstring = definition.body[0]
    assert docstring.end_lineno is not None
    assert definition.end_lineno is not None
    kept = lines[first - 1 : docstring.lineno - 1] + lines[docstring.end_lineno : definition.end_lineno]
    source = textwrap.dedent("".join(kept)).strip("\n")
    return source if _is_encodable(source) and not _ADDRESS.search(source) else ""


def _is_encodable(text: str) -> bool:
    """Whether the text can be written as UTF-8: no unpaired surrogates."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
