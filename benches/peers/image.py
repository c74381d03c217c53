#!/usr/bin/env python3
"""Makes a raw memory image from real processes: `image.py FILE [--size 1G] [--seed 1]`.

The mix, taken in turn with a new seed each time until the size is reached:

    records   CPython   dicts, lists, strings, floats, datetimes, JSON texts
    sqlite    CPython   an in-memory SQLite database with two indexes, rows added and deleted
    perl      perl      a hash of hashes, arrays and strings                      (if installed)
    buffers   CPython   half-filled bytearrays, float arrays, pixels, zlib output
    node      node      a Map of objects, JSON texts, typed arrays, V8's heap     (if installed)
    modules   CPython   the standard library as text, syntax trees and code objects
    awk       awk       associative arrays of numbers and strings                 (if installed)

Each program grows by 1/16 of the image (4 to 128 MiB), reports that, and is stopped. The image gets
the resident pages of its writable mappings. It gets each read-only file (program, library) once,
with the first program that maps it, as the memory of a virtual machine holds a file once. Pages
that were never accessed are left out, so the zero pages are those that programs really keep.

The same seed gives the same data at other addresses, because address randomisation stays on. The
images of two runs differ in their pointers and have the same composition, which is printed on
stderr. The programs get an empty environment, so that the image holds none of your secrets.
"""

import argparse
import array
import ctypes
import itertools
import os
import re
import select
import shutil
import signal
import subprocess
import sys

PAGE_BYTES = 4096
PIECE_BYTES = 1 << 20
GROWTH_SECONDS = 120

# Every program gets the arguments SEED and PAGES. It grows until it has PAGES more resident pages
# than at its start, prints "ready" and waits until its standard input ends.

PYTHON_START = r"""
import os, random, re, sys
rng = random.Random(int(sys.argv[1]))
with open(os.__file__) as file:
    words = re.findall(r"[A-Za-z]{3,}", file.read())

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1])

full = resident() + int(sys.argv[2])

def grow(step):
    while resident() < full:
        step()
    print("ready", flush=True)
    sys.stdin.read()
"""

RECORDS = PYTHON_START + r"""
import datetime, json
users, texts = {}, []

def step():
    for _ in range(500):
        key = rng.getrandbits(48)
        user = {
            "id": key,
            "name": " ".join(rng.sample(words, 2)).title(),
            "email": f"{rng.choice(words)}.{key % 9973}@example.org",
            "score": rng.random(),
            "tags": rng.sample(words, 4),
            "seen": datetime.datetime.fromtimestamp(rng.getrandbits(31)),
        }
        users[key] = user
        if key % 4 == 0:
            texts.append(json.dumps(user, default=str))

grow(step)
"""

SQLITE = PYTHON_START + r"""
import sqlite3
database = sqlite3.connect(":memory:")
database.executescript(
    "create table event(id integer primary key, time real, user text, kind text, body text);"
    "create index event_user on event(user); create index event_time on event(time);"
)

def step():
    database.executemany(
        "insert into event(time, user, kind, body) values (?, ?, ?, ?)",
        [
            (
                rng.uniform(1.6e9, 1.8e9),
                f"{rng.choice(words)}{rng.randrange(5000)}",
                rng.choice(words),
                " ".join(rng.choices(words, k=rng.randrange(5, 40))),
            )
            for _ in range(2000)
        ],
    )
    database.execute(
        "delete from event where id > (select max(id) from event) - 2000 and id % 20 = ?",
        (rng.randrange(20),),
    )

grow(step)
"""

BUFFERS = PYTHON_START + r"""
import array, math, zlib
kept = []

def log():
    lines = "".join(
        f"2026-01-{rng.randrange(1, 31):02} INFO {rng.choice(words)}={rng.random():.6f} "
        f"{' '.join(rng.choices(words, k=8))}\n"
        for _ in range(1500)
    )
    buffer = bytearray(256 << 10)
    buffer[: len(lines)] = lines.encode()
    return buffer

def samples():
    step = rng.uniform(0.001, 0.1)
    return array.array("d", (math.sin(i * step) + rng.gauss(0, 0.01) for i in range(16 << 10)))

def pixels():
    red, green = rng.randrange(256), rng.randrange(256)
    noise = rng.randbytes(32 << 10)
    rows = (((red + i // 256) % 256, green, i % 256 ^ (noise[i] & 3), 255) for i in range(32 << 10))
    return bytearray(byte for pixel in rows for byte in pixel)

def compressed():
    return zlib.compress(" ".join(rng.choices(words, k=30000)).encode())

def step():
    kept.append((log, samples, pixels, compressed)[len(kept) % 4]())

grow(step)
"""

