import time

n, seen = 0, {}
while True:
    n += 1
    seen[n] = n * n
    print(n, len(seen), sum(seen.values()), flush=True)
    time.sleep(0.5)
