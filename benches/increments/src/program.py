"""A CPython program with a large structure. Each line of input changes 1 % of its records."""

import random
import sys

count = int(sys.argv[1])
chance = random.Random(1)


def record(at):
    return {
        "id": at,
        "name": f"user {at}",
        "mail": f"user.{at}@mail-{at % 97}.example",
        "tags": [f"tag {at % 13}", "x" * (at % 40)],
        "score": at / 7,
        "visits": 1000 + at,
    }


records = [record(at) for at in range(count)]
by_name = {one["name"]: one for one in records}
print("ready", flush=True)

for line in sys.stdin:
    for one in chance.choices(records, k=count // 100):
        one["score"] = chance.random()
        one["visits"] += 1
        one["tags"][1] = "y" * chance.randrange(40)
    print("done", flush=True)
