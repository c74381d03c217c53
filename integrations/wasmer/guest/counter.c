// Counts, and keeps a large table. For each line of input it takes a step and prints the sum of all
// its state. A line that begins with 's' also takes a snapshot, six calls deep.
#include "wasix.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { WORDS = 2 << 20, CHANGES = 2000 };

static uint32_t table[WORDS];
static uint64_t random_state;
static uint32_t steps;

static uint64_t next_random(void) {
    random_state += 0x9e3779b97f4a7c15;
    uint64_t bits = random_state;
    bits = (bits ^ (bits >> 30)) * 0xbf58476d1ce4e5b9;
    bits = (bits ^ (bits >> 27)) * 0x94d049bb133111eb;
    return bits ^ (bits >> 31);
}

// A resume must restore these values on the stack too.
static uint64_t __attribute__((noinline)) deeper(int depth, uint64_t before, int take) {
    volatile uint64_t here = before * 31 + (uint64_t)depth;
    if (depth == 0) {
        if (take) proc_snapshot();
        return here;
    }
    uint64_t below = deeper(depth - 1, here, take);
    return below ^ (here << 1);
}

int main(int argc, char **argv) {
    uint64_t seed = argc > 1 ? strtoull(argv[1], NULL, 10) : 1;
    // All instances begin with the same table, half text-like and half noise.
    random_state = 42;
    for (uint32_t at = 0; at < WORDS; at++) table[at] = at % 2 ? (uint32_t)next_random() : at / 16;
    random_state = seed;
    static char line[64];
    while (fgets(line, sizeof line, stdin)) {
        steps++;
        // Some changes are spread over the table, most are in one place.
        for (int change = 0; change < CHANGES; change++) {
            uint64_t bits = next_random();
            uint32_t at = change % 8 ? (uint32_t)(bits % (WORDS / 64)) : (uint32_t)(bits % WORDS);
            table[at] = (uint32_t)(bits >> 32);
        }
        uint64_t deep = deeper(6, seed * 1000 + steps, line[0] == 's');
        uint64_t sum = deep;
        for (uint32_t at = 0; at < WORDS; at++) sum = sum * 31 + table[at];
        printf("%u %llu %s", steps, (unsigned long long)sum, line);
        fflush(stdout);
    }
    return 0;
}
