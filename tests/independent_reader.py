#!/usr/bin/env python3
"""Reads a store without stillframe. Written from docs/format.md alone, as a test of that document.

    independent_reader.py STORE list             the live snapshots, as JSON; bytes in hexadecimal
    independent_reader.py STORE restore ID OUT   writes the image of a snapshot

It checks the CRC32C of every object, but no BLAKE3 hash: Python's standard library lacks BLAKE3.
Numbers in brackets are sections of docs/format.md.
"""

import io
import json
import re
import struct
import sys
from pathlib import Path

ZERO = bytes(32)
REGION, TABLE, ROOT, LAYOUT, RECORD, ATTACHMENT, NOTE, TOMBSTONE = range(1, 9)
MAX_PLAIN_BYTES = {REGION: 64 << 10, TABLE: 16 << 10}


class Damaged(Exception):
    pass


def expect(condition, what):
    if not condition:
        raise Damaged(what)


# ---- CRC32C [4] ----

CRC_TABLE = list(range(256))
for _ in range(8):
    CRC_TABLE = [crc >> 1 ^ (0x82F63B78 if crc & 1 else 0) for crc in CRC_TABLE]


def crc32c(data):
    crc = 0xFFFFFFFF
    for byte in data:
        crc = CRC_TABLE[(crc ^ byte) & 0xFF] ^ crc >> 8
    return crc ^ 0xFFFFFFFF


assert crc32c(b"123456789") == 0xE3069283


# ---- Encodings [6] ----

