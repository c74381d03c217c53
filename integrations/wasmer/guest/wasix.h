// The additions of WASIX to WASI that the guests need.
#include <stdint.h>

__attribute__((import_module("wasix_32v1"), import_name("proc_snapshot"))) int proc_snapshot(void);
