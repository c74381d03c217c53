// What WASIX adds to WASI, as far as the guests need it.
#include <stdint.h>

__attribute__((import_module("wasix_32v1"), import_name("proc_snapshot"))) int proc_snapshot(void);