MODULES = PYTHON_START + r"""
import ast, glob
paths = sorted(glob.glob(os.path.dirname(os.__file__) + "/**/*.py", recursive=True))
paths = [path for path in paths if "/site-packages/" not in path and "/test" not in path]
rng.shuffle(paths)
kept = []

def step():
    path = paths[len(kept) % len(paths)]
    with open(path, encoding="utf-8", errors="replace") as file:
        text = file.read()
    try:
        kept.append((text, ast.parse(text), compile(text, path, "exec")))
    except SyntaxError:  # lib2to3 and others keep sources that are wrong on purpose
        kept.append((text, None, None))

grow(step)
"""

PERL = r"""
use strict;
my ($seed, $pages) = @ARGV;
srand($seed);
open(my $source, "<", $INC{"strict.pm"}) or die $!;
my @words = grep { length > 2 } split /\W+/, join("", <$source>);
sub resident { open(my $file, "<", "/proc/self/statm") or die $!; (split / /, <$file>)[1] }
my $full = resident() + $pages;
my %orders;
while (resident() < $full) {
    for (1 .. 500) {
        my $key = sprintf("order-%d", int(rand(1e12)));
        $orders{$key} = {
            customer => join(" ", map { $words[rand @words] } 1 .. 2),
            lines    => [map { int(rand(1000)) } 1 .. 6],
            total    => rand(1000),
            note     => join(" ", map { $words[rand @words] } 1 .. 12),
        };
    }
}
$| = 1;
print "ready\n";
<STDIN>;
"""

NODE = r"""
const fs = require("fs");
let [state, pages] = process.argv.slice(1).map(Number);
function random() {  // mulberry32: Math.random takes no seed
  state = (state + 0x6d2b79f5) | 0;
  let t = Math.imul(state ^ (state >>> 15), 1 | state);
  t = (t + Math.imul(t ^ (t >>> 7), 61 | t)) ^ t;
  return ((t ^ (t >>> 14)) >>> 0) / 2 ** 32;
}
const resident = () => Number(fs.readFileSync("/proc/self/statm", "utf8").split(" ")[1]);
const words = require("module").builtinModules.concat(Object.getOwnPropertyNames(globalThis));
const word = () => words[Math.floor(random() * words.length)];
const full = resident() + pages;
const sessions = new Map(), texts = [], buffers = [];
while (resident() < full) {
  for (let i = 0; i < 500; i++) {
    const key = `session-${Math.floor(random() * 1e12)}`;
    const session = { key, user: word() + "@" + word(), score: random(), path: [word(), word()], hits: i };
    sessions.set(key, session);
    if (i % 4 === 0) texts.push(JSON.stringify(session));
  }
  buffers.push(Float64Array.from({ length: 1024 }, random));
}
console.log("ready");
process.stdin.resume();
"""

AWK = r"""
function resident(   line, part) {
    getline line < "/proc/self/statm"
    close("/proc/self/statm")
    split(line, part, " ")
    return part[2]
}
BEGIN {
    srand(ARGV[1])
    full = resident() + ARGV[2]
    count = split("GET POST PUT index login search cart image style script font report user", word, " ")
    while (resident() < full)
        for (i = 0; i < 500; i++) {
            address = int(rand() * 256) "." int(rand() * 256) "." int(rand() * 256)
            hits[address]++
            line = ++lines
            log_line[line] = address " " word[int(rand() * count) + 1] " /" word[int(rand() * count) + 1] " " rand()
            bytes[line] = int(rand() * 100000)
        }
    print "ready"
    fflush()
    getline line < "-"
}
"""

PROGRAMS = [
    ("records", sys.executable, ["-c", RECORDS]),
    ("sqlite", sys.executable, ["-c", SQLITE]),
    ("perl", shutil.which("perl"), ["-e", PERL]),
    ("buffers", sys.executable, ["-c", BUFFERS]),
    ("node", shutil.which("node"), ["-e", NODE]),
    ("modules", sys.executable, ["-c", MODULES]),
    ("awk", shutil.which("awk"), [AWK]),
]


def size_bytes(text):
    """`1G`, `256MiB`, `4096` as a number of bytes."""
    found = re.fullmatch(r"(\d+)([KMGT]?)(i?B)?", text, re.IGNORECASE)
    if not found or int(found[1]) == 0:
        raise argparse.ArgumentTypeError(f"a size such as 256M, 1G or 4096 was expected, not {text!r}")
    return int(found[1]) << 10 * " KMGT".index(found[2].upper() or " ")


