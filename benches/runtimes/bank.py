# Threads that move money between accounts and allocate all the time, with signals of a timer.
import os, random, signal, sys, threading, time
accounts = {i: [100] for i in range(1000)}
lock = threading.Lock()
signal.signal(signal.SIGPROF, lambda *_: None)
signal.setitimer(signal.ITIMER_PROF, 0.001, 0.001)

def work(seed):
    draw = random.Random(seed)
    while True:
        with lock:
            for _ in range(20):
                a, b = draw.randrange(1000), draw.randrange(1000)
                accounts[a] = [accounts[a][0] - 1]
                accounts[b] = [accounts[b][0] + 1]
                garbage = [str(i) for i in range(20)]

for seed in range(3):
    threading.Thread(target=work, args=(seed,), daemon=True).start()
tick = 0
while True:
    time.sleep(0.1)
    with lock:
        if sum(a[0] for a in accounts.values()) != 100000:
            print("WRONG sum", flush=True); os._exit(3)
    tick += 1
    print("tick", tick, flush=True)