def lz4_block(block, plain_bytes):
    out, at = bytearray(), 0

    def length(start):
        nonlocal at
        total = start
        while start == 15:
            total += block[at]
            at += 1
            if block[at - 1] != 255:
                break
        return total

    try:
        while True:
            token = block[at]
            at += 1
            literals = length(token >> 4)
            expect(at + literals <= len(block), "literals reach beyond the block")
            out += block[at:at + literals]
            at += literals
            if at == len(block):
                break
            offset = block[at] | block[at + 1] << 8
            at += 2
            match = length(token & 15) + 4
            expect(1 <= offset <= len(out) and len(out) + match <= plain_bytes, "an impossible match")
            seen = bytes(out[-offset:])
            out += (seen * (match // offset + 1))[:match]
    except IndexError:
        raise Damaged("an LZ4 block ends too early") from None
    return bytes(out)


def zstd_frame(frame):
    try:
        from compression import zstd
    except ImportError:
        raise Damaged("reading Zstandard frames takes Python 3.14") from None
    return zstd.decompress(frame)


def shifted(plain, shifts):
    """The bytes, each word shifted by the first shift that applies to it."""
    count = len(plain) // 8
    words = list(struct.unpack_from(f"<{count}Q", plain))
    for at, word in enumerate(words):
        by = next((by for first, last, by in shifts if first <= word <= last), 0)
        words[at] = (word + by) % 2**64
    return struct.pack(f"<{count}Q", *words) + plain[8 * count:]


def with_runs(base, payload, plain_bytes):
    """The plain bytes of a delta, computed from those of its base."""
    form, runs = payload[33], payload[34:]
    expect(form <= 3, "a delta of an unknown form")
    plain = base[:plain_bytes].ljust(plain_bytes, b"\0")
    if form & 2:
        count, runs = runs[0], runs[1:]
        expect(count <= 8 and len(runs) >= 24 * count, "too many shifts")
        plain = shifted(plain, [struct.unpack_from("<3Q", runs, 24 * at) for at in range(count)])
        runs = runs[24 * count:]
    if form & 1:
        length, = struct.unpack_from("<I", runs)
        expect(length <= 2 * plain_bytes + 64, "more runs than there can be")
        runs = lz4_block(runs[4:], length)
        expect(len(runs) == length, "the runs have another length")
    plain, at, position = bytearray(plain), 0, 0

    def varint():
        nonlocal at
        total = 0
        for shift in range(0, 28, 7):
            expect(at < len(runs), "a delta ends inside a run")
            at += 1
            total |= (runs[at - 1] & 0x7F) << shift
            if runs[at - 1] < 0x80:
                return total
        raise Damaged("a varint is too long")

    while at < len(runs):
        position += varint()
        count = varint()
        expect(at + count <= len(runs) and position + count <= plain_bytes, "a run lies outside")
        plain[position:position + count] = runs[at:at + count]
        at, position = at + count, position + count
    return bytes(plain)


def decoded(payload, encoding, plain_bytes, base_of=None):
    """The plain bytes of an object. `base_of` returns those of the object with a given hash."""
    if encoding == 3:
        expect(base_of, "a fact is never a delta")
        plain = with_runs(base_of(payload[:32]), payload, plain_bytes)
    else:
        plain = {0: lambda: payload, 1: lambda: lz4_block(payload, plain_bytes),
                 2: lambda: zstd_frame(payload)}[encoding]()
    expect(len(plain) == plain_bytes, "an object has another length than its header says")
    return plain


# ---- Packs and objects [4, 5] ----

def pack_header(data, number, store):
    """The numbers of replaced packs and the header's length. Raises `Damaged` for any other file."""
    expect(len(data) >= 64 and data[:8] == b"STILLPAK", "not a pack")
    form, found, identity, _, region_size, replaced, check = struct.unpack_from("<II16s16sIII", data, 8)
    length = -(-(64 + 4 * replaced) // 8) * 8
    expect(length <= len(data), "the header is longer than the pack")
    expect(check == crc32c(data[:56] + bytes(4) + data[60:length]), "the check of the header does not match")
    expect((form, found, identity.hex(), region_size) == (1, number, store["id"], store["region_size"]),
           "a pack of another store")
    return struct.unpack_from(f"<{replaced}I", data, 64), length


def object_at(data, at, number, store):
    """Kind, hash, payload, encoding, plain length and end of the whole object at byte `at` of a pack."""
    expect(at + 48 <= len(data), "the pack ends inside a header")
    kind, encoding, head_check, plain, stored, check, name = struct.unpack_from("<BBHIII32s", data, at)
    place = crc32c(bytes.fromhex(store["id"]) + struct.pack("<IQ", number, at))

    def check_up_to(end):
        return crc32c(data[at:at + 2] + bytes(2) + data[at + 4:at + 12] + bytes(4) + data[at + 16:end]) ^ place

    expect(check_up_to(at + 48) & 0xFFFF == head_check, "the header check does not match")
    expect(REGION <= kind <= TOMBSTONE and plain <= MAX_PLAIN_BYTES.get(kind, 256 << 20), "impossible kind or length")
    least = {0: plain, 1: plain // 255, 2: 1, 3: 34}
    expect(encoding in least and least[encoding] <= stored and stored < plain + (encoding == 0),
           "impossible encoding or length")
    end = at + -(-(48 + stored) // 8) * 8
    expect(end <= len(data), "the pack ends inside an object")
    expect(check_up_to(end) == check, "the check does not match")
    return kind, name, data[at + 48:at + 48 + stored], encoding, plain, end


# ---- Values [7] ----
# The reader of a type takes a stream and returns the value.

def take(stream, count):
    data = stream.read(count)
    expect(len(data) == count, "a value ends too early")
    return data


def unsigned(stream):
    first = take(stream, 1)[0]
    expect(first < 255, "255 is no integer")
    return first if first <= 250 else int.from_bytes(take(stream, 2 << first - 251), "little")


def signed(stream):
    value = unsigned(stream)
    return -(value + 1) // 2 if value & 1 else value // 2


def boolean(stream):
    value = take(stream, 1)[0]
    expect(value < 2, "a bool is 0 or 1")
    return value == 1


def text(stream):
    return take(stream, unsigned(stream)).decode()


def octets(stream):
    return take(stream, unsigned(stream)).hex()


def digest(stream):
    return take(stream, 32).hex()


def optional(read):
    return lambda stream: read(stream) if boolean(stream) else None


def many(read):
    return lambda stream: [read(stream) for _ in range(unsigned(stream))]


def both(first, second):
    return lambda stream: (first(stream), second(stream))


def fields(**readers):
    return lambda stream: {name: read(stream) for name, read in readers.items()}


def choice(*alternatives):
    def read(stream):
        number = unsigned(stream)
        expect(number < len(alternatives), "an unknown alternative")
        name, fields = alternatives[number]
        return {"kind": name, **fields(stream)}
    return read


def value(read, data):
    stream = io.BytesIO(data)
    expect(take(stream, 1) == b"\x01", "a value of another version")
    result = read(stream)
    expect(not stream.read(), "a value is followed by something")
    return result


NAMES = ["explicit", "periodic", "idle", "first-listen", "first-stdin", "first-environ"]
TRIGGERS = choice(*((name, fields()) for name in NAMES), ("signal", fields(text=text)), ("bootstrap", fields()),
                  ("other", fields(text=text)))
ORIGINS = choice(("bytes", fields()), ("file", fields(path=octets)),
                 ("process", fields(pid=unsigned, path=optional(octets), command=many(text))),
                 ("core", fields(path=octets, pid=optional(unsigned), executable=optional(octets), command=many(text))))
RECORD_FIELDS = fields(
    process=text, parent=optional(digest), time=signed, trigger=TRIGGERS, source=ORIGINS, region_size=unsigned,
    memory_bytes=unsigned, zero_bytes=unsigned, regions=unsigned,
    attachments=many(fields(name=text, hash=digest, bytes=unsigned)), layout=digest, root=digest)
RANGES = many(both(unsigned, unsigned))
PROTECTION = fields(read=boolean, write=boolean, execute=boolean, shared=boolean)
MAPPING = fields(start=unsigned, end=unsigned, protection=PROTECTION, kind=unsigned, name=text, file_offset=unsigned,
                 captured=boolean)
LAYOUT_FIELDS = fields(mappings=many(MAPPING), excluded=RANGES, unreadable=RANGES)
NOTE_FIELDS = fields(snapshot=digest, time=signed, labels=many(both(text, text)))
TOMBSTONE_FIELDS = fields(snapshot=digest, time=signed)
FACTS = {RECORD: RECORD_FIELDS, NOTE: NOTE_FIELDS, TOMBSTONE: TOMBSTONE_FIELDS}
THREAD = fields(tid=unsigned, name=octets, signal_mask=unsigned, pending_signal=signed, signal_information=octets,
                registers=many(fields(note_type=unsigned, bytes=octets)))
THREADS = fields(machine=unsigned, pid=unsigned, parent_pid=unsigned, process_group=unsigned, session=unsigned,
                 threads=many(THREAD))


# ---- The store [1, 2, 9, 11] ----

class Store:
    def __init__(self, path):
        lines, _, check = (path / "FORMAT").read_text("ascii").rpartition("check = ")
        expect(lines.startswith("stillframe store\nformat = 1\n"), "not a store of format 1")
        expect(check == f"{crc32c(lines.encode()):08x}\n", "the check of FORMAT does not match")
        self.format = dict(line.split(" = ", 1) for line in lines.splitlines()[1:])
        self.format["region_size"] = int(self.format["region_size"])
        packs, replaced = {}, set()
        for file in (path / "packs").iterdir():
            if re.fullmatch(r"[0-9]{8,}\.pack", file.name):
                number, data = int(file.stem), file.read_bytes()
                try:
                    others, start = pack_header(data, number, self.format)
                except Damaged as why:
                    print(f"{file}: {why}", file=sys.stderr)
                    continue
                replaced.update(others)
                packs[number] = (data, start)
        self.objects, facts = {}, []
        for number in sorted(packs.keys() - replaced):
            data, at = packs[number]
            while at < len(data):
                try:
                    kind, name, *stored, end = object_at(data, at, number, self.format)
                    encoding = stored[1]
                    if kind in FACTS:
                        facts.append((kind, name, value(FACTS[kind], decoded(*stored))))
                    else:
                        # Of two copies use the one that is no delta: it needs no other object.
                        if encoding != 3 or (kind == REGION, name) not in self.objects:
                            self.objects[kind == REGION, name] = stored
                    at = end
                except Damaged as why:
                    print(f"pack {number}, byte {at}: {why}", file=sys.stderr)
                    at += 8
        records = [(name.hex(), record) for kind, name, record in facts if kind == RECORD]
        self.snapshots = {name: {**record, "labels": {}} for name, record in records}
        newest = {}
        for kind, _, note in facts:
            if kind == NOTE and note["snapshot"] in self.snapshots:
                about, time = note["snapshot"], note["time"]
                if time >= newest.get(about, time):
                    newest[about], self.snapshots[about]["labels"] = time, dict(note["labels"])
        for kind, _, tombstone in facts:
            if kind == TOMBSTONE:
                self.snapshots.pop(tombstone["snapshot"], None)

    def plain(self, name, is_region=False, deltas=0):
        expect((is_region, name) in self.objects, f"there is no object {name.hex()}")
        expect(deltas <= 16, f"too many deltas lead to {name.hex()}")
        return decoded(*self.objects[is_region, name], lambda base: self.plain(base, is_region, deltas + 1))

    def value(self, read, name):
        return value(read, self.plain(bytes.fromhex(name)))

    def hashes(self, name, count):
        if name == ZERO:
            return [ZERO] * count
        data = self.plain(name)
        expect(len(data) == 32 * count, f"object {name.hex()} does not have {count} hashes")
        return [data[at:at + 32] for at in range(0, len(data), 32)]

    def list(self):
        def moment(snapshot):
            names = [attachment["name"] for attachment in snapshot["attachments"]]
            said = [int(name[7:]) for name in names if name.startswith("moment:")]
            return said[0] if said else snapshot["time"]
        ordered = sorted(self.snapshots.items(), key=lambda item: (moment(item[1]), item[0]))
        for _, snapshot in ordered:
            snapshot["layout"] = self.value(LAYOUT_FIELDS, snapshot["layout"])
            for attachment in snapshot["attachments"]:
                if attachment["name"] == "threads":
                    attachment["threads"] = self.value(THREADS, attachment["hash"])
        return [{"id": name, **snapshot} for name, snapshot in ordered]

    def restore(self, name, out):
        expect(name in self.snapshots, "there is no such snapshot")
        snapshot = self.snapshots[name]
        region_size = snapshot["region_size"]
        mappings = self.value(LAYOUT_FIELDS, snapshot["layout"])["mappings"]
        lengths = [mapping["end"] - mapping["start"] for mapping in mappings if mapping["captured"]]
        whole = 512 * region_size
        tables = [min(whole, length - at) for length in lengths for at in range(0, length, whole)]
        for table, covered in zip(self.hashes(bytes.fromhex(snapshot["root"]), len(tables)), tables):
            for at, region in enumerate(self.hashes(table, -(-covered // region_size))):
                length = min(region_size, covered - at * region_size)
                plain = bytes(length) if region == ZERO else self.plain(region, is_region=True)
                expect(len(plain) == length, f"region {region.hex()} has another length")
                out.write(plain)


def main(arguments):
    try:
        store = Store(Path(arguments[0]))
        if arguments[1:] == ["list"]:
            json.dump(store.list(), sys.stdout, indent=1)
        else:
            with open(arguments[3], "xb") as out:
                store.restore(arguments[2], out)
    except (Damaged, OSError) as error:
        sys.exit(f"independent_reader: {error}")


if __name__ == "__main__":
    if len(sys.argv) < 3 or (sys.argv[2], len(sys.argv)) not in (("list", 3), ("restore", 5)):
        sys.exit(__doc__)
    main(sys.argv[1:])
