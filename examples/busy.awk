# A program to watch: it keeps a table, changes a few entries of it at a time, and lets it grow.
BEGIN {
    for (step = 1; ; step++) {
        for (i = 0; i < 20000; i++) entry[int(rand() * 10000) + step * 500] = step " " i
        print "step " step ": " length(entry) " entries" > "/dev/stderr"
        system("sleep 0.3")
    }
}
