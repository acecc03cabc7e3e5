"""README, ARCHITECTURE, CONTRIBUTING and docs against the tree; reads files, imports nothing of the package.

Every path, module, class, member, identifier, make target, command and option that they name must exist, and every
relative link must lead somewhere.
"""

from __future__ import annotations

import ast
import keyword
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "midlogit"
PAGES = [ROOT / name for name in ("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md")]
PAGES += sorted((ROOT / "docs").glob("*.md"))

CODE = [*PACKAGE.rglob("*.py")]
CODE += [
    path for name in ("benchmarks", "training", "examples") for path in (ROOT / name).rglob("*.py")
]
CODE += [ROOT / "docs" / "make_cli.py", ROOT / "docs" / "make_picture.py"]

# Names of other programs that our pages mention.
OTHERS = {
    "EngineArgs",
    "max_num_batched_tokens",
    "enforce_eager",
    "quantization",
    "load_format",
}  # vLLM
OTHERS |= {"prompt_logprobs", "prompt_logprob_token_ids", "skip_reading_prefix_cache"}  # vLLM
OTHERS |= {"theta", "t"}  # the older coordinator's words for the two models
OTHERS |= {"null", "true", "real_models", "Int64"}  # JSON, a marker of tests, a type of pandas
OTHERS |= {"datasets.load_dataset", "custom_id"}  # datasets, OpenAI batch files
OTHERS |= {"SFTTrainer", "GRPOTrainer", "ref_per_token_logps", "sampling_per_token_logps"}  # TRL
OTHERS |= {"RLOOTrainer", "mask_truncated_completions", "vllm_importance_sampling_mode"}
OTHERS |= {"sequence_mask", "sequence_truncate", "token_truncate", "min_p", "repetition_penalty"}
OTHERS |= {"vllm_server_base_url"}  # TRL
OTHERS |= {"MultiTurnSFTDataset", "RLHFDataset", "ref_log_prob", "rollout_log_probs"}  # verl
OTHERS |= {"torchrun"}
OTHERS |= {"general", "ground_truth", "answer", "agent_name"}  # columns of verl's data
OTHERS |= {"AgentLoopWorker", "vLLMHttpServer", "tokenizer_path"}  # verl
OTHERS |= {"compute_rollout_correction_and_rejection_mask"}
OTHERS |= {"rollout.engine_kwargs.vllm.max_logprobs"}
OTHERS |= {"Dataset", "Sample", "rollout_top_p_token_ids", "status", "label"}  # slime
OTHERS |= {"api_key_var", "base_url", "data.name", "dppo_mask_high", "dppo_mask_low", "extra_body"}
OTHERS |= {"kl_tau", "opd", "sampling"}  # prime-rl
OTHERS |= {"RemotevLLMEngine"}  # AReaL
OTHERS |= {"client_max_body_size", "proxy_read_timeout", "limit_conn", "limit_req"}  # nginx
NAMED = re.compile(r"(?<![\w-])--[a-z][a-z-]*")  # an option
VLLM_OPTIONS = {
    "--weight-transfer-config",
    "--port",
    "--gpu-memory-utilization",
    "--max-model-len",
    "--max-logprobs",
    "--logprobs-mode",
    "--enable-scale-out",
}
SLIME_OPTIONS = {
    "--update-weight-transport",
    "--use-tis",
    "--use-opd",
    "--opd-type",
    "--apply-chat-template",
    "--custom-config-path",
    "--rollout-top-p",
    "--rollout-top-k",
    "--partial-rollout",
    "--input-key",
    "--label-key",
    "--rollout-external-engine-addrs",
    "--custom-generate-function-path",
    "--update-weight-mode",
    "--update-weight-disk-dir",
}


# Pages


