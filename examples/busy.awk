# A program to watch: it keeps a table, changes a few entries at a time, and lets the table grow.
BEGIN {
    for (step = 1; step <= 16; step++) {
        for (i = 0; i < 20000; i++) entry[int(rand() * 10000) + step * 500] = step " " i
        system("sleep 0.3")
    }
    print "the program is done: " length(entry) " entries"
}