def die_with_parent():
    """Has the kernel kill the child, which may be stopped, when this program is killed."""
    PR_SET_PDEATHSIG = 1
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def start(name, program, arguments, seed, pages):
    """Starts a program, waits until it has grown, and returns it stopped."""
    child = subprocess.Popen(
        [program, *arguments, str(seed), str(pages)],
        env={"PATH": os.defpath, "LANG": "C.UTF-8", "PYTHONHASHSEED": str(seed), "PERL_HASH_SEED": str(seed)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        preexec_fn=die_with_parent,
    )
    try:
        grown, _, _ = select.select([child.stdout], [], [], GROWTH_SECONDS)
        if not grown or child.stdout.readline() != b"ready\n":
            raise RuntimeError(f"{name} ({program}) did not grow by {pages} pages in {GROWTH_SECONDS} seconds")
        child.send_signal(signal.SIGSTOP)
        _, status = os.waitpid(child.pid, os.WUNTRACED)
        if not os.WIFSTOPPED(status):
            raise RuntimeError(f"{name} ({program}) ended instead of stopping: wait status {status:#x}")
        return child
    except BaseException:
        end(child)
        raise


def end(child):
    child.kill()
    child.stdin.close()
    child.stdout.close()
    child.wait()


def resident_ranges(pid, start, end):
    """The ranges of a mapping whose pages are in memory or swapped out."""
    with open(f"/proc/{pid}/pagemap", "rb", buffering=0) as pagemap:
        pagemap.seek(start // PAGE_BYTES * 8)
        entries = array.array("Q", pagemap.read((end - start) // PAGE_BYTES * 8))
    address = start
    for here, run in itertools.groupby(entries, lambda entry: bool(entry >> 62)):
        length = sum(1 for _ in run) * PAGE_BYTES
        if here:
            yield address, address + length
        address += length


def pieces(pid, seen_files):
    """The bytes of a stopped process, in pieces of whole pages."""
    with open(f"/proc/{pid}/maps") as maps:
        mappings = [line.split(maxsplit=5) for line in maps]
    with open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
        for where, protection, offset, device, inode, *path in mappings:
            start, end = (int(address, 16) for address in where.split("-"))
            if protection.startswith("rw"):
                ranges = resident_ranges(pid, start, end)
            elif protection[0] == "r" and inode != "0" and (device, inode, offset) not in seen_files:
                seen_files.add((device, inode, offset))
                ranges = [(start, end)]
            else:
                continue
            for address, stop in ranges:
                while address < stop:
                    try:
                        piece = os.pread(memory.fileno(), min(PIECE_BYTES, stop - address), address)
                    except OSError:  # past the end of a file, or a device
                        break
                    if not piece:
                        break
                    yield piece
                    address += len(piece)


def write_image(path, size, seed):
    """Fills `path` and returns (zero pages, distinct pages, bytes by program)."""
    available = [entry for entry in PROGRAMS if entry[1]]
    grow_pages = min(max(size // 16, 4 << 20), 128 << 20) // PAGE_BYTES
    zero_page = bytes(PAGE_BYTES)
    zero_pages, distinct, seen_files, bytes_by_program = 0, set(), set(), {}
    left = size
    with open(path, "wb") as image:
        for turn, (name, program, arguments) in enumerate(itertools.cycle(available)):
            child = start(name, program, arguments, seed * 1000 + turn, grow_pages)
            try:
                for piece in pieces(child.pid, seen_files):
                    piece = piece[:left]
                    image.write(piece)
                    left -= len(piece)
                    bytes_by_program[name] = bytes_by_program.get(name, 0) + len(piece)
                    for at in range(0, len(piece), PAGE_BYTES):
                        page = piece[at : at + PAGE_BYTES]
                        if page == zero_page:
                            zero_pages += 1
                        # A 64-bit hash: a million pages collide with probability 1 in 10^7.
                        distinct.add(hash(page))
                    if left == 0:
                        return zero_pages, len(distinct), bytes_by_program
            finally:
                end(child)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", help="the image to write (replaced if it exists)")
    parser.add_argument("--size", type=size_bytes, default="1G", help="bytes, or with K, M, G (default 1G)")
    parser.add_argument("--seed", type=int, default=1, help="another seed gives other data (default 1)")
    options = parser.parse_args()
    try:
        zero_pages, distinct_pages, bytes_by_program = write_image(options.file, options.size, options.seed)
    except BaseException as problem:
        if os.path.isfile(options.file):
            os.unlink(options.file)
        if isinstance(problem, (OSError, RuntimeError)):
            sys.exit(f"image.py: {problem}")
        raise
    pages = -(-options.size // PAGE_BYTES)
    shares = ", ".join(f"{name} {100 * count / options.size:.0f} %" for name, count in bytes_by_program.items())
    print(
        f"{options.size / 2**20:.0f} MiB, {pages} pages of 4 KiB: {100 * zero_pages / pages:.1f} % zero, "
        f"{distinct_pages} distinct ({100 * distinct_pages / pages:.1f} %); from {shares}",
        file=sys.stderr,
    )


if __name__ == "__main__":
    main()