def prose(page: Path) -> str:
    """A page without its blocks of code."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"(?<=\n\n)(?: {4}.*\n+)+", "\n", text)


def spans(page: Path) -> list[str]:
    """The code spans of a page, line breaks made spaces."""
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose(page))]


def blocks(page: Path, language: str = "") -> list[str]:
    """The blocks of code of a page: fenced ones of a language, and indented ones if none is asked for."""
    text = page.read_text()
    found = re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)
    return found if language else found + re.findall(r"(?<=\n\n)((?: {4}.*\n+)+)", text)


def commands(page: Path) -> Iterator[str]:
    """Shell lines in blocks, continued ones joined, and code spans."""
    for block in blocks(page):
        yield from (line.strip() for line in block.replace("\\\n", " ").splitlines())
    yield from spans(page)


def slugs(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(
        r"^#+ (.*)$",
        re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE),
        re.M,
    )
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


# The tree


@cache
def classes() -> dict[str, set[str]]:
    """The members of each class of the package by its name; classes of one name together."""
    members: dict[str, set[str]] = {}
    bases: dict[str, set[str]] = {}
    for path in PACKAGE.rglob("*.py"):
        for node in nodes(path):
            if isinstance(node, ast.ClassDef):
                members.setdefault(node.name, set()).update(members_of(node))
                bases.setdefault(node.name, set()).update(
                    b.id for b in node.bases if isinstance(b, ast.Name)
                )

    def inherited(name: str) -> set[str]:
        return members.get(name, set()).union(*(inherited(base) for base in bases.get(name, ())))

    return {name: inherited(name) for name in members}


def members_of(node: ast.ClassDef) -> Iterator[str]:
    """Methods, fields, and what methods set on self."""
    for statement in node.body:
        match statement:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                yield name
            case ast.AnnAssign(target=ast.Name(id=name)):
                yield name
    for part in ast.walk(node):
        match part:
            case ast.Attribute(value=ast.Name(id="self"), attr=name, ctx=ast.Store()):
                yield name


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


@cache
def nodes(path: Path) -> list[ast.AST]:
    return list(ast.walk(tree(path)))


@cache
def identifiers() -> set[str]:
    """All names in the code, and strings that are identifiers, such as keys of JSON."""
    found: set[str] = set()
    for path in CODE:
        for node in nodes(path):
            match node:
                case (
                    ast.Name(id=name)
                    | ast.Attribute(attr=name)
                    | ast.arg(arg=name)
                    | ast.keyword(arg=str(name))
                ):
                    found.add(name)
                case (
                    ast.FunctionDef(name=name)
                    | ast.AsyncFunctionDef(name=name)
                    | ast.ClassDef(name=name)
                ):
                    found.add(name)
                case ast.Constant(value=str(text)) if text.isidentifier():
                    found.add(text)
    return found


@cache
def fields_of_requests() -> set[str]:
    """The fields of all bodies that the server reads."""
    bodies = tree(PACKAGE / "server" / "wire" / "requests.py").body
    return {
        member for body in bodies if isinstance(body, ast.ClassDef) for member in members_of(body)
    }


@cache
def everything() -> str:
    """The text of all code, for names that stand inside strings."""
    return "\n".join(path.read_text() for path in [*CODE, ROOT / "Makefile"])


@cache
def options() -> dict[str, set[str]]:
    """The options of each command, by docs/cli.md."""
    text = (ROOT / "docs" / "cli.md").read_text()
    sections = re.findall(
        r"^## midlogit ?([\w ]*)\n(.*?)(?=^## |\Z)", text, flags=re.DOTALL | re.MULTILINE
    )
    return {
        command: {
            option
            for line in re.findall(r"^  --.*", section, re.M)
            for option in NAMED.findall(line)
        }
        for command, section in sections
    }


def exists(name: str, page: Path) -> bool:
    """Whether a path is one from the root, from the package, from the page, or of a file of that name anywhere."""
    if any(
        any(folder.glob(name.rstrip("/")))
        for folder in (ROOT, PACKAGE, page.parent, ROOT / "benchmarks/results")
    ):
        return True
    return "/" not in name and any(path.name == name for path in [*CODE, *PAGES])


# Checks


def each_page(check: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(check, PAGES, ids=lambda page: page.name)


@each_page("page")
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", prose(page)):
        if re.match(r"https?://", target):
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), target
        assert not anchor or anchor in slugs(linked), target


@each_page("page")
def test_paths_exist(page: Path) -> None:
    words = [
        word for text in (prose(page), *blocks(page)) for word in re.findall(r"[\w./*-]+", text)
    ]
    for word in words:
        if word.startswith("/") or "//" in word or re.match(r"[A-Z]+/", word):
            continue  # a route, a URL, or a placeholder such as FOLDER/name
        if re.search(r"\.(py|md|svg)$", word) or re.search(
            r"^(benchmarks|src|tests|docs)/.*\w$", word
        ):
            assert exists(word, page), word
    for span in spans(page):
        if re.fullmatch(r"[\w.-][\w./-]*/", span):
            assert exists(span, page), span


@each_page("page")
def test_modules_exist(page: Path) -> None:
    for name in re.findall(r"(?<!/)\bmidlogit(?:\.\w+)+", prose(page)):
        assert is_module_name(name.split(".")[1:]), name
    for name in re.findall(r"python -m ((?!midlogit\b|timeit\b|verl\b)[\w.]+)", page.read_text()):
        assert (ROOT / name.replace(".", "/")).with_suffix(".py").exists(), name


def is_module_name(parts: list[str]) -> bool:
    """Whether the parts name a module of the package, something in it, or a field of requests to the server."""
    path = PACKAGE
    for n, part in enumerate(parts):
        if (path / f"{part}.py").exists():
            names = {node.name for node in tree(path / f"{part}.py").body if hasattr(node, "name")}
            return len(parts) == n + 1 or parts[n + 1] in names
        if not (path / part).is_dir():
            exported = n > 0 and f'"{part}"' in (path / "__init__.py").read_text()
            return len(parts) == n + 1 and (exported or part in fields_of_requests())
        path = path / part
    return True


@each_page("page")
def test_names_exist(page: Path) -> None:
    for span in spans(page):
        for name in re.findall(r"\b[A-Z][A-Z0-9]*(?:_[A-Z0-9]+)+\b", span):
            assert name in everything(), name
        # Calls lose their arguments, assignments their values.
        name = re.sub(r"[(=\[].*", "", span).rstrip(".")
        if (
            not re.fullmatch(r"[A-Za-z_]\w*(\.\w+)*", name)
            or keyword.iskeyword(name)
            or name in OTHERS
        ):
            continue
        if (
            ("_" in name and name.isupper())
            or name.startswith("midlogit.")
            or name.endswith((".py", ".txt"))
        ):
            continue  # checked elsewhere
        owner, *members = name.split(".")
        if owner in classes() and members:
            assert members[0] in classes()[owner], name
        else:
            assert {owner.removesuffix("_total"), *members} <= identifiers() | classes().keys(), (
                name
            )


@each_page("page")
def test_python_uses_what_exists(page: Path) -> None:
    for block in blocks(page, "python"):
        code = compile(block, page.name, "exec", ast.PyCF_ONLY_AST | ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
        for node in ast.walk(code):
            match node:
                case ast.ImportFrom(module=str(module)) if module.startswith("midlogit"):
                    assert is_module_name(module.split(".")[1:]), module
                    assert {alias.name for alias in node.names} <= identifiers()
                case ast.Attribute(value=ast.Name(id=owner), attr=member) if owner in classes():
                    assert member in classes()[owner], f"{owner}.{member}"
                case ast.Attribute(attr=name) | ast.keyword(arg=str(name)):
                    assert name in identifiers(), name


@each_page("page")
def test_make_targets_exist(page: Path) -> None:
    targets = re.findall(r"^([\w-]+(?: [\w-]+)*):", (ROOT / "Makefile").read_text(), re.M)
    known = {target for line in targets for target in line.split()}
    for command in commands(page):
        for target in re.findall(r"^make ([a-z][\w-]*)", command):
            assert target in known, command


@each_page("page")
def test_commands_and_options_exist(page: Path) -> None:
    everywhere = set().union(*options().values())
    for command in commands(page):
        command = re.sub(r"\s#.*| {2,}#.*", "", command)
        used = set(NAMED.findall(command))
        if called := re.match(r"(?:\w+=\S+ )*midlogit (batch \w+|\w+)", command):
            assert called[1] in options(), command
            assert used <= options()[called[1]], command
        elif called := re.search(r"python -m (benchmarks\.\w+)", command):
            source = (ROOT / called[1].replace(".", "/")).with_suffix(".py").read_text()
            assert all(f'"{option}"' in source for option in used), command
        elif re.match(r"(serve )?--", command):
            assert used <= everywhere | VLLM_OPTIONS | SLIME_OPTIONS, command


def test_formulas_that_are_cited_exist() -> None:
    tags = set(re.findall(r"\\tag\{(\w+)\}", (ROOT / "docs" / "theory.md").read_text()))
    for path in [*CODE, *PAGES, *(ROOT / "tests").rglob("*.py")]:
        for listed in re.findall(r"theory\.md ((?:(?:, | and | to )?\(\w+\))+)", path.read_text()):
            for cited in re.findall(r"\w+(?=\))", listed):
                assert cited in tags, f"{path.name}: ({cited})"


def test_suffixes_of_shapes_are_explained() -> None:
    legend = "".join(re.findall(r"^\| ([A-Z]) \|", (ROOT / "CONTRIBUTING.md").read_text(), re.M))
    for path in PACKAGE.rglob("*.py"):
        for node in nodes(path):
            if isinstance(node, ast.Name | ast.arg):
                name = node.id if isinstance(node, ast.Name) else node.arg
                suffix = re.search(r"[a-z0-9](?<!_of)_([A-Z]{1,4})\d?$", name)
                assert suffix is None or set(suffix[1]) <= set(legend), f"{path.name}: {name}"


def test_all_diagnostics_are_documented() -> None:
    outputs = tree(PACKAGE / "outputs.py")
    (diagnostics,) = (
        n for n in outputs.body if isinstance(n, ast.ClassDef) and n.name == "Diagnostics"
    )
    fields = {
        ast.unparse(statement.target)
        for statement in diagnostics.body
        if isinstance(statement, ast.AnnAssign)
    }
    for page in ("cli.md", "python.md"):
        assert fields <= set(spans(ROOT / "docs" / page)), page


def test_imports_go_down_the_floors() -> None:
    """Imports for types included. Folders on one floor do not import each other."""
    drawing = blocks(ROOT / "ARCHITECTURE.md")[0].partition("beside all floors")[0]
    floor_of = {
        name.removesuffix("/").removesuffix(".py"): number
        for number, floor in enumerate(re.split(r"\n ─.*\n", drawing))
        for name in re.findall(r"\w+(?:/|\.py)", floor)
    }
    assert floor_of.keys() >= {path.parent.name for path in PACKAGE.glob("*/__init__.py")}

    for path in PACKAGE.rglob("*.py"):
        own = path.relative_to(PACKAGE).with_suffix("").parts[0]
        for node in nodes(path):
            if (
                isinstance(node, ast.ImportFrom)
                and node.module
                and node.module.startswith("midlogit.")
            ):
                other = node.module.split(".")[1]
                if own in floor_of and other in floor_of and own != other:
                    assert floor_of[own] < floor_of[other], f"{path.name} imports {node.module}"


def test_every_folder_is_on_the_map() -> None:
    architecture = (ROOT / "ARCHITECTURE.md").read_text()
    for folder in PACKAGE.rglob("*/"):
        name = folder.relative_to(PACKAGE).as_posix()
        if any(folder.glob("*.py")):
            assert f"`{name}/`" in architecture, name


def test_every_page_is_in_the_index() -> None:
    index = (ROOT / "docs" / "index.md").read_text()
    for page in PAGES:
        if page.name not in ("README.md", "index.md"):
            assert f"{page.name})" in index, page.name
